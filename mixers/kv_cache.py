"""Keys and values of the tokens that are kept, and only those: in pages, as many for a head as it stores."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels import decode
from kernels.decode.cache import PagedCache
from kernels.routed_attention.gathered import attend, like_sizes


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
    """

    pages: PagedCache
    heads: int
    recent: Recent | None = None

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
        rows = [x.transpose(1, 2).flatten(0, 1) for x in (k, v, stored & real[..., None])]  # (N H, T, ...)
        pages = self.pages.append(*rows)
        queries = q.unflatten(2, (H, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)  # (N H, groups, T, K)
        if T == 1 and not window and self.recent is None and not (torch.is_grad_enabled() and q.requires_grad):
            o = decode.attend(queries[:, :, 0], pages, scale=scale)[:, :, None]
        else:
            o = self._attend(queries, *rows, real, scale, window)
        o = o.unflatten(0, (N, H)).permute(0, 3, 1, 2, 4).flatten(2, 3)
        return o, replace(self, pages=pages, recent=self._recent(k, v, stored, real, window))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, stored: Tensor, real: Tensor, scale: float, window: int):
        """q (R, groups, T, K) over pages, recent tokens and new ones (R, T, .): rows that hold about as much together,
        so that one full head beside empty ones costs what it holds and no more."""
        T = k.shape[1]
        token = torch.arange(T, device=k.device)
        behind = token[:, None] - token
        new = real.repeat_interleave(self.heads, 0)[:, None] & (behind >= 0)
        new = new & (stored[:, None] | (behind < window))  # (R, T, T)
        old = None
        if self.recent is not None:
            old = [x.transpose(1, 2).flatten(0, 1) for x in vars(self.recent).values()]  # (R, W, ...)
            held = old[0].shape[1]
            near = token[:, None] + held - torch.arange(held, device=k.device) < window  # (T, W)
        counts, order = self.pages.length.sort(descending=True)
        parts = []
        for rows in order.split(like_sizes(counts.tolist())):
            paged_k, paged_v, there = self.pages.rows(rows)
            keys, values, seen = [paged_k.to(q.dtype)], [paged_v.to(q.dtype)], [there[:, None].expand(-1, T, -1)]
            if old is not None:
                keys.append(old[0][rows].to(q.dtype))
                values.append(old[1][rows].to(q.dtype))
                seen.append(old[2][rows][:, None] & near)
            keys, values, seen = (
                torch.cat([*some, last[rows]], dim)
                for some, last, dim in ((keys, k, 1), (values, v, 1), (seen, new, 2))
            )
            parts.append(attend(q[rows], keys, values, seen, scale=scale))
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
