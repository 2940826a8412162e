"""Small parts that several mixers share: the short causal convolution, rotary positions."""

import torch
from torch import Tensor, nn

from kernels.dispatch import choose
from kernels.sequences import Layout
from kernels.short_convolution import BACKENDS, short_convolution


def start_biases_at_zero(*layers: nn.Linear) -> None:
    """What biases these have starts at zero."""
    for layer in layers:
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def parts_of(qkv: nn.Linear, widths: list[int], out: nn.Linear, name: str) -> dict[str, Tensor]:
    """The weights or biases (`name`) of the projections to q, k and v, which are one layer, and of o; empty: none."""
    if getattr(qkv, name) is None:
        return {}
    return dict(zip("qkv", getattr(qkv, name).split(widths), strict=True)) | {"o": getattr(out, name)}


def cast_once(x: Tensor) -> Tensor:
    """x as autocast, where it is on, would cast it for each of a layer's projections."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):  # which leaves float64 alone
        return x
    return x.to(torch.get_autocast_dtype(device))


class ShortConvolution(nn.Module):
    """Causal depthwise convolution over the last `taps` tokens, then SiLU.

    It starts on its last two taps, so that a token begins with its predecessor in view: in associative recall a value
    then finds its key at once, which a random start has to learn first.
    """

    def __init__(self, channels: int, *, taps: int) -> None:
        super().__init__()
        self.taps = taps
        weight = torch.zeros(taps, channels)
        weight[-2:] = 1.0
        self.weight = nn.Parameter(weight)  # (taps, channels), the current token last
        self.weight._no_weight_decay = True

    def init_state(self, batch_size: int, *, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
        """The tail (N, taps - 1, channels) of sequences that have not begun."""
        return torch.zeros(batch_size, self.taps - 1, self.weight.shape[1], dtype=dtype, device=device)

    def heads(
        self, x: Tensor, tail: Tensor | None, layout: Layout, widths: list[int], dims: list[int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys and values from x (B, T, channels), convolved, queries and keys normalised.

        Args:
            x, tail, layout: as for `forward`.
            widths: channels of the three.
            dims: of a head of each.

        Returns:
            q, k, v (B, T, heads, dim) and the new tail; None if there was no tail before, and it was not needed.
        """
        if tail is None:
            backend, run = choose("short_convolution", "auto", BACKENDS, x.device)
            if backend == "triton":
                return *run(x, self.weight, layout, widths, dims), None
        y, tail = self(x, tail, layout)
        q, k, v = (part.unflatten(-1, (-1, dim)) for part, dim in zip(y.split(widths, -1), dims, strict=True))
        return normalise(q), normalise(k), v, tail

    def forward(self, x: Tensor, tail: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor]:
        """x (B, T, channels), tail (N, taps - 1, channels) of what came before -> (same as x, new tail)."""
        if tail is None:
            tail = self.init_state(len(layout), dtype=x.dtype, device=x.device)
        if not layout.packed:
            x = torch.cat([tail.to(x.dtype), x], 1)
            return short_convolution(x, self.weight), x[:, x.shape[1] - self.taps + 1 :]
        # every sequence gets its tail in front; the outputs that fall on tails are dropped
        before = self.taps - 1
        place, fronts, ends = layout.once(("tails", before), lambda: _tails(layout, before))
        row = x.new_zeros(x.shape[1] + before * len(tail), x.shape[-1])
        row = row.index_copy(0, fronts.flatten(), tail.to(x.dtype).flatten(0, 1)).index_copy(0, place, x[0])
        return short_convolution(row[None], self.weight)[:, place - before], row[ends]


def normalise(x: Tensor) -> Tensor:
    """x / ||x||, in at least float32; zero stays zero, with a finite gradient."""
    exact = x if x.dtype == torch.float64 else x.float()
    return (exact * (exact.square().sum(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)


def _tails(layout: Layout, before: int) -> tuple[Tensor, Tensor, Tensor]:
    """Places in a row where `before` of them stand in front of each packed sequence.

    Those of the tokens (T,), of those in front (N, before), and of the last `before` of each sequence and its front
    (N, before).
    """
    device = layout.lengths.device
    place = torch.arange(layout.tokens, device=device) + before * (layout.documents + 1)
    each = torch.arange(before, device=device)
    fronts = layout.cu_seqlens[:-1].long() + before * torch.arange(len(layout), device=device)
    return place, fronts[:, None] + each, (fronts + layout.lengths)[:, None] + each


def frequencies(dim: int, base: float, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Radians (K / 2,) that a token turns the pairs of a head of K numbers by."""
    half = dim // 2
    return base ** -(torch.arange(half, device=device, dtype=dtype) / half)


def rotary(x: Tensor, position: Tensor, base: float) -> Tensor:
    """Rotary position embedding (RoFormer, arXiv 2104.09864).

    Args:
        x: (B, T, H, K), K even.
        position: (B or 1, T).
        base: of the wavelengths, in tokens.

    Returns:
        (B, T, H, K) in the dtype of x.
    """
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    frequency = frequencies(x.shape[-1], base, dtype=exact, device=x.device)
    angle = position[..., None, None].to(exact) * frequency  # (B, T, 1, K / 2)
    cos, sin = angle.cos(), angle.sin()
    a, b = x.to(exact).chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)
