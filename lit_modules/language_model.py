"""Next-token models: text and recall."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lit_modules.base import SequenceModule
from lit_modules.data.batches import IGNORED, cut_to_length
from lit_modules.data.generated import GeneratedData
from lit_modules.data.names import KNOWN, REST, UNKNOWN
from lit_modules.data.stream import ANSWER, NAMES, PART, REPEATED
from lit_modules.metrics import BitsPerByte, Loss, MeanAccuracy, NameBits, Perplexity
from mixers.registry import SpecError, check_range

BYTES = 256
LOGITS_AT_ONCE = 2**26


class LanguageModel(SequenceModule):
    """A decoder trained to answer ``targets`` at every position where they are not -100.

    Logs loss, perplexity and accuracy, bits per byte where the vocabulary is the 256 bytes (of names that come back
    apart, where batches mark them), and where batches name a part, the accuracy of each and the mean.

    Args:
        z_loss: weight in training of the mean square of log(sum(exp(logits))), which keeps logits from drifting (PaLM,
            arXiv 2204.02311: 1e-4).
        length_warmup: steps over which sequences grow to their whole length from a 16th of it: they are cut into pieces
            of that length, each a sequence by itself. For text alone: what a task asks about is in another piece.
        options: see :class:`lit_modules.base.SequenceModule`.
    """

    answers = ("targets",)

    def __init__(self, *, z_loss: float = 0.0, length_warmup: int = 0, **options: Any):
        check_range(0, z_loss=z_loss, length_warmup=length_warmup)
        super().__init__(**options)
        vocab_size = self.hparams.vocab_size
        metrics = {
            "loss": Loss(),
            "perplexity": Perplexity(),
            "accuracy": MulticlassAccuracy(vocab_size, average="micro", ignore_index=IGNORED, validate_args=False),
            "mean_accuracy": MeanAccuracy(),
        }
        if vocab_size == BYTES:
            metrics |= {"bits_per_byte": BitsPerByte(), "name_bits_per_byte": NameBits()}
        self.metrics = MetricCollection(metrics)

    def on_fit_start(self) -> None:
        """Raises SpecError where a length that grows would cut questions off from what they are about."""
        data = self.trainer.datamodule
        if self.hparams.length_warmup and isinstance(data, GeneratedData):
            raise SpecError(f"length_warmup is for text: it cuts sequences, and what {type(data).__name__} asks, apart")

    def forward(self, tokens: Tensor, **kwargs: Any) -> Tensor:
        """Logits (B, T, vocab_size) of ``tokens`` (B, T); the keywords are the decoder's."""
        return self.decoder.logits(self.decoder(tokens, **kwargs).hidden)

    def token_loss(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy and the model's answers.

        With a large vocabulary, a chunk of tokens at a time, whose logits are computed again in the backward pass. This
        works with every torch, under torch.compile and with any ``decoder.logits``; ``F.linear_cross_entropy`` (torch
        2.13) saves the recomputation but none of these hold for it.

        Args:
            hidden: (B, T, D).
            targets: (B, T) int64, -100 where nothing is asked.

        Returns:
            Mean loss in nats over the targets, float32 scalar (0 if there are none), and the likeliest token at each
            position, (B, T) int64.
        """
        return self._losses(hidden, targets)[:2]

    def _losses(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `token_loss`, and the mean square of log(sum(exp(logits))), 0 unless it is asked for."""
        hidden_ND, targets_N = hidden.flatten(0, 1), targets.flatten()
        rows = max(1, LOGITS_AT_ONCE // self.hparams.vocab_size)
        chunks = list(zip(hidden_ND.split(rows), targets_N.split(rows), strict=True))
        if len(chunks) == 1:
            results = [self._chunk_loss(*chunks[0])]
        else:
            results = [checkpoint(self._chunk_loss, *chunk, use_reentrant=False) for chunk in chunks]
        losses, answers, squares = zip(*results, strict=True)
        count = (targets != IGNORED).sum().clamp(min=1)
        return (
            torch.stack(losses).sum() / count,
            torch.cat(answers).view_as(targets),
            torch.stack(squares).sum() / count,
        )

    def _chunk_loss(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.decoder.logits(hidden).float()
        loss = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        squares = loss.new_zeros(())
        if self.hparams.z_loss and self.training:
            squares = (logits.logsumexp(-1).square() * (targets != IGNORED)).sum()
        return loss, logits.detach().argmax(-1), squares

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean loss of a batch in nats, float32 scalar."""
        return self.token_loss(self.decode(batch).hidden, batch["targets"])[0]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        steps = self.hparams.length_warmup
        if steps and self.trainer.global_step < steps:
            batch = cut_to_length(batch, share=self.trainer.global_step / steps)
        out = self.decode(batch)
        loss, answers, squares = self._losses(out.hidden, batch["targets"])
        asked = batch["targets"] != IGNORED
        accuracy = ((answers == batch["targets"]) & asked).sum() / asked.sum().clamp(min=1)
        bits = {"bits_per_byte": loss.detach() / math.log(2)} if self.hparams.vocab_size == BYTES else {}
        self.log_step(out, loss=loss.detach(), accuracy=accuracy, **bits)
        total = loss + out.aux_loss
        return {"loss": total + self.hparams.z_loss * squares if self.hparams.z_loss else total, "accuracy": accuracy}

    def evaluation_step(self, batch: dict[str, Tensor]) -> None:
        out = self.decode(batch)
        loss, answers = self.token_loss(out.hidden, batch["targets"])
        counted = 0 if batch.get(REPEATED) else 1
        targets = batch["targets"] if counted else torch.full_like(batch["targets"], IGNORED)
        counts = {"value": loss, "weight": (targets != IGNORED).sum(), "preds": answers, "target": targets}
        total = torch.stack([loss * counts["weight"], counts["weight"]])
        by_kind = self._by_kind(out.hidden, targets, batch[NAMES], total) if NAMES in batch else None
        self.metrics.update(**counts, part=batch.get(PART), answer=batch.get(ANSWER), by_kind=by_kind)
        self.usage.update(out.routing, counted)

    def _by_kind(self, hidden: Tensor, targets: Tensor, names: Tensor, total: Tensor) -> Tensor:
        """As :class:`NameBits` takes it, (2, 3), of a total (2,); logits are computed anew: training pays nothing."""
        found = {}
        for kind in (KNOWN, UNKNOWN):
            chosen = targets.masked_fill(names != kind, IGNORED)
            count = (chosen != IGNORED).sum()
            found[kind] = torch.stack([self.token_loss(hidden, chosen)[0] * count, count])
        found[REST] = total - sum(found.values())
        return torch.stack([found[kind] for kind in (REST, KNOWN, UNKNOWN)], 1)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The likeliest next token at each position, (B, T) int64."""
        return self.token_loss(self.decode(batch).hidden, batch["targets"])[1]
