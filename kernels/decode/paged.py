"""Decoding in PyTorch: a handful of batched operations on any device; storing waits for nothing."""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity


def step(q, k, v, g, beta, state, *, scale, delta, cache, tau, score, gram) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.decode.step`."""
    exact = state.dtype
    key, value, strength = k.to(exact), v.to(exact), beta[..., None]
    state.mul_(g.exp()[..., None, None])
    p = (key[..., None, :] @ state)[..., 0, :]
    u = strength * (value - p)
    state.add_(key[..., :, None] * (u if delta else strength * value)[..., None, :])
    read = (scale * q.to(exact)[..., None, :] @ state)[..., 0, :].to(v.dtype)
    if cache is None:
        return read, v.new_zeros(v.shape[:2], dtype=torch.float32), torch.zeros_like(g, dtype=torch.bool)
    if score == "cosine":
        scores = 1 - cosine_similarity(p, value, dim=-1)
    elif score == "value":
        scores = u.norm(dim=-1)
    else:
        scores = (torch.einsum("nhv,hvw->nhw", u, gram.to(exact)) * u).sum(-1).clamp(min=0).sqrt()
    scores = scores.float()
    stored = scores > tau
    append(cache, k.flatten(0, 1), v.flatten(0, 1), stored.flatten())
    return read, scores, stored


def append(cache, k: Tensor, v: Tensor, stored: Tensor) -> None:
    """Store k (R, K) and v (R, V) in the rows where `stored` (R,) is True, in place. The caller has reserved room."""
    size = cache.k.shape[1]
    row = torch.arange(len(k), device=k.device)
    slot, place = (cache.length // size).long(), (cache.length % size).long()
    slot = slot.clamp(max=cache.table.shape[1] - 1)  # of a full row that stores nothing
    new = stored & (place == 0)
    taken = new.cumsum(0)  # pages that this row and those before it take
    fresh = cache.free[(cache.used + taken - 1).clamp(min=0, max=len(cache.free) - 1)]
    cache.table[row, slot] = torch.where(new, fresh, cache.table[row, slot])
    page = torch.where(stored, cache.table[row, slot], 0).long()  # page 0 takes what is not stored
    cache.k[page, place], cache.v[page, place] = k.to(cache.k), v.to(cache.v)
    cache.used += taken[-1].to(cache.used)
    cache.length += stored.to(cache.length)


def attend(q: Tensor, cache, *, scale: float) -> Tensor:
    """As `kernels.decode.attend`. Each page is read once, where it lies, by its row's queries: keys and values are not
    copied, and the cost is that of the pages in use. A row's softmax is put together from those of its pages."""
    size, slots = cache.k.shape[1], cache.table.shape[1]
    out = q.new_zeros(*q.shape[:2], cache.v.shape[-1])
    row, slot = (torch.arange(slots, device=q.device) * size < cache.length[:, None]).nonzero(as_tuple=True)
    if not len(row):
        return out
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
    total = q.new_zeros(q.shape[:2]).index_add(0, row, weights.sum(-1))
    out = out.index_add(0, row, weights @ v.to(q.dtype))
    return out / total.clamp(min=torch.finfo(q.dtype).tiny)[..., None]
