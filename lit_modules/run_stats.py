"""How fast a run goes, how far it is, and what it takes: for every logger, in every run."""

import importlib.util
import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor


class RunStats(pl.Callback):
    """Logs how a run goes.

    ``trainer/learning_rate``, ``trainer/tokens`` (seen by all processes since the run first began),
    ``trainer/tokens_per_second`` (since the last log, without validations) and ``trainer/peak_memory_gb`` (of a GPU's
    tensors, else of the process).

    Lightning's own monitors log a learning rate for each parameter group, count anew after a resume, and sort before
    the loss on TensorBoard's first screen.
    """

    def __init__(self) -> None:
        self.tokens: int | Tensor = 0
        self.logged = 0  # tokens, at the last log
        self.since = self.validating = self.rate = 0.0

    def state_dict(self) -> dict[str, int]:
        return {"tokens": int(self.tokens)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.tokens = self.logged = state["tokens"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.since = time.perf_counter()

    def on_validation_start(self, *_: Any) -> None:
        self.validating = time.perf_counter()

    def on_validation_end(self, *_: Any) -> None:
        self.since += time.perf_counter() - self.validating

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self.rate = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.tokens = self.tokens + tokens_in(batch) * trainer.world_size
        last = 0 < trainer.max_steps <= trainer.global_step
        if trainer.global_step % trainer.log_every_n_steps and not last:
            return
        tokens, now = int(self.tokens), time.perf_counter()
        values = {
            "learning_rate": self.rate,
            "tokens": float(tokens),
            "tokens_per_second": (tokens - self.logged) / max(now - self.since, 1e-9),
            "peak_memory_gb": peak_memory(pl_module.device) / 1e9,
        }
        self.logged, self.since = tokens, now
        pl_module.log_dict({f"trainer/{name}": value for name, value in values.items()}, batch_size=1)


def tokens_in(batch: dict[str, Tensor]) -> int | Tensor:
    """Real tokens of a batch; a tensor where only the device knows."""
    return batch["padding_mask"].sum() if "padding_mask" in batch else batch["tokens"].numel()


def peak_memory(device: torch.device) -> float:
    """The most bytes that tensors took on a GPU, or the process elsewhere; NaN where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if importlib.util.find_spec("resource") is None:  # Windows
        return float("nan")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
