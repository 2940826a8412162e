"""torchmetrics that torchmetrics lacks: bits per byte, perplexity from a known loss, accuracy by part, KV usage."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from lit_modules.data.batches import IGNORED
from mixers.base import Routing


class Loss(MeanMetric):
    """Mean of a loss. ``update(value, weight)``: its mean over a batch, and over how many."""

    higher_is_better = False


class BitsPerByte(Loss):
    """Mean loss in bits; for a model whose tokens are bytes. ``update(value, weight)``: mean nats, number of bytes."""

    def compute(self) -> Tensor:
        return super().compute() / math.log(2)


class Perplexity(Loss):
    """exp of the mean loss. ``update(value, weight)``: mean nats, number of tokens.

    ``torchmetrics.text.Perplexity`` wants the logits and would compute the loss a second time.
    """

    def compute(self) -> Tensor:
        return super().compute().exp()


class MeanAccuracy(Metric):
    """Accuracy of each part of a set that batches say, by name, and the mean over parts; nothing if they say none.

    ``update(preds, target, part, answer)``: answers and what was due (B, T) int64, -100 where nothing is asked; the
    name of the batch's part, and the names of all; which answer of its sequence a token belongs to (B, T) int64, or
    None if each token is one. An answer counts as right if all of its tokens are.

    ``compute()`` returns ``mean_accuracy`` and ``accuracy/{name}``, float32 scalars.
    """

    full_state_update = False
    higher_is_better = True

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.names: tuple[str, ...] = ()

    def update(
        self, preds: Tensor, target: Tensor, part: tuple[str, tuple[str, ...]] | None, answer: Tensor | None
    ) -> None:
        if part is None:
            return
        name, names = part
        if names != self.names:  # known only now; the same on all ranks
            self.names = names
            for state in ("right", "asked"):
                self.add_state(state, torch.zeros(len(names), device=preds.device), dist_reduce_fx="sum")
        due = target != IGNORED
        right = (preds == target)[due].float()
        if answer is not None:
            rows = torch.arange(len(target), device=target.device)[:, None].expand_as(target)
            owner = torch.stack([rows[due], answer[due]]).unique(dim=1, return_inverse=True)[1]
            right = right.new_ones(owner.max() + 1 if len(owner) else 0).scatter_reduce(0, owner, right, "amin")
        self.right[names.index(name)] += right.sum()
        self.asked[names.index(name)] += len(right)

    def compute(self) -> dict[str, Tensor]:
        if not self.names:
            return {}
        shares = self.right / self.asked
        named = {f"accuracy/{name}": share for name, share in zip(self.names, shares, strict=True)}
        return {"mean_accuracy": shares.nanmean()} | named


class KVUsage(Metric):
    """Tokens kept in the cache / tokens, pooled by counts over batches and ranks; padding does not count.

    ``compute()`` returns scalars by name: ``kv_usage`` over all heads of all layers that route, ``kv_usage/layer{i}``
    and ``kv_usage/layer{i}/head{h}``; an empty dict if no layer routes.
    """

    full_state_update = False
    higher_is_better = None

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.layers: dict[int, str] = {}
        self.add_state("tokens", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, routing: Sequence[Routing | None], weight: int = 1) -> None:
        """Counts one batch ``weight`` times; ``routing`` holds what each layer routed, None for a layer that does not.

        A weight of 0 still makes the states that other ranks have.
        """
        routed = {layer: entry for layer, entry in enumerate(routing) if entry is not None}
        for layer, entry in routed.items():
            if layer not in self.layers:  # the number of heads is known only now
                self.layers[layer] = f"kept{layer}"
                self.add_state(self.layers[layer], torch.zeros_like(entry.kept, dtype=torch.long), dist_reduce_fx="sum")
            setattr(self, self.layers[layer], getattr(self, self.layers[layer]) + weight * entry.kept.long())
        if routed:
            self.tokens = self.tokens + next(iter(routed.values())).lengths.sum() * weight

    def compute(self) -> dict[str, Tensor]:
        usage = {layer: getattr(self, state) / self.tokens for layer, state in self.layers.items()}
        if not usage:
            return {}
        named = {"kv_usage": torch.cat(list(usage.values())).mean()}
        for layer, heads in usage.items():
            named[f"kv_usage/layer{layer}"] = heads.mean()
            named |= {f"kv_usage/layer{layer}/head{head}": value for head, value in enumerate(heads)}
        return named
