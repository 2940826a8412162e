"""The read-out in one kernel, forward and backward, against PyTorch's operations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from kernels.read_out import BACKENDS, read_out, triton_rows


def draw(B=2, T=5, R=3, V=4, attends=True, gated=True, dtype=torch.float64):
    """r, weight, z, a, gates."""
    generator = torch.Generator().manual_seed(0)
    shapes = (B, T, R, V), (V,), (B, T, R * V), (B, T, R, V) if attends else None, (B, T, 2 * R) if gated else None
    return [
        None if shape is None else torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()
        for shape in shapes
    ]


def run(parts, backend):
    """The output, and gradients of a random function of it."""
    r, weight, z, a, gates = parts
    y = read_out(r, weight, 1e-3, z, a, gates, backend=backend)
    draw = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [y, *torch.autograd.grad((y * draw.to(y.dtype)).sum(), [part for part in parts if part is not None])]


def test_the_definition():
    r, weight, z, a, gates = draw(1, 1, 1, 4)
    n = r[0, 0, 0] / (r.square().mean() + 1e-3).sqrt() * weight
    g_r, g_a = gates[0, 0].sigmoid()
    golden = (g_r * n + g_a * a[0, 0, 0]) * z[0, 0] * z[0, 0].sigmoid()
    assert_close(read_out(r, weight, 1e-3, z, a, gates, backend="torch")[0, 0], golden)


@settings(max_examples=12)
@given(
    B=st.integers(1, 2),
    T=st.sampled_from([1, 5, 50]),
    R=st.integers(1, 3),
    V=st.sampled_from([1, 4, 17, 130]),
    more=st.sampled_from([(False, False), (True, False), (True, True)]),
)
def test_the_kernel_is_the_definition(B, T, R, V, more, no_stale_memory):
    parts = draw(B, T, R, V, *more)
    for one, other in zip(run(parts, "triton"), run(parts, "torch"), strict=True):
        assert_close(one, other, rtol=0, atol=1e-10 * (1 + other.abs().max().item()))


def test_more_rows_than_programs(monkeypatch, no_stale_memory):
    monkeypatch.setattr(triton_rows, "PROGRAMS", 2)
    parts = draw(2, 70, 3, 40)
    for one, other in zip(run(parts, "triton"), run(parts, "torch"), strict=True):
        assert_close(one, other, rtol=0, atol=1e-10 * (1 + other.abs().max().item()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_precision(backend):
    """bfloat16 in, bfloat16 out, where autocast leaves the weight in float32."""
    parts = [part.detach().bfloat16() for part in draw(1, 40, 2, 16)]
    parts[1] = parts[1].float()
    y = read_out(parts[0], parts[1], 1e-3, *parts[2:], backend=backend)
    exact = read_out(parts[0].double(), parts[1].double(), 1e-3, *(x.double() for x in parts[2:]), backend="torch")
    assert y.dtype == torch.bfloat16
    assert_close(y.double(), exact, rtol=0, atol=2**-6 * exact.abs().max().item())


def test_the_operator_is_sound():
    r, weight, z, a, gates = (x.detach().float().requires_grad_() for x in draw())
    for more in ((a, gates), (a, None), (None, None)):
        torch.library.opcheck(torch.ops.lightning_mixers.read_out, (r, weight, z, *more, 1e-3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_that_do_not_fit(backend):
    """Those of z are those of the output, which a kernel would write past."""
    r, weight, z, a, gates = draw(1, 3, 2, 8)
    for wrong, message in [
        ((r, weight, z[:, :1], a, gates), r"z must be \(1, 3, 16\), got \(1, 1, 16\)"),
        ((r, weight[:4], z, a, gates), r"weight must be \(8,\), got \(4,\)"),
        ((r, weight, z, a[:, :1], gates), r"a must be \(1, 3, 2, 8\)"),
        ((r, weight, z, a, gates[..., :2]), r"gates must be \(1, 3, 4\)"),
        ((r, weight, z, None, gates), "there is no a"),
        ((r[0], weight, z, a, gates), r"r must be \(B, T, R, V\)"),
    ]:
        r_, weight_, z_, a_, gates_ = wrong
        with pytest.raises(ValueError, match=message):
            read_out(r_, weight_, 1e-3, z_, a_, gates_, backend=backend)


def test_a_weight_that_is_a_view():
    r, _, z, a, gates = draw(1, 3, 2, 8)
    for weight in (torch.randn(8, 2, dtype=torch.float64)[:, 0], torch.ones(1, dtype=torch.float64).expand(8)):
        one, other = (read_out(r, weight, 1e-3, z, a, gates, backend=name) for name in ("triton", "naive"))
        assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_dtype_is_that_of_the_memorys_answer(backend):
    r, weight, z, a, gates = (x.float() for x in draw(1, 3, 2, 8))
    assert read_out(r.bfloat16(), weight, 1e-3, z, a, gates, backend=backend).dtype == torch.bfloat16
