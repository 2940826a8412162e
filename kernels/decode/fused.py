"""The Triton backend of decoding: one kernel for the step with score and store, one for attention over the pages."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.decode import paged

SCORE = {"none": 0, "cosine": 1, "value": 2, "output": 3}
SPLITS = 16
"""Programs that share a row's pages: enough to fill a GPU at batch 1."""


@triton.jit
def step_kernel(
    q, k, v, g, beta, state, tau, gram, cache_k, cache_v, table, length, free, used, read, scores, stored,
    scale, H, slots,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PAGE: tl.constexpr,
    DELTA: tl.constexpr, SCORE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid (N * H,): everything that one token does to one head."""
    row = tl.program_id(0)
    h = row % H
    i, j = tl.arange(0, BK), tl.arange(0, BV)
    at = state + row.to(tl.int64) * K * V + i[:, None] * V + j[None, :]
    inside = (i < K)[:, None] & (j < V)[None, :]
    key = tl.load(k + row * K + i, mask=i < K, other=0.0)
    value = tl.load(v + row * V + j, mask=j < V, other=0.0)
    query = tl.load(q + row * K + i, mask=i < K, other=0.0).to(ACC)
    strength = tl.load(beta + row).to(ACC)
    S = tl.load(at, mask=inside, other=0.0).to(ACC) * tl.exp(tl.load(g + row).to(ACC))
    p = tl.sum(S * key.to(ACC)[:, None], 0)
    u = strength * (value.to(ACC) - p)
    S += key.to(ACC)[:, None] * (u if DELTA else strength * value.to(ACC))[None, :]
    tl.store(at, S.to(state.dtype.element_ty), mask=inside)
    out = scale * tl.sum(S * query[:, None], 0)
    tl.store(read + row * V + j, out.to(read.dtype.element_ty), mask=j < V)
    if SCORE > 0:
        if SCORE == 1:
            x = value.to(ACC)
            norms = tl.maximum(tl.sqrt(tl.sum(p * p, 0)), 1e-8) * tl.maximum(tl.sqrt(tl.sum(x * x, 0)), 1e-8)
            e = 1.0 - tl.sum(p * x, 0) / norms
        elif SCORE == 2:
            e = tl.sqrt(tl.sum(u * u, 0))
        else:
            both = (j < V)[:, None] & (j < V)[None, :]
            G = tl.load(gram + h * V * V + j[:, None] * V + j[None, :], mask=both, other=0.0).to(ACC)
            e = tl.sqrt(tl.maximum(tl.sum(tl.sum(G * u[None, :], 1) * u, 0), 0.0))
        tl.store(scores + row, e.to(tl.float32))
        keep = e.to(tl.float32) > tl.load(tau + h)
        tl.store(stored + row, keep)
        if keep:
            count = tl.load(length + row)
            place = count % PAGE
            slot = table + row.to(tl.int64) * slots + count // PAGE
            if place == 0:  # which page a row gets does not matter, only that nobody else has it
                page = tl.load(free + tl.atomic_add(used, 1))
                tl.store(slot, page)
            else:
                page = tl.load(slot)
            page = page.to(tl.int64)
            tl.store(cache_k + (page * PAGE + place) * K + i, key.to(cache_k.dtype.element_ty), mask=i < K)
            tl.store(cache_v + (page * PAGE + place) * V + j, value.to(cache_v.dtype.element_ty), mask=j < V)
            tl.store(length + row, count + 1)


@triton.jit
def attend_kernel(
    q, cache_k, cache_v, table, length, out, top, total, scale, G, slots,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PAGE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid (R * G, splits): softmax over a share of a row's pages -> its maximum, its sum and the weighted values."""
    query, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row = query // G
    i, j, m = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, PAGE)
    x = tl.load(q + query.to(tl.int64) * K + i, mask=i < K, other=0.0).to(ACC) * scale
    count = tl.load(length + row)
    pages = tl.cdiv(count, PAGE)
    share = tl.cdiv(pages, splits)
    acc = tl.zeros((BV,), ACC)
    largest = tl.max(tl.full((PAGE,), float("-inf"), ACC), 0)
    weight = tl.sum(tl.zeros((PAGE,), ACC), 0)
    first = split * share
    for step in range(0, tl.maximum(tl.minimum(share, pages - first), 0)):
        n = first + step
        page = tl.load(table + row.to(tl.int64) * slots + n).to(tl.int64) * PAGE
        there = n * PAGE + m < count
        at_k, at_v = (page + m)[:, None] * K + i[None, :], (page + m)[:, None] * V + j[None, :]
        keys = tl.load(cache_k + at_k, mask=there[:, None] & (i < K)[None, :], other=0.0)
        values = tl.load(cache_v + at_v, mask=there[:, None] & (j < V)[None, :], other=0.0)
        s = tl.where(there, tl.sum(keys.to(ACC) * x[None, :], 1), float("-inf"))
        new = tl.maximum(largest, tl.max(s, 0))
        e = tl.exp(s - new)
        fade = tl.exp(largest - new)
        weight = weight * fade + tl.sum(e, 0)
        acc = acc * fade + tl.sum(e[:, None] * values.to(ACC), 0)
        largest = new
    at = query * splits + split
    tl.store(out + at.to(tl.int64) * V + j, acc, mask=j < V)
    tl.store(top + at, largest)
    tl.store(total + at, weight)


def _sizes(k: Tensor, v: Tensor, dtype: torch.dtype) -> dict:
    K, V = k.shape[-1], v.shape[-1]
    size = dict(K=K, V=V, BK=triton.next_power_of_2(K), BV=triton.next_power_of_2(V))
    return size | dict(ACC=tl.float64 if dtype == torch.float64 else tl.float32)


def step(q, k, v, g, beta, state, *, scale, delta, cache, tau, score, gram) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.decode.step`; a state of more than 128 x 128 goes to the torch backend, as it fits no program."""
    if max(k.shape[-1], v.shape[-1]) > 128:
        options = dict(scale=scale, delta=delta, cache=cache, tau=tau, score=score, gram=gram)
        return paged.step(q, k, v, g, beta, state, **options)
    N, H, V = v.shape
    read, scores = torch.empty_like(v), v.new_zeros(N, H, dtype=torch.float32)
    stored = torch.zeros(N, H, dtype=torch.bool, device=v.device)
    if cache is None:
        pages = (v, v, stored, stored, stored, stored)  # pointers that are not read
    else:
        pages = (cache.k, cache.v, cache.table, cache.length, cache.free, cache.used)
    q, k, v, g, beta = (x.contiguous() for x in (q, k, v, g, beta))
    assert state.is_contiguous()
    step_kernel[(N * H,)](
        q, k, v, g, beta, state, g if tau is None else tau, g if gram is None else gram.contiguous(), *pages,
        read, scores, stored, scale, H, 0 if cache is None else cache.table.shape[1],
        **_sizes(k, v, state.dtype), PAGE=64 if cache is None else cache.k.shape[1], DELTA=delta,
        SCORE=SCORE["none" if cache is None else score], num_warps=8,
    )  # fmt: skip
    return read, scores, stored


def attend(q: Tensor, cache, *, scale: float) -> Tensor:
    """As `kernels.decode.attend`. Up to SPLITS programs share a row; what they read is put together at the end."""
    R, G, _ = q.shape
    V = cache.v.shape[-1]
    splits = max(1, min(SPLITS, cache.table.shape[1]))
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty(R * G, splits, V, dtype=exact)
    top, total = (q.new_empty(R * G, splits, dtype=exact) for _ in range(2))
    attend_kernel[(R * G, splits)](
        q.contiguous(), cache.k, cache.v, cache.table, cache.length, out, top, total, scale, G, cache.table.shape[1],
        **_sizes(cache.k, cache.v, q.dtype), PAGE=cache.k.shape[1], num_warps=4,
    )  # fmt: skip
    largest = top.amax(1, keepdim=True)
    fade = (top - largest.masked_fill(largest == -torch.inf, 0.0)).exp()  # 0 for a share that holds nothing
    weight = (total * fade).sum(1, keepdim=True)
    mixed = (out * fade[..., None]).sum(1) / weight.masked_fill(weight == 0, 1.0)
    return mixed.view(R, G, V).to(q.dtype)
