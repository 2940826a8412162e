"""Classification of whole sequences."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lit_modules.base import SequenceModule
from lit_modules.data.stream import REPEATED
from lit_modules.metrics import Loss

IGNORED = -100


class SequenceClassifier(SequenceModule):
    """The decoder's outputs, averaged over the real tokens, and a linear head.

    Args:
        num_classes: classes, at least 2.
        options: see :class:`lit_modules.base.SequenceModule`.
    """

    answers = ("label",)

    def __init__(self, *, num_classes: int, **options: Any):
        super().__init__(**options)
        self.classifier = nn.Linear(self.hparams.dim, num_classes)
        accuracy = MulticlassAccuracy(num_classes, average="micro", ignore_index=IGNORED, validate_args=False)
        self.metrics = MetricCollection({"loss": Loss(), "accuracy": accuracy})

    def forward(self, tokens: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Logits (B, num_classes) of ``tokens`` (B, T); ``padding_mask`` (B, T) bool is True at real tokens."""
        return self.classify(self.decoder(tokens, padding_mask=padding_mask).hidden, padding_mask)

    def classify(self, hidden: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Logits (B, num_classes), float32, of decoder outputs (B, T, D)."""
        real = torch.ones_like(hidden[..., :1]) if padding_mask is None else padding_mask[..., None].to(hidden.dtype)
        mean = (hidden * real).sum(1) / real.sum(1).clamp(min=1)
        return self.classifier(mean).float()

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean loss of a batch in nats, float32 scalar."""
        return F.cross_entropy(self.classify(self.decode(batch).hidden, batch.get("padding_mask")), batch["label"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        out = self.decode(batch)
        logits = self.classify(out.hidden, batch.get("padding_mask"))
        loss = F.cross_entropy(logits, batch["label"])
        accuracy = (logits.detach().argmax(-1) == batch["label"]).float().mean()
        self.log_step(out, loss=loss.detach(), accuracy=accuracy)
        return {"loss": loss + out.aux_loss, "accuracy": accuracy}

    def evaluation_step(self, batch: dict[str, Tensor]) -> None:
        out = self.decode(batch)
        logits, label = self.classify(out.hidden, batch.get("padding_mask")), batch["label"]
        counted = 0 if batch.get(REPEATED) else 1
        target = label if counted else torch.full_like(label, IGNORED)
        self.metrics.update(
            value=F.cross_entropy(logits, label), weight=counted * len(label), preds=logits, target=target
        )
        self.usage.update(out.routing, counted)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The likeliest class of each sequence, (B,) int64."""
        return self.classify(self.decode(batch).hidden, batch.get("padding_mask")).argmax(-1)
