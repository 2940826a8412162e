"""The memories: the gap between the host's attention and that over the stored tokens, learned by gradient descent.

The host runs undisturbed, and all layers take a step at the same time on what it computes, at KV usages drawn for each
sequence: no layer waits for another, and one fit serves every budget.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kernels.sequences import Layout
from mixers.always_seen import are_sinks
from mixers.caches.paged import attend_new
from mixers.quantiles import value_above
from mixers.retrofit.parts import HostedPart, parts_of
from mixers.retrofit.watch import watched

LEARNING_RATE = 3e-3
USAGES = (0.5, 0.25, 0.125, 0.0625)


class MemoryFit:
    """Gradient descent on the memories, each on its own layer.

    Args:
        model: retrofitted, with thresholds calibrated.
        metric: as for `Forecast`.
        steps: calls of `read` that are planned.
        usages: drawn from, one for each sequence.
        seed: of the draws.
    """

    def __init__(
        self,
        model: nn.Module,
        metric: Callable[[str], Tensor],
        *,
        steps: int,
        usages: Iterable[float] = USAGES,
        seed: int = 0,
    ) -> None:
        self.model, self.parts = model, {n: p for n, p in parts_of(model).items() if p.adds_memory}
        self.steps, self.count, self.usages = steps, 0, list(usages)
        self.random = torch.Generator().manual_seed(seed)
        self.roots, self.optimizers = {}, {}
        for name, part in self.parts.items():
            G = metric(name)
            floor = 1e-6 * G.diagonal(0, -2, -1).mean() * torch.eye(G.shape[-1]).to(G)
            self.roots[name] = torch.linalg.cholesky(G + floor)
            self.optimizers[name] = torch.optim.Adam(part.memory.parameters(), lr=LEARNING_RATE)
        self.errors: dict[str, Tensor] = {}

    def read(self, ids: Tensor) -> None:
        """A step on sequences (B, T) of token ids."""
        pick = torch.randint(len(self.usages), (len(ids),), generator=self.random)
        self.drawn = [self.usages[i] for i in pick.tolist()]
        warm = min(1.0, (self.count + 1) / 10)
        rate = LEARNING_RATE * warm * 0.5 * (1 + math.cos(math.pi * self.count / self.steps))
        for optimizer in self.optimizers.values():
            optimizer.param_groups[0]["lr"] = rate
        with torch.no_grad(), watched(self.parts, self._see):
            self.model(input_ids=ids, use_cache=False, logits_to_keep=1)
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        """What is known so far."""
        return {
            "memories": {name: part.memory.state_dict() for name, part in self.parts.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "random": self.random.get_state(),
            "errors": self.errors,
            "count": self.count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for name, part in self.parts.items():
            part.memory.load_state_dict(state["memories"][name])
            self.optimizers[name].load_state_dict(state["optimizers"][name])
        self.random.set_state(state["random"])
        self.errors, self.count = state["errors"], state["count"]

    def _see(self, name: str, part: HostedPart, h, q, k, v, out) -> None:
        layout = Layout.of(None, h)
        tau = torch.stack([value_above(part.threshold.table, u) for u in self.drawn])[:, None]  # (B, 1, groups)
        stored = part.scores(h, q, k, v, layout) > tau
        stored = stored | are_sinks(layout.positions, part.sinks)
        some = attend_new(q, k, v, stored, layout, scale=part.sizes.scale, window=part.window)
        with torch.enable_grad():
            added = part.remember(h, q, k, v, stored, layout)
            gap, left = (self._size(name, x) for x in (out - some, out - some - added))
            loss = (left / gap.clamp(min=1e-12)).mean()
            self.optimizers[name].zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(part.memory.parameters(), 1.0)
        self.optimizers[name].step()
        ratio = loss.detach()
        self.errors[name] = ratio if name not in self.errors else self.errors[name].lerp(ratio, 0.1)

    def _size(self, name: str, change: Tensor) -> Tensor:
        """(B,) what changes of the read-outs (B, T, heads, V) do to the loss, twice, to second order."""
        return torch.einsum("bthv,hvw->bthw", change.float(), self.roots[name]).square().sum((1, 2, 3))
