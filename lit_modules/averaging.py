"""The exponential mean of the weights over the steps of training (EMA)."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from mixers.registry import SpecError


class WeightAverage(EMAWeightAveraging):
    """Lightning's, for models with KV thresholds.

    Validation, the weights in a checkpoint and what a fit ends with are the mean; training goes on from the last
    weights, which the checkpoint holds, too. Buffers are not averaged: the mean has the tables of the scores in
    training until thresholds are fitted to it, after the last step (`lit_modules.callbacks.CalibrateThresholds`).

    Args:
        decay: weight of the mean so far in each step, 0..1.

    Raises:
        SpecError: a decay out of range.
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise SpecError(f"ema must be at least 0 and less than 1, such as 0.999, got {decay:g}")
        super().__init__(use_buffers=False, decay=decay)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raises SpecError where weights are sharded, or too narrow to hold a mean."""
        if not isinstance(trainer.strategy, DDPStrategy | SingleDeviceStrategy):
            raise SpecError(f"ema needs whole weights, which {type(trainer.strategy).__name__} shards: use ddp")
        if trainer.precision in ("bf16-true", "16-true"):
            raise SpecError(f"ema needs float32 weights: those of {trainer.precision} round its steps away")
        self._device = trainer.strategy.root_device  # Lightning's choice is the module's, which is moved there later
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*overrides the configure_model")  # ours shards nothing with these
            super().setup(trainer, pl_module, stage)

    @contextmanager
    def applied(self, pl_module: pl.LightningModule) -> Iterator[None]:
        """Within it the module has the mean of the weights."""
        self._swap_models(pl_module)
        try:
            yield
        finally:
            self._swap_models(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing: checkpoints written by others here need the last weights, too."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._copy_average_to_current(pl_module)
