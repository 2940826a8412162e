"""Causal attention of packed sequences is that of each alone, on either way that it takes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from kernels import causal_attention as module
from kernels.causal_attention import causal_attention
from kernels.sequences import Layout


def draw(T, heads=4, kv_heads=2, K=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, T, h, K, generator=generator, dtype=torch.float64) for h in (heads, kv_heads, kv_heads)]


def alone(q, k, v, lengths, window):
    """Sequence by sequence, under a mask that is written out."""
    outputs = []
    for parts in zip(*(x.split(lengths, 1) for x in (q, k, v)), strict=True):
        T = parts[0].shape[1]
        behind = torch.arange(T)[:, None] - torch.arange(T)
        mask = (behind >= 0) & (behind < (window or T))
        parts = (x.transpose(1, 2) for x in parts)
        outputs.append(scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=True).transpose(1, 2))
    return torch.cat(outputs, 1)


lengths_of_sequences = st.lists(st.sampled_from([0, 1, 2, 17, 40, 41]), min_size=1, max_size=6).filter(any)


@given(lengths=lengths_of_sequences, window=st.sampled_from([0, 1, 5, 100]))
def test_packed_is_alone(lengths, window):
    parts = [x.requires_grad_() for x in draw(sum(lengths))]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    ours, golden = causal_attention(*parts, bounds, window=window), alone(*parts, lengths, window)
    assert_close(ours, golden, rtol=0, atol=1e-12)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for one, other in zip(*(torch.autograd.grad((o * weight).sum(), parts) for o in (ours, golden)), strict=True):
        assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [0, 3])
def test_what_cuda_is_asked(window, monkeypatch):
    """PyTorch's attention without padding gets the row as it is, with bounds, window and groups."""
    lengths, asked = [5, 0, 2], {}

    def varlen_attn(q, k, v, bounds, bounds_k, longest, longest_k, *, scale, window_size, enable_gqa):
        asked.update(window_size=window_size, enable_gqa=enable_gqa, longest=longest)
        assert bounds is bounds_k and bounds.dtype == torch.int32 and longest == longest_k
        sizes = bounds.diff().tolist()
        return alone(q[None], k[None], v[None], sizes, window_size[0] + 1)[0]

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(module, "_varlen_takes", lambda q: True)
    parts, bounds = draw(7), torch.tensor([0, 5, 5, 7])
    assert_close(causal_attention(*parts, bounds, window=window), alone(*parts, lengths, window), rtol=0, atol=1e-12)
    assert asked == {"window_size": (window - 1, 0), "enable_gqa": True, "longest": 5}


def test_padding_is_a_fifth_at_most(monkeypatch):
    seen, dense = [], module._dense
    monkeypatch.setattr(module, "_dense", lambda q, *rest: seen.append(q.shape[0] * q.shape[1]) or dense(q, *rest))
    lengths = [200, 400, 190, 1, 2, 100, 395]
    parts = draw(sum(lengths))
    causal_attention(*parts, Layout.of(torch.tensor([0, *lengths]).cumsum(0), parts[0]))
    assert sum(seen) <= 1.25 * sum(lengths)


def test_no_tokens_and_a_window_that_means_nothing():
    q, k, v = draw(0)
    assert causal_attention(q, k, v, torch.tensor([0, 0])).shape == causal_attention(q, k, v).shape == q.shape
    with pytest.raises(ValueError, match="window must not be negative, got -3"):
        causal_attention(*draw(4), window=-3)
