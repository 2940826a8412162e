"""Triton kernels of attention over stored tokens: keys and values are gathered by rank, so cost follows what is stored.

The stored tokens of a row (a sequence's key head) are numbered 0, 1, ... in order: `index` (rows, T) holds their
positions by rank. Query t sees the ranks low[t] <= r < high[t] of its row (low: where its document begins; high: how
many tokens are stored up to t, or up to t - window with a local window), and with a window also every token of its
document with t - window < j <= t. Blocks of ranks that no query of a block sees are never visited; those that all of
them see whole are most, and are in a loop of their own, which masks nothing.

Logits are in units of log 2, since exp2 is what a GPU has.

Grids have one axis, since the others end at 65,535: blocks of a row side by side, row after row.

Rows of q, k, v are (T, heads, D); a row of `index`, `low`, `high` is one per (batch, key head).
"""

import triton
import triton.language as tl


@triton.jit
def tile(x, t, seen, h, H, D: tl.constexpr, d, WHOLE: tl.constexpr = False):
    """x[t, h, d] of (T, H, D); zeros where a token is not `seen`. WHOLE: all are."""
    at = x + (t.to(tl.int64) * H + h)[:, None] * D + d[None, :]
    if WHOLE and d.shape[0] == D:
        return tl.load(at)
    return tl.load(at, mask=(d < D)[None, :] if WHOLE else seen[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def put(x, value, t, seen, h, H, D: tl.constexpr, d):
    at = x + (t.to(tl.int64) * H + h)[:, None] * D + d[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=seen[:, None] & (d < D)[None, :])


@triton.jit
def logits_of(q, k, bias, h, H, j, seen, scale, HAS_BIAS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """Logits (M, N), by log 2, of loaded queries q (M, K) and keys k (N, K) at tokens j."""
    log2e = tl.full((), 1.4426950408889634, ACC)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION).to(ACC) * (scale * log2e)
    if HAS_BIAS:
        s += (tl.load(bias + j.to(tl.int64) * H + h, mask=seen, other=0.0) * log2e)[None, :]
    return s


@triton.jit
def keys_at(r, ranks, index, row, T, near: tl.constexpr):
    """Tokens j of a block of keys r (BN,), by rank, or `near`, by position; and where it holds any."""
    there = r < ranks
    return (r if near else tl.load(index + row.to(tl.int64) * T + r, mask=there, other=0)), there


@triton.jit
def visible(t, j, r, low, high, start, window, near: tl.constexpr):
    """Which keys a query sees (M, N): stored ones by rank, or those of its window."""
    if near:
        behind = t[:, None] - j[None, :]
        return (behind >= 0) & (behind < window) & (j[None, :] >= start[:, None])
    return (r[None, :] >= low[:, None]) & (r[None, :] < high[:, None])


@triton.jit
def queries_of(low, high, starts, T, H, G, BM: tl.constexpr):
    """What a program's block of queries is: batch, head, key head, row, block, tokens, and what each may see."""
    blocks = tl.cdiv(T, BM)
    block = blocks - 1 - tl.program_id(0) % blocks  # the longest first
    b, hq = tl.program_id(0) // blocks // (H * G), tl.program_id(0) // blocks % (H * G)
    h = hq // G
    row = b * H + h
    t = block * BM + tl.arange(0, BM)
    live = t < T
    lo = tl.load(low + row.to(tl.int64) * T + t, mask=live, other=2147483647)
    hi = tl.load(high + row.to(tl.int64) * T + t, mask=live, other=0)
    start = tl.load(starts + b.to(tl.int64) * T + t, mask=live, other=2147483647)
    return b, hq, h, row, block, t, live, lo, hi, start


@triton.jit
def range_of(near: tl.constexpr, block, live, lo, hi, start, T, window, BM: tl.constexpr, BN: tl.constexpr):
    """Of the keys, by rank or by position if `near`: first and last (excluded) that some query of a block sees, and
    in between, in whole blocks, first and last that all of them see.
    """
    if near:
        end = tl.minimum((block + 1) * BM, T)
        first, last = tl.maximum(tl.maximum(block * BM - window + 1, tl.min(start, 0)), 0), end
        inner, after = tl.maximum(end - window, tl.max(tl.where(live, start, 0), 0)), block * BM + 1
    else:
        first, last = tl.min(lo, 0), tl.max(hi, 0)
        inner, after = tl.max(tl.where(live, lo, 0), 0), tl.min(tl.where(live, hi, 2147483647), 0)
    inner, after = whole_blocks(inner, after, BN)
    return first // BN * BN, last, inner, after


@triton.jit
def whole_blocks(inner, after, B: tl.constexpr):
    """Bounds of the blocks that are within [inner, after)."""
    inner = tl.cdiv(tl.maximum(inner, 0), B) * B
    return inner, tl.maximum(inner, after // B * B)


@triton.jit
def steps_of(WHOLE: tl.constexpr, first, last, inner, after, B: tl.constexpr):
    """How many blocks are whole, or how many of [first, last) are not."""
    whole = (after - inner) // B
    return whole if WHOLE else tl.maximum(tl.cdiv(tl.maximum(last - first, 0), B) - whole, 0)


@triton.jit
def step_at(WHOLE: tl.constexpr, step, first, inner, after, B: tl.constexpr):
    """Where the next of them begins."""
    if WHOLE:
        return inner + step * B
    at = first + step * B
    return at + tl.where(at >= inner, after - inner, 0)


@triton.jit
def forward(
    q, k, v, bias, index, low, high, starts, o, lse, scale, T, H, G, window,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_BIAS: tl.constexpr, NEAR: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (B * H * G * T / BM,): outputs -> o (B T, H G, V), log2 of the softmax's sum -> lse (B H G, T)."""
    b, hq, h, row, block, t, live, lo, hi, start = queries_of(low, high, starts, T, H, G, BM)
    heads = H * G
    d, e, n = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BN)
    base, biases = b.to(tl.int64) * T, bias + b.to(tl.int64) * T * H
    queries = tile(q, base + t, live, hq, heads, K, d)
    acc = tl.zeros((BM, BV), ACC)
    top = tl.full((BM,), float("-inf"), ACC)
    total = tl.zeros((BM,), ACC)
    for near in tl.static_range(2 if NEAR else 1):
        first, last, inner, after = range_of(near == 1, block, live, lo, hi, start, T, window, BM, BN)
        for whole in tl.static_range(2):
            for step in range(0, steps_of(whole == 1, first, last, inner, after, BN)):
                r = step_at(whole == 1, step, first, inner, after, BN) + n
                j, there = keys_at(r, last, index, row, T, near == 1)
                keys = tile(k, base + j, there, h, H, K, d, whole == 1)
                values = tile(v, base + j, there, h, H, V, e, whole == 1)
                s = logits_of(queries, keys, biases, h, H, j, there, scale, HAS_BIAS, ACC, PRECISION)
                if whole == 0:
                    see = visible(t, j, r, lo, hi, start, window, near == 1) & there[None, :]
                    s = tl.where(see, s, float("-inf"))
                new = tl.maximum(top, tl.max(s, 1))
                shift = tl.where(new == float("-inf"), 0.0, new)  # nothing seen yet
                p = tl.exp2(s - shift[:, None])
                fade = tl.exp2(top - shift)
                total = total * fade + tl.sum(p, 1)
                acc = acc * fade[:, None] + tl.dot(p.to(v.dtype.element_ty), values, input_precision=PRECISION)
                top = new
    some = total > 0
    put(o, acc / tl.where(some, total, 1.0)[:, None], base + t, live, hq, heads, V, e)
    value = tl.where(some, top + tl.log2(tl.where(some, total, 1.0)), float("inf"))  # inf: weights of exp2(-inf)
    tl.store(lse + (b * heads + hq).to(tl.int64) * T + t, value, mask=live)


@triton.jit
def backward_q(
    q, k, v, bias, index, low, high, starts, do, lse, delta, dq, scale, T, H, G, window,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_BIAS: tl.constexpr, NEAR: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid as `forward`: dq. `delta` (B H G, T) is the sum of o * do."""
    b, hq, h, row, block, t, live, lo, hi, start = queries_of(low, high, starts, T, H, G, BM)
    heads = H * G
    d, e, n = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BN)
    base, biases = b.to(tl.int64) * T, bias + b.to(tl.int64) * T * H
    queries = tile(q, base + t, live, hq, heads, K, d)
    d_out = tile(do, base + t, live, hq, heads, V, e)
    at = (b * heads + hq).to(tl.int64) * T + t
    log_sum = tl.load(lse + at, mask=live, other=float("inf"))
    dot = tl.load(delta + at, mask=live, other=0.0)
    acc = tl.zeros((BM, BK), ACC)
    for near in tl.static_range(2 if NEAR else 1):
        first, last, inner, after = range_of(near == 1, block, live, lo, hi, start, T, window, BM, BN)
        for whole in tl.static_range(2):
            for step in range(0, steps_of(whole == 1, first, last, inner, after, BN)):
                r = step_at(whole == 1, step, first, inner, after, BN) + n
                j, there = keys_at(r, last, index, row, T, near == 1)
                keys = tile(k, base + j, there, h, H, K, d, whole == 1)
                values = tile(v, base + j, there, h, H, V, e, whole == 1)
                s = logits_of(queries, keys, biases, h, H, j, there, scale, HAS_BIAS, ACC, PRECISION)
                p = tl.exp2(s - log_sum[:, None])
                if whole == 0:
                    see = visible(t, j, r, lo, hi, start, window, near == 1) & there[None, :]
                    p = tl.where(see, p, 0.0)
                ds = p * (tl.dot(d_out, tl.trans(values), input_precision=PRECISION).to(ACC) - dot[:, None])
                acc += tl.dot(ds.to(k.dtype.element_ty), keys, input_precision=PRECISION)
    put(dq, acc * scale, base + t, live, hq, heads, K, d)


@triton.jit
def backward_kv(
    q, k, v, bias, index, counts, low, high, starts, ends, do, lse, delta, dk, dv, d_bias, scale, T, H, G, window,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_BIAS: tl.constexpr, NEAR: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (B * H * T / BN,): dk, dv and d_bias of a block of stored tokens, or with NEAR of a block of positions,
    whose gradients are added to what is there. A token's row is written by one program: there are no atomics.
    """
    row, block = tl.program_id(0) // tl.cdiv(T, BN), tl.program_id(0) % tl.cdiv(T, BN)
    b, h = row // H, row % H
    heads = H * G
    count = T if NEAR else tl.load(counts + row)
    first = block * BN
    if first < count:
        m, d, e = tl.arange(0, BM), tl.arange(0, BK), tl.arange(0, BV)
        r = first + tl.arange(0, BN)
        j, there = keys_at(r, count, index, row, T, NEAR)
        base, biases = b.to(tl.int64) * T, bias + b.to(tl.int64) * T * H
        keys, values = tile(k, base + j, there, h, H, K, d), tile(v, base + j, there, h, H, V, e)
        d_keys, d_values = tl.zeros((BN, BK), ACC), tl.zeros((BN, BV), ACC)
        d_logits = tl.zeros((BN,), ACC)
        ends_of = tl.load(ends + base + j, mask=there, other=0)
        newest, end = tl.max(tl.where(there, j, 0), 0), tl.max(ends_of, 0)  # key, and end of its document
        oldest = tl.min(tl.where(there, j, T), 0)
        inner, after = newest + window, tl.min(tl.where(there, ends_of, T), 0)
        if NEAR:
            end = tl.minimum(end, newest + window)
            inner, after = newest, tl.minimum(after, oldest + window)
        from_t = oldest // BM * BM
        inner, after = whole_blocks(inner, tl.where(first + BN <= count, after, 0), BM)
        for whole in tl.static_range(2):
            for step in range(0, steps_of(whole == 1, from_t, end, inner, after, BM)):
                t = step_at(whole == 1, step, from_t, inner, after, BM) + m
                live = t < end
                if whole == 0:
                    lo = tl.load(low + row.to(tl.int64) * T + t, mask=live, other=2147483647)
                    hi = tl.load(high + row.to(tl.int64) * T + t, mask=live, other=0)
                    start = tl.load(starts + base + t, mask=live, other=2147483647)
                    see = visible(t, j, r, lo, hi, start, window, NEAR) & there[None, :] & live[:, None]
                for g in range(0, G):
                    hq = h * G + g
                    queries = tile(q, base + t, live, hq, heads, K, d, whole == 1)
                    d_out = tile(do, base + t, live, hq, heads, V, e, whole == 1)
                    at = (b.to(tl.int64) * heads + hq) * T + t
                    log_sum = tl.load(lse + at, mask=live, other=float("inf"))
                    dot = tl.load(delta + at, mask=live, other=0.0)
                    s = logits_of(queries, keys, biases, h, H, j, there, scale, HAS_BIAS, ACC, PRECISION)
                    p = tl.exp2(s - log_sum[:, None])
                    if whole == 0:
                        p = tl.where(see, p, 0.0)
                    d_values += tl.dot(tl.trans(p.to(v.dtype.element_ty)), d_out, input_precision=PRECISION)
                    ds = p * (tl.dot(d_out, tl.trans(values), input_precision=PRECISION).to(ACC) - dot[:, None])
                    d_logits += tl.sum(ds, 0)
                    d_keys += tl.dot(tl.trans(ds.to(q.dtype.element_ty)), queries, input_precision=PRECISION)
        d_keys *= scale
        if NEAR:
            d_keys += tile(dk, base + j, there, h, H, K, d)
            d_values += tile(dv, base + j, there, h, H, V, e)
        put(dk, d_keys, base + j, there, h, H, K, d)
        put(dv, d_values, base + j, there, h, H, V, e)
        if HAS_BIAS:
            at = d_bias + (base + j) * H + h
            if NEAR:
                d_logits += tl.load(at, mask=there, other=0.0)
            tl.store(at, d_logits.to(d_bias.dtype.element_ty), mask=there)
