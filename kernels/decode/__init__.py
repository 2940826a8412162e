"""Decoding, a token at a time: the recurrent memory's step, and keys and values kept in pages from one pool.

Each row (a sequence's head) holds pages of PAGE tokens, as many as it stored tokens need, so that memory follows KV
usage though rows differ wildly. Pages come from a free list on the device: no step waits for the host.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from kernels.dispatch import choose

PAGE = 64
"""Tokens of a page."""

BACKENDS = {
    "naive": "kernels.decode.naive:step",
    "torch": "kernels.decode.paged:step",
    "triton": "kernels.decode.fused:step",
}
ATTEND = {name: path.replace(":step", ":attend") for name, path in BACKENDS.items()}
SCORES = ("cosine", "value", "output")
"""Scores that a step can take by itself: 1 - cos(p, v); ||u||; sqrt(u^T G u)."""


@dataclass
class PagedCache:
    """Keys and values of R rows. `append` and `step` change it in place.

    Attributes:
        k, v: (pages, PAGE, K or V); page 0 belongs to nobody: what is not stored is written there.
        table: (R, slots) int32, the pages of every row in order.
        length: (R,) int32, tokens that every row holds.
        free: (pages,) int32, page numbers; those from `used` on are free.
        used: () int32.
    """

    k: Tensor
    v: Tensor
    table: Tensor
    length: Tensor
    free: Tensor
    used: Tensor

    @classmethod
    def empty(
        cls, rows: int, key_dim: int, value_dim: int, *, pages: int, slots: int, dtype: torch.dtype, device=None
    ) -> "PagedCache":
        """A cache for up to `slots * PAGE` tokens a row and `pages * PAGE` in all."""
        like = dict(dtype=dtype, device=device)
        ints = dict(dtype=torch.int32, device=device)
        return cls(
            torch.zeros(pages + 1, PAGE, key_dim, **like),
            torch.zeros(pages + 1, PAGE, value_dim, **like),
            torch.zeros(rows, slots, **ints),
            torch.zeros(rows, **ints),
            torch.arange(pages + 1, **ints),
            torch.ones((), **ints),
        )

    @property
    def bytes(self) -> int:
        """Bytes of the pages in use. Waits for the device."""
        page = sum(x[0].numel() * x.element_size() for x in (self.k, self.v))
        return (int(self.used) - 1) * page

    def reserve(self, tokens: int) -> "PagedCache":
        """A cache with room for `tokens` more in every row: this one, or a larger one. Waits for the device, so call
        it once for many steps."""
        longest = int(self.length.max()) + tokens if len(self.length) else 0
        # a row needs a new page where its last is full
        wanted = int((self.length + (tokens + PAGE - 1)).div(PAGE, rounding_mode="floor").sum())
        held = int(self.length.add(PAGE - 1).div(PAGE, rounding_mode="floor").sum())
        pages, slots = len(self.k), self.table.shape[1]
        missing = int(self.used) + wanted - held - pages
        if missing > 0:
            more = max(missing, pages // 2)
            self = replace(
                self,
                k=torch.cat([self.k, self.k.new_zeros(more, *self.k.shape[1:])]),
                v=torch.cat([self.v, self.v.new_zeros(more, *self.v.shape[1:])]),
                free=torch.cat([self.free, torch.arange(pages, pages + more).to(self.free)]),
            )
        more = -(-longest // PAGE) - slots
        if more > 0:
            self = replace(self, table=torch.nn.functional.pad(self.table, (0, max(more, slots // 2))))
        return self

    def clone(self) -> "PagedCache":
        return replace(self, **{f.name: getattr(self, f.name).clone() for f in fields(self)})


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    scale: float = 1.0,
    delta: bool = True,
    cache: PagedCache | None = None,
    tau: Tensor | None = None,
    score: str = "output",
    gram: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """One token of every sequence: predict, write, read, score, and store what scores above tau. In place.

    Args:
        q, k: (N, H, K), normalised.
        v: (N, H, V).
        g, beta: (N, H) float32, log-decay and write strength.
        state: (N, H, K, V) float32; becomes the new state.
        scale: factor of the read-out.
        delta: False for the additive rule.
        cache: of N * H rows; without it nothing is scored.
        tau: (H,) float32; the token is stored in a head iff its score is above.
        score: one of SCORES.
        gram: (H, V, V) of the output projection, for score `output`.
        backend: `naive`, `torch`, `triton` or `auto`.

    Returns:
        read-out (N, H, V) in the dtype of v; scores (N, H) float32 and stored (N, H) bool (without a cache: zeros).

    Raises:
        ValueError: an unknown score, or a backend that is not available.
    """
    if score not in SCORES:
        raise ValueError(f"unknown score {score!r}; known: {', '.join(SCORES)}")
    if cache is not None and (tau is None or (score == "output" and gram is None)):
        raise ValueError("storing needs tau, and score 'output' the Gram matrices of the output projection")
    _, run = choose("decode", backend, BACKENDS, v.device)
    return run(q, k, v, g, beta, state, scale=scale, delta=delta, cache=cache, tau=tau, score=score, gram=gram)


def attend(q: Tensor, cache: PagedCache, *, scale: float = 1.0, backend: str = "auto") -> Tensor:
    """Attention of one query of every row to what the row holds.

    Args:
        q: (R, G, K), G queries a row.
        cache: of R rows.
        scale: factor of q.k.
        backend: `naive`, `torch`, `triton` or `auto`.

    Returns:
        (R, G, V) in the dtype of q; exact zeros for a row that holds nothing.
    """
    _, run = choose("decode_attention", backend, ATTEND, q.device)
    return run(q, cache, scale=scale)
