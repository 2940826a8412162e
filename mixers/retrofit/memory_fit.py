"""The memories: the gap between the host's attention and that over the stored tokens, learned layer by layer.

    ReadOut      M by ridge regression of the gap on what the memory answers, all else as it starts: closed form
    MemoryFit    all of it by gradient descent, from there

The host runs undisturbed, and all layers learn at the same time from what it computes, at KV usages drawn for each
sequence: no layer waits for another, and one fit serves every budget. (A lead: in a layer of SmolLM2 the closed form
takes away most of what gradient descent does, in a fraction of the time.)
"""

import copy
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
RIDGE = 1e-2  # of the mean square of what a memory answers
USAGES = (0.5, 0.25, 0.125, 0.0625)


class Drawn:
    """Base: shows the memories sequences at KV usages drawn for each.

    Args:
        model: retrofitted, with thresholds calibrated.
        usages: drawn from, one for each sequence.
        seed: of the draws.
    """

    def __init__(self, model: nn.Module, *, usages: Iterable[float] = USAGES, seed: int = 0) -> None:
        self.model, self.parts = model, {n: p for n, p in parts_of(model).items() if p.adds_memory}
        self.usages, self.count = list(usages), 0
        self.random = torch.Generator().manual_seed(seed)

    def read(self, ids: Tensor) -> None:
        """Learn from sequences (B, T) of token ids."""
        pick = torch.randint(len(self.usages), (len(ids),), generator=self.random)
        self.drawn = [self.usages[i] for i in pick.tolist()]
        with torch.no_grad(), watched(self.parts, self._see):
            self.model(input_ids=ids, use_cache=False, logits_to_keep=1)
        self.count += 1

    def _see(self, name: str, part: HostedPart, h, q, k, v, out) -> None:
        layout = Layout.of(None, h)
        tau = torch.stack([value_above(part.threshold.table, u) for u in self.drawn])[:, None]  # (B, 1, groups)
        stored = (part.scores(h, q, k, v, layout) > tau) | are_sinks(layout.positions, part.sinks)
        some = attend_new(q, k, v, stored, layout, scale=part.sizes.scale, window=part.window)
        self.learn(name, part, out - some, lambda: part.remember(h, q, k, v, stored, layout))

    def learn(self, name: str, part: HostedPart, gap: Tensor, remember: Callable[[], Tensor]) -> None:
        """Learn to add what is missing, `gap` (B, T, heads, V); `remember` says what is added now."""
        raise NotImplementedError


class ReadOut(Drawn):
    """Moments of what the memories answer and of what is missing."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        self.moments: dict[str, list[Tensor]] = {}
        for part in self.parts.values():  # what is added is then what the memory answers
            part.memory.out_map.data.copy_(torch.eye(part.sizes.value_dim).expand_as(part.memory.out_map))

    def learn(self, name: str, part: HostedPart, gap: Tensor, remember: Callable[[], Tensor]) -> None:
        weight = gap.float().square().mean((1, 2, 3)).clamp(min=1e-20).rsqrt()[:, None, None, None]  # usages alike
        x, y = ((part.float() * weight).flatten(0, 1).double() for part in (remember(), gap))
        new = [torch.einsum("nhv,nhw->hvw", x, x), torch.einsum("nhv,nhw->hvw", x, y)]
        old = self.moments.get(name)
        self.moments[name] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]

    @torch.no_grad()
    def solve(self) -> None:
        """Write the maps into the memories."""
        for name, part in self.parts.items():
            xx, xy = self.moments[name]
            floor = RIDGE * xx.diagonal(0, 1, 2).mean(1)[:, None, None].clamp(min=1e-20)
            part.memory.out_map.copy_(torch.linalg.solve(xx + floor * torch.eye(xx.shape[-1]).to(xx), xy))

    def state_dict(self) -> dict[str, Any]:
        """What is known so far."""
        return {"moments": self.moments, "random": self.random.get_state(), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.moments, self.count = state["moments"], state["count"]
        self.random.set_state(state["random"])


class MemoryFit(Drawn):
    """Gradient descent on the memories, each on its own layer.

    Args:
        model: as for `Drawn`.
        metric: as for `Forecast`.
        steps: calls of `read` that are planned.
        options: of `Drawn`.
    """

    def __init__(self, model: nn.Module, metric: Callable[[str], Tensor], *, steps: int, **options: Any) -> None:
        super().__init__(model, **options)
        self.steps = steps
        self.roots, self.optimizers = {}, {}
        for name, part in self.parts.items():
            G = metric(name)
            floor = 1e-6 * G.diagonal(0, -2, -1).mean() * torch.eye(G.shape[-1]).to(G)
            self.roots[name] = torch.linalg.cholesky(G + floor)
            self.optimizers[name] = torch.optim.Adam(part.memory.parameters(), lr=LEARNING_RATE)
        self.errors: dict[str, Tensor] = {}

    def read(self, ids: Tensor) -> None:
        rate = LEARNING_RATE * min(1.0, (self.count + 1) / 10)
        for optimizer in self.optimizers.values():
            optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * self.count / self.steps))
        super().read(ids)

    def learn(self, name: str, part: HostedPart, gap: Tensor, remember: Callable[[], Tensor]) -> None:
        with torch.enable_grad():
            left = self._size(name, gap - remember()) / self._size(name, gap).clamp(min=1e-20)
            loss = left.mean()
            self.optimizers[name].zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(part.memory.parameters(), 1.0)
        self.optimizers[name].step()
        now = loss.detach()
        self.errors[name] = self.errors[name].lerp(now, 0.1) if name in self.errors else now

    def _size(self, name: str, change: Tensor) -> Tensor:
        """(B,) what changes of the read-outs (B, T, heads, V) do to the loss, twice, to second order."""
        return torch.einsum("bthv,hvw->bthw", change.float(), self.roots[name]).square().sum((1, 2, 3))

    def state_dict(self) -> dict[str, Any]:
        """What is known so far."""
        return {
            # copies: what is trained further must not change what this fit came to
            "memories": {name: copy.deepcopy(part.memory.state_dict()) for name, part in self.parts.items()},
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
