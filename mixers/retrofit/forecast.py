"""The routers' forecasts: regression of a token's worth (`mixers.retrofit.worth`) on the input of its layer.

    y = log(d + d_0) / 2        d_0 the median of d over tokens, heads and layers: below, all is the same

Linear by ridge regression in closed form; an MLP beside it by gradient descent on what that leaves. The host runs
undisturbed, and tokens of all layers are taken from the same passes. (A lead, SmolLM2, one seed: the floor d_0 takes a
quarter off what usage .25 costs on code, and a second kind of text in the fit another.)
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mixers.retrofit.parts import HostedPart, parts_of
from mixers.retrofit.watch import watched
from mixers.retrofit.worth import worth

KEPT = 2 * 2**30  # bytes of examples, in half precision
RIDGE = 1e-3  # of the variance of a feature
LEARNING_RATE = 2e-3  # of the MLP
EPOCHS, BATCH = 4, 512


class Forecast:
    """Gathers examples, and solves for the forecasts.

    Args:
        model: retrofitted, with routers `demand` without the error.
        metric: of each part by name, see `Sensitivity.metric`.
        reads: calls of `read` that are planned.
        seed: of the choice of examples, where there are too many, and of the MLPs.
    """

    def __init__(self, model: nn.Module, metric: Callable[[str], Tensor], *, reads: int, seed: int = 0) -> None:
        self.model, self.parts, self.reads, self.seed = model, parts_of(model), reads, seed
        self.metrics = {name: metric(name) for name in self.parts}
        self.examples: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.parts}
        self.floor: float | None = None  # log(d_0) / 2
        self.count = 0

    @torch.no_grad()
    def read(self, ids: Tensor) -> None:
        """Take examples from sequences (B, T) of token ids. The first ones are read twice."""
        if self.floor is None:
            seen: list[Tensor] = []
            self._run(ids, lambda name, part, *call: seen.append(_worth(part, *call, self.metrics[name]).flatten()))
            self.floor = float(torch.cat(seen).median())
        self._run(ids, self._see)
        self.count += 1

    def _run(self, ids: Tensor, watcher: Callable[..., None]) -> None:
        with watched(self.parts, watcher):
            self.model(input_ids=ids, use_cache=False, logits_to_keep=1)

    def _see(self, name: str, part: HostedPart, h, *call) -> None:
        x, y = h[:, _some(part, h)].flatten(0, 1), _worth(part, h, *call, self.metrics[name]).flatten(0, 1)
        most = KEPT // (self.reads * len(self.parts) * x.shape[1] * 2)
        if len(x) > most:
            keep = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed + self.count))
            x, y = x[keep[:most].to(x.device)], y[keep[:most].to(x.device)]
        self.examples[name].append((x.half().cpu(), y.cpu()))

    def solve(self, progress: bool = False) -> dict[str, float]:
        """Write the forecasts into the routers.

        Args:
            progress: show a bar.

        Returns:
            What share of the variance they explain of their examples, by part.
        """
        explained = {}
        for name, part in tqdm(self.parts.items(), desc="solving", disable=not progress):
            device = part.head_bias.device
            x, y = (torch.cat(parts).float().to(device) for parts in zip(*self.examples[name], strict=True))
            y = torch.logaddexp(2 * y, torch.full_like(y, 2 * self.floor)) / 2
            explained[name] = fit(part.router, x, y, seed=self.seed)
        return explained

    def state_dict(self) -> dict[str, Any]:
        """What is known so far."""
        return {"examples": self.examples, "floor": self.floor, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.examples, self.floor, self.count = state["examples"], state["floor"], state["count"]


def fit(router: nn.Module, x: Tensor, y: Tensor, *, seed: int = 0) -> float:
    """Fit a router `demand` to foresee y (n, H) from x (n, D), both float32.

    Returns:
        The share of the variance that it explains.
    """
    mean, size = x.mean(0), x.std(0).clamp(min=1e-6)
    z, goal = ((x - mean) / size).double(), y.double() - y.double().mean(0)
    ridge = RIDGE * len(z) * torch.eye(z.shape[1], device=z.device, dtype=z.dtype)
    w = torch.linalg.solve(z.T @ z + ridge, z.T @ goal).float() / size[:, None]
    with torch.no_grad():
        router.forecast.weight.copy_(w.T)
        router.forecast.bias.copy_(y.mean(0) - mean @ w)
    if router.hidden:
        _descend(router, x, y, mean, size, seed)
    with torch.no_grad():
        left = sum((router.foresee(a.to(router.forecast.weight)) - b).square().sum() for a, b in _batches(x, y))
    return float(1 - left / goal.square().sum())


def _descend(router: nn.Module, x: Tensor, y: Tensor, mean: Tensor, size: Tensor, seed: int) -> None:
    """Gradient descent on all of the forecast; the MLP begins with inputs of unit size."""
    up, down = nn.Linear(x.shape[1], router.hidden), nn.Linear(router.hidden, y.shape[1], bias=False)
    random = torch.Generator().manual_seed(seed)
    nn.init.normal_(up.weight, std=x.shape[1] ** -0.5, generator=random)
    nn.init.zeros_(up.bias)
    nn.init.zeros_(down.weight)
    linear = nn.Linear(x.shape[1], y.shape[1])
    linear.load_state_dict({k: v.float() for k, v in router.forecast.state_dict().items()})
    for layer in (up, down, linear):
        layer.to(x.device)
    optimizer = torch.optim.Adam([*up.parameters(), *down.parameters(), *linear.parameters()], lr=LEARNING_RATE)
    with torch.no_grad():  # the linear part, too, sees inputs of unit size while it is trained
        linear.bias += linear.weight @ mean
        linear.weight *= size
    steps = EPOCHS * -(-len(x) // BATCH)
    orders = (torch.randperm(len(x), generator=random).to(x.device) for _ in range(EPOCHS))
    batches = (some for order in orders for some in order.split(BATCH))
    with torch.enable_grad():
        for step, some in enumerate(batches):
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
            z = (x[some] - mean) / size
            loss = (linear(z) + down(nn.functional.gelu(up(z))) - y[some]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        for layer, target in ((linear, router.forecast), (up, router.up)):
            weight = layer.weight / size
            target.weight.copy_(weight)
            target.bias.copy_(layer.bias - weight @ mean)
        router.down.weight.copy_(down.weight)


def _batches(x: Tensor, y: Tensor):
    return zip(x.split(8192), y.split(8192), strict=True)


def _some(part: HostedPart, h: Tensor) -> slice:
    """Which tokens are examples: sinks are not asked for, and of the last tokens too little is seen."""
    return slice(part.sinks, max(part.sinks + 1, h.shape[1] - 3 * part.window))


def _worth(part: HostedPart, h, q, k, v, out, metric: Tensor) -> Tensor:
    """(B, n, H) of the tokens that are examples."""
    y = worth(q, k, v, metric, scale=part.sizes.scale, window=part.window)
    return y[:, _some(part, h)]
