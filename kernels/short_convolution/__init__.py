"""The short causal depthwise convolution that recurrent mixers put before q, k and v, and SiLU after it.

    y_t = SiLU(sum_i w_i x_{t-taps+1+i})        w_{taps-1} being that of the token itself

Its input is all that is kept for the backward pass, which computes the sum anew: autograd would keep two more tensors,
each as large as q, k and v together, and take twice the time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.autograd import first_order

BLOCK = 2**18
"""Numbers that the backward pass takes at a time. Of (8, 1024, 384) in float32 it takes 15 ms on one thread of a CPU;
in one piece, whose parts are fresh memory each time and leave the cache, 40 to 60."""


def short_convolution(x: Tensor, weight: Tensor) -> Tensor:
    """Slide over x and apply SiLU.

    Args:
        x: (B, taps - 1 + T, channels), what came before the T tokens in front; any float dtype.
        weight: (taps, channels), the current token last; cast to the dtype of x.

    Returns:
        (B, T, channels) in the dtype of x.

    Raises:
        ValueError: shapes that do not fit.
    """
    if x.ndim != 3 or weight.ndim != 2 or x.shape[2] != weight.shape[1] or x.shape[1] < len(weight) - 1:
        raise ValueError(
            f"x (B, taps - 1 + T, channels) and weight (taps, channels) do not fit: {(*x.shape,)}, {(*weight.shape,)}"
        )
    return _ShortConvolution.apply(x, weight.to(x.dtype))


BACKENDS = {
    "torch": "kernels.short_convolution:short_convolution",
    "triton": "kernels.short_convolution.triton_heads:heads",
}
"""Of convolving, cutting into heads and normalising in one: `torch` is `short_convolution` and operations after it."""


def naive(x: Tensor, weight: Tensor) -> Tensor:
    """The definition, by PyTorch's convolution."""
    y = F.conv1d(x.transpose(1, 2), weight.to(x.dtype).T[:, None], groups=x.shape[-1])
    return F.silu(y).transpose(1, 2)


class _ShortConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.silu(_slide(x, weight), inplace=True)

    @staticmethod
    @first_order("short_convolution")
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        dx = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        dw = torch.zeros(weight.shape, dtype=exact, device=x.device) if ctx.needs_input_grad[1] else None
        for rows, start, stop in _blocks(dy):
            some = x[rows, start : stop + len(weight) - 1]
            y = _slide(some, weight)
            dz = torch.ops.aten.silu_backward(dy[rows, start:stop], y)
            for i, w in enumerate(weight):
                if dx is not None:
                    dx[rows, start + i : stop + i].addcmul_(dz, w)
                if dw is not None:
                    dw[i] += torch.mul(dz, some[:, i : i + dz.shape[1]], out=y).sum((0, 1), dtype=exact)
        return dx, None if dw is None else dw.to(weight.dtype)


def _blocks(x: Tensor) -> Iterator[tuple[slice, int, int]]:
    """Sequences, and the tokens of theirs from one to another, of x (B, T, channels): parts that fit a CPU's cache."""
    B, T, channels = x.shape
    most = max(BLOCK // channels, 1) if x.device.type == "cpu" else max(B * T, 1)
    tokens, rows = min(T, most) or 1, max(most // max(T, 1), 1)
    for first in range(0, B, rows):
        for start in range(0, T, tokens):
            yield slice(first, first + rows), start, min(start + tokens, T)


def _slide(x: Tensor, weight: Tensor) -> Tensor:
    """Sums of shifted views, as PyTorch's depthwise convolution is slow on a CPU."""
    T = x.shape[1] - len(weight) + 1
    y = x[:, :T] * weight[0]
    for i in range(1, len(weight)):
        y.addcmul_(x[:, i : i + T], weight[i])
    return y
