"""The routers' forecasts: ridge regression of a token's worth (`mixers.retrofit.worth`) on the input of its layer.

The host runs undisturbed, and all layers learn at the same time from what it computes; nothing but moments is kept.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mixers.retrofit.parts import HostedPart, parts_of
from mixers.retrofit.watch import watched
from mixers.retrofit.worth import worth

RIDGE = 1e-3  # of the variance of a feature
LEARNING_RATE = 1e-3  # of the MLPs
BATCH = 256  # tokens of a step of theirs


class Forecast:
    """Ridge regression of a token's worth on its layer's input.

    Args:
        model: retrofitted, with routers `demand`.
        metric: of each part by name, see `Sensitivity.metric`.
    """

    def __init__(self, model: nn.Module, metric: Callable[[str], Tensor]) -> None:
        self.model, self.parts = model, parts_of(model)
        self.metrics = {name: metric(name) for name in self.parts}
        self.moments: dict[str, list[Tensor]] = {}
        self.count = 0

    @torch.no_grad()
    def read(self, ids: Tensor) -> None:
        """Count sequences (B, T) of token ids."""
        with watched(self.parts, self._see):
            self.model(input_ids=ids, use_cache=False, logits_to_keep=1)
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        """What is known so far."""
        return {"moments": self.moments, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.moments, self.count = state["moments"], state["count"]

    def _see(self, name: str, part: HostedPart, h, q, k, v, out) -> None:
        x, y = (part.double() for part in _examples(part, h, q, k, v, self.metrics[name]))
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        new = [x.T @ x, x.T @ y, (y * y).sum(0)]
        old = self.moments.get(name)
        self.moments[name] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]

    @torch.no_grad()
    def solve(self) -> dict[str, float]:
        """Write the forecasts into the routers; what share of the variance they explain, by part."""
        explained = {}
        for name, part in self.parts.items():
            xx, xy, yy = self.moments[name]
            n = xx[-1, -1]
            mean, my = xx[-1, :-1] / n, xy[-1] / n
            cov = xx[:-1, :-1] / n - mean[:, None] * mean
            cross = xy[:-1] / n - mean[:, None] * my
            size = cov.diagonal().clamp(min=1e-12).sqrt()
            scaled = cov / size[:, None] / size
            w = torch.linalg.solve(
                scaled + RIDGE * torch.eye(len(cov), device=cov.device).double(), cross / size[:, None]
            )
            w = w / size[:, None]
            forecast = part.router.forecast
            forecast.weight.copy_(w.T)
            forecast.bias.copy_(my - mean @ w)
            var = yy / n - my * my
            left = var - 2 * (w * cross).sum(0) + (w * (cov @ w)).sum(0)
            explained[name] = float(1 - (left / var).mean())
        return explained


class Refinement:
    """Gradient descent on the MLPs beside the linear forecasts, which stay as they are.

    Args:
        model: retrofitted, with routers `demand` that have `hidden` units and a linear forecast that is solved.
        metric: as for `Forecast`.
        steps: calls of `read` that are planned.
    """

    def __init__(self, model: nn.Module, metric: Callable[[str], Tensor], *, steps: int) -> None:
        self.model, self.parts, self.steps, self.count = model, parts_of(model), steps, 0
        self.metrics = {name: metric(name) for name in self.parts}
        self.optimizers = {
            name: torch.optim.Adam([*part.router.up.parameters(), *part.router.down.parameters()], lr=LEARNING_RATE)
            for name, part in self.parts.items()
        }
        self.errors: dict[str, Tensor] = {}

    @torch.no_grad()
    def read(self, ids: Tensor) -> None:
        """Take steps on sequences (B, T) of token ids."""
        rate = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * self.count / self.steps))
        for optimizer in self.optimizers.values():
            optimizer.param_groups[0]["lr"] = rate
        with watched(self.parts, self._see):
            self.model(input_ids=ids, use_cache=False, logits_to_keep=1)
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        """What is known so far."""
        return {
            "routers": {name: part.router.state_dict() for name, part in self.parts.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "errors": self.errors,
            "count": self.count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for name, part in self.parts.items():
            part.router.load_state_dict(state["routers"][name])
            self.optimizers[name].load_state_dict(state["optimizers"][name])
        self.errors, self.count = state["errors"], state["count"]

    def _see(self, name: str, part: HostedPart, h, q, k, v, out) -> None:
        x, y = _examples(part, h, q, k, v, self.metrics[name])
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.count)).to(x.device)
        for some in order.split(BATCH):
            with torch.enable_grad():
                error = (part.router.foresee(x[some]).float() - y[some]).square().mean()
                self.optimizers[name].zero_grad()
                error.backward()
            self.optimizers[name].step()
            relative = error.detach() / y.var(0).mean()
            self.errors[name] = self.errors[name].lerp(relative, 0.02) if name in self.errors else relative


def _examples(part: HostedPart, h: Tensor, q: Tensor, k: Tensor, v: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs (n, D) and worths (n, H) of the tokens that a forecast learns from."""
    y = worth(q, k, v, metric, scale=part.sizes.scale, window=part.window, sinks=part.sinks)
    # sinks are not asked for, and of the last tokens too little is seen
    some = slice(part.sinks, max(part.sinks + 1, h.shape[1] - 3 * part.window))
    return h[:, some].flatten(0, 1), y[:, some].flatten(0, 1)
