"""Routers that look at no token: what surprise has to beat, and the two ends of the dial.

None of them depends on how a sequence is split into calls: a draw is a hash of seed, layer, head and position.
"""

import torch
from torch import Tensor

from mixers.registry import SpecError, unknown
from mixers.routers.base import Router, RouterInputs, draws


class Random(Router):
    """A score drawn uniformly from [0, 1).

    Args:
        seed: of the draws.
    """

    predict = "none"

    def __init__(self, dim: int, num_heads: int, *, seed: int = 0) -> None:
        super().__init__(dim, num_heads)
        self.seed = seed

    def forward(self, inputs: RouterInputs) -> Tensor:
        return draws(self.seed, inputs.layer, self.num_heads, inputs.positions)


class Static(Random):
    """Whole heads, a layer after the other, the first head of a layer first.

    Where the KV usage ends within a head, a random part of it. With a threshold for the whole model, usage 1 / 4 of a
    model of four heads gives one head everything.

    Args:
        seed: of the draws that split the last head.
        begin: the layer that is filled first: `last` or `first`.
    """

    def __init__(self, dim: int, num_heads: int, *, seed: int = 0, begin: str = "last") -> None:
        super().__init__(dim, num_heads, seed=seed)
        if begin not in ("last", "first"):
            raise unknown("begin", begin, ("last", "first"), of=" for router 'static'")
        self.begin = begin

    def forward(self, inputs: RouterInputs) -> Tensor:
        layer = inputs.layer if self.begin == "last" else -inputs.layer
        rank = layer * self.num_heads + torch.arange(self.num_heads - 1, -1, -1, device=inputs.x.device)
        return rank + super().forward(inputs)


class Recency(Router):
    """The last tokens: a sliding window in place of a score.

    Args:
        window: tokens, at any KV usage above 0; 0 derives it from the KV usage.
        length: tokens that the KV usage is a share of: window = usage * length.
    """

    predict, tells_tokens_apart = "none", False

    def __init__(self, dim: int, num_heads: int, *, window: int = 0, length: int = 512) -> None:
        super().__init__(dim, num_heads)
        if window < 0 or length < 1:
            raise SpecError(f"router 'recency' needs window >= 0 and length >= 1, got {window} and {length}")
        self._window, self.length = window, length

    def forward(self, inputs: RouterInputs) -> Tensor:
        return torch.full(inputs.g.shape, -torch.inf, device=inputs.x.device)

    def window(self, kv_usage: float) -> int:
        return self._window * (kv_usage > 0) or round(kv_usage * self.length)


class All(Router):
    """Every token, unless the KV usage is 0: both memories at full size."""

    predict, tells_tokens_apart = "none", False

    def forward(self, inputs: RouterInputs) -> Tensor:
        return torch.full(inputs.g.shape, torch.inf, device=inputs.x.device)


class Nothing(Router):
    """No token: the recurrent memory alone."""

    predict, tells_tokens_apart = "none", False

    def forward(self, inputs: RouterInputs) -> Tensor:
        return torch.full(inputs.g.shape, -torch.inf, device=inputs.x.device)
