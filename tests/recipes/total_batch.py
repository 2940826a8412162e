"""A plug-in of the tests: data of one total batch, whatever the number of processes, and what each of them saw."""

import lightning.pytorch as pl
import torch

from lit_modules.data.stream import BatchStream, FixedBatches
from mixers.threshold import thresholds_of

TOTAL, LENGTH = 4, 24


class TotalBatch(pl.LightningDataModule):
    """Every process takes every n-th sequence of a batch, `parts` times as few at once."""

    vocab_size = 17
    model = "language_model"
    defaults = {"model": {"dim": 16, "depth": 2}, "mixer": {"num_heads": 2, "head_dim": 8}, "steps": 4}

    def __init__(self, *, parts: int = 1):
        super().__init__()
        self.parts = parts

    def sequences(self, split: int, number: int, count: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * split + number)
        first, step = (torch.randint(self.vocab_size, (count, 1), generator=generator) for _ in range(2))
        noise = torch.rand(count, LENGTH + 1, generator=generator) < 0.2
        return (first + step * torch.arange(LENGTH + 1) + noise) % self.vocab_size

    def share(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = rows[self.trainer.global_rank :: self.trainer.world_size]
        return {"tokens": rows[:, :-1].contiguous(), "targets": rows[:, 1:].contiguous()}

    def train_dataloader(self):
        def make(number: int) -> dict[str, torch.Tensor]:
            whole = self.share(self.sequences(0, number // self.parts, TOTAL))
            return {name: rows.chunk(self.parts)[number % self.parts] for name, rows in whole.items()}

        return BatchStream(make, length=64 * self.parts)

    def val_dataloader(self):
        rows = [self.sequences(1, number, 2) for number in range(3)]  # one process counts the third
        batches = [{"tokens": some[:, :-1].contiguous(), "targets": some[:, 1:].contiguous()} for some in rows]
        return FixedBatches(batches, rank=self.trainer.global_rank, world_size=self.trainer.world_size)


class Record(pl.Callback):
    """Writes what each process saw: the mean loss of every step, thresholds before and after calibration, and so on."""

    def __init__(self, name: str) -> None:
        self.name, self.losses, self.learned = name, [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.learned = [threshold.table.clone() for threshold in thresholds_of(pl_module)]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.losses.append(0.0)
        self.losses[-1] += float(trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean"))

    def on_fit_end(self, trainer, pl_module) -> None:
        found = {
            "losses": self.losses,
            "learned": self.learned,
            "tables": [threshold.table.clone() for threshold in thresholds_of(pl_module)],
            "allocated": any(getattr(callback, "allocated", False) for callback in trainer.callbacks),
            "head_bias": [block.mixer.head_bias.clone() for block in pl_module.decoder.blocks],
            "usage": pl_module.last_usage,
            "validation": float(trainer.callback_metrics["val/loss"]),
        }
        torch.save(found, f"{self.name}-{trainer.global_rank}.pt")
