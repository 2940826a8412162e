"""Attention to pages, row by row: the definition that faster versions are tested against."""

import torch
from torch import Tensor

from kernels.paged_attention.cache import PagedCache


def attend(q: Tensor, cache: PagedCache, *, scale: float) -> Tensor:
    """As `kernels.paged_attention.attend`; any float dtype."""
    out = q.new_zeros(*q.shape[:2], cache.v.shape[-1])
    for row in range(len(q)):
        k, v, _ = cache.rows(torch.tensor([row], device=q.device))
        if k.shape[1]:
            out[row] = ((q[row] @ k[0].to(q).T) * scale).softmax(-1) @ v[0].to(q)
    return out
