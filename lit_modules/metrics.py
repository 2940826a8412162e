"""torchmetrics that torchmetrics lacks: bits per byte, also of names, perplexity, accuracy by part, KV usage."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from lit_modules.data.batches import IGNORED
from lit_modules.data.names import KNOWN, REST, UNKNOWN
from mixers.base import Routing


class Loss(MeanMetric):
    """Mean of a loss. ``update(value, weight)``: its mean over a batch, and over how many.

    One that is not finite makes the mean so, where torchmetrics would leave it out; one of weight 0 does not count.
    """

    higher_is_better = False

    def __init__(self, **options: Any):
        # NaN in place of NaN: with "disable" torchmetrics 1.9 drops the weights.
        super().__init__(**({"nan_strategy": math.nan} | options))

    def update(self, value: float | Tensor, weight: float | Tensor = 1.0) -> None:
        value, weight = (torch.as_tensor(x, dtype=self.dtype, device=self.device) for x in (value, weight))
        super().update(torch.where(weight == 0, 0.0, value), weight)


class BitsPerByte(Loss):
    """Mean loss in bits; for a model whose tokens are bytes. ``update(value, weight)``: mean nats, number of bytes."""

    def compute(self) -> Tensor:
        return super().compute() / math.log(2)


class NameBits(Metric):
    """Bits per byte of names that come back, and of the rest; nothing if batches mark none.

    ``update(by_kind)``: of what is REST, KNOWN and UNKNOWN (:mod:`lit_modules.data.names`), the loss summed in nats and
    the number of bytes, (2, 3) float32; None where nothing is marked.

    ``compute()`` returns ``name_bits_per_byte``, ``unknown_name_bits_per_byte`` (of those names that the training text
    has not), ``rest_bits_per_byte``, and as ``name_bytes``, ... how many bytes each is over: float32 scalars.
    """

    full_state_update = False
    higher_is_better = False

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.add_state("by_kind", torch.zeros(2, 3), dist_reduce_fx="sum")

    def update(self, by_kind: Tensor | None) -> None:
        if by_kind is not None:
            self.by_kind = self.by_kind + by_kind

    def compute(self) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        if not self.by_kind[1, [KNOWN, UNKNOWN]].any():
            return values
        for what, kinds in {"name": [KNOWN, UNKNOWN], "unknown_name": [UNKNOWN], "rest": [REST]}.items():
            nats, count = self.by_kind[:, kinds].sum(1)
            if count:
                values |= {f"{what}_bits_per_byte": nats / count / math.log(2), f"{what}_bytes": count}
        return values


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
