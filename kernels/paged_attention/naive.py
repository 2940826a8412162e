"""Attention to pages, row by row: the definition that faster versions are tested against."""

import torch
from torch import Tensor

from kernels.paged_attention.cache import PagedCache


def attend(q: Tensor, cache: PagedCache, *, scale: float) -> tuple[Tensor, Tensor]:
    """As `kernels.paged_attention.attend`; any float dtype.

    Returns:
        The read-out (R, G, V), and the logarithm (R, G) of what its softmax is divided by, in at least float32: -inf
        where nothing is held.
    """
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    out, weight = q.new_zeros(*q.shape[:2], cache.v.shape[-1]), q.new_full(q.shape[:2], -torch.inf, dtype=exact)
    for row in range(len(q)):
        k, v, _ = cache.rows(torch.tensor([row], device=q.device))
        if k.shape[1]:
            logits = (q[row] @ k[0].to(q).T) * scale
            out[row], weight[row] = logits.softmax(-1) @ v[0].to(q), logits.to(exact).logsumexp(-1)
    return out, weight
