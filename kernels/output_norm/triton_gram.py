"""The norm of a write by the Gram matrix, in one Triton kernel: it reads u once, and writes a number per token."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import interpreted
from kernels.launch import on, warpgroups
from kernels.output_norm.torch_gram import gram


@triton.jit
def norms(
    u, g, n, T, H,
    V: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (T / BT, H): sqrt(u G u) of u (T, H, V) and G (H, V, V) -> n (T, H)."""
    h = tl.program_id(1)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    row, live = u + ((t.to(tl.int64) * H + h) * V)[:, None], (t < T)[:, None]
    squared = tl.zeros((BT,), ACC)
    for last in tl.static_range(0, V, BJ):
        j = last + tl.arange(0, BJ)
        uG = tl.zeros((BT, BJ), ACC)
        for first in range(0, V, BI):
            i = first + tl.arange(0, BI)
            part = tl.load(row + i[None, :], mask=live & (i < V)[None, :], other=0.0).to(ACC)
            at = g + h.to(tl.int64) * V * V + i[:, None] * V + j[None, :]
            G = tl.load(at, mask=(i < V)[:, None] & (j < V)[None, :], other=0.0)
            uG += tl.dot(part, G, input_precision=PRECISION)
        squared += tl.sum(uG * tl.load(row + j[None, :], mask=live & (j < V)[None, :], other=0.0), 1)
    tl.store(n + t.to(tl.int64) * H + h, tl.sqrt(tl.maximum(squared, 0.0)), mask=t < T)


def output_norm(u: Tensor, weight: Tensor) -> Tensor:
    """Shapes as in `kernels.output_norm.output_norm`; V up to 256.

    A bfloat16 or float16 u is multiplied in TF32: it fits in exactly, and of G more is kept than of u.
    """
    if interpreted() and u.dtype in (torch.float16, torch.bfloat16):
        u = u.float()  # the interpreter's arithmetic on bfloat16 is wrong (triton issue 11584)
    return _norms(u.flatten(0, 1).contiguous(), gram(weight)).unflatten(0, u.shape[:2])


@torch.library.custom_op("lightning_mixers::output_norm", mutates_args=())
def _norms(u: Tensor, g: Tensor) -> Tensor:
    """u (T, H, V) and G (H, V, V) -> (T, H) in the dtype of G."""
    (T, H, V), n = u.shape, _empty(u, g)
    half, wide = u.dtype in (torch.float16, torch.bfloat16), max(16, triton.next_power_of_2(V))
    with on(u):
        norms[(triton.cdiv(T, 64), H)](
            u, g, n, T, H,
            V=V, BT=64, BI=min(wide, 32), BJ=min(wide, 128), ACC=tl.float64 if g.dtype == torch.float64 else tl.float32,
            PRECISION="ieee" if interpreted() else "tf32" if half else "tf32x3",
            num_warps=4, num_stages=1 if warpgroups(u.device) else 2,  # why: `kernels.delta_rule.triton_sizes.fit`
        )  # fmt: skip
    return n


@_norms.register_fake
def _empty(u: Tensor, g: Tensor) -> Tensor:
    return g.new_empty(u.shape[:2])
