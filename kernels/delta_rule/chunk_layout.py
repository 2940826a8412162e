"""How the tokens of a batch, dense or packed, become chunks."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.sequences import Layout


def chunk_layout(
    layout: Layout, H: int, C: int
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], list[int], Tensor | None]:
    """(split, join, sizes, order) for tensors (B, T, H, ...).

    `split` maps (B, T, H, ...) to (chunks, H, C, ...), time-major, short chunks filled with zeros: a zero key, value,
    write strength and log-decay leave the state as it is. (Of a dense batch it is a view, with steps and B in place of
    chunks.) `join` maps (chunks * H, C, ...) back. `sizes` counts the chunks of every step; `order` lists the
    sequences, longest first (None: as they are).
    """
    return layout.once(("chunks", H, C), lambda: _packed(layout, H, C) if layout.packed else _dense(layout, H, C))


def _dense(layout: Layout, H: int, C: int):
    B, T = layout.batch, layout.tokens
    steps = -(-T // C)

    def split(x: Tensor) -> Tensor:
        if T % C:
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, steps * C - T))
        return x.unflatten(1, (steps, C)).transpose(0, 1).transpose(2, 3)

    def join(x: Tensor) -> Tensor:
        return x.unflatten(0, (steps, B, H)).transpose(2, 3).transpose(0, 1).flatten(1, 2)[:, :T]

    return split, join, [B] * steps, None


def _packed(layout: Layout, H: int, C: int):
    T, device = layout.tokens, layout.lengths.device
    lengths, order = layout.lengths.sort(descending=True, stable=True)
    step = torch.arange(-(-layout.longest // C), device=device)[:, None]
    live = step * C < lengths  # (steps, N): which sequences have a chunk of that step
    sequence = torch.arange(len(lengths), device=device).expand_as(live)[live]
    within = step.expand_as(live)[live][:, None] * C + torch.arange(C, device=device)  # (chunks, C)
    real = within < lengths[sequence, None]
    index = torch.where(real, layout.cu_seqlens.long()[order][sequence, None] + within, T)  # T: a row of zeros
    back = torch.empty(T, dtype=torch.long, device=device)
    back[index[real]] = torch.arange(index.numel(), device=device)[real.flatten()]

    def split(x: Tensor) -> Tensor:
        x = F.pad(x[0], (0, 0) * (x.dim() - 2) + (0, 1))
        return x[index].transpose(1, 2)

    def join(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, H)).transpose(1, 2).flatten(0, 1)[back][None]

    return split, join, live.sum(1).tolist(), order
