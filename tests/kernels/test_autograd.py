"""A second derivative that a backward pass does not have is refused, and not taken for zero."""

import pytest
import torch

from kernels.delta_rule import gated_delta_rule
from kernels.short_convolution import short_convolution
from tests.kernels.delta_rule_cases import make
from tests.kernels.test_short_convolution import draw


def test_of_the_delta_rule():
    """By `torch`; the definition has one, and Triton's operators raise by themselves."""
    inputs = make(T=9)
    leaves = [*inputs.values()]

    def penalty(backend):
        first = torch.autograd.grad(gated_delta_rule(**inputs, backend=backend)[0].sum(), leaves[:2], create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), leaves[2])

    with pytest.raises(RuntimeError, match="the torch backend of delta_rule has no second derivative"):
        penalty("torch")
    assert penalty("naive")[0].abs().max() > 1e-3


def test_of_the_short_convolution():
    x, weight = draw()
    for wanted in (x, weight):
        with pytest.raises(RuntimeError, match="short_convolution has no second derivative"):
            torch.autograd.grad(short_convolution(x, weight).sum(), wanted, create_graph=True)
    torch.autograd.grad(short_convolution(x, weight).sum(), [x, weight])
