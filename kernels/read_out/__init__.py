"""What a memory and attention answer, put together: y = (g_r RMSNorm(r) + g_a a) * SiLU(z), head by head.

g_r and g_a are sigmoids, one number per token and head each, or 1; without attention the second part is not there.
"""

from torch import Tensor

from kernels.dispatch import choose

BACKENDS = {
    "naive": "kernels.read_out.naive:read_out",
    "torch": "kernels.read_out.naive:read_out",
    "triton": "kernels.read_out.triton_rows:read_out",
}


def read_out(
    r: Tensor,
    weight: Tensor,
    eps: float,
    z: Tensor,
    a: Tensor | None = None,
    gates: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Normalise, mix and gate.

    Args:
        r: (B, T, R, V), the memory's read-out.
        weight: (V,) of the RMSNorm.
        eps: of the same.
        z: (B, T, R V), the gate before its SiLU.
        a: (B, T, R, V), attention's read-out, if there is one.
        gates: (B, T, 2 R), g_r and then g_a of every head before the sigmoid; None: both are 1. Only with `a`.
        backend: `naive` and `torch`, which are the same, `triton` or `auto`.

    Returns:
        (B, T, R V) in the dtype of r.

    Raises:
        ValueError: shapes that do not fit, gates without `a`; a backend that does not exist or is not available.
    """
    if r.ndim != 4:
        raise ValueError(f"r must be (B, T, R, V), got {tuple(r.shape)}")
    B, T, R, V = r.shape
    wanted = {
        "weight": (weight, (V,)),
        "z": (z, (B, T, R * V)),
        "a": (a, (B, T, R, V)),
        "gates": (gates, (B, T, 2 * R)),
    }
    for name, (x, shape) in wanted.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(x.shape)}")
    if gates is not None and a is None:
        raise ValueError("gates are of r and a, but there is no a")
    _, run = choose("read_out", backend, BACKENDS, r.device)
    return run(r, weight, eps, z, a, gates)
