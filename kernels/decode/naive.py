"""Decoding row by row: the definition that faster versions are tested against."""

import torch
from torch import Tensor


def step(q, k, v, g, beta, state, *, scale, delta, cache, tau, score, gram) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.decode.step`; any float dtype."""
    N, H, V = v.shape
    read = state.new_zeros(N, H, V)
    scores = state.new_zeros(N, H, dtype=torch.float32)
    stored = torch.zeros_like(scores, dtype=torch.bool)
    for n in range(N):
        for h in range(H):
            S = g[n, h].exp() * state[n, h]
            key, value = k[n, h].to(S), v[n, h].to(S)
            p = key @ S
            u = beta[n, h] * (value - p if delta else value)
            state[n, h] = S + key[:, None] * u
            read[n, h] = scale * (q[n, h].to(S) @ state[n, h])
            if cache is None:
                continue
            scores[n, h] = _score(score, p, value, beta[n, h] * (value - p), None if gram is None else gram[h])
            stored[n, h] = scores[n, h] > tau[h]
            if stored[n, h]:
                put(cache, n * H + h, k[n, h], v[n, h])
    return read.to(v.dtype), scores, stored


def _score(kind: str, p: Tensor, v: Tensor, u: Tensor, gram: Tensor | None) -> Tensor:
    if kind == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(p, v, dim=-1)
    return u.norm() if kind == "value" else (u @ gram.to(u) @ u).clamp(min=0).sqrt()


def put(cache, row: int, k: Tensor, v: Tensor) -> None:
    """One more token in a row, on a new page if the last is full."""
    slot, place = divmod(int(cache.length[row]), cache.k.shape[1])
    if place == 0:
        cache.table[row, slot] = cache.free[int(cache.used)]
        cache.used += 1
    page = int(cache.table[row, slot])
    cache.k[page, place], cache.v[page, place] = k.to(cache.k), v.to(cache.v)
    cache.length[row] += 1


def rows(cache, row: int) -> tuple[Tensor, Tensor]:
    """Keys (M, K) and values (M, V) that a row holds, in order."""
    count = int(cache.length[row])
    pages = cache.table[row, : -(-count // cache.k.shape[1])].long()
    return cache.k[pages].flatten(0, 1)[:count], cache.v[pages].flatten(0, 1)[:count]


def attend(q: Tensor, cache, *, scale: float) -> Tensor:
    """As `kernels.decode.attend`; any float dtype."""
    out = q.new_zeros(*q.shape[:2], cache.v.shape[-1])
    for row in range(len(q)):
        k, v = rows(cache, row)
        if len(k):
            out[row] = ((q[row] @ k.to(q).T) * scale).softmax(-1) @ v.to(q)
    return out
