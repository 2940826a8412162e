"""The routers' forecasts: ridge regression of a token's worth (`mixers.retrofit.worth`) on the input of its layer.

The host runs undisturbed, and all layers learn at the same time from what it computes; nothing but moments is kept.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mixers.retrofit.parts import HostedPart, parts_of
from mixers.retrofit.watch import watched
from mixers.retrofit.worth import worth

RIDGE = 1e-3  # of the variance of a feature


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
        options = dict(scale=part.sizes.scale, window=part.window, sinks=part.sinks)
        y = worth(q, k, v, self.metrics[name], **options)
        # sinks are not asked for, and of the last tokens too little is seen
        some = slice(part.sinks, max(part.sinks + 1, h.shape[1] - 3 * part.window))
        x, y = h[:, some].flatten(0, 1).double(), y[:, some].flatten(0, 1).double()
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
