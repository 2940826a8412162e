"""torchmetrics that torchmetrics does not have: bits per byte, perplexity from a known loss, and KV usage."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric

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
