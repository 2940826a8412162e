"""The Triton backend of routed attention: the plan of ranks, the launches, and what autograd and torch.compile need.

The plan is made on the device, so that nothing waits for the host.
"""

import torch
from torch import Tensor

from kernels.dispatch import interpreted
from kernels.launch import on, warpgroups
from kernels.routed_attention import triton_kernels as kernels
from kernels.routed_attention.triton_ranks import plan
from kernels.sequences import Layout


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stored: Tensor,
    bias: Tensor | None,
    *,
    scale: float,
    layout: Layout,
    window: int,
) -> Tensor:
    """Shapes as in `kernels.routed_attention.routed_attention`; K and V up to 256.

    float16, bfloat16, float32 or float64, which q, k and v share.
    """
    dtype = v.dtype
    if interpreted() and dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32  # the interpreter's arithmetic on bfloat16 is wrong (triton issue 11584)
    q, k, v = (x.to(dtype).contiguous() for x in (q, k, v))
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    bias = None if bias is None else bias.to(exact).contiguous()
    return _forward(q, k, v, bias, *plan(stored, layout, window), scale, window)[0]


def blocks(v: Tensor, size: int, *, keys: bool = False, more: bool = False) -> tuple[int, int, int, int]:
    """(queries, keys, warps, stages) of a program, as compiled ahead of time: nothing is tuned at run time.

    Its sums are in registers and its operands in shared memory. `size` is the larger of K and V; `keys`: the program
    that sums over queries; `more`: with a window or a bias, which take registers of their own.
    """
    half = v.dtype in (torch.float16, torch.bfloat16)
    if warpgroups(v.device):
        wide = size > 128 or (keys and more and size > 64)
        if half:
            return (64, 32 if wide else 64, 8, 3) if keys or wide else (128, 64, 8, 3)
        return (32, 32, 8, 2) if wide else (64, 32, 8, 2)
    if half and size <= 64:
        return (64 if keys else 128, 64, 8, 2)
    if half:
        return (64, 32 if keys and more else 64, 8, 2) if size <= 128 else (32, 32, 8, 1)
    return (64, 32, 8, 2) if size <= 64 else (32, 32, 8, 1) if size <= 128 else (16, 16, 4, 1)


def _options(q: Tensor, v: Tensor, bias: Tensor | None, *, keys: bool = False, window: int = 0) -> dict:
    import triton.language as tl
    from triton import next_power_of_2

    K, V = q.shape[-1], v.shape[-1]
    BM, BN, warps, stages = blocks(v, max(K, V), keys=keys, more=window > 0 or bias is not None)
    half = v.dtype in (torch.float16, torch.bfloat16)
    return dict(
        K=K,
        V=V,
        BK=max(16, next_power_of_2(K)),
        BV=max(16, next_power_of_2(V)),
        BM=BM,
        BN=BN,
        HAS_BIAS=bias is not None,
        ACC=tl.float64 if v.dtype == torch.float64 else tl.float32,
        PRECISION="ieee" if half or v.dtype == torch.float64 or interpreted() else "tf32x3",
        num_warps=warps,
        num_stages=stages,
    )


@torch.library.custom_op("lightning_mixers::routed_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
    index: Tensor, counts: Tensor, low: Tensor, high: Tensor, starts: Tensor, ends: Tensor,
    scale: float, window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output (B, T, H, V) and the log of every softmax's sum (B, H, T)."""
    (B, T, heads, _), H = q.shape, k.shape[2]
    o, lse = _empty(q, v)
    options = _options(q, v, bias)
    with on(v):
        kernels.forward[(-(-T // options["BM"]) * B * heads,)](
            q, k, v, k if bias is None else bias, index, low, high, starts, o, lse, scale, T, H, heads // H, window,
            **options, NEAR=window > 0,
        )  # fmt: skip
    return o, lse


@_forward.register_fake
def _(q, k, v, bias, index, counts, low, high, starts, ends, scale, window):
    return _empty(q, v)


def _empty(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    B, T, heads, _ = q.shape
    exact = torch.float64 if v.dtype == torch.float64 else torch.float32
    return v.new_empty(B, T, heads, v.shape[-1]), v.new_empty(B, heads, T, dtype=exact)


@torch.library.custom_op("lightning_mixers::routed_attention_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
    index: Tensor, counts: Tensor, low: Tensor, high: Tensor, starts: Tensor, ends: Tensor,
    o: Tensor, lse: Tensor, do: Tensor, scale: float, window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and bias (empty without one)."""
    (B, T, heads, _), H = q.shape, k.shape[2]
    delta = (o.to(lse.dtype) * do).sum(-1).transpose(1, 2).contiguous()  # (B, heads, T)
    dq = torch.empty_like(q)
    near = window > 0
    # without a window the rows of tokens that are not stored are never written; with one, sums pass through memory
    dk, dv = (torch.zeros_like(x, dtype=lse.dtype if near else None) for x in (k, v))
    d_bias = lse.new_empty(0) if bias is None else torch.zeros_like(bias)
    some_bias = k if bias is None else bias
    options, options_kv = _options(q, v, bias), _options(q, v, bias, keys=True, window=window)
    with on(v):
        kernels.backward_q[(-(-T // options["BM"]) * B * heads,)](
            q, k, v, some_bias, index, low, high, starts, do, lse, delta, dq, scale, T, H, heads // H, window,
            **options, NEAR=near,
        )  # fmt: skip
        for by_position in (False, True) if near else (False,):
            kernels.backward_kv[(-(-T // options_kv["BN"]) * B * H,)](
                q, k, v, some_bias, index, counts, low, high, starts, ends, do, lse, delta, dk, dv, d_bias,
                scale, T, H, heads // H, window, **options_kv, NEAR=by_position,
            )  # fmt: skip
    return dq, dk.to(k.dtype), dv.to(v.dtype), d_bias


@_backward.register_fake
def _(q, k, v, bias, index, counts, low, high, starts, ends, o, lse, do, scale, window):
    d_bias = lse.new_empty(0) if bias is None else torch.empty_like(bias)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), d_bias


def _save(ctx, inputs, output):
    *tensors, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx, do, _):
    *tensors, o, lse = ctx.saved_tensors
    dq, dk, dv, d_bias = _backward(*tensors, o, lse, do.contiguous(), ctx.scale, ctx.window)
    return dq, dk, dv, d_bias if tensors[3] is not None else None, *[None] * 8


_forward.register_autograd(_differentiate, setup_context=_save)
