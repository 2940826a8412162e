"""Tokens that attention sees whatever their score: the first of every sequence for good, the last for a while.

Sinks, the tokens with position < `sinks`, are stored for good. The last `window` tokens, the query's own among them,
are seen whether they are stored or not; what leaves the window stays only if it is stored (StreamingLLM, arXiv
2309.17453, keeps nothing else). Both count in the KV usage that is asked for: where a threshold learns its table of
scores, theirs count as infinite (`counted`), so that tau at usage u stores u less these at the length that it was
trained on. A usage that they alone exceed stores nothing else; they are there at usage 0, too.
"""

import torch
from torch import Tensor

from kernels.sequences import Layout
from mixers.registry import SpecError


def check_always_seen(window: int, sinks: int) -> None:
    """SpecError unless both are numbers of tokens, 0 or more."""
    for name, value in (("window", window), ("sinks", sinks)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise SpecError(f"{name} must be 0 (none) or a number of tokens, got {value!r}")


def are_sinks(positions: Tensor, sinks: int) -> Tensor:
    """Which tokens are stored whatever their score: (B, T, 1) bool, of positions (B, T) in their sequences."""
    return (positions < sinks)[..., None]


def are_recent(layout: Layout, window: int) -> Tensor:
    """The last `window` tokens of every sequence: (B, T, 1) bool."""
    return (layout.positions >= layout.per_token(layout.lengths - window))[..., None]


def counted(scores: Tensor, layout: Layout, positions: Tensor, window: int, sinks: int) -> Tensor:
    """Scores as a threshold is to count them: infinite where a token is kept anyway.

    Args:
        scores: (B, T, H) of floating point.
        layout: of whole sequences; their last `window` tokens are kept.
        positions: (B, T) int64, places of the tokens in their sequences, of which the first `sinks` are kept.
        window: 0 is none.
        sinks: 0 are none.

    Returns:
        (B, T, H) in the dtype of the scores.
    """
    if window:
        scores = scores.masked_fill(are_recent(layout, window), torch.inf)
    return scores.masked_fill(are_sinks(positions, sinks), torch.inf) if sinks else scores


def stored_behind(stored: Tensor, layout: Layout, window: int) -> Tensor:
    """How many stored tokens of every sequence are further back than its last `window` ones.

    Args:
        stored: (B, T, H) bool, sinks among them.
        layout: of the sequences.
        window: 0 is none.

    Returns:
        (N, H) int64.
    """
    behind = (stored & ~are_recent(layout, window)).long()
    if not layout.packed:
        return behind.sum(1)
    return behind.new_zeros(len(layout), stored.shape[2]).index_add(0, layout.documents, behind[0])
