"""The read-out by PyTorch's operations: the definition that the kernel is tested against."""

from torch import Tensor
from torch.nn import functional as F


def read_out(r: Tensor, weight: Tensor, eps: float, z: Tensor, a: Tensor | None, gates: Tensor | None) -> Tensor:
    """Shapes as in `kernels.read_out.read_out`."""
    y = F.rms_norm(r, weight.shape, weight.to(r.dtype), eps).to(r.dtype)
    if gates is not None:
        g_r, g_a = gates.sigmoid().unflatten(-1, (2, -1))[..., None].unbind(2)
        y = g_r * y + g_a * a
    elif a is not None:
        y = y + a
    return (y.flatten(2) * F.silu(z)).to(r.dtype)
