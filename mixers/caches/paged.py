"""Keys and values of the tokens that are stored, and only those: in pages, as many for a head as it stores."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels import paged_attention
from kernels.causal_attention import causal_attention
from kernels.paged_attention.cache import PagedCache
from kernels.routed_attention import routed_attention
from kernels.routed_attention.torch_gathered import attend
from kernels.sequences import Layout, like_sizes

QUERY_BLOCK = 256


@dataclass
class Recent:
    """The last W tokens of N sequences, stored or not.

    Attributes:
        k: (N, W, H, K), the newest last.
        v: (N, W, H, V).
        seen: (N, W, H) bool: False where there was no token yet or the pages hold it.
    """

    k: Tensor
    v: Tensor
    seen: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "Recent":
        return Recent(function(self.k), function(self.v), function(self.seen))

    def append(self, k: Tensor, v: Tensor, seen: Tensor, new: Tensor, size: int) -> "Recent":
        """The last `size` tokens when T more have come, (N, T, ...), of which the first `new` (N,) are real."""
        k, v = torch.cat([self.k, k.to(self.k.dtype)], 1), torch.cat([self.v, v.to(self.v.dtype)], 1)
        seen = torch.cat([self.seen, seen], 1)
        place = torch.arange(-min(size, k.shape[1]), 0, device=new.device) + (self.k.shape[1] + new)[:, None]  # (N, W)
        row, exists = torch.arange(len(new), device=new.device)[:, None], place >= 0
        place = place.clamp(min=0)
        return Recent(k[row, place], v[row, place], seen[row, place] & exists[..., None])


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
    def bytes_per_token(self) -> int:
        """Bytes of the key and the value of one token in one head."""
        return sum(x.shape[2] * x.element_size() for x in (self.pages.k, self.pages.v))

    @property
    def kind(self) -> tuple:
        """What does not depend on the sequences."""
        return type(self).__name__, self.heads, self.pages.k.shape[2], self.pages.v.shape[2]

    def map(self, function: Callable[[Tensor], Tensor]) -> "KVCache":
        recent = None if self.recent is None else self.recent.map(function)
        return replace(self, pages=self.pages.map(function), recent=recent)

    def select(self, index: Tensor) -> "KVCache":
        """The cache of some sequences (n,) int64, in that order; one may be taken twice."""
        rows = index[:, None] * self.heads + torch.arange(self.heads, device=index.device)
        recent = None if self.recent is None else self.recent.map(lambda x: x[index])
        return replace(self, pages=self.pages.select(rows.flatten()), recent=recent)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        stored: Tensor | None,
        scores: Tensor | None,
        layout: Layout,
        *,
        scale: float,
        window: int = 0,
        backend: str = "auto",
    ) -> tuple[Tensor, "KVCache"]:
        """Attend from new tokens to what is kept and to themselves.

        Args:
            q: (B, T, H_q, K).
            k: (B, T, H, K).
            v: (B, T, H, V).
            stored: (B, T, H) bool; None stores every token, or with a window none for good.
            scores: not looked at: what is stored stays.
            layout: of the new tokens.
            scale: factor of q.k.
            window: tokens nearer than this are seen, stored or not.
            backend: of the attention of new tokens among themselves.

        Returns:
            The read-out (B, T, H_q, V) in the dtype of q, and the cache with the new tokens.
        """
        o = attend_new(q, k, v, stored, layout, scale=scale, window=window, backend=backend) if self.fresh else None
        if stored is None:
            stored = torch.full(k.shape[:3], not window, dtype=torch.bool, device=k.device)
        q, k, v, stored = (layout.pad(x) for x in (q, k, v, stored))
        after = self.append(k, v, stored, layout, window)
        if o is None:
            o = layout.unpad(self._attend(q, k, v, stored, layout, after, scale, window))
        return o, after

    def append(self, k: Tensor, v: Tensor, stored: Tensor, layout: Layout, window: int = 0) -> "KVCache":
        """The cache with more tokens (N, T, H, .), padded where sequences are shorter than the longest of `layout`."""
        rows = (x.transpose(1, 2).flatten(0, 1) for x in (k, v, stored))
        recent = None
        if window > 1:  # what the next token will see of a window is one token fewer
            seen = layout.real[..., None] & ~stored
            recent = self.recent
            if recent is None:
                recent = Recent(*(x[:, :0] for x in (k.to(self.pages.k.dtype), v.to(self.pages.v.dtype), seen)))
            recent = recent.append(k, v, seen, layout.lengths, window - 1)
        return replace(self, pages=self.pages.append(*rows), recent=recent, fresh=False)

    def _attend(self, q, k, v, stored, layout: Layout, after: "KVCache", scale: float, window: int) -> Tensor:
        """(N, T, H_q, V), of tokens (N, T, ...)."""
        N, T, H = k.shape[:3]
        q = q.unflatten(2, (H, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)  # (N H, groups, T, K)
        if T == 1 and not (torch.is_grad_enabled() and q.requires_grad):
            beside = self._beside(k, v, stored, window) if window else None
            o = paged_attention.attend(q[:, :, 0], after.pages, scale=scale, beside=beside)[:, :, None]
        else:
            rows = (x.transpose(1, 2).flatten(0, 1) for x in (k, v, stored))  # (N H, T, ...)
            o = self._attend_rows(q, *rows, layout.real.repeat_interleave(H, 0), scale, window)
        return o.unflatten(0, (N, H)).permute(0, 3, 1, 2, 4).flatten(2, 3)

    def _beside(self, k, v, stored, window: int) -> tuple[Tensor, Tensor, Tensor]:
        """What a window shows one new token beside the pages: keys, values and which are seen, (N H, W, ...)."""
        parts = [k, v, ~stored]
        if self.recent is not None:
            near = min(window - 1, self.recent.k.shape[1])
            held = [x[:, x.shape[1] - near :] for x in vars(self.recent).values()]
            parts = [torch.cat([old.to(new.dtype), new], 1) for old, new in zip(held, parts, strict=True)]
        return tuple(x.transpose(1, 2).flatten(0, 1) for x in parts)

    def _attend_rows(self, q, k, v, stored, real, scale: float, window: int) -> Tensor:
        """q (R, groups, T, K) over pages, recent tokens and new ones (R, T, .).

        Rows that hold about as much are run together, so that one full head beside empty ones costs what it holds and
        no more.
        """
        counts, order = self.pages.length.sort(descending=True)
        recent = None
        if self.recent is not None:
            recent = [x.transpose(1, 2).flatten(0, 1) for x in vars(self.recent).values()]  # (R, W, ...)
        parts = []
        for rows in order.split(like_sizes(counts.tolist())):
            keys, values, exists = self.pages.rows(rows)
            held = [(keys.to(q.dtype), values.to(q.dtype), exists)]
            if recent is not None:
                held.append(tuple(x[rows].to(x.dtype if x.dtype == torch.bool else q.dtype) for x in recent))
            new = k[rows], v[rows], stored[rows], real[rows]
            parts.append(_over(q[rows], held, new, scale, window))
        return torch.cat(parts)[order.argsort()]


def attend_new(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stored: Tensor | None,
    layout: Layout,
    *,
    scale: float,
    window: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Attention of tokens among themselves, as in training and at the start of a prompt; as for `KVCache.attend`."""
    if stored is not None:
        return routed_attention(q, k, v, stored, scale=scale, cu_seqlens=layout, window=window, backend=backend)
    return causal_attention(q, k, v, layout, scale=scale, window=window)


def _over(q: Tensor, held: list[tuple[Tensor, ...]], new: tuple[Tensor, ...], scale: float, window: int) -> Tensor:
    """Rows q (r, groups, T, K) over what they hold and over new tokens.

    `held` is (k, v, exists) of the pages and perhaps of recent tokens, `new` is (k, v, stored, real). A block of
    queries at a time, so that memory is bounded.
    """
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
