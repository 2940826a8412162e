"""Attention to pages in PyTorch: a handful of batched operations on any device."""

import torch
from torch import Tensor

from kernels.paged_attention.cache import PagedCache


def attend(q: Tensor, cache: PagedCache, *, scale: float) -> tuple[Tensor, Tensor]:
    """As `kernels.paged_attention.naive.attend`.

    Each page is read once, where it lies, by its row's queries: keys and values are not copied, and the cost is that of
    the pages in use. A row's softmax is put together from those of its pages.
    """
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32  # sums over pages, and their logarithm
    size, slots = cache.k.shape[1], cache.table.shape[1]
    out = q.new_zeros(*q.shape[:2], cache.v.shape[-1], dtype=exact)
    row, slot = (torch.arange(slots, device=q.device) * size < cache.length[:, None]).nonzero(as_tuple=True)
    if not len(row):
        return out.to(q.dtype), q.new_full(q.shape[:2], -torch.inf, dtype=exact)
    page = cache.table[row, slot].long()
    if len(page) == int(cache.used) - 1:  # all that are used: in the order of the pool, which is read as it is
        order = page.argsort()
        row, slot = row[order], slot[order]
        k, v = (x[1 : len(page) + 1] for x in (cache.k, cache.v))
    else:  # a cache that others have gone on from
        k, v = cache.k[page], cache.v[page]
    logits = (q[row] * scale) @ k.to(q.dtype).mT  # (pages, G, size)
    held = torch.arange(size, device=q.device) < (cache.length[row] - slot * size)[:, None]
    logits = logits.masked_fill(~held[:, None], torch.finfo(q.dtype).min)
    top = q.new_full(q.shape[:2], torch.finfo(q.dtype).min)
    top = top.scatter_reduce(0, row[:, None].expand(-1, q.shape[1]), logits.amax(-1), "amax")
    weights = (logits - top[row, :, None]).exp()
    total = q.new_zeros(q.shape[:2], dtype=exact).index_add(0, row, weights.sum(-1, dtype=exact))
    out = out.index_add(0, row, (weights @ v.to(q.dtype)).to(exact))
    weight = (top.to(exact) + total.log()).masked_fill(total == 0, -torch.inf)
    return (out / total.clamp(min=torch.finfo(exact).tiny)[..., None]).to(q.dtype), weight
