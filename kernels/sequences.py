"""Packed sequences: several documents laid end to end in one row, their bounds in `cu_seqlens`.

`cu_seqlens` (N + 1,) holds the documents' starts and the total, as in FlashAttention and fla; documents may be empty.
"""

import torch
from torch import Tensor


def lengths_of(cu_seqlens: Tensor) -> Tensor:
    """Lengths (N,) int64 of the documents."""
    return cu_seqlens.long().diff()


def positions_in(cu_seqlens: Tensor) -> Tensor:
    """Position (T,) int64 of every token in its own document."""
    lengths = lengths_of(cu_seqlens)
    starts = torch.repeat_interleave(cu_seqlens[:-1].long(), lengths)
    return torch.arange(len(starts), device=cu_seqlens.device) - starts


def documents_in(cu_seqlens: Tensor) -> Tensor:
    """Index (T,) int64 of the document that every token belongs to."""
    lengths = lengths_of(cu_seqlens)
    return torch.repeat_interleave(torch.arange(len(lengths), device=cu_seqlens.device), lengths)


def real_tokens(cu_seqlens: Tensor) -> Tensor:
    """Mask (N, L) bool of the padded form: True where document n has a token at position l; L is the longest."""
    lengths = lengths_of(cu_seqlens)
    longest = int(lengths.max()) if len(lengths) else 0
    return torch.arange(longest, device=cu_seqlens.device) < lengths[:, None]


def pad_packed(x: Tensor, real: Tensor) -> Tensor:
    """(1, T, ...) packed -> (N, L, ...) zero-padded on the right; `real` (N, L) is from `real_tokens`."""
    padded = x.new_zeros(*real.shape, *x.shape[2:])
    padded[real] = x[0]
    return padded


def unpad(x: Tensor, real: Tensor) -> Tensor:
    """(N, L, ...) padded -> (1, T, ...) packed."""
    return x[real][None]


def check_cu_seqlens(cu_seqlens: Tensor, batch: int, tokens: int) -> None:
    """Raise ValueError unless `cu_seqlens` rises from 0 to the `tokens` of a batch of one row."""
    if batch != 1:
        raise ValueError(f"cu_seqlens needs a batch of one packed row, got {batch} rows")
    bounds = cu_seqlens.tolist()
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != tokens or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens must rise from 0 to {tokens} (the tokens of the row), got {bounds}")
