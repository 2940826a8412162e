"""What the Triton kernels keep for the backward pass, in bytes per token and head; K = V = 128 in bfloat16."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.autograd.graph import saved_tensors_hooks

from kernels.delta_rule import triton_chunks
from kernels.read_out import triton_rows
from kernels.routed_attention import triton_ranked
from kernels.sequences import Layout
from kernels.short_convolution import triton_heads

T, H, K = 8192, 4, 128
ROW = 2 * K
"""Bytes of a token's K numbers in a head."""


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch):
    """Tensors without storage, of the dtypes that a GPU is given."""
    for module in (triton_chunks, triton_rows, triton_ranked, triton_heads):
        monkeypatch.setattr(module, "interpreted", lambda: False)
    with FakeTensorMode():
        yield


def kept(run, *given):
    """Bytes per token and head of what autograd keeps of a call, each storage once: (of `given`, of all else)."""
    own = {x.untyped_storage()._cdata for x in given if x is not None}
    found: dict[int, torch.Tensor] = {}

    def keep(x):
        found[x.untyped_storage()._cdata] = x
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        outputs = run()
    assert any(x.requires_grad for x in outputs if x is not None)
    sizes = {storage: x.untyped_storage().nbytes() for storage, x in found.items()}
    ours = sum(size for storage, size in sizes.items() if storage in own)
    return ours / (T * H), (sum(sizes.values()) - ours) / (T * H)


def draw(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, requires_grad=True)


def layout_of(bounds, x):
    if bounds is None:
        return Layout.of(None, x)
    with unset_fake_temporarily():
        layout = Layout(1, T, torch.tensor(bounds), torch.device("cpu"))
    layout.cu_seqlens = torch.empty(len(bounds), dtype=torch.int32)
    return layout


@pytest.mark.parametrize("cu_seqlens", [None, list(range(0, T + 1, 512))], ids=["a row", "packed"])
@pytest.mark.parametrize("predict", ["none", "writes", "statistics", "values"])
def test_the_delta_rule_keeps_its_inputs(predict, cu_seqlens):
    """And the tables of a layout, which all layers share."""
    q, k, v = (draw(1, T, H, K) for _ in range(3))
    g, beta = (draw(1, T, H, dtype=torch.float32) for _ in range(2))
    layout = layout_of(cu_seqlens, v)
    options = dict(scale=1.0, initial_state=None, layout=layout, delta=True, predict=predict)
    ours, more = kept(lambda: triton_chunks.gated_delta_rule(q, k, v, g, beta, **options), q, k, v, g, beta)
    assert ours == 3 * ROW + 8
    assert more < 0.1


def test_attention_keeps_its_inputs_its_output_and_what_a_query_sees():
    """The log of the softmax's sum, a stored token's place and two ranks of a token and head; its document's bounds."""
    q, k, v = (draw(1, T, H, K) for _ in range(3))
    layout, stored = Layout.of(None, v), torch.empty(1, T, H, dtype=torch.bool)
    options = dict(bias=None, scale=1.0, layout=layout, window=0)
    ours, more = kept(lambda: (triton_ranked.routed_attention(q, k, v, stored, **options),), q, k, v)
    assert ours == 3 * ROW
    assert more == pytest.approx(ROW + 4 + 3 * 4 + 2 * 4 / H, abs=0.01)


def test_the_convolution_and_the_read_out_keep_their_inputs():
    x, weight = draw(1, T, 3 * H * K), draw(4, 3 * H * K, dtype=torch.float32)
    layout = Layout.of(None, x)
    ours, more = kept(lambda: triton_heads.heads(x, weight, layout, [H * K] * 3, [K] * 3), x)
    assert ours == 3 * ROW
    assert more == pytest.approx((4 * T + weight.nbytes) / (T * H))  # positions, which all layers share
    r, a, z, gates = draw(1, T, H, K), draw(1, T, H, K), draw(1, T, H * K), draw(1, T, 2 * H)
    weight = draw(K)
    ours, more = kept(lambda: (triton_rows.read_out(r, weight, 1e-5, z, a, gates),), r, z, a, gates, weight)
    assert ours == pytest.approx(3 * ROW + 2 * 2, abs=0.01) and more == 0
