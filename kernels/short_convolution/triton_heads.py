"""The short convolution, SiLU, and queries and keys normalised: one Triton kernel forward and one backward.

Per head, y_t = sum_i w_i x_{t-taps+1+i} over the tokens of its own sequence, s = SiLU(y), and of queries and keys
n = s / sqrt(s.s + 1e-6). Nothing but the input is kept; the backward pass computes the rest anew:

    ds = (dn - n (n.dn)) / sqrt(s.s + 1e-6)      dy = SiLU'(y) ds      dx_t = sum_i w_i dy_{t+taps-1-i}
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import interpreted
from kernels.launch import on
from kernels.sequences import Layout

STEPS = 8  # blocks of tokens of a program of the backward pass, which sums the weight's gradient over them


@triton.jit
def convolved(x, weight, position, t, live, C, c, inside, TAPS: tl.constexpr, ACC: tl.constexpr):
    """y (BT, BD) of tokens t in channels c; `position` (BT,) is their place in their sequences."""
    y = tl.zeros((t.shape[0], c.shape[0]), ACC)
    for lag in tl.static_range(TAPS):
        at = x + (t - lag).to(tl.int64)[:, None] * C + c[None, :]
        before = tl.load(at, mask=(live & (position >= lag))[:, None] & inside[None, :], other=0.0).to(ACC)
        y += before * tl.load(weight + (TAPS - 1 - lag) * C + c, mask=inside, other=0.0).to(ACC)[None, :]
    return y


@triton.jit
def part_of(h, q, k, v, q_heads, k_heads, v_heads, K, V):
    """Of head h of q, k and v side by side: its tensor, place and number of heads there, size, and first channel."""
    if h < q_heads:
        x, place, H = q, h, q_heads
    elif h < q_heads + k_heads:
        x, place, H = k, h - q_heads, k_heads
    else:
        x, place, H = v, h - q_heads - k_heads, v_heads
    others = tl.maximum(h - q_heads - k_heads, 0)  # of v, before it
    return x, place, H, tl.where(h < q_heads + k_heads, K, V), (h - others) * K + others * V


@triton.jit
def convolve(
    x, weight, positions, q, k, v, T, C, q_heads, k_heads, v_heads, K, V,
    BD: tl.constexpr, BT: tl.constexpr, TAPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid (T / BT, all heads): x (T, C) -> q, k (T, heads, K) of norm 1 and v (T, heads, V)."""
    out, h, H, D, first = part_of(tl.program_id(1), q, k, v, q_heads, k_heads, v_heads, K, V)
    t, d = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BD)
    live, inside = t < T, d < D
    position = tl.load(positions + t, mask=live, other=0)
    y = convolved(x, weight, position, t, live, C, first + d, inside, TAPS, ACC)
    s = y / (1 + tl.exp(-y))
    if tl.program_id(1) < q_heads + k_heads:
        s = s / tl.sqrt(tl.sum(s * s, 1) + 1e-6)[:, None]
    at = out + (t.to(tl.int64) * H + h)[:, None] * D + d[None, :]
    tl.store(at, s.to(out.dtype.element_ty), mask=live[:, None] & inside[None, :])


@triton.jit
def convolve_back(
    x, weight, positions, dq, dk, dv, dx, dw, T, C, q_heads, k_heads, v_heads, K, V,
    BD: tl.constexpr, BT: tl.constexpr, TAPS: tl.constexpr, ACC: tl.constexpr,
    STEPS: tl.constexpr, BTAPS: tl.constexpr,
):  # fmt: skip
    """Grid (T / (BT STEPS), all heads): dx (T, C), and what these tokens add to dw (programs, TAPS, C)."""
    d_out, h, H, D, first = part_of(tl.program_id(1), dq, dk, dv, q_heads, k_heads, v_heads, K, V)
    d, tap = tl.arange(0, BD), tl.arange(0, BTAPS)
    c, inside, unit = first + d, d < D, tl.program_id(1) < q_heads + k_heads
    sums = tl.zeros((BTAPS, BD), ACC)
    for step in range(STEPS):
        t = (tl.program_id(0) * STEPS + step) * BT + tl.arange(0, BT)
        total = tl.zeros((BT, BD), ACC)
        for lag in tl.static_range(TAPS):  # what token t does to the output at t + lag
            later = t + lag
            live = later < T
            position = tl.load(positions + later, mask=live, other=0)
            y = convolved(x, weight, position, later, live, C, c, inside, TAPS, ACC)
            gate = 1 / (1 + tl.exp(-y))
            at = d_out + (later.to(tl.int64) * H + h)[:, None] * D + d[None, :]
            dy = tl.load(at, mask=live[:, None] & inside[None, :], other=0.0).to(ACC)
            if unit:
                s = y * gate
                size = tl.sqrt(tl.sum(s * s, 1) + 1e-6)[:, None]
                dy = (dy - s / size * (tl.sum(s * dy, 1)[:, None] / size)) / size
            dy *= gate * (1 + y * (1 - gate))
            seen = (live & (position >= lag))[:, None]
            w = tl.load(weight + (TAPS - 1 - lag) * C + c, mask=inside, other=0.0).to(ACC)
            total += tl.where(seen, dy * w[None, :], 0.0)
            now = tl.load(x + t.to(tl.int64)[:, None] * C + c[None, :], mask=seen & inside[None, :], other=0.0)
            sums += tl.where((tap == TAPS - 1 - lag)[:, None], tl.sum(dy * now, 0)[None, :], 0.0)
        at = dx + t.to(tl.int64)[:, None] * C + c[None, :]
        tl.store(at, total.to(dx.dtype.element_ty), mask=(t < T)[:, None] & inside[None, :])
    at = dw + (tl.program_id(0).to(tl.int64) * TAPS + tap)[:, None] * C + c[None, :]
    tl.store(at, sums, mask=(tap < TAPS)[:, None] & inside[None, :])


def heads(x: Tensor, weight: Tensor, layout: Layout, widths: list[int], dims: list[int]) -> tuple[Tensor, ...]:
    """Queries, keys and values, convolved, and the first two normalised; nothing came before the sequences.

    Args:
        x: (B, T, channels), any float dtype.
        weight: (taps, channels), the current token last.
        layout: of the sequences in (B, T).
        widths: channels of q, k and v.
        dims: of a head of each; q's is k's.

    Returns:
        q, k, v (B, T, heads, dim) in the dtype of x.
    """
    dtype = x.dtype
    if interpreted() and dtype in (torch.float16, torch.bfloat16):
        x = x.float()  # the interpreter's arithmetic on bfloat16 is wrong (triton issue 11584)
    positions = layout.once("flat positions", lambda: layout.positions.flatten().int())
    parts = _forward(x.flatten(0, 1).contiguous(), weight.contiguous(), positions, widths, dims)
    return tuple(part.unflatten(0, x.shape[:2]).to(dtype) for part in parts)


def _options(x: Tensor, weight: Tensor, dims: list[int], tokens: int) -> dict:
    """A program has `tokens` of them where a head is of 128."""
    BD = triton.next_power_of_2(max(dims))
    ACC = tl.float64 if x.dtype == torch.float64 else tl.float32
    return dict(BD=BD, BT=min(128, max(1, tokens * 128 // BD)), TAPS=len(weight), ACC=ACC, num_warps=4)


@torch.library.custom_op("lightning_mixers::convolved_heads", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, positions: Tensor, widths: list[int], dims: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """x (T, channels) -> q, k, v (T, heads, dim)."""
    parts, options = _empty(x, weight, positions, widths, dims), _options(x, weight, dims, 32)
    heads = [part.shape[1] for part in parts]
    with on(x):
        convolve[(triton.cdiv(len(x), options["BT"]), sum(heads))](
            x, weight, positions, *parts, len(x), x.shape[1], *heads, *dims[1:], **options
        )
    return parts


@_forward.register_fake
def _empty(x, weight, positions, widths, dims):
    return tuple(x.new_empty(len(x), width // D, D) for width, D in zip(widths, dims, strict=True))


@torch.library.custom_op("lightning_mixers::convolved_heads_backward", mutates_args=())
def _backward(
    x: Tensor, weight: Tensor, positions: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, dims: list[int]
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight."""
    options, heads = _options(x, weight, dims, 8), [part.shape[1] for part in (dq, dk, dv)]
    programs = triton.cdiv(len(x), options["BT"] * STEPS)
    dx, exact = torch.empty_like(x), torch.float64 if x.dtype == torch.float64 else torch.float32
    dw = x.new_empty(programs, *weight.shape, dtype=exact)
    with on(x):
        convolve_back[(programs, sum(heads))](
            x, weight, positions, dq, dk, dv, dx, dw, len(x), x.shape[1], *heads, *dims[1:], **options,
            STEPS=STEPS, BTAPS=triton.next_power_of_2(len(weight)),
        )  # fmt: skip
    return dx, dw.sum(0).to(weight.dtype)


@_backward.register_fake
def _(x, weight, positions, dq, dk, dv, dims):
    return torch.empty_like(x), torch.empty_like(weight)


def _save(ctx, inputs, output):
    x, weight, positions, _, ctx.dims = inputs
    ctx.save_for_backward(x, weight, positions)


def _differentiate(ctx, dq, dk, dv):
    gradients = (d.contiguous() for d in (dq, dk, dv))
    return *_backward(*ctx.saved_tensors, *gradients, ctx.dims), None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
