"""A table of quantiles: what a threshold remembers of the scores it has seen."""

import torch
from torch import Tensor

LEVELS = 129  # at 0, 1/128, ..., 1: scores come in clusters, and what is read lies between levels


def quantiles(x: Tensor) -> Tensor:
    """The table of some values: what shares 0, 1/128, ..., 1 of them lie below.

    As `torch.quantile` has it, which stops at 2^24 numbers.

    Args:
        x: (groups, n), n >= 1.

    Returns:
        (groups, LEVELS) in the dtype of x.
    """
    x = x.sort(1).values
    place = torch.arange(LEVELS, device=x.device) * (x.shape[1] - 1)  # in units of 1/128: exact
    low = place // (LEVELS - 1)
    high = (low + 1).clamp(max=x.shape[1] - 1)
    return torch.lerp(x[:, low], x[:, high], (place % (LEVELS - 1)).to(x.dtype) / (LEVELS - 1))


def value_above(table: Tensor, share: float) -> Tensor:
    """The value that a share of what a table was made of lies above.

    Args:
        table: (groups, LEVELS) from `quantiles`.
        share: in [0, 1].

    Returns:
        (groups,).
    """
    place = (1 - share) * (LEVELS - 1)
    low = min(int(place), LEVELS - 2)
    return torch.lerp(table[:, low], table[:, low + 1], place - low)
