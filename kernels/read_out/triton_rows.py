"""The read-out in one Triton kernel forward and one backward, a row of a token's head at a time; it keeps its inputs.

With n = r / sqrt(r.r / V + eps), h = w n, m = g_r h + g_a a and y = m SiLU(z), the gradients are

    dm = dy SiLU(z)     dz = dy m SiLU'(z)     da = g_a dm     dw = sum_t g_r dm n     (the gates by their sigmoid's)
    dn = g_r dm w       dr = (dn - n (n.dn) / V) / sqrt(r.r / V + eps)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import interpreted
from kernels.launch import on

PROGRAMS = 1024
"""Of the backward pass at most, each of which sums the weight's gradient over its rows."""


@triton.jit
def rows(x, row, live, d, inside, V: tl.constexpr, ACC: tl.constexpr):
    """Rows x[row] (BR, BV) of (rows, V)."""
    at = x + row.to(tl.int64)[:, None] * V + d[None, :]
    return tl.load(at, mask=live[:, None] & inside[None, :], other=0.0).to(ACC)


@triton.jit
def put(x, value, row, live, d, inside, V: tl.constexpr):
    at = x + row.to(tl.int64)[:, None] * V + d[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=live[:, None] & inside[None, :])


@triton.jit
def gates_of(gates, row, live, R, GATED: tl.constexpr, ACC: tl.constexpr):
    """g_r and g_a (BR, 1), and where they lie."""
    at = gates + row.to(tl.int64) // R * (2 * R) + row % R
    if GATED:
        g_r = 1 / (1 + tl.exp(-tl.load(at, mask=live, other=0.0).to(ACC)))
        g_a = 1 / (1 + tl.exp(-tl.load(at + R, mask=live, other=0.0).to(ACC)))
    else:
        g_r = tl.full(row.shape, 1.0, ACC)
        g_a = g_r
    return g_r[:, None], g_a[:, None]


@triton.jit
def mix(
    r, weight, z, a, gates, out, eps, N, R,
    V: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr,
    ATTENDS: tl.constexpr, GATED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid (N / BR,): rows of r, z and a (N, V) -> out (N, V); N is tokens times R heads."""
    row, d = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BV)
    live, inside = row < N, d < V
    n = rows(r, row, live, d, inside, V, ACC)
    n = n / tl.sqrt(tl.sum(n * n, 1) / V + eps)[:, None]
    g_r, g_a = gates_of(gates, row, live, R, GATED, ACC)
    m = g_r * n * tl.load(weight + d, mask=inside, other=0.0).to(ACC)[None, :]
    if ATTENDS:
        m += g_a * rows(a, row, live, d, inside, V, ACC)
    gate = rows(z, row, live, d, inside, V, ACC)
    put(out, m * gate / (1 + tl.exp(-gate)), row, live, d, inside, V)


@triton.jit
def mix_back(
    r, weight, z, a, gates, d_out, dr, dw, dz, da, d_gates, eps, N, R,
    V: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr,
    ATTENDS: tl.constexpr, GATED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid (programs,): the gradients of rows; what a program's rows add to the weight's -> dw (programs, V)."""
    d = tl.arange(0, BV)
    inside = d < V
    w = tl.load(weight + d, mask=inside, other=0.0).to(ACC)[None, :]
    total = tl.zeros((BV,), ACC)
    for block in range(tl.program_id(0), tl.cdiv(N, BR), tl.num_programs(0)):
        row = block * BR + tl.arange(0, BR)
        live = row < N
        n = rows(r, row, live, d, inside, V, ACC)
        size = tl.sqrt(tl.sum(n * n, 1) / V + eps)[:, None]
        n = n / size
        g_r, g_a = gates_of(gates, row, live, R, GATED, ACC)
        m = g_r * n * w
        if ATTENDS:
            attended = rows(a, row, live, d, inside, V, ACC)
            m += g_a * attended
        gate, dy = rows(z, row, live, d, inside, V, ACC), rows(d_out, row, live, d, inside, V, ACC)
        open = 1 / (1 + tl.exp(-gate))
        put(dz, dy * m * open * (1 + gate * (1 - open)), row, live, d, inside, V)
        dm = dy * gate * open
        at = d_gates + row.to(tl.int64) // R * (2 * R) + row % R
        if GATED:
            slope = tl.sum(g_r * (1 - g_r), 1) * tl.sum(dm * n * w, 1)
            tl.store(at, slope.to(d_gates.dtype.element_ty), mask=live)
        if ATTENDS:
            put(da, g_a * dm, row, live, d, inside, V)
            if GATED:
                slope = tl.sum(g_a * (1 - g_a), 1) * tl.sum(dm * attended, 1)
                tl.store(at + R, slope.to(d_gates.dtype.element_ty), mask=live)
        total += tl.sum(g_r * dm * n, 0)
        dn = g_r * dm * w
        put(dr, (dn - n * (tl.sum(n * dn, 1) / V)[:, None]) / size, row, live, d, inside, V)
    tl.store(dw + tl.program_id(0).to(tl.int64) * V + d, total, mask=inside)


def read_out(r: Tensor, weight: Tensor, eps: float, z: Tensor, a: Tensor | None, gates: Tensor | None) -> Tensor:
    """Shapes as in `kernels.read_out.read_out`."""
    dtype = r.dtype
    if interpreted() and dtype in (torch.float16, torch.bfloat16):
        r = r.float()  # the interpreter's arithmetic on bfloat16 is wrong (triton issue 11584)
    given = (None if x is None else x.to(r.dtype).contiguous() for x in (z, a, gates))
    return _forward(r.contiguous(), weight.contiguous(), *given, eps).to(dtype)


def _options(r: Tensor, a: Tensor | None, gates: Tensor | None) -> dict:
    BV = triton.next_power_of_2(r.shape[-1])
    return dict(
        V=r.shape[-1],
        BV=BV,
        BR=max(1, min(64, 1024 // BV)),
        ATTENDS=a is not None,
        GATED=gates is not None,
        ACC=tl.float64 if r.dtype == torch.float64 else tl.float32,
        num_warps=4,
    )


@torch.library.custom_op("lightning_mixers::read_out", mutates_args=())
def _forward(r: Tensor, weight: Tensor, z: Tensor, a: Tensor | None, gates: Tensor | None, eps: float) -> Tensor:
    out, options = torch.empty_like(z), _options(r, a, gates)
    N, (some_a, some_gates) = r.numel() // r.shape[-1], (r if x is None else x for x in (a, gates))
    with on(r):
        mix[(triton.cdiv(N, options["BR"]),)](
            r, weight, z, some_a, some_gates, out, eps, N, r.shape[-2], **options
        )  # fmt: skip
    return out


@_forward.register_fake
def _(r, weight, z, a, gates, eps):
    return torch.empty_like(z)


@torch.library.custom_op("lightning_mixers::read_out_backward", mutates_args=())
def _backward(
    r: Tensor, weight: Tensor, z: Tensor, a: Tensor | None, gates: Tensor | None, d_out: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of r, weight, z, a and the gates; empty where they are not there."""
    options, (dr, dz) = _options(r, a, gates), (torch.empty_like(x) for x in (r, z))
    da, d_gates = (r.new_empty(0) if x is None else torch.empty_like(x) for x in (a, gates))
    N, (some_a, some_gates) = r.numel() // r.shape[-1], (r if x is None else x for x in (a, gates))
    programs = min(PROGRAMS, triton.cdiv(N, options["BR"]))
    exact = torch.float64 if r.dtype == torch.float64 else torch.float32
    dw = r.new_empty(programs, r.shape[-1], dtype=exact)
    with on(r):
        mix_back[(programs,)](
            r, weight, z, some_a, some_gates, d_out, dr, dw, dz, da, d_gates, eps, N, r.shape[-2], **options
        )  # fmt: skip
    return dr, dw.sum(0).to(weight.dtype), dz, da, d_gates


@_backward.register_fake
def _(r, weight, z, a, gates, d_out, eps):
    return tuple(r.new_empty(0) if x is None else torch.empty_like(x) for x in (r, weight, z, a, gates))


def _save(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, d_out):
    r, weight, z, a, gates = ctx.saved_tensors
    dr, dw, dz, da, d_gates = _backward(r, weight, z, a, gates, d_out.contiguous(), ctx.eps)
    return dr, dw, dz, None if a is None else da, None if gates is None else d_gates, None


_forward.register_autograd(_differentiate, setup_context=_save)
