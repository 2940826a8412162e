"""Shows what the routers of a model do."""

import math
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lit_modules.data.stream import longest_document
from lit_modules.loggers import log_figure, log_numbers
from lit_modules.routing_figure import routing_figure
from mixers.base import Routing


class RoutingMonitor(pl.Callback):
    """Shows in every logger what the routers of a model do, after each validation.

    Under ``val_routing/``:

    - ``kv_usage``, ``layer{i}/kv_usage`` and ``layer{i}/head{h}/kv_usage`` over the whole validation set;
    - ``tau``, the threshold, once for whatever shares it;
    - ``layer{i}/score_low``, ``_middle`` and ``_high``: the scores' quantiles at .1, .5 and .9;
    - ``sequence``, a picture of scores, threshold, stored tokens and gate along one sequence.

    The scores are of the first validation batch, which the model reads once more. Nothing happens for a model without
    routers or a trainer without loggers.

    Args:
        max_tokens: of the sequence to show, at most.
    """

    def __init__(self, *, max_tokens: int = 64) -> None:
        self.max_tokens = max_tokens
        self.batch: dict[str, Tensor] = {}
        self.routing: list[Routing | None] = []

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: dict,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx or dataloader_idx or trainer.sanity_checking or not trainer.loggers:
            return
        # Now: at the end of a validation, averaged weights have given way to those of training.
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            self.batch, self.routing = batch, pl_module.decode(batch).routing

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (batch, routing), self.batch, self.routing = (self.batch, self.routing), {}, []
        if all(routed is None for routed in routing):
            return
        tokens, sequence = one_sequence(batch, routing, max_tokens=self.max_tokens)
        decode = getattr(trainer.datamodule, "decode", None)
        labels = [visible(decode(token[None])) for token in tokens] if decode else []
        shown = numbers(routing, pl_module.last_usage)
        log_numbers(trainer, {f"val_routing/{name}": value for name, value in shown.items()})
        figure = routing_figure(sequence, labels=labels)
        figure.set_dpi(200)
        log_figure(trainer, "val_routing/sequence", figure)


def one_sequence(
    batch: dict[str, Tensor], routing: list[Routing | None], *, max_tokens: int
) -> tuple[Tensor, list[Routing | None]]:
    """The beginning of a batch's first sequence, of packed ones the longest.

    Returns:
        Its tokens (T,) and its routing, (1, T, H) in each layer, T <= ``max_tokens``.
    """
    part = slice(0, batch["tokens"].shape[1])
    if "cu_seqlens" in batch:
        part = longest_document(batch["cu_seqlens"])
    elif "padding_mask" in batch:
        (there,) = batch["padding_mask"][0].nonzero(as_tuple=True)  # padding may stand before it
        part = slice(int(there[0]), int(there[-1]) + 1) if len(there) else slice(0)
    part = slice(part.start, min(part.stop, part.start + max_tokens))
    cut = [
        routed and replace(routed, scores=routed.scores[:1, part], stored=routed.stored[:1, part], g=routed.g[:1, part])
        for routed in routing
    ]
    return batch["tokens"][0, part], cut


def numbers(routing: list[Routing | None], usage: dict[str, float]) -> dict[str, float]:
    """What there is to plot; ``usage`` is what ``KVUsage`` computed.

    A threshold that layers or heads share is there once: as ``tau``, ``layer{i}/tau`` or ``layer{i}/head{h}/tau``.
    """
    named = {f"{name.removeprefix('kv_usage').lstrip('/')}/kv_usage".lstrip("/"): x for name, x in usage.items()}
    taus = {layer: routed.tau.tolist() for layer, routed in enumerate(routing) if routed is not None}
    if len({tau for heads in taus.values() for tau in heads}) == 1:
        named["tau"] = next(iter(taus.values()))[0]
    else:
        for layer, heads in taus.items():
            shared = len({*heads}) == 1
            named |= {f"layer{layer}/tau": heads[0]} if shared else {}
            named |= {} if shared else {f"layer{layer}/head{head}/tau": tau for head, tau in enumerate(heads)}
    for layer, routed in enumerate(routing):
        scores = routed.scores[routed.scores.isfinite()].float() if routed is not None else []
        if len(scores):
            quantiles = torch.tensor([0.1, 0.5, 0.9], device=scores.device)
            found = torch.quantile(scores[: 2**24], quantiles).tolist()  # the most that torch takes
            named |= {f"layer{layer}/score_{q}": x for q, x in zip(("low", "middle", "high"), found, strict=True)}
    return {name: value for name, value in named.items() if math.isfinite(value)}


def visible(character: str) -> str:
    """A character as a label: white space shown, anything else that does not print as a dot."""
    return {"\n": "\u21b5", " ": "\u2423", "\t": "\u21e5"}.get(character) or (
        character if character.isprintable() else "\u00b7"
    )
