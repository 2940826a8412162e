"""Keys and values of the tokens that are kept, and only those: in pages, as many for a head as it stores."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels import decode
from kernels.decode.cache import PagedCache
from kernels.routed_attention.gathered import attend, like_sizes

QUERY_BLOCK = 256


@dataclass
class Recent:
    """The last W tokens of N sequences, stored or not: k (N, W, H, K), v (N, W, H, V), the newest last, and `seen`
    (N, W, H) bool: False where there was no token yet or the pages hold it."""

    k: Tensor
    v: Tensor
    seen: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "Recent":
        return Recent(function(self.k), function(self.v), function(self.seen))

    def follow(self, k: Tensor, v: Tensor, seen: Tensor, new: Tensor, size: int) -> "Recent":
        """The last `size` tokens when T more have come, (N, T, ...), of which the first `new` (N,) are real."""
        k, v = torch.cat([self.k, k.to(self.k.dtype)], 1), torch.cat([self.v, v.to(self.v.dtype)], 1)
        seen = torch.cat([self.seen, seen], 1)
        place = torch.arange(-min(size, k.shape[1]), 0, device=new.device) + (self.k.shape[1] + new)[:, None]  # (N, W)
        row, there = torch.arange(len(new), device=new.device)[:, None], place >= 0
        place = place.clamp(min=0)
        return Recent(k[row, place], v[row, place], seen[row, place] & there[..., None])


@dataclass
class KVCache:
    """What attention keeps of N sequences and H key heads.

    Attributes:
        pages: of N * H rows, what is stored for good.
        heads: H.
        recent: the tokens of a local window, if there is one.
        fresh: nothing has been read yet, so that new tokens see each other alone.
    """

    pages: PagedCache
    heads: int
    recent: Recent | None = None
    fresh: bool = True

    @classmethod
    def empty(
        cls, batch_size: int, heads: int, key_dim: int, value_dim: int, *, dtype: torch.dtype, device=None
    ) -> "KVCache":
        """A cache without entries."""
        return cls(PagedCache.empty(batch_size * heads, key_dim, value_dim, dtype=dtype, device=device), heads)

    @property
    def counts(self) -> Tensor:
        """Tokens (N, H) that are kept."""
        stored = self.pages.length.long().view(-1, self.heads)
        return stored if self.recent is None else stored + self.recent.seen.sum(1)

    @property
    def bytes(self) -> int:
        """Bytes of keys and values, and of free places in the pages."""
        recent = () if self.recent is None else (self.recent.k, self.recent.v)
        return self.pages.bytes + sum(x.numel() * x.element_size() for x in recent)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the kept keys and values alone."""
        k, v = self.pages.k, self.pages.v
        return int(self.counts.sum()) * (k.shape[2] * k.element_size() + v.shape[2] * v.element_size())

    def map(self, function: Callable[[Tensor], Tensor]) -> "KVCache":
        recent = None if self.recent is None else self.recent.map(function)
        return replace(self, pages=self.pages.map(function), recent=recent)

    def select(self, index: Tensor) -> "KVCache":
        """The cache of some sequences (n,) int64, in that order; one may be taken twice."""
        rows = index[:, None] * self.heads + torch.arange(self.heads, device=index.device)
        recent = None if self.recent is None else self.recent.map(lambda x: x[index])
        return replace(self, pages=self.pages.select(rows.flatten()), recent=recent)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, stored: Tensor, real: Tensor, scale: float, window: int = 0
    ) -> tuple[Tensor, "KVCache"]:
        """Attend from T new tokens to the cache and to themselves; (read-out (N, T, H_q, V), the cache with them).

        Args:
            q: (N, T, H_q, K).
            k, v: (N, T, H, .).
            stored: (N, T, H) bool.
            real: (N, T) bool, False on the padding at the end of shorter sequences.
            scale: factor of q.k.
            window: tokens nearer than this are seen, stored or not.
        """
        N, T, H = k.shape[:3]
        after = self.follow(k, v, stored, real, window)
        queries = q.unflatten(2, (H, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)  # (N H, groups, T, K)
        if T == 1 and not window and self.recent is None and not (torch.is_grad_enabled() and q.requires_grad):
            o = decode.attend(queries[:, :, 0], after.pages, scale=scale)[:, :, None]
        else:
            rows = (x.transpose(1, 2).flatten(0, 1) for x in (k, v, stored))  # (N H, T, ...)
            o = self._attend(queries, *rows, real, scale, window)
        return o.unflatten(0, (N, H)).permute(0, 3, 1, 2, 4).flatten(2, 3), after

    def follow(self, k: Tensor, v: Tensor, stored: Tensor, real: Tensor, window: int = 0) -> "KVCache":
        """The cache with T more tokens; shapes as in `attend`."""
        rows = (x.transpose(1, 2).flatten(0, 1) for x in (k, v, stored & real[..., None]))
        recent = self._recent(k, v, stored, real, window)
        return replace(self, pages=self.pages.append(*rows), recent=recent, fresh=False)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, stored: Tensor, real: Tensor, scale: float, window: int):
        """q (R, groups, T, K) over pages, recent tokens and new ones (R, T, .): rows that hold about as much together,
        so that one full head beside empty ones costs what it holds and no more."""
        counts, order = self.pages.length.sort(descending=True)
        real = real.repeat_interleave(self.heads, 0)
        recent = None
        if self.recent is not None:
            recent = [x.transpose(1, 2).flatten(0, 1) for x in vars(self.recent).values()]  # (R, W, ...)
        parts = []
        for rows in order.split(like_sizes(counts.tolist())):
            keys, values, there = self.pages.rows(rows)
            held = [(keys.to(q.dtype), values.to(q.dtype), there)]
            if recent is not None:
                held.append(tuple(x[rows].to(x.dtype if x.dtype == torch.bool else q.dtype) for x in recent))
            new = k[rows], v[rows], stored[rows], real[rows]
            parts.append(_over(q[rows], held, new, scale, window))
        return torch.cat(parts)[order.argsort()]

    def _recent(self, k: Tensor, v: Tensor, stored: Tensor, real: Tensor, window: int) -> Recent | None:
        """What the next token will see of a window: one token fewer than that."""
        if window <= 1:
            return None
        seen = real[..., None] & ~stored
        recent = self.recent
        if recent is None:
            recent = Recent(*(x[:, :0] for x in (k.to(self.pages.k.dtype), v.to(self.pages.v.dtype), seen)))
        return recent.follow(k, v, seen, real.sum(1), window - 1)


def _over(q: Tensor, held: list[tuple[Tensor, ...]], new: tuple[Tensor, ...], scale: float, window: int) -> Tensor:
    """Rows q (r, groups, T, K) over what they hold: (k, v, there) of the pages and perhaps of recent tokens; and over
    new tokens (k, v, stored, real). A block of queries at a time, so that memory is bounded."""
    k, v, stored, real = new
    keys, values = (torch.cat([*(part[i] for part in held), x], 1) for i, x in enumerate((k, v)))
    old = keys.shape[1] - k.shape[1]
    recent = held[1][0].shape[1] if len(held) > 1 else 0
    token = torch.arange(k.shape[1], device=k.device)
    blocks = []
    for query in token.split(QUERY_BLOCK):
        end = int(query[-1]) + 1
        seen = [held[0][2][:, None].expand(-1, len(query), -1)]
        if recent:
            near = query[:, None] + recent - torch.arange(recent, device=k.device) < window
            seen.append(held[1][2][:, None] & near)
        behind = query[:, None] - token[:end]
        some = stored[:, None, :end] | (behind < window)
        seen.append(some & real[:, None, :end] & (behind >= 0))
        part = q[:, :, query[0] : end]
        blocks.append(attend(part, keys[:, : old + end], values[:, : old + end], torch.cat(seen, 2), scale=scale))
    return torch.cat(blocks, 2)
