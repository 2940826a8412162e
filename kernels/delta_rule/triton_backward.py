"""Triton kernels of the gated delta rule, backward. The equations and the letters are those of `torch_chunks.py`.

They come after `prepare` and `scan`, which make X and the chunks' first states once more and, in place of the writes U,
V - P, which is U / beta and what d_beta needs. They mirror them:
`prepare_back` (per chunk: what needs no gradient of a state), `scan_back` (per sequence, from the end: gradients of
the states, W), `gradients_v` (per chunk: of v and beta) and `gradients_k` (per chunk: of q, k and g). The last two are
apart since their sums together do not fit in registers.
"""

import triton
import triton.language as tl

from kernels.delta_rule.triton_forward import decays, put_rows, rows_of, scalars_of, state_of, strict, sums


@triton.jit
def readers(
    dp, W, strength, t, live, h, H,
    V: tl.constexpr, j, C: tl.constexpr, BV: tl.constexpr,
    ACC: tl.constexpr, DELTA: tl.constexpr, HAS_DP: tl.constexpr,
):  # fmt: skip
    """Z_P (C, BV): the gradient of the prediction and what the writes owe to it."""
    Z = tl.zeros((C, BV), ACC)
    if HAS_DP:
        Z += rows_of(dp, t, live, h, H, V, j)
    if DELTA:
        Z -= strength[:, None] * W
    return Z


@triton.jit
def prepare_back(
    q, k, g, x, do, dp, chunks, xe, w, scale, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, DELTA: tl.constexpr, HAS_DP: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, H): X^T e K -> xe (T, H, K); X^T (Qm^T dO + A^T dP) -> w (T, H, V)."""
    c, h = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(chunks + 2 * c), tl.load(chunks + 2 * c + 1)
    if start < stop:
        i, d = tl.arange(0, C), tl.arange(0, BK)
        t, live = start + i, start + i < stop
        dtype = k.dtype.element_ty
        D, _, e, _ = decays(sums(g, t, live, h, H), C, ACC)
        queries, keys = rows_of(q, t, live, h, H, K, d), rows_of(k, t, live, h, H, K, d)
        Qm = (tl.dot(queries, tl.trans(keys), input_precision=PRECISION).to(ACC) * D * scale).to(dtype)
        if HAS_DP:
            A = strict(tl.dot(keys, tl.trans(keys), input_precision=PRECISION).to(ACC) * D, C).to(dtype)
        ek = (keys * e[:, None]).to(dtype)
        if DELTA:
            at = x + (c.to(tl.int64) * H + h) * C * C + i[:, None] * C + i[None, :]
            Xt = tl.trans(tl.load(at).to(dtype))
            ek = tl.dot(Xt, ek, input_precision=PRECISION)
        put_rows(xe, ek, t, live, h, H, K, d)
        for first in tl.static_range(0, V, BV):
            j = first + tl.arange(0, BV)
            W = tl.dot(tl.trans(Qm), rows_of(do, t, live, h, H, V, j), input_precision=PRECISION)
            if HAS_DP:
                W += tl.dot(tl.trans(A), rows_of(dp, t, live, h, H, V, j).to(dtype), input_precision=PRECISION)
            if DELTA:
                W = tl.dot(Xt, W.to(dtype), input_precision=PRECISION)
            put_rows(w, W, t, live, h, H, V, j)


@triton.jit
def scan_back(
    q, k, g, beta, do, dp, xe, w, chunks, offsets, d_final, d_next, d_initial, scale, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, DELTA: tl.constexpr, HAS_DP: tl.constexpr,
):  # fmt: skip
    """Grid (N * V / BV, H): gradients of the states after every chunk -> d_next; w becomes W; -> d_initial."""
    n, block, h = tl.program_id(0) // tl.cdiv(V, BV), tl.program_id(0) % tl.cdiv(V, BV), tl.program_id(1)
    i, d = tl.arange(0, C), tl.arange(0, BK)
    j = block * BV + tl.arange(0, BV)
    inside = (d < K)[:, None] & (j < V)[None, :]
    cell = d[:, None] * V + j[None, :]
    dtype = k.dtype.element_ty
    dS = state_of(d_final, (n.to(tl.int64) * H + h) * K * V + cell, inside, ACC)
    first, end = tl.load(offsets + n), tl.load(offsets + n + 1)
    for back in range(0, end - first):
        c = end - 1 - back
        start, stop = tl.load(chunks + 2 * c), tl.load(chunks + 2 * c + 1)
        t, live = start + i, start + i < stop
        later = dS.to(dtype)
        tl.store(d_next + (c.to(tl.int64) * H + h) * K * V + cell, later, mask=inside)
        W = rows_of(w, t, live, h, H, V, j)
        W += tl.dot(rows_of(xe, t, live, h, H, K, d), later, input_precision=PRECISION).to(dtype)
        put_rows(w, W, t, live, h, H, V, j)
        b = sums(g, t, live, h, H)
        f = tl.exp(b.to(ACC))
        last = tl.sum(tl.where(i == C - 1, b, 0.0), 0)
        fq = (rows_of(q, t, live, h, H, K, d) * (f * scale)[:, None]).to(dtype)
        dS = dS * tl.exp(last.to(ACC))
        dS += tl.dot(tl.trans(fq), rows_of(do, t, live, h, H, V, j), input_precision=PRECISION)
        if DELTA or HAS_DP:
            strength = scalars_of(beta, t, live, h, H).to(ACC)
            Z = readers(dp, W, strength, t, live, h, H, V, j, C, BV, ACC, DELTA, HAS_DP)
            fk = (rows_of(k, t, live, h, H, K, d) * f[:, None]).to(dtype)
            dS += tl.dot(tl.trans(fk), Z.to(dtype), input_precision=PRECISION)
    tl.store(d_initial + (n.to(tl.int64) * H + h) * K * V + cell, dS.to(d_initial.dtype.element_ty), mask=inside)


@triton.jit
def gradients_v(
    g, beta, error, w, do, dp, chunks, dv, d_beta, ha, hq, scale, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, DELTA: tl.constexpr, HAS_DP: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, H): dV, d_beta; H = Z U^T * D of the readers k and q -> ha, hq (chunks, H, C, C)."""
    c, h = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(chunks + 2 * c), tl.load(chunks + 2 * c + 1)
    if start < stop:
        i = tl.arange(0, C)
        t, live = start + i, start + i < stop
        dtype = error.dtype.element_ty
        strength = scalars_of(beta, t, live, h, H).to(ACC)
        HA, HQ = tl.zeros((C, C), ACC), tl.zeros((C, C), ACC)  # of V - P: beta comes at the end
        d_strength = tl.zeros((C,), ACC)
        for first in range(0, V, BV):
            j = first + tl.arange(0, BV)
            R, W = rows_of(error, t, live, h, H, V, j), rows_of(w, t, live, h, H, V, j)
            put_rows(dv, W * strength[:, None], t, live, h, H, V, j)
            d_strength += tl.sum(W.to(ACC) * R, 1)
            HQ += tl.dot(rows_of(do, t, live, h, H, V, j), tl.trans(R), input_precision=PRECISION)
            if DELTA or HAS_DP:
                Z = readers(dp, W, strength, t, live, h, H, V, j, C, BV, ACC, DELTA, HAS_DP)
                HA += tl.dot(Z.to(dtype), tl.trans(R), input_precision=PRECISION)
        D, _, _, _ = decays(sums(g, t, live, h, H), C, ACC)
        D *= strength[None, :]
        at = (c.to(tl.int64) * H + h) * C * C + i[:, None] * C + i[None, :]
        tl.store(ha + at, strict(HA * D, C).to(dtype))
        tl.store(hq + at, (HQ * D * scale).to(dtype))
        at = d_beta + t.to(tl.int64) * H + h
        tl.store(at, d_strength.to(d_beta.dtype.element_ty), mask=live)


@triton.jit
def gradients_k(
    q, k, g, beta, error, w, starts, do, dp, d_next, chunks, ha, hq, dq, dk, dg, scale, T, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, DELTA: tl.constexpr, HAS_DP: tl.constexpr,
):  # fmt: skip
    """Grid (chunks * K / BK, H): dQ, dK, and what this block of K adds to dg -> dg (K / BK, T, H)."""
    c, part, h = tl.program_id(0) // tl.cdiv(K, BK), tl.program_id(0) % tl.cdiv(K, BK), tl.program_id(1)
    start, stop = tl.load(chunks + 2 * c), tl.load(chunks + 2 * c + 1)
    if start < stop:
        i, d = tl.arange(0, C), part * BK + tl.arange(0, BK)
        t, live = start + i, start + i < stop
        dtype = k.dtype.element_ty
        strength = scalars_of(beta, t, live, h, H).to(ACC)
        dKS, dQS, dKE = tl.zeros((C, BK), ACC), tl.zeros((C, BK), ACC), tl.zeros((C, BK), ACC)
        through_state = tl.zeros((BK,), ACC)
        for first in range(0, V, BV):
            j = first + tl.arange(0, BV)
            at = (c.to(tl.int64) * H + h) * K * V + j[:, None] + d[None, :] * V  # transposed: (V, K)
            inside = (j < V)[:, None] & (d < K)[None, :]
            St = tl.load(starts + at, mask=inside, other=0.0)
            dSt = tl.load(d_next + at, mask=inside, other=0.0)
            through_state += tl.sum(St.to(ACC) * dSt, 0)
            dQS += tl.dot(rows_of(do, t, live, h, H, V, j), St, input_precision=PRECISION)
            dKE += tl.dot(rows_of(error, t, live, h, H, V, j), dSt, input_precision=PRECISION)
            if DELTA or HAS_DP:
                W = rows_of(w, t, live, h, H, V, j)
                Z = readers(dp, W, strength, t, live, h, H, V, j, C, BV, ACC, DELTA, HAS_DP)
                dKS += tl.dot(Z.to(dtype), St, input_precision=PRECISION)
        b = sums(g, t, live, h, H)
        last = tl.sum(tl.where(i == C - 1, b, 0.0), 0)
        f = tl.exp(b.to(ACC))
        keys, queries = rows_of(k, t, live, h, H, K, d), rows_of(q, t, live, h, H, K, d)
        at = (c.to(tl.int64) * H + h) * C * C + i[:, None] * C + i[None, :]
        HA, HQ = tl.load(ha + at), tl.load(hq + at)
        d_queries = dQS * (f * scale)[:, None] + tl.dot(HQ, keys, input_precision=PRECISION)
        put_rows(dq, d_queries, t, live, h, H, K, d)
        reads = dKS * f[:, None] + tl.dot(HA, keys, input_precision=PRECISION)
        writes = dKE * (strength * tl.exp((last - b).to(ACC)))[:, None]
        at_end = tl.sum(keys * writes) + tl.exp(last.to(ACC)) * tl.sum(through_state, 0)
        writes += tl.dot(tl.trans(HA), keys, input_precision=PRECISION)
        writes += tl.dot(tl.trans(HQ), queries, input_precision=PRECISION)
        put_rows(dk, reads + writes, t, live, h, H, K, d)
        db = tl.sum(queries * d_queries + keys * (reads - writes), 1)
        db += tl.where(t == stop - 1, at_end, 0.0)  # b_C is in e and in f_C
        at = dg + (part.to(tl.int64) * T + t) * H + h
        tl.store(at, tl.cumsum(db, 0, reverse=True).to(dg.dtype.element_ty), mask=live)
