"""Triton kernels of the gated delta rule, forward. The equations and the letters are those of `torch_chunks.py`.

Three launches: `prepare` (per chunk: the triangular inverse X and what needs no state), `scan` (per sequence: states in
order, the writes U) and `read` (per chunk: predictions and outputs). A chunk never crosses the end of a sequence; chunk
c spans the tokens chunks[c, 0] <= t < chunks[c, 1], and an empty one is skipped.

What can be long, chunks and sequences, is on the grid's first axis: the others end at 65,535.

Decays are summed in float64, since after a reset float32 would lose the small ones; all other arithmetic accumulates in
ACC (float32; float64 for float64 inputs), and matrix products take their operands in the inputs' dtype.
"""

import triton
import triton.language as tl


@triton.jit
def inverse(L, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + L)^-1 of strictly lower triangular L (C, C), by forward substitution.

    Row by row in the blocks of 16 on the diagonal, side by side; then two inverted blocks X, Y with M below them become
    [[X, 0], [-Y M X, Y]].
    """
    N: tl.constexpr = C // 16
    n = tl.arange(0, N)
    on_diagonal = n[:, None, None, None] == n[None, None, :, None]
    small = tl.sum(tl.where(on_diagonal, tl.reshape(L, (N, 16, N, 16)), 0.0), 2)  # (N, 16, 16)
    i = tl.arange(0, 16)
    X = tl.zeros_like(small) + (i[:, None] == i[None, :]).to(L.dtype)[None, :, :]
    for row in tl.static_range(1, 16):
        at_row = (i == row)[None, :, None]
        above = tl.sum(tl.where(at_row, small, 0.0), 1)  # (N, 16)
        X -= tl.where(at_row, tl.sum(above[:, :, None] * X, 1)[:, None, :], 0.0)
    full = tl.reshape(tl.where(on_diagonal, X[:, :, None, :], 0.0), (C, C))
    i = tl.arange(0, C)
    for level in tl.static_range(4, 6):
        if (1 << level) < C:
            M = tl.where(_below(i, 1 << level), L, 0.0)
            full -= tl.dot(tl.dot(full, M, input_precision=PRECISION), full, input_precision=PRECISION)
    return full


@triton.jit
def _below(i, size):
    """Where the lower left block of a pair of diagonal blocks is."""
    block = i // size
    return (block[:, None] == block[None, :] + 1) & (block[:, None] // 2 == block[None, :] // 2)


@triton.jit
def rows_of(x, t, live, h, H, D: tl.constexpr, d):
    """Rows x[t, h, d] (T, H, D) of a chunk; zeros past its end."""
    return tl.load(
        x + (t.to(tl.int64) * H + h)[:, None] * D + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0
    )


@triton.jit
def put_rows(x, value, t, live, h, H, D: tl.constexpr, d):
    """Writes rows (C, D) of a chunk to x[t, h, d] (T, H, D), those past its end excepted."""
    at = x + (t.to(tl.int64) * H + h)[:, None] * D + d[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=live[:, None] & (d < D)[None, :])


@triton.jit
def scalars_of(x, t, live, h, H):
    """x[t, h] (T, H) of a chunk; zeros past its end."""
    return tl.load(x + t.to(tl.int64) * H + h, mask=live, other=0.0)


@triton.jit
def decays(b, C: tl.constexpr, ACC: tl.constexpr):
    """D (C, C) with D_ij = e^(b_i - b_j) for i >= j, f = e^b and e = e^(b_C - b) (C,), and f_C."""
    i = tl.arange(0, C)
    later = i[:, None] >= i[None, :]
    D = tl.where(later, tl.exp(tl.where(later, b[:, None] - b[None, :], 0.0).to(ACC)), 0.0)
    last = tl.sum(tl.where(i == C - 1, b, 0.0), 0)
    return D, tl.exp(b.to(ACC)), tl.exp((last - b).to(ACC)), tl.exp(last.to(ACC))


@triton.jit
def state_of(x, at, inside, ACC: tl.constexpr):
    """A state x[at], or zeros where there is none."""
    return tl.zeros(at.shape, ACC) if x is None else tl.load(x + at, mask=inside, other=0.0).to(ACC)


@triton.jit
def strict(A, C: tl.constexpr):
    """A (C, C) below the diagonal, zeros elsewhere."""
    i = tl.arange(0, C)
    return tl.where(i[:, None] > i[None, :], A, 0.0)


@triton.jit
def sums(g, t, live, h, H):
    """b (C,) float64, the running sum of the log-decays; it stays level past the chunk's end.

    What decays to nothing (e^-1000 is 0 in float64 too) may be -inf, whose differences would be NaN.
    """
    x = scalars_of(g, t, live, h, H).to(tl.float64)
    return tl.cumsum(tl.where(x < -1000.0, -1000.0, x), 0)


@triton.jit
def prepare(
    k, v, g, beta, chunks, e, x, w, u, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, H): X beta f K -> w (T, H, K), X beta V -> u (T, H, V), e -> e (T, H).

    With x, for the backward pass, X -> x (chunks, H, C, C), and Y in place of X beta: Y f K -> w, Y V -> u, where
    Y = I - A X beta, since V - P = Y (V - f K S). Without the delta rule V - P is V, which is not copied.
    """
    c, h = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(chunks + 2 * c), tl.load(chunks + 2 * c + 1)
    if start < stop:
        i, d = tl.arange(0, C), tl.arange(0, BK)
        t, live = start + i, start + i < stop
        D, f, to_end, _ = decays(sums(g, t, live, h, H), C, ACC)
        tl.store(e + t.to(tl.int64) * H + h, to_end, mask=live)
        strength = scalars_of(beta, t, live, h, H).to(ACC)
        keys = rows_of(k, t, live, h, H, K, d)
        if DELTA:
            A = strict(tl.dot(keys, tl.trans(keys), input_precision=PRECISION).to(ACC) * D, C)
            X = inverse(A * strength[:, None], C, PRECISION)
            M = (X * strength[None, :]).to(k.dtype.element_ty)
            if x is not None:
                at = x + (c.to(tl.int64) * H + h) * C * C + i[:, None] * C + i[None, :]
                tl.store(at, X.to(x.dtype.element_ty))
                AXb = tl.dot(A.to(k.dtype.element_ty), M, input_precision=PRECISION)
                M = (tl.where(i[:, None] == i[None, :], 1.0, 0.0) - AXb).to(k.dtype.element_ty)
            fk = (keys * f[:, None]).to(k.dtype.element_ty)
            put_rows(w, tl.dot(M, fk, input_precision=PRECISION), t, live, h, H, K, d)
        if DELTA or x is None:
            for first in tl.static_range(0, V, BV):
                j = first + tl.arange(0, BV)
                values = rows_of(v, t, live, h, H, V, j)
                U = tl.dot(M, values, input_precision=PRECISION) if DELTA else values * strength[:, None]
                put_rows(u, U, t, live, h, H, V, j)


@triton.jit
def scan(
    k, g, e, beta, w, u, chunks, offsets, initial, starts, final, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """Grid (N * V / BV, H): states at the start of every chunk -> starts (chunks, H, K, V); u becomes U; -> final.

    With beta, for the backward pass, u becomes V - P, and U is beta (V - P), or beta V without the delta rule.
    """
    n, block, h = tl.program_id(0) // tl.cdiv(V, BV), tl.program_id(0) % tl.cdiv(V, BV), tl.program_id(1)
    i, d = tl.arange(0, C), tl.arange(0, BK)
    j = block * BV + tl.arange(0, BV)
    inside = (d < K)[:, None] & (j < V)[None, :]
    cell = d[:, None] * V + j[None, :]
    S = state_of(initial, (n.to(tl.int64) * H + h) * K * V + cell, inside, ACC)
    first, end = tl.load(offsets + n), tl.load(offsets + n + 1)
    for step in range(0, end - first):
        c = first + step
        start, stop = tl.load(chunks + 2 * c), tl.load(chunks + 2 * c + 1)
        t, live = start + i, start + i < stop
        state = S.to(k.dtype.element_ty)
        tl.store(starts + (c.to(tl.int64) * H + h) * K * V + cell, state, mask=inside)
        U = rows_of(u, t, live, h, H, V, j)
        if DELTA:
            XK = rows_of(w, t, live, h, H, K, d)
            U = (U - tl.dot(XK, state, input_precision=PRECISION)).to(k.dtype.element_ty)
            put_rows(u, U, t, live, h, H, V, j)
        at = start.to(tl.int64) * H + h
        f_C = tl.load(e + at) * tl.exp(tl.load(g + at).to(ACC))  # of the first token: to the end, and from the start
        weight = scalars_of(e, t, live, h, H)
        if beta is not None:
            weight *= scalars_of(beta, t, live, h, H).to(ACC)
        eU = (U * weight[:, None]).to(k.dtype.element_ty)
        keys = rows_of(k, t, live, h, H, K, d)
        S = S * f_C + tl.dot(tl.trans(keys), eU, input_precision=PRECISION)
    if final is not None:
        tl.store(final + (n.to(tl.int64) * H + h) * K * V + cell, S.to(final.dtype.element_ty), mask=inside)


@triton.jit
def read(
    q, k, v, g, u, starts, chunks, o, p, scale, T, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, PREDICT: tl.constexpr,
):  # fmt: skip
    """Grid (chunks * V / BV, H): O = scale (f Q S + Qm U) -> o (T, H, V), and what is wanted of P = f K S + A U.

    With PREDICT 1 all -> p (T, H, V), with 2 what a block of V adds to P.V and P.P -> p (V / BV, T, H, 2), with 0
    nothing.
    """
    c, block, h = tl.program_id(0) // tl.cdiv(V, BV), tl.program_id(0) % tl.cdiv(V, BV), tl.program_id(1)
    start, stop = tl.load(chunks + 2 * c), tl.load(chunks + 2 * c + 1)
    if start < stop:
        i, d = tl.arange(0, C), tl.arange(0, BK)
        e = block * BV + tl.arange(0, BV)
        t, live = start + i, start + i < stop
        D, f, _, _ = decays(sums(g, t, live, h, H), C, ACC)
        inside = (d < K)[:, None] & (e < V)[None, :]
        at = starts + (c.to(tl.int64) * H + h) * K * V + d[:, None] * V + e[None, :]
        S = tl.load(at, mask=inside, other=0.0)
        U = rows_of(u, t, live, h, H, V, e)
        queries, keys = rows_of(q, t, live, h, H, K, d), rows_of(k, t, live, h, H, K, d)
        Qm = tl.dot(queries, tl.trans(keys), input_precision=PRECISION).to(ACC) * D
        out = tl.dot(queries, S, input_precision=PRECISION) * f[:, None]
        out += tl.dot(Qm.to(U.dtype), U, input_precision=PRECISION)
        put_rows(o, out * scale, t, live, h, H, V, e)
        if PREDICT > 0:
            A = strict(tl.dot(keys, tl.trans(keys), input_precision=PRECISION).to(ACC) * D, C)
            P = tl.dot(keys, S, input_precision=PRECISION) * f[:, None]
            P += tl.dot(A.to(U.dtype), U, input_precision=PRECISION)
            if PREDICT == 1:
                put_rows(p, P, t, live, h, H, V, e)
            else:
                at = p + ((block.to(tl.int64) * T + t) * H + h) * 2
                values = rows_of(v, t, live, h, H, V, e).to(ACC)
                tl.store(at, tl.sum(P * values, 1), mask=live)
                tl.store(at + 1, tl.sum(P * P, 1), mask=live)
