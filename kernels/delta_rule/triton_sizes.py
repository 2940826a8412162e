"""What the Triton kernels of the delta rule are compiled for: chunks, tiles, warps and stages, by GPU, dtype and size.

Nothing is tuned at run time: these are what compiling ahead of time (`python -m recipes doctor --compile`) showed to
fit into shared memory, with few registers spilled.
"""

import torch
from torch import Tensor

from kernels.dispatch import interpreted
from kernels.launch import warpgroups

HALF = (torch.float16, torch.bfloat16)
FEW = 128
"""Fewer programs leave some of a large GPU idle."""


def chunk_size(dtype: torch.dtype, K: int, V: int, device: torch.device) -> int:
    """Tokens of a chunk: as many as the registers and the shared memory of a program hold."""
    size = max(K, V)
    if dtype in HALF:
        return 64 if warpgroups(device) and size <= 128 else 32
    return 32 if size <= 64 else 16


def constants(v: Tensor, K: int, C: int) -> dict:
    """What the kernels have in common: sizes, blocks, precision."""
    import triton.language as tl
    from triton import next_power_of_2

    V = v.shape[-1]
    exact = v.dtype == torch.float64 or interpreted()
    return dict(
        K=K,
        V=V,
        BK=max(16, next_power_of_2(K)),
        BV=min(64 if v.dtype in HALF else 32, max(16, next_power_of_2(V))),
        C=C,
        ACC=tl.float64 if v.dtype == torch.float64 else tl.float32,
        PRECISION="ieee" if exact else "tf32" if v.dtype in HALF else "tf32x3",
    )


def scan_block(BV: int, V: int, states: int) -> int:
    """Columns of a state that a program of a scan takes: half a block where the programs would be few."""
    return 32 if BV == 64 and states * -(-V // BV) < FEW else BV


def fit(kernel: str, v: Tensor, K: int) -> dict:
    """Warps of a program, so that its registers hold its tiles, and stages of its loops, whose operands are in shared
    memory at once.
    """
    size, half, hopper = max(K, v.shape[-1]), v.dtype in HALF, warpgroups(v.device)
    heavy = kernel == "scan_back" or (kernel == "gradients_v" and size > 64)  # keep several sums
    warps = 8 if (heavy and half and hopper) or size > (128 if half else 64) else 4
    stages = 3 if half and hopper and size <= 128 else 2 if half or hopper or size <= 128 else 1
    if hopper and kernel in ("gradients_v", "gradients_k"):
        stages = 1  # pipelined, they overwrite operands that may still be read: triton issue 9433, `kernels.sass`
    options = dict(num_warps=warps, num_stages=stages)
    # left to itself, ptxas gives the many products of this one 32 registers on sm_80, and spills 28 kB
    return options if half or kernel != "read" else options | dict(maxnreg=255)
