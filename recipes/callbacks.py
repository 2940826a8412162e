"""What the command line adds to a run."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_modules.averaging import WeightAverage
from lit_modules.callbacks import CalibrateThresholds, RNGState
from lit_modules.finite import not_finite
from lit_modules.routing_monitor import RoutingMonitor
from lit_modules.sharded import WholeCheckpointIO
from mixers import SpecError, set_kv_usage
from mixers.registry import check_positive
from mixers.threshold import thresholds_of
from recipes.checkpoint.saved import PROCESSES, RECIPE, WANDB
from recipes.results import written_whole


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml into the run's folder, if it has one, and the same into every checkpoint."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[RECIPE] = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        checkpoint[PROCESSES] = trainer.world_size
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                checkpoint[WANDB] = logger.version


class WholeFiles(WholeCheckpointIO):
    """Writes a checkpoint beside its place and then names it, so that whatever stands there is whole.

    Lightning writes into the system's temporary folder, which may be a small disk, and copies from there.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if storage_options is not None or "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        with written_whole(Path(path)) as part, part.open("wb") as file:
            torch.save(checkpoint, file)


class LinkedCheckpoint(ModelCheckpoint):
    """ModelCheckpoint whose last checkpoint can be relied on.

    Its link always leads to a whole one: a new one is written, then linked, and then the one before is removed;
    Lightning removes before it links. Weights that are not finite are not saved. What ends a run in the middle of a
    step leaves the checkpoint before: one from there would resume after a batch that was drawn and not learned from.

    Args:
        keep: how many checkpoints of a run stay: the last ones.
        options: of ModelCheckpoint.
    """

    def __init__(self, *, keep: int = 1, **options: Any) -> None:
        check_positive(keep=keep)
        if keep > 1:
            options.update(monitor="step", mode="max", save_top_k=keep)
        super().__init__(**options)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        agreed = trainer.world_size == 1 or isinstance(exception, SIGTERMException)  # processes save together
        if agreed and not isinstance(exception, SpecError) and between_steps(trainer):
            trainer.fit_loop.epoch_loop.val_loop.batch_progress.reset()  # a validation is not resumed half-way
            super().on_exception(trainer, pl_module, exception)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        bad = not_finite(trainer.lightning_module.named_parameters())
        if not trainer.strategy.reduce_boolean_decision(bad is None):
            kept = f"the last checkpoint is {self.last_model_path}" if self.last_model_path else "nothing was saved"
            what = f"{bad or 'a weight'} is not finite at step {trainer.global_step}"
            raise SpecError(f"training diverged: {what}; {kept}")
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
                (shutil.copytree if Path(filepath).is_dir() else shutil.copy)(filepath, new)
            new.replace(linkpath)
        trainer.strategy.barrier()


def between_steps(trainer: Trainer) -> bool:
    """Whether weights, optimizer, data and counters are those of one and the same step, with no gradient under way."""
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    ended = progress.processed if 0 < trainer.max_steps <= trainer.global_step else progress.completed
    return progress.ready == ended and not accumulates(trainer)


def accumulates(trainer: Trainer) -> bool:
    """Whether the batch under way, or the last one, leaves its gradient for the next to be added to."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return bool(progress.current.ready % trainer.accumulate_grad_batches) and not progress.is_last_batch


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
    """Validates after the last of `max_steps`, wherever it falls between the validations that are due anyway.

    A run that was stopped between its last step and the end of that validation, which `done` in its checkpoint tells,
    is resumed to finish it: thresholds, validation, the checkpoint after it. Lightning would do nothing.
    """

    def __init__(self) -> None:
        self.done = False
        self.resumed_at_the_end = False
        self.went_on = False

    def state_dict(self) -> dict[str, bool]:
        return {"done": self.done}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        done = checkpoint["callbacks"].get(self.state_key, {}).get("done", True)
        if trainer.state.fn == TrainerFn.FITTING and trainer.max_steps == checkpoint["global_step"] and not done:
            self.resumed_at_the_end = True
            trainer.fit_loop.epoch_loop.max_steps += 1  # until `on_train_start`, which is not called after all steps

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.ckpt_path and not self.went_on:
            limits = f"its max_epochs ({trainer.max_epochs}) or max_time"
            raise SpecError(f"nothing was trained: {trainer.ckpt_path} is at {limits}; give more to go on")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.done = False
        self.went_on = self.went_on or self.resumed_at_the_end
        if not self.resumed_at_the_end:
            return
        self.resumed_at_the_end = False
        trainer.fit_loop.epoch_loop.max_steps -= 1
        for callback in trainer.callbacks:
            if isinstance(callback, CalibrateThresholds):
                callback.on_train_end(trainer, pl_module)
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.restarting = False
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.went_on = True
        if 0 < trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True  # Lightning validates once more before it stops

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.done = 0 < trainer.max_steps <= trainer.global_step


PLACES = {
    WeightAverage: -4,
    ProgressBar: -3,
    CalibrateThresholds: -2,
    ValidateAtEnd: -1,
    RNGState: 1,
    Checkpoint: 2,
}  # all others: 0
MISSED = {
    CalibrateThresholds: "the KV usage is not fitted to the one asked for",
    ValidateAtEnd: "the last step is not validated",
    LinkedCheckpoint: "a run that is stopped does not save",
    RNGState: "a resumed run draws other random numbers",
    RoutingMonitor: "the KV usage by head is not logged",
}


def in_order(callbacks: list[Callback]) -> list[Callback]:
    """The callbacks in the order that a run needs, whatever the one they were given in.

    At the last step the weights' mean is taken, the bar shows it, thresholds are fitted, and then the others, the
    user's own among them, may test or save the model; when training resumes, random numbers go on from the
    checkpoint's once all others have begun; checkpoints are written last.
    """

    def place(callback: Callback) -> int:
        return next((place for kind, place in PLACES.items() if isinstance(callback, kind)), 0)

    return sorted(callbacks, key=place)


def missed(trainer: Trainer, model: LightningModule) -> str:
    """What a fit goes without that has not all callbacks of the recipes: one line, or nothing.

    What would do nothing in this run is not missed: without thresholds, loggers or checkpoints; nor is ours that saves,
    where the user's does so, too.
    """
    routes = next(thresholds_of(model), None) is not None
    needed = {CalibrateThresholds: routes, RoutingMonitor: routes and bool(trainer.loggers)}
    saving = trainer.checkpoint_callbacks
    needed[LinkedCheckpoint] = bool(saving) and not any(getattr(one, "save_on_exception", False) for one in saving)
    lacking = [
        kind
        for kind in MISSED
        if needed.get(kind, True) and not any(isinstance(callback, kind) for callback in trainer.callbacks)
    ]
    said = "; ".join(f"without {kind.__name__} {MISSED[kind]}" for kind in lacking)
    return said and f"these callbacks replace the recipe's: {said}. --trainer.callbacks+= adds to them"


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
        """What a bar has room for: loss, how good that is, KV usage, and the last validation."""
        metrics = super().get_metrics(trainer, pl_module)
        good = "bits_per_byte" if "train/bits_per_byte" in metrics else "accuracy"
        names = {
            "train/loss": "loss",
            f"train/{good}": good,
            "train/kv_usage": "kv_usage",
            f"val/{good}": f"val_{good}",
        }
        ours = {short: metrics.pop(name) for name, short in names.items() if name in metrics}
        return ours | {name: x for name, x in metrics.items() if name != "v_num" and "/" not in name}
