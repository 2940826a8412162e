"""A cache with a ceiling: of a head's stored tokens, those of the highest scores, as in HOLA (arXiv 2607.02303).

A token that a better one has driven out never comes back, so what a query sees are the best of the tokens stored up to
it: of equal scores, the older.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.routed_attention.torch_gathered import attend
from kernels.sequences import Layout

QUERY_BLOCK = 256


@dataclass
class BoundedCache:
    """Keys and values of at most `limit` tokens in each of R = N * heads rows.

    Attributes:
        k: (R, M, K) in order of position; M grows up to `limit`.
        v: (R, M, V).
        score: (R, M) float32; -inf is an empty place.
        heads: H.
        limit: tokens that a row keeps at most.
    """

    k: Tensor
    v: Tensor
    score: Tensor
    heads: int
    limit: int

    @classmethod
    def empty(
        cls, batch_size: int, heads: int, key_dim: int, value_dim: int, *, limit: int, dtype: torch.dtype, device=None
    ) -> "BoundedCache":
        """A cache without entries."""
        like, rows = dict(dtype=dtype, device=device), batch_size * heads
        score = torch.zeros(rows, 0, dtype=torch.float32, device=device)
        return cls(torch.zeros(rows, 0, key_dim, **like), torch.zeros(rows, 0, value_dim, **like), score, heads, limit)

    @property
    def counts(self) -> Tensor:
        """Tokens (N, H) that are kept."""
        return (self.score > -torch.inf).sum(1).view(-1, self.heads)

    @property
    def bytes(self) -> int:
        """Bytes of keys, values and scores."""
        return sum(x.numel() * x.element_size() for x in (self.k, self.v, self.score))

    @property
    def bytes_per_token(self) -> int:
        """Bytes of the key and the value of one token in one head."""
        return sum(x.shape[2] * x.element_size() for x in (self.k, self.v))

    @property
    def kind(self) -> tuple:
        """What does not depend on the sequences."""
        return type(self).__name__, self.heads, self.k.shape[2], self.v.shape[2], self.limit

    def map(self, function: Callable[[Tensor], Tensor]) -> "BoundedCache":
        return BoundedCache(function(self.k), function(self.v), function(self.score), self.heads, self.limit)

    def select(self, index: Tensor) -> "BoundedCache":
        """The cache of some sequences (n,) int64, in that order; one may be taken twice."""
        rows = (index[:, None] * self.heads + torch.arange(self.heads, device=index.device)).flatten()
        return self.map(lambda x: x[rows])

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, stored: Tensor, scores: Tensor, layout: Layout, *, scale: float
    ) -> tuple[Tensor, "BoundedCache"]:
        """Attend from new tokens to what is kept and to themselves.

        Args:
            q: (B, T, H_q, K).
            k: (B, T, H, K).
            v: (B, T, H, V).
            stored: (B, T, H) bool.
            scores: (B, T, H) float32, by which stored tokens are kept.
            layout: of the new tokens.
            scale: factor of q.k.

        Returns:
            The read-out (B, T, H_q, V) in the dtype of q, and the cache with the new tokens.
        """
        H = k.shape[2]
        q, k, v, stored, scores = (layout.pad(x) for x in (q, k, v, stored, scores))
        scores = scores.masked_fill(~(stored & layout.real[..., None]), -torch.inf)
        q = q.unflatten(2, (H, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)  # (R, groups, T, K)
        k, v, scores = (x.transpose(1, 2).flatten(0, 1) for x in (k, v, scores))
        cache, parts = self, []
        blocks = zip(*(x.split(QUERY_BLOCK, dim) for x, dim in ((q, 2), (k, 1), (v, 1), (scores, 1))), strict=True)
        for block in blocks:
            o, cache = cache._block(*block, scale)
            parts.append(o)
        o = torch.cat(parts, 2).unflatten(0, (-1, H)).permute(0, 3, 1, 2, 4).flatten(2, 3)
        return layout.unpad(o), cache

    def _block(self, q: Tensor, k: Tensor, v: Tensor, scores: Tensor, scale: float) -> tuple[Tensor, "BoundedCache"]:
        k, v = torch.cat([self.k, k.to(self.k.dtype)], 1), torch.cat([self.v, v.to(self.v.dtype)], 1)
        score = torch.cat([self.score, scores], 1)  # (R, C)
        seen = best(score, self.score.shape[1], self.limit)
        o = attend(q, k.to(q.dtype), v.to(q.dtype), seen, scale=scale)
        kept = seen[:, -1]
        order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(kept.sum(1).max())]
        k, v = (x.gather(1, order[..., None].expand(-1, -1, x.shape[-1])) for x in (k, v))
        score = score.masked_fill(~kept, -torch.inf).gather(1, order)
        return o, BoundedCache(k, v, score, self.heads, self.limit)


def best(score: Tensor, held: int, limit: int) -> Tensor:
    """Which of C candidates, `held` old ones and T new ones in order, each new token sees: (R, T, C) bool.

    Candidate j is seen by token t iff it is stored, is no later than t, and fewer than `limit` of the candidates up to
    t are better: have a higher score, or an equal one and are older.
    """
    R, C = score.shape
    j = torch.arange(C, device=score.device)
    stored = (score > -torch.inf)[:, None]
    if C - held == 1:  # decoding: at most one has to go, the last of the worst
        worst = C - 1 - score.flip(1).argmin(1, keepdim=True)
        full = stored[:, 0].sum(1, keepdim=True) > limit
        return stored & ~(full & (j == worst))[:, None]
    better = (score[:, :, None] > score[:, None]) | ((score[:, :, None] == score[:, None]) & (j[:, None] < j))
    better = better & stored.mT
    rank = better[:, held:].cumsum(1, dtype=torch.int32) + better[:, :held].sum(1, keepdim=True, dtype=torch.int32)
    return stored & (rank < limit) & (j <= held + torch.arange(C - held, device=score.device)[:, None])
