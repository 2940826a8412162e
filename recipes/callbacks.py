"""What the command line adds to a run."""

import os
import shutil
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.cli import SaveConfigCallback

from mixers import set_kv_usage
from recipes.checkpoints import RECIPE


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml into the run's folder, if it has one, and the same into every checkpoint."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[RECIPE] = yaml.safe_load(self.parser.dump(self.config, skip_none=False))


class LinkedCheckpoint(ModelCheckpoint):
    """ModelCheckpoint whose link to the last checkpoint always leads to a whole one: a new one is written, then linked,
    and then the one before is removed. Lightning removes before it links."""

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        last = f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
        if self.save_last == "link" and Path(filepath).name != last:
            self._link_checkpoint(trainer, filepath, str(Path(filepath).with_name(last)))

    @staticmethod
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        """In one step, where Lightning takes the old link away first."""
        if trainer.is_global_zero and Path(filepath).absolute() != Path(linkpath).absolute():
            new = Path(f"{linkpath}.part")
            new.unlink(missing_ok=True)
            try:
                new.symlink_to(os.path.relpath(filepath, Path(linkpath).parent))
            except OSError:  # no symbolic links here
                shutil.copy(filepath, new)
            new.replace(linkpath)
        trainer.strategy.barrier()


class AskedUsage(Callback):
    """Sets the KV usage once a checkpoint is loaded: what it holds may include a threshold for another usage.

    Args:
        kv_usage: stored tokens / tokens, 0..1.
    """

    def __init__(self, kv_usage: float):
        self.kv_usage: float | None = kv_usage

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.kv_usage is not None:
            set_kv_usage(pl_module, self.kv_usage)
        self.kv_usage = None

    on_validation_start = on_test_start = on_predict_start = on_train_start


class ValidateAtEnd(Callback):
    """Validates after the last of `max_steps`, wherever it falls between the validations that are due anyway."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if 0 < trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True  # Lightning validates once more before it stops


class StepBar(TQDMProgressBar):
    """One bar over all steps, where Lightning's begins again with every epoch."""

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        bar = self.train_progress_bar
        bar.total = trainer.max_steps if trainer.max_steps > 0 else None
        bar.initial = bar.n = trainer.global_step
        bar.set_description("training")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        bar = self.train_progress_bar
        if self._should_update(trainer.global_step, bar.total):
            bar.n = trainer.global_step
            bar.set_postfix(self.get_metrics(trainer, pl_module))

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics
