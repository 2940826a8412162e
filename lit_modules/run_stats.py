"""How fast a run goes, how far it is, and what it takes: for every logger, in every run."""

import importlib.util
import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lit_modules.flops import available_flops, flops_per_token


class RunStats(pl.Callback):
    """Logs how a run goes.

    ``trainer/learning_rate``, ``trainer/tokens`` (seen by all processes since the run first began),
    ``trainer/tokens_per_second`` (since the last log, without validations), ``trainer/data_wait`` (share of that time
    between a batch and the next: waiting for data, or saving a checkpoint), ``trainer/teraflops`` (a second and
    process, by :func:`lit_modules.flops.flops_per_token` at the length of the sequence that a token is in, on average),
    ``trainer/mfu`` (those over what the GPU can do; left out where that is not known) and ``trainer/peak_memory_gb``
    (of a GPU's tensors, else of the process).

    Lightning's own monitors log a learning rate for each parameter group, count anew after a resume, and sort before
    the loss on TensorBoard's first screen.
    """

    def __init__(self) -> None:
        self.tokens: int | Tensor = 0
        self.logged = 0  # tokens, at the last log
        self.since = self.validating = self.rate = 0.0
        self.waited = self.ended = 0.0
        self.squares: int | Tensor = 0  # of the lengths of this process's sequences, since the last log

    def state_dict(self) -> dict[str, int]:
        return {"tokens": int(self.tokens)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.tokens = self.logged = state["tokens"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.since = self.ended = time.perf_counter()
        self.waited, self.squares = 0.0, 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.waited += time.perf_counter() - self.ended

    def on_validation_start(self, *_: Any) -> None:
        self.validating = time.perf_counter()

    def on_validation_end(self, *_: Any) -> None:
        self.since += time.perf_counter() - self.validating
        self.ended += time.perf_counter() - self.validating

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self.rate = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.ended = time.perf_counter()
        lengths = lengths_in(getattr(pl_module, "last_batch", None) or batch)  # as it was cut for a length warm-up
        self.tokens = self.tokens + lengths.sum() * trainer.world_size
        self.squares = self.squares + lengths.square().sum()
        last = 0 < trainer.max_steps <= trainer.global_step
        if trainer.global_step % trainer.log_every_n_steps and not last:
            return
        tokens, now = int(self.tokens), time.perf_counter()
        took = max(now - self.since, 1e-9)
        rate = (tokens - self.logged) / took
        length = int(self.squares) * trainer.world_size / max(1, tokens - self.logged)
        flops = flops_per_token(pl_module, max(1.0, length)) * rate / trainer.world_size
        values = {
            "learning_rate": self.rate,
            "tokens": float(tokens),
            "tokens_per_second": rate,
            "data_wait": self.waited / took,
            "teraflops": flops / 1e12,
            "peak_memory_gb": peak_memory(pl_module.device) / 1e9,
        }
        if most := available_flops(pl_module.device, trainer.precision):
            values["mfu"] = flops / most
        self.logged, self.since, self.waited, self.squares = tokens, now, 0.0, 0
        pl_module.log_dict({f"trainer/{name}": value for name, value in values.items()}, batch_size=1)


def lengths_in(batch: dict[str, Tensor]) -> Tensor:
    """Real tokens of each sequence of a batch, (N,) int64, on whatever device knows."""
    if "cu_seqlens" in batch:
        return batch["cu_seqlens"].long().diff()
    if "padding_mask" in batch:
        return batch["padding_mask"].sum(1)
    return torch.tensor(batch["tokens"].shape)[1:].expand(len(batch["tokens"]))


def peak_memory(device: torch.device) -> float:
    """The most bytes that tensors took on a GPU, or the process elsewhere; NaN where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if importlib.util.find_spec("resource") is None:  # Windows
        return float("nan")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
