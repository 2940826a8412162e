"""Queries, keys and values in one kernel each, forward and backward, against the convolution and what follows it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from kernels.sequences import Layout
from kernels.short_convolution import triton_heads
from mixers.layers import ShortConvolution


def both(B, T, heads, dims, taps, bounds=None, seed=0):
    """(q, k, v, gradients of x and of the weight), by the kernels and by PyTorch's operations."""
    draw = torch.Generator().manual_seed(seed)
    widths = [n * dim for n, dim in zip(heads, dims, strict=True)]
    x = torch.randn(B, T, sum(widths), generator=draw, dtype=torch.float64, requires_grad=True)
    conv = ShortConvolution(sum(widths), taps=taps).double()
    conv.weight.data = torch.randn(taps, sum(widths), generator=draw, dtype=torch.float64)
    layout = Layout.of(None if bounds is None else torch.tensor(bounds), x)
    found = []
    for parts in (
        triton_heads.heads(x, conv.weight, layout, widths, dims),
        conv.heads(x, None, layout, widths, dims)[:3],
    ):
        draw.manual_seed(1)
        loss = sum((part * torch.randn(part.shape, generator=draw, dtype=part.dtype)).sum() for part in parts)
        found.append([*parts, *torch.autograd.grad(loss, (x, conv.weight))])
    return zip(*found, strict=True)


@settings(max_examples=3)
@given(
    B=st.integers(1, 2),
    T=st.sampled_from([1, 2, 3, 40]),
    heads=st.sampled_from([(1, 1, 1), (2, 1, 1)]),
    dims=st.sampled_from([(4, 4, 4), (3, 3, 5), (17, 17, 1)]),
    taps=st.integers(2, 5),
)
def test_batches(B, T, heads, dims, taps, no_stale_memory):
    for one, other in both(B, T, heads, list(dims), taps):
        assert_close(one, other, rtol=0, atol=1e-10 * (1 + other.abs().max().item()))


@pytest.mark.parametrize(
    "bounds", [[0, 1, 4, 4, 41], pytest.param([0, 2, 33, 35, 90], marks=pytest.mark.slow)], ids=str
)
def test_packed_sequences(bounds, no_stale_memory):
    for one, other in both(1, bounds[-1], (2, 1, 1), [4, 4, 6], 4, bounds):
        assert_close(one, other, rtol=0, atol=1e-10)


def test_the_sizes_that_models_have(no_stale_memory):
    for one, other in both(1, 40, (1, 1, 1), [128, 128, 256], 4):
        assert_close(one, other, rtol=0, atol=1e-10 * (1 + other.abs().max().item()))


def test_precision():
    """bfloat16 is taken as it is, and so is a weight in float32."""
    x, weight = torch.randn(1, 20, 12).bfloat16(), torch.randn(4, 12)
    parts = triton_heads.heads(x, weight, Layout.of(None, x), [4, 4, 4], [2, 2, 4])
    assert {part.dtype for part in parts} == {torch.bfloat16}
    exact = triton_heads.heads(x.double(), weight.double(), Layout.of(None, x), [4, 4, 4], [2, 2, 4])
    for one, other in zip(parts, exact, strict=True):
        assert_close(one.double(), other, rtol=2**-8, atol=1e-6)


def test_the_operators_are_sound():
    x, weight = torch.randn(3, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    arguments = x, weight, torch.arange(3, dtype=torch.int32), [1, 1, 1], [1, 1, 1]
    torch.library.opcheck(torch.ops.lightning_mixers.convolved_heads, arguments)


def test_a_weight_that_is_a_view(no_stale_memory):
    x, weight = torch.randn(1, 9, 12, dtype=torch.float64), torch.randn(12, 4, dtype=torch.float64)
    layout = Layout.of(None, x)
    views = (triton_heads.heads(x, w, layout, [4] * 3, [4] * 3) for w in (weight.T, weight.T.contiguous()))
    for one, other in zip(*views, strict=True):
        assert torch.equal(one, other)
