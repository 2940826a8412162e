"""The kinds of thresholds: what tau is between the KV usages 0 and 1."""

import math

import torch
from torch import Tensor, nn

from mixers.registry import SpecError, check_range
from mixers.threshold import Threshold, check_usage


class Calibrated(Threshold):
    """Read tau from the table: holds the usage as the scores drift, at any usage, without a loss of its own."""

    def finite_tau(self) -> Tensor:
        return self.quantile(self.kv_usage)


class Moved(Threshold):
    """Base of thresholds that are a number, `current`, which training moves: it belongs to the KV usage aimed at."""

    current: Tensor

    def __init__(self, num_heads: int, **options) -> None:
        super().__init__(num_heads, **options)
        self.register_buffer("current_usage", torch.tensor(self.kv_usage, dtype=torch.float32))

    def finite_tau(self) -> Tensor:
        return self.current

    def set_usage(self, kv_usage: float) -> None:
        super().set_usage(kv_usage)
        self._follow()

    @torch.no_grad()
    def _follow(self) -> None:
        """Read `current` from the table, at the usage asked for."""
        if self.steps:
            self.current.copy_(self.quantile(self.kv_usage))
        self.current_usage.fill_(self.kv_usage)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        key = prefix + "current_usage"
        if prefix + "current" in state_dict and key not in state_dict:  # saved before there was such a buffer
            state_dict[key] = self.current_usage.clone()
        super()._load_from_state_dict(state_dict, prefix, *args)
        if key in state_dict and not self.current.is_meta and abs(self.current_usage.item() - self.kv_usage) > 1e-6:
            self._follow()


class Controlled(Moved):
    """Feedback: tau moves by `rate` times (usage - asked usage) each step, as HAM's paper is reported to do.

    Args:
        rate: step of the feedback, in units of the score.
        start: tau at the beginning.
        freeze_after: training steps after which tau stays; 0 never freezes.
    """

    def __init__(
        self, num_heads: int, *, rate: float = 0.1, start: float = 0.5, freeze_after: int = 20_000, **options
    ) -> None:
        super().__init__(num_heads, **options)
        check_range(0, rate=rate, freeze_after=freeze_after)
        check_range(-math.inf, start=start)
        self.rate, self.freeze_after = rate, freeze_after
        self.register_buffer("current", torch.full_like(self.table[:, 0], start))

    def adjust(self, scores: Tensor) -> None:
        if not self.freeze_after or self.steps <= self.freeze_after:
            self.current += self.rate * self.usage_gap(scores, self.current)


class Fixed(Threshold):
    """The user's own tau. The KV usage is then what the data make of it.

    Args:
        tau: the threshold, in units of the router's score.
    """

    follows_usage = False

    def __init__(self, num_heads: int, *, tau: float = 0.5, **options) -> None:
        super().__init__(num_heads, **options)
        if math.isnan(tau):
            raise SpecError("tau of threshold 'fixed' must be a number, got nan")
        self.fixed = tau
        self._checked = True  # it needs no training

    def finite_tau(self) -> Tensor:
        return torch.full_like(self.table[:, 0], self.fixed)

    def set_usage(self, kv_usage: float) -> None:
        if 0 < check_usage(kv_usage) < 1:
            raise SpecError(f"a fixed threshold has no KV usage to set, got {kv_usage}; use threshold 'calibrated'")
        super().set_usage(kv_usage)


class Learned(Moved):
    """A parameter, moved by the task's loss (through a gate on stored values) and by a penalty on the usage gap.

    Args:
        start: tau at the beginning.
        weight: of the penalty, weight * (soft usage - asked usage)^2.
        temperature: of the soft usage, mean sigmoid((score - tau) / temperature).
    """

    trained_by_gate = True

    def __init__(
        self, num_heads: int, *, start: float = 0.5, weight: float = 10.0, temperature: float = 0.05, **options
    ) -> None:
        super().__init__(num_heads, **options)
        check_range(0, weight=weight)
        check_range(1e-9, temperature=temperature)
        check_range(-math.inf, start=start)
        self.weight, self.temperature = weight, temperature
        self.current = nn.Parameter(torch.full_like(self.table[:, 0], start))
        self.current._no_weight_decay = True

    def loss(self, scores: Tensor) -> Tensor | None:
        soft = ((scores.detach() - self.current) / self.temperature).sigmoid()
        gap = soft.mean((0, 1) if self.scope == "head" else None) - self.kv_usage
        return self.weight * gap.square().mean()
