"""A cache with a ceiling: of a head's stored tokens, those of the highest scores, as in HOLA (arXiv 2607.02303).

A token that a better one has driven out never comes back, so what a query sees are the best of the tokens stored up to
it: of equal scores, the older. With a window the last tokens are seen besides, stored or not, and compete for a place
once it has left them behind.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.routed_attention.torch_gathered import attend
from kernels.sequences import Layout

QUERY_BLOCK = 256


@dataclass
class BoundedCache:
    """Keys and values of at most `limit` tokens, and of a window, in each of R = N * heads rows.

    Attributes:
        k: (R, M, K) in order of position; M grows up to `limit` and the tokens of the window.
        v: (R, M, V).
        score: (R, M) float32; -inf of what is not stored.
        near: (R, M) bool: tokens that are in the window still. What is neither stored nor near is an empty place.
        heads: H.
        limit: tokens that a row keeps at most, beside those of the window.
        recent: how many of the M places, the last, are the window's.
    """

    k: Tensor
    v: Tensor
    score: Tensor
    near: Tensor
    heads: int
    limit: int
    recent: int = 0

    @classmethod
    def empty(
        cls, batch_size: int, heads: int, key_dim: int, value_dim: int, *, limit: int, dtype: torch.dtype, device=None
    ) -> "BoundedCache":
        """A cache without entries."""
        like, rows = dict(dtype=dtype, device=device), batch_size * heads
        k, v = torch.zeros(rows, 0, key_dim, **like), torch.zeros(rows, 0, value_dim, **like)
        score, near = (torch.zeros(rows, 0, dtype=kind, device=device) for kind in (torch.float32, torch.bool))
        return cls(k, v, score, near, heads, limit)

    @property
    def counts(self) -> Tensor:
        """Tokens (N, H) that are kept."""
        return (self.near | (self.score > -torch.inf)).sum(1).view(-1, self.heads)

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
        return replace(self, **{name: function(getattr(self, name)) for name in ("k", "v", "score", "near")})

    def select(self, index: Tensor) -> "BoundedCache":
        """The cache of some sequences (n,) int64, in that order; one may be taken twice."""
        rows = (index[:, None] * self.heads + torch.arange(self.heads, device=index.device)).flatten()
        return self.map(lambda x: x[rows])

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        stored: Tensor,
        scores: Tensor,
        layout: Layout,
        *,
        scale: float,
        window: int = 0,
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
            window: tokens nearer than this are seen, stored or not.

        Returns:
            The read-out (B, T, H_q, V) in the dtype of q, and the cache with the new tokens.
        """
        H = k.shape[2]
        q, k, v, stored, scores = (layout.pad(x) for x in (q, k, v, stored, scores))
        scores = scores.masked_fill(~(stored & layout.real[..., None]), -torch.inf)
        q = q.unflatten(2, (H, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)  # (R, groups, T, K)
        k, v, scores = (x.transpose(1, 2).flatten(0, 1) for x in (k, v, scores))
        real, cache, parts = layout.real.repeat_interleave(H, 0), self, []
        split = ((q, 2), (k, 1), (v, 1), (scores, 1), (real, 1))
        for block in zip(*(x.split(QUERY_BLOCK, dim) for x, dim in split), strict=True):
            o, cache = cache._block(*block, scale, window)
            parts.append(o)
        o = torch.cat(parts, 2).unflatten(0, (-1, H)).permute(0, 3, 1, 2, 4).flatten(2, 3)
        return layout.unpad(o), cache

    def _block(self, q, k, v, scores, real, scale: float, window: int) -> tuple[Tensor, "BoundedCache"]:
        """q (R, groups, T, K); k, v, scores and real (R, T, ...), of which the real ones come first."""
        T, recent = k.shape[1], self.recent
        held = self.score.shape[1] - recent
        k, v = torch.cat([self.k, k.to(self.k.dtype)], 1), torch.cat([self.v, v.to(self.v.dtype)], 1)
        score, near = torch.cat([self.score, scores], 1), torch.cat([self.near, real], 1)  # (R, C)
        place = torch.arange(score.shape[1], device=k.device)

        # (R, 1 + left, C): what is kept when so many tokens have left the window, up to all but those of the next query
        stays = min(max(window - 1, 0), recent + T)
        rivals = score[:, : score.shape[1] - stays]
        kept = torch.cat(
            [(rivals > -torch.inf)[:, None] & (place[: rivals.shape[1]] < held), best(rivals, held, self.limit)], 1
        )
        kept = F.pad(kept, (0, stays))

        token = torch.arange(T, device=k.device)
        behind = held + recent + token[:, None] - place
        seen = kept[:, (recent + 1 - window + token).clamp(min=0)]
        seen = seen | near[:, None] & (behind >= 0) & (behind < window)
        o = attend(q, k.to(q.dtype), v.to(q.dtype), seen, scale=scale)

        row, new = torch.arange(len(k), device=k.device), real.sum(1)
        kept = kept[row, (recent + new - stays).clamp(min=0)]
        order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, : max(kept.sum(1).tolist(), default=0)]
        last = (held + recent + new)[:, None] + torch.arange(-stays, 0, device=k.device)
        exists, order = last >= held, torch.cat([order, last.clamp(min=0)], 1)
        k, v = (x.gather(1, order[..., None].expand(-1, -1, x.shape[-1])) for x in (k, v))
        exists = torch.cat([kept.gather(1, order[:, : order.shape[1] - stays]), exists], 1)
        score = score.gather(1, order).masked_fill(~exists, -torch.inf)
        near = near.gather(1, order) & exists
        near = near & (torch.arange(order.shape[1], device=k.device) >= order.shape[1] - stays)
        return o, BoundedCache(k, v, score, near, self.heads, self.limit, stays)


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
