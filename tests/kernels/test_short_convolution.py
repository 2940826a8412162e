"""The short convolution against PyTorch's, and what it keeps for the backward pass."""

import pytest
import torch
from torch.testing import assert_close

import kernels.short_convolution
from kernels.short_convolution import naive, short_convolution


def draw(B=2, T=9, channels=5, taps=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, taps - 1 + T, channels, generator=generator, dtype=torch.float64)
    weight = torch.randn(taps, channels, generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


@pytest.mark.parametrize("taps", [2, 3, 4, 7])
@pytest.mark.parametrize("T", [1, 2, 30])
def test_it_is_pytorchs(taps, T):
    results = []
    for function in (short_convolution, naive):
        leaves = draw(T=T, taps=taps)
        y = function(*leaves)
        weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        results.append([y, *torch.autograd.grad((y * weight).sum(), leaves)])
    for one, other in zip(*results, strict=True):
        assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("block", [1, 20, 45, 100, 10**6])
@pytest.mark.parametrize(("B", "T"), [(0, 9), (3, 0), (3, 9)])
def test_it_is_the_same_block_by_block(B, T, block, monkeypatch):
    """Blocks of a token, of some tokens, of a sequence, of two and of all."""
    monkeypatch.setattr(kernels.short_convolution, "BLOCK", block)

    def gradients(function):
        leaves = draw(B=B, T=T)
        y = function(*leaves)
        return torch.autograd.grad((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum(), leaves)

    found = gradients(short_convolution)
    golden = gradients(naive) if B * T else [torch.zeros_like(x) for x in found]  # PyTorch's takes no empty input
    for one, other in zip(found, golden, strict=True):
        assert_close(one, other, rtol=0, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    assert torch.autograd.gradcheck(short_convolution, draw(T=3, channels=2, taps=3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype):
    """float32 to its precision; bfloat16 to three roundings of 8 bits, with sums over tokens in float32."""
    x, weight = draw(B=4, T=500, dtype=dtype)
    short_convolution(x, weight).sum().backward()
    exact = [leaf.detach().double().requires_grad_() for leaf in (x, weight)]
    naive(*exact).sum().backward()
    for leaf, golden in zip((x, weight), exact, strict=True):
        assert leaf.grad.dtype == dtype
        size = golden.grad.abs().max().item()
        assert_close(leaf.grad.double(), golden.grad, rtol=0, atol=size * (1e-5 if dtype == torch.float32 else 0.03))


def test_the_input_is_all_that_is_kept():
    kept = []
    x, weight = draw()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        short_convolution(x, weight)
    assert sum(t.numel() for t in kept) == x.numel() + weight.numel()


def test_shapes_that_do_not_fit():
    for x, weight in ((2, 9, 8), (4, 1)), ((2, 9, 1), (4, 8)), ((2, 1, 8), (4, 8)), ((9, 8), (4, 8)):
        with pytest.raises(ValueError, match="do not fit"):
            short_convolution(torch.zeros(x), torch.zeros(weight))
