"""Small parts that several mixers share: the short causal convolution, a norm, rotary positions."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.sequences import documents_in, lengths_of


class ShortConvolution(nn.Module):
    """Causal depthwise convolution over the last `taps` tokens, then SiLU.

    It starts on its last two taps, so that a token begins with its predecessor in view: in associative recall a value
    then finds its key at once, which a random start has to learn first.
    """

    def __init__(self, channels: int, *, taps: int = 4) -> None:
        super().__init__()
        self.taps = taps
        weight = torch.zeros(taps, channels)
        weight[-2:] = 1.0
        self.weight = nn.Parameter(weight)  # (taps, channels), the current token last
        self.weight._no_weight_decay = True

    def forward(self, x: Tensor, tail: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, T, channels), tail (N, taps - 1, channels) of what came before -> (same as x, new tail)."""
        if tail is None:
            sequences = len(x) if cu_seqlens is None else len(cu_seqlens) - 1
            tail = x.new_zeros(sequences, self.taps - 1, x.shape[-1])
        if cu_seqlens is None:
            x = torch.cat([tail.to(x.dtype), x], 1)
            return F.silu(self._slide(x)), x[:, x.shape[1] - self.taps + 1 :]
        # every sequence gets its tail in front; the outputs that fall on tails are dropped
        room = self.taps - 1
        shift = room * (documents_in(cu_seqlens) + 1)
        place = torch.arange(x.shape[1], device=x.device) + shift
        row = x.new_zeros(x.shape[1] + room * len(tail), x.shape[-1])
        fronts = cu_seqlens[:-1].long() + room * torch.arange(len(tail), device=x.device)
        row[fronts[:, None] + torch.arange(room, device=x.device)] = tail.to(x.dtype)
        row[place] = x[0]
        ends = fronts + lengths_of(cu_seqlens)
        new_tail = row[ends[:, None] + torch.arange(room, device=x.device)]
        return F.silu(self._slide(row[None])[:, place - room]), new_tail

    def _slide(self, x: Tensor) -> Tensor:
        """(B, taps - 1 + T, channels) -> (B, T, channels). Sums of shifted views: depthwise conv1d is slow on CPU."""
        T = x.shape[1] - self.taps + 1
        weight = self.weight.to(x.dtype)  # under autocast x is narrower: a product with float32 would widen q, k and v
        y = x[:, :T] * weight[0]
        for i in range(1, self.taps):
            y = torch.addcmul(y, x[:, i : i + T], weight[i])
        return y


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm in the dtype of its input, also where autocast leaves the weight in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps).to(x.dtype)


def rotary(x: Tensor, position: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) of x (B, T, H, K), K even, at position (B or 1, T)."""
    half = x.shape[-1] // 2
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    frequency = base ** -(torch.arange(half, device=x.device, dtype=exact) / half)
    angle = position[..., None, None].to(exact) * frequency  # (B, T, 1, K / 2)
    cos, sin = angle.cos(), angle.sin()
    a, b = x.to(exact).chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)
