"""A table of quantiles: what a threshold remembers of the scores it has seen."""

import torch
from torch import Tensor

LARGEST = 1e38  # what infinite scores count as
INFINITE = 1e30  # levels that lie between a finite score and one of these are beyond this
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


def averaged(old: Tensor, new: Tensor, weight: Tensor) -> Tensor:
    """Two tables (groups, LEVELS) as one: old + weight (new - old).

    Where one of them is infinite, as its sequences were so short that what is always seen took that share, the other
    stands: no mean with an infinite level would ever come back.
    """
    one, other = torch.where(old.abs() < INFINITE, old, new), torch.where(new.abs() < INFINITE, new, old)
    return torch.lerp(one, other, weight)


def fault(scores: Tensor, table: Tensor, usage: float) -> str:
    """Why scores (groups, n) do not allow the KV usage asked for, in words; empty if they do, or are too few to tell.

    Args:
        scores: infinite where a token is stored anyway.
        table: of them.
        usage: in [0, 1].
    """
    if scores.isnan().any():
        return "gave NaN, which is never stored"
    if scores.shape[1] * min(usage, 1 - usage) < 8:
        return ""
    stored = float((scores > value_above(table, usage)[:, None]).float().mean())
    infinite = float((scores == torch.inf).float().mean())
    if infinite > usage + 1 / (LEVELS - 1):  # more than a level: it is not for rounding
        hint = f" ({infinite:.2g} of the scores are infinite, as those of window and sinks are)"
    elif usage / 2 <= stored <= (1 + usage) / 2:
        return ""
    else:
        hint = ""
    return f"gives too many tokens the same score: the KV usage {usage:g} becomes {stored:.2g}{hint}"
