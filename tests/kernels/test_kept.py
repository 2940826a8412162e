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
