"""What a run does about a step whose gradient is not finite: it stops, or goes on without that step."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lit_modules.finite import first_not_finite, gradient_norm
from mixers.registry import SpecError
from mixers.threshold import thresholds_of

MOST_SKIPPED = 10  # in a row


class OnNonFinite(pl.Callback):
    """Logs the norm of the gradients, and stops the run, or skips the step, where it is not finite.

    It looks when the gradient is whole, that of all micro-batches and of all processes, which therefore agree; before
    the KV thresholds end their step, clipping, and the weights. A step is skipped by taking its gradients away: a
    parameter without one, its moments and its decay, is left as it is by torch's optimizers, under every precision.
    Lightning's own ways are no good: a `training_step` that returns None has not seen its gradient, and does not end
    the step of other processes. Of what Lightning counts, a skipped step is one: learning rate and data go on.

    Logs ``trainer/gradient_norm``, and with "skip" ``trainer/skipped_steps``, which checkpoints carry on. The norm is
    read in every step: a GPU has nothing to do while the optimizer's step is launched. Steps that a scaler of the loss
    (16-mixed) leaves out while it looks for its scale are neither stopped at nor counted.

    Args:
        skips: up to ``MOST_SKIPPED`` steps in a row; the next one stops the run.
    """

    def __init__(self, *, skips: bool = False) -> None:
        self.skips = skips
        self.skipped = self.in_a_row = 0

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raises SpecError where processes may see different gradients, or have them elsewhere than in parameters."""
        strategy = trainer.strategy
        known = isinstance(strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy)
        if self.skips and (not known or getattr(strategy, "_ddp_comm_hook", None)):
            what = type(strategy).__name__ + " with a communication hook" * known
            raise SpecError(f"on_nonfinite skip works with one device, ddp and fsdp2, not with {what}; use stop")

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        norm = gradient_norm(pl_module.parameters())
        pl_module.log("trainer/gradient_norm", norm)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if norm.isfinite():
            self.in_a_row = 0
        elif scaler is None or scaler.get_scale() <= 1:
            self._skip(trainer, pl_module)
        if self.skips:
            pl_module.log("trainer/skipped_steps", float(self.skipped))

    def _skip(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raises SpecError where the run is to stop."""
        self.skipped += 1
        self.in_a_row += 1
        step = trainer.global_step + 1
        if not self.skips or self.in_a_row > MOST_SKIPPED:
            tried = f", after {MOST_SKIPPED} skipped steps in a row" * self.skips
            raise SpecError(f"training diverged in step {step}{tried}: {_what(trainer, pl_module)}")
        for threshold in thresholds_of(pl_module):
            threshold.drop_step()
        pl_module.zero_grad(set_to_none=True)
        for callback in trainer.callbacks:
            if isinstance(callback, WeightAveraging):  # which else averages the same weights once more
                callback.load_state_dict({"latest_update_step": step})
        rank_zero_warn(f"step {step} is skipped: its gradient is not finite ({self.skipped} skipped so far)")


def _what(trainer: pl.Trainer, pl_module: Any) -> str:
    with trainer.precision_plugin.forward_context():
        what = first_not_finite(pl_module, pl_module.loss, pl_module.last_batch)
    saved = getattr(trainer.checkpoint_callback, "last_model_path", "")
    kept = f"the last checkpoint is {saved}" if saved else "no checkpoint was saved before"
    return f"{what} is not finite; {kept}; try a learning_rate below {pl_module.hparams.learning_rate:g}"
