"""The Triton backend of the gated delta rule: shapes, launches, and what autograd and torch.compile need to know.

Every batch is run as packed sequences. The tables that say which tokens form a chunk are computed on the device, with
room for the most chunks that there can be, so that nothing waits for the host.
"""

import torch
from torch import Tensor

from kernels.delta_rule import triton_backward as backward_kernels
from kernels.delta_rule import triton_forward as forward_kernels
from kernels.dispatch import interpreted
from kernels.sequences import Layout

PREDICT = {"none": 0, "values": 1, "statistics": 2}

Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float,
    initial_state: Tensor,
    layout: Layout,
    delta: bool,
    predict: str = "values",
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Shapes as in `kernels.delta_rule.gated_delta_rule`, q and k with as many heads as v; K and V up to 256; float16,
    bfloat16, float32 or float64, which q, k and v share. g, beta and the state are float32 at least.
    """
    B, T = v.shape[:2]
    if interpreted() and v.dtype in (torch.float16, torch.bfloat16):
        v = v.float()  # the interpreter's arithmetic on bfloat16 is wrong (triton issue 11584)
    cu_seqlens = bounds_of(layout)
    flat = (x.flatten(0, 1).contiguous() for x in (q.to(v.dtype), k.to(v.dtype), v, g, beta))
    o, p, state, *_ = _forward(*flat, initial_state.contiguous(), cu_seqlens, scale, delta, PREDICT[predict])
    o = o.unflatten(0, (B, T))
    if predict != "values":
        p = p.detach()
    return o, None if predict == "none" else p.unflatten(0, (B, T)), state


def bounds_of(layout: Layout) -> Tensor:
    """(N + 1,) int32: where every sequence begins in the flattened (B * T), and the end."""

    def rows() -> Tensor:
        B, T = layout.batch, layout.tokens
        return torch.arange(0, (B + 1) * T, T, device=layout.lengths.device, dtype=torch.int32)

    return layout.cu_seqlens if layout.packed else layout.once("rows", rows)


def chunk_size(K: int, V: int) -> int:
    """Tokens of a chunk: as many as the registers of a program hold."""
    return 64 if max(K, V) <= 128 else 32


def constants(v: Tensor, K: int) -> dict:
    """What the kernels are compiled for: sizes, blocks, precision."""
    V = v.shape[-1]
    half = v.dtype in (torch.float16, torch.bfloat16)
    exact = v.dtype == torch.float64 or interpreted()
    import triton.language as tl
    from triton import next_power_of_2

    return dict(
        K=K,
        V=V,
        BK=max(16, next_power_of_2(K)),
        BV=min(64, max(16, next_power_of_2(V))),
        C=chunk_size(K, V),
        ACC=tl.float64 if v.dtype == torch.float64 else tl.float32,
        PRECISION="ieee" if exact else "tf32" if half else "tf32x3",
    )


def chunk_tables(cu_seqlens: Tensor, T: int, C: int) -> tuple[Tensor, Tensor]:
    """(chunks (most, 2), offsets (N + 1,)), int32: the tokens of every chunk, and where each sequence's chunks begin.

    There are at most T // C + N chunks; those beyond the last are empty.
    """
    lengths = cu_seqlens.diff()
    offsets = torch.nn.functional.pad(((lengths + C - 1) // C).cumsum(0, dtype=torch.int32), (1, 0))
    c = torch.arange(T // C + len(lengths), device=cu_seqlens.device, dtype=torch.int32)
    n = torch.searchsorted(offsets[1:].contiguous(), c, right=True).clamp(max=len(lengths) - 1)
    start = cu_seqlens[n] + (c - offsets[n]) * C
    stop = torch.minimum(start + C, cu_seqlens[n + 1])
    return torch.stack([start, stop], 1).int().contiguous(), offsets


def warps(K: int, V: int, *, heavy: bool = False) -> int:
    """Warps of a program, so that its registers hold its tiles; `heavy`: the kernels that keep several (C, K) sums."""
    return 8 if heavy or max(K, V) > 128 else 4


def _blocks(options: dict) -> int:
    return -(-options["V"] // options["BV"])


@torch.library.custom_op("lightning_mixers::gated_delta_rule", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial: Tensor, cu_seqlens: Tensor,
    scale: float, delta: bool, predict: int,
) -> Tensors:  # fmt: skip
    """q, k (T, H, K), v (T, H, V) -> o, p, final state, and for the backward pass X, U and the chunks' first states."""
    T, H, K = q.shape
    o, p, final, x, u, starts = _empty(q, v, initial, cu_seqlens, predict)
    options = constants(v, K)
    chunks, offsets = chunk_tables(cu_seqlens, T, options["C"])
    w = torch.empty_like(q) if delta else q
    options |= dict(num_warps=warps(K, v.shape[-1]))
    run = forward_kernels
    run.prepare[len(chunks), H](k, v, g, beta, chunks, x, w, u, H, **options, DELTA=delta)
    run.scan[_blocks(options), len(initial), H](
        k, g, w, u, chunks, offsets, initial, starts, final, H, **options, DELTA=delta
    )
    blocks = _blocks(options)
    parts = p.new_empty(blocks, *p.shape) if predict == PREDICT["statistics"] else p
    run.read[blocks, len(chunks), H](q, k, v, g, u, starts, chunks, o, parts, scale, T, H, **options, PREDICT=predict)
    if predict == PREDICT["statistics"]:
        p = parts.sum(0)
    return o, p, final, x, u, starts


@_forward.register_fake
def _(q, k, v, g, beta, initial, cu_seqlens, scale, delta, predict):
    return _empty(q, v, initial, cu_seqlens, predict)


def _empty(q: Tensor, v: Tensor, initial: Tensor, cu_seqlens: Tensor, predict: int) -> Tensors:
    (T, H, K), V = q.shape, v.shape[-1]
    C = chunk_size(K, V)
    most = T // C + cu_seqlens.shape[0] - 1
    o, u = torch.empty_like(v), torch.empty_like(v)
    p = initial.new_empty({0: (0,), 1: v.shape, 2: (T, H, 2)}[predict])
    return o, p, torch.empty_like(initial), v.new_empty(most, H, C, C), u, v.new_empty(most, H, K, V)


@torch.library.custom_op("lightning_mixers::gated_delta_rule_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor,
    p: Tensor, x: Tensor, u: Tensor, starts: Tensor,
    do: Tensor, dp: Tensor | None, d_final: Tensor, scale: float, delta: bool, given: bool,
) -> Tensors:  # fmt: skip
    """Gradients of q, k, v, g, beta and the initial state."""
    (T, H, K), V = q.shape, v.shape[-1]
    options = constants(v, K)
    chunks, offsets = chunk_tables(cu_seqlens, T, options["C"])
    xe, w, d_next = torch.empty_like(q), torch.empty_like(v), torch.empty_like(starts)
    dq, dk, dv, d_beta = (torch.empty_like(t) for t in (q, k, v, beta))
    d_initial = torch.empty_like(d_final)
    has_dp, run = dp is not None, backward_kernels
    dp = p if dp is None else dp  # a pointer that is not read
    options |= dict(DELTA=delta, HAS_DP=has_dp)
    few, many = warps(K, V), warps(K, V, heavy=True)
    part = min(64, options["BK"])  # of K, that a program of gradients_k takes
    parts = -(-K // part)
    dg = g.new_empty(parts, *g.shape)
    ha, hq = torch.empty_like(x), torch.empty_like(x)
    run.prepare_back[len(chunks), H](q, k, g, x, do, dp, chunks, xe, w, scale, H, **options, num_warps=few)
    run.scan_back[_blocks(options), len(d_final), H](
        q, k, g, beta, do, dp, xe, w, chunks, offsets, d_final, d_next, d_initial, scale, H, **options, num_warps=many
    )
    run.gradients_v[len(chunks), H](
        q, k, v, g, beta, p, u, w, starts, do, dp, chunks, dv, d_beta, ha, hq, scale, H,
        **options, GIVEN=given, num_warps=few,
    )  # fmt: skip
    run.gradients_k[parts, len(chunks), H](
        q, k, g, beta, u, w, starts, do, dp, d_next, chunks, ha, hq, dq, dk, dg, scale, T, H,
        **options | dict(BK=part), num_warps=few,
    )  # fmt: skip
    dg = dg.sum(0)
    return dq, dk, dv, dg, d_beta, d_initial


@_backward.register_fake
def _(q, k, v, g, beta, cu_seqlens, p, x, u, starts, do, dp, d_final, scale, delta, given):
    return tuple(torch.empty_like(t) for t in (q, k, v, g, beta, d_final))


def _save(ctx, inputs, output):
    q, k, v, g, beta, initial, cu_seqlens, ctx.scale, ctx.delta, predict = inputs
    ctx.given = predict == PREDICT["values"]
    _, p, final, x, u, starts = output
    ctx.save_for_backward(q, k, v, g, beta, cu_seqlens, p, x, u, starts)
    ctx.state_shape, ctx.state_dtype = final.shape, final.dtype
    ctx.set_materialize_grads(False)


def _differentiate(ctx, do, dp, d_final, *_):
    saved = ctx.saved_tensors
    v = saved[2]
    do = torch.zeros_like(v) if do is None else do.contiguous()
    dp = dp.contiguous() if ctx.given and dp is not None else None
    if d_final is None:
        d_final = v.new_zeros(ctx.state_shape, dtype=ctx.state_dtype)
    return *_backward(*saved, do, dp, d_final.contiguous(), ctx.scale, ctx.delta, ctx.given), *[None] * 4


_forward.register_autograd(_differentiate, setup_context=_save)
