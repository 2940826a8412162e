"""The Triton backend of the gated delta rule: shapes, launches, and what autograd and torch.compile need to know.

Every batch is run as packed sequences. The tables that say which tokens form a chunk are computed on the device, with
room for the most chunks that there can be, so that nothing waits for the host; once per layout, for all layers.

Autograd keeps the inputs alone: X, U and the chunks' first states are made again in the backward pass.
"""

import torch
from torch import Tensor

from kernels.delta_rule import triton_backward as backward_kernels
from kernels.delta_rule import triton_forward as forward_kernels
from kernels.delta_rule.triton_sizes import chunk_size, constants, fit, scan_block
from kernels.dispatch import interpreted
from kernels.launch import on
from kernels.sequences import Layout

PREDICT = {"none": 0, "values": 1, "statistics": 2, "writes": 3}


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None,
    layout: Layout,
    delta: bool,
    predict: str = "values",
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Shapes as in `kernels.delta_rule.gated_delta_rule`, q and k with as many heads as v.

    K and V up to 256; float16, bfloat16, float32 or float64, which q, k and v share. g, beta and the state are float32
    at least. `writes` are those of the delta rule, beta v without it. No initial state is one of zeros.
    """
    B, T = v.shape[:2]
    if interpreted() and v.dtype in (torch.float16, torch.bfloat16):
        v = v.float()  # the interpreter's arithmetic on bfloat16 is wrong (triton issue 11584)
    C = chunk_size(v.dtype, k.shape[-1], v.shape[-1], v.device)
    tables = layout.once(("chunk tables", C), lambda: chunk_tables(bounds_of(layout), B * T, C))
    flat = (x.flatten(0, 1).contiguous() for x in (q.to(v.dtype), k.to(v.dtype), v, g, beta))
    initial_state = None if initial_state is None else initial_state.contiguous()
    o, p, state = _forward(*flat, initial_state, *tables, C, scale, delta, PREDICT[predict])
    o, p = o.unflatten(0, (B, T)), None if predict == "none" else p.unflatten(0, (B, T))
    return o, p if predict in ("values", "none") else p.detach(), state


def bounds_of(layout: Layout) -> Tensor:
    """(N + 1,) int32: where every sequence begins in the flattened (B * T), and the end."""

    def rows() -> Tensor:
        B, T = layout.batch, layout.tokens
        return torch.arange(0, (B + 1) * T, T, device=layout.lengths.device, dtype=torch.int32)

    return layout.cu_seqlens if layout.packed else layout.once("rows", rows)


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


@torch.library.custom_op("lightning_mixers::gated_delta_rule", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial: Tensor | None, chunks: Tensor, offsets: Tensor,
    C: int, scale: float, delta: bool, predict: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k (T, H, K), v (T, H, V) -> o, what is wanted of the predictions, final state."""
    T, H, K = q.shape
    o, p, final = _empty(q, v, g, offsets, predict)
    given = predict == PREDICT["writes"]
    options = constants(v, K, C)
    blocks = -(-v.shape[-1] // options["BV"])
    parts = p.new_empty(blocks, *p.shape) if predict == PREDICT["statistics"] else p
    u, starts = _states(k, v, g, beta, initial, chunks, offsets, None, p if given else None, final, C, delta)
    with on(v):
        forward_kernels.read[len(chunks) * blocks, H](
            q, k, v, g, u, starts, chunks, o, parts, scale, T, H,
            **options, PREDICT=0 if given else predict, **fit("read", v, K),
        )  # fmt: skip
    if predict == PREDICT["statistics"]:
        p = parts.sum(0)
    return o, p, final


def _states(k, v, g, beta, initial, chunks, offsets, x, u, final, C: int, delta: bool) -> tuple[Tensor, Tensor]:
    """The writes U (T, H, V), in `u` if there is one, and the chunks' first states; final state -> final if given.

    With x, for the backward pass, X -> x, and V - P in place of U.
    """
    (_, H, K), V, options = k.shape, v.shape[-1], constants(v, k.shape[-1], C) | dict(DELTA=delta)
    back = x is not None
    if u is None:
        u = v if back and not delta else torch.empty_like(v)
    w, starts = torch.empty_like(k) if delta else k, v.new_empty(len(chunks), H, K, V)
    e, N, run = torch.empty_like(g), len(offsets) - 1, forward_kernels
    narrow = dict(BV=scan_block(options["BV"], V, N * H))
    with on(v):
        run.prepare[len(chunks), H](k, v, g, beta, chunks, e, x, w, u, H, **options, **fit("prepare", v, K))
        run.scan[N * -(-V // narrow["BV"]), H](
            k, g, e, beta if back else None, w, u, chunks, offsets, initial, starts, final, H,
            **options | narrow, **fit("scan", v, K),
        )  # fmt: skip
    return u, starts


@_forward.register_fake
def _(q, k, v, g, beta, initial, chunks, offsets, C, scale, delta, predict):
    return _empty(q, v, g, offsets, predict)


def _empty(q: Tensor, v: Tensor, g: Tensor, offsets: Tensor, predict: int) -> tuple[Tensor, Tensor, Tensor]:
    (T, H, K), V = q.shape, v.shape[-1]
    p = (
        v.new_empty(v.shape)
        if predict == PREDICT["writes"]
        else g.new_empty({0: (0,), 1: v.shape, 2: (T, H, 2)}[predict])
    )
    return torch.empty_like(v), p, g.new_empty(len(offsets) - 1, H, K, V)


@torch.library.custom_op("lightning_mixers::gated_delta_rule_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial: Tensor | None, chunks: Tensor, offsets: Tensor,
    do: Tensor, dp: Tensor | None, d_final: Tensor | None, C: int, scale: float, delta: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, g, beta and the initial state."""
    (T, H, K), V = q.shape, v.shape[-1]
    has_dp, run = dp is not None, backward_kernels
    options = constants(v, K, C) | dict(DELTA=delta, HAS_DP=has_dp)
    x, ha, hq = (v.new_empty(len(chunks), H, C, C) for _ in range(3))
    dp = do if dp is None else dp  # a pointer that is not read
    dq, dk, dv, dg, d_beta, d_initial = _gradients(q, k, v, g, beta, offsets)
    N = len(offsets) - 1
    narrow = dict(BV=scan_block(options["BV"], V, N * H))
    part = min(64, options["BK"])  # of K, that a program of gradients_k takes
    parts = -(-K // part)
    dg_parts = g.new_empty(parts, *g.shape)
    error, starts = _states(k, v, g, beta, initial, chunks, offsets, x, None, None, C, delta)  # V - P
    xe, w, d_next = torch.empty_like(q), torch.empty_like(v), torch.empty_like(starts)
    with on(v):
        run.prepare_back[len(chunks), H](
            q, k, g, x, do, dp, chunks, xe, w, scale, H, **options, **fit("prepare_back", v, K)
        )
        run.scan_back[N * -(-V // narrow["BV"]), H](
            q, k, g, beta, do, dp, xe, w, chunks, offsets, d_final, d_next, d_initial, scale, H,
            **options | narrow, **fit("scan_back", v, K),
        )  # fmt: skip
        run.gradients_v[len(chunks), H](
            g, beta, error, w, do, dp, chunks, dv, d_beta, ha, hq, scale, H,
            **options, **fit("gradients_v", v, K),
        )  # fmt: skip
        run.gradients_k[len(chunks) * parts, H](
            q, k, g, beta, error, w, starts, do, dp, d_next, chunks, ha, hq, dq, dk, dg_parts, scale, T, H,
            **options | dict(BK=part), **fit("gradients_k", v, K),
        )  # fmt: skip
    return dq, dk, dv, dg_parts.sum(0), d_beta, d_initial


@_backward.register_fake
def _(q, k, v, g, beta, initial, chunks, offsets, do, dp, d_final, C, scale, delta):
    return _gradients(q, k, v, g, beta, offsets)


def _gradients(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
    d_initial = g.new_empty(len(offsets) - 1, *q.shape[1:], v.shape[-1])
    return *(torch.empty_like(t) for t in (q, k, v, g, beta)), d_initial


def _save(ctx, inputs, output):
    *tensors, ctx.C, ctx.scale, ctx.delta, predict = inputs
    ctx.values = predict == PREDICT["values"]
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, do, dp, d_final):
    saved = ctx.saved_tensors
    v, initial = saved[2], saved[5]
    do = torch.zeros_like(v) if do is None else do.contiguous()
    dp = dp.contiguous() if ctx.values and dp is not None else None
    d_final = None if d_final is None else d_final.contiguous()
    *gradients, d_initial = _backward(*saved, do, dp, d_final, ctx.C, ctx.scale, ctx.delta)
    return *gradients, None if initial is None else d_initial, *[None] * 6


_forward.register_autograd(_differentiate, setup_context=_save)
