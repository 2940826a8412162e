"""Shows in TensorBoard what the routers of a model do."""

import math
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from lit_modules.data.stream import longest_document
from lit_modules.routing_figure import routing_figure
from mixers.base import Routing


class RoutingMonitor(pl.Callback):
    """After each validation, writes to TensorBoard:

    - ``routing/layer{i}/kv_usage`` and ``routing/layer{i}/head{h}/kv_usage`` over the whole validation set;
    - ``routing/layer{i}/head{h}/tau``, the thresholds, and ``routing/layer{i}/scores``, a histogram;
    - ``routing/sequence``, a picture of scores, threshold, stored tokens and gate along one sequence.

    The scores are of the first validation batch, which the model reads once more. Nothing happens for a model without
    routers or a trainer without TensorBoard.

    Args:
        max_tokens: of the sequence to show, at most.
    """

    def __init__(self, *, max_tokens: int = 128) -> None:
        self.max_tokens = max_tokens
        self.batch: dict[str, Tensor] = {}

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: dict, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0:
            self.batch = batch

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        batch, self.batch = self.batch, {}
        writers = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if trainer.sanity_checking or not writers or not batch:
            return
        with torch.no_grad():
            routing = pl_module.decode(batch).routing
        if all(routed is None for routed in routing):
            return
        tokens, sequence = one_sequence(batch, routing, max_tokens=self.max_tokens)
        decode = getattr(trainer.datamodule, "decode", None)
        labels = [visible(decode(token[None])) for token in tokens] if decode else []
        for writer in writers:
            write_routing(writer, routing, pl_module.last_usage, step=trainer.global_step)
            writer.add_figure("routing/sequence", routing_figure(sequence, labels=labels), trainer.global_step)


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
        part = slice(0, int(batch["padding_mask"][0].sum()))
    part = slice(part.start, min(part.stop, part.start + max_tokens))
    cut = [
        routed and replace(routed, scores=routed.scores[:1, part], stored=routed.stored[:1, part], g=routed.g[:1, part])
        for routed in routing
    ]
    return batch["tokens"][0, part], cut


def write_routing(writer: Any, routing: list[Routing | None], usage: dict[str, float], *, step: int) -> None:
    """Writes scalars and histograms to a ``SummaryWriter``; ``usage`` is what ``KVUsage`` computed."""
    for name, value in usage.items():
        writer.add_scalar(
            f"routing/{name.removeprefix('kv_usage/')}/kv_usage" if "/" in name else "routing/kv_usage", value, step
        )
    for layer, routed in enumerate(routing):
        if routed is None:
            continue
        for head, tau in enumerate(routed.tau.tolist()):
            if math.isfinite(tau):
                writer.add_scalar(f"routing/layer{layer}/head{head}/tau", tau, step)
        scores = routed.scores[routed.scores.isfinite()]
        if len(scores):
            writer.add_histogram(f"routing/layer{layer}/scores", scores, step)


def visible(character: str) -> str:
    """A character as a label: white space shown, anything else that does not print as a dot."""
    return {"\n": "\u21b5", " ": "\u2423", "\t": "\u21e5"}.get(character) or (
        character if character.isprintable() else "\u00b7"
    )
