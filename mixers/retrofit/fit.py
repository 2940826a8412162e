"""Fitting the parts of a retrofitted model to its own host, which stays as it is.

    sensitivity   what a change of a layer's output does to the loss: the Fisher matrix of every layer, by a few backward
                  passes, with targets drawn from the model itself
    forecast      ridge regression of a token's worth (`mixers.retrofit.demand`) on the input of its layer: closed form
    memory        the gap between the host's attention and that over the stored tokens, learned by gradient descent at KV
                  usages drawn for each sequence

Each reads sequences once, and in each the host runs undisturbed while all layers learn at the same time from what it
computes: nothing of it has to be kept, and no layer waits for another.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixers.caches.paged import attend_new
from mixers.always_seen import are_sinks
from mixers.quantiles import value_above
from mixers.retrofit.attach import HostedPart, parts_of
from mixers.retrofit.demand import worth
from mixers.retrofit.watch import watched
from kernels.sequences import Layout

RIDGE = 1e-3
LEARNING_RATE = 3e-3


class Sensitivity:
    """E[g g^T] of every layer, g the gradient of the loss in what the layer adds to the residual stream.

    Args:
        model: retrofitted.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.parts = model, parts_of(model)
        self.sums = {name: 0.0 for name in self.parts}
        self.tokens = 0

    def read(self, ids: Tensor, generator: torch.Generator | None = None) -> None:
        """Count sequences (B, T) of token ids."""
        outputs: dict[str, Tensor] = {}
        hooks = []
        for name, part in self.parts.items():
            keep = lambda _, args, out, name=name: outputs.__setitem__(name, out[0] if isinstance(out, tuple) else out)
            hooks.append(part.host[0].register_forward_hook(keep))
        grads = {p: p.requires_grad for p in self.model.parameters()}
        for p in grads:
            p.requires_grad_(False)
        embedding = self.model.get_input_embeddings()
        hooks.append(embedding.register_forward_hook(lambda _, args, out: out.requires_grad_()))
        try:
            with watched(self.parts, lambda *_: None), torch.enable_grad():
                logits = self.model(input_ids=ids, use_cache=False).logits.float().flatten(0, 1)
                with torch.no_grad():
                    target = logits.softmax(-1).multinomial(1, generator=generator)[:, 0]
                loss = F.cross_entropy(logits, target, reduction="sum")
                found = torch.autograd.grad(loss, [outputs[name] for name in self.parts])
        finally:
            for hook in hooks:
                hook.remove()
            for p, wanted in grads.items():
                p.requires_grad_(wanted)
        for (name, part), g in zip(self.parts.items(), found, strict=True):
            g = g[:, part.sinks :].float().flatten(0, 1)  # all later tokens hang on the first ones: another scale
            self.sums[name] = self.sums[name] + g.T @ g
        self.tokens += ids.numel()

    def metric(self, name: str) -> Tensor:
        """(heads, V, V): what a change of a head's read-out does to the loss, twice, to second order."""
        part = self.parts[name]
        fisher = self.sums[name] / self.tokens
        fisher = fisher + 0.01 * fisher.diagonal().mean() * torch.eye(len(fisher), device=fisher.device)
        W = part.output_weight().float()  # (groups, D, H, V)
        return torch.einsum("gdhv,de,gehw->hgvw", W, fisher, W).flatten(0, 1)


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

    @torch.no_grad()
    def read(self, ids: Tensor) -> None:
        """Count sequences (B, T) of token ids."""
        with watched(self.parts, self._see):
            self.model(input_ids=ids, use_cache=False, logits_to_keep=1)

    def _see(self, name: str, part: HostedPart, h, q, k, v) -> None:
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
            w = torch.linalg.solve(scaled + RIDGE * torch.eye(len(cov), device=cov.device).double(), cross / size[:, None])
            w = w / size[:, None]
            forecast = part.router.forecast
            forecast.weight.copy_(w.T)
            forecast.bias.copy_(my - mean @ w)
            var = yy / n - my * my
            left = var - 2 * (w * cross).sum(0) + (w * (cov @ w)).sum(0)
            explained[name] = float(1 - (left / var).mean())
        return explained


class MemoryFit:
    """Gradient descent on the memories, each on its own layer.

    Args:
        model: retrofitted, with thresholds calibrated.
        metric: as for `Forecast`.
        steps: calls of `read` that are planned.
        usages: drawn from, one for each sequence.
        seed: of the draws.
    """

    def __init__(self, model, metric, *, steps: int, usages: Iterable[float] = (0.5, 0.25, 0.125, 0.0625), seed=0):
        self.model, self.parts = model, {n: p for n, p in parts_of(model).items() if p.adds_memory}
        self.steps, self.step, self.usages = steps, 0, list(usages)
        self.random = torch.Generator().manual_seed(seed)
        self.roots, self.optimizers = {}, {}
        for name, part in self.parts.items():
            G = metric(name)
            self.roots[name] = torch.linalg.cholesky(G + 1e-6 * G.diagonal(0, -2, -1).mean() * torch.eye(G.shape[-1]).to(G))
            self.optimizers[name] = torch.optim.Adam(part.memory.parameters(), lr=LEARNING_RATE)
        self.errors: dict[str, Tensor] = {}

    def read(self, ids: Tensor) -> None:
        """A step on sequences (B, T) of token ids."""
        pick = torch.randint(len(self.usages), (len(ids),), generator=self.random)
        self.drawn = [self.usages[i] for i in pick.tolist()]
        warm = min(1.0, (self.step + 1) / 10)
        rate = LEARNING_RATE * warm * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        for optimizer in self.optimizers.values():
            optimizer.param_groups[0]["lr"] = rate
        with torch.no_grad(), watched(self.parts, self._see):
            self.model(input_ids=ids, use_cache=False, logits_to_keep=1)
        self.step += 1

    def _see(self, name: str, part: HostedPart, h, q, k, v) -> None:
        layout = Layout.of(None, h)
        full = attend_new(q, k, v, None, layout, scale=part.sizes.scale)
        tau = torch.stack([value_above(part.threshold.table, u) for u in self.drawn])[:, None]  # (B, 1, groups)
        stored = part.scores(h, q, k, v, layout) > tau
        stored = stored | are_sinks(layout.positions, part.sinks)
        some = attend_new(q, k, v, stored, layout, scale=part.sizes.scale, window=part.window)
        with torch.enable_grad():
            added = part.remember(h, q, k, v, stored, layout)
            R = self.roots[name]
            size = lambda x: torch.einsum("bthv,hvw->bthw", x.float(), R).square().sum((1, 2, 3))
            gap = size(full - some)
            loss = (size(full - some - added) / gap.clamp(min=1e-12)).mean()
            self.optimizers[name].zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(part.memory.parameters(), 1.0)
        self.optimizers[name].step()
        ratio = loss.detach()
        self.errors[name] = ratio if name not in self.errors else self.errors[name].lerp(ratio, 0.1)
