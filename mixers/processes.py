"""What the processes of a distributed run have to agree on."""

import torch
import torch.nn.functional as F
from torch import Tensor


def several_processes() -> bool:
    """Whether thresholds have to agree with those of other processes."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def processes() -> int:
    """How many there are."""
    return torch.distributed.get_world_size() if several_processes() else 1


def pooled_over_ranks(x: Tensor) -> Tensor:
    """The columns of x (groups, n) of all processes, side by side; n may differ."""
    if not several_processes():
        return x
    count = torch.tensor([x.shape[1]], device=x.device)
    counts = [torch.empty_like(count) for _ in range(processes())]
    torch.distributed.all_gather(counts, count)
    widths = torch.cat(counts).tolist()  # a GPU waits here, as it does for the norm of the gradients
    padded = F.pad(x, (0, max(widths) - x.shape[1])).contiguous()
    parts = [torch.empty_like(padded) for _ in widths]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], 1)


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of x over all processes; it may be changed in place."""
    if several_processes():
        torch.distributed.all_reduce(x)
        x = x / processes()
    return x
