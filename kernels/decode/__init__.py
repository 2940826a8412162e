"""Decoding, a token at a time: the recurrent memory's step, and keys and values kept in pages from one pool.

Each row (a sequence's head) holds pages of PAGE tokens, as many as it stored tokens need, so that memory follows KV
usage though rows differ wildly. Pages come from a free list on the device: no step waits for the host.
"""

from torch import Tensor

from kernels.decode.cache import PAGE as PAGE
from kernels.decode.cache import PagedCache as PagedCache
from kernels.dispatch import choose

BACKENDS = {
    "naive": "kernels.decode.naive:step",
    "torch": "kernels.decode.paged:step",
    "triton": "kernels.decode.fused:step",
}
ATTEND = {name: path.replace(":step", ":attend") for name, path in BACKENDS.items()}
SCORES = ("cosine", "value", "output")
"""Scores that a step can take by itself: 1 - cos(p, v); ||u||; sqrt(u^T G u)."""


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
