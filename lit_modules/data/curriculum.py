"""Growing difficulty, decided by what the model has learned."""

from typing import Any

import lightning.pytorch as pl


class Curriculum(pl.Callback):
    """Steps through ``stages`` as the model learns; checkpoints carry where it stands.

    A stage ends when the accuracy on a training batch (``training_step`` returns it) passes ``advance_at``, or when its
    share of the steps is used up: those that were left when the stage began, divided by the stages that were left. The
    last stage keeps what remains.

    Args:
        stages: the level of each stage, one or more.
        advance_at: accuracy in 0..1; from 1 on only the steps end a stage.
    """

    def __init__(self, stages: list[int], *, advance_at: float):
        self.stages = stages
        self.advance_at = advance_at
        self.begun = [0]  # the step at which each stage began that was reached

    @property
    def level(self) -> int:
        return self.stages[len(self.begun) - 1]

    def history(self) -> list[tuple[int, int]]:
        """(step, level): when each stage began that was reached."""
        return list(zip(self.begun, self.stages, strict=False))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        left, since = len(self.stages) - len(self.begun) + 1, self.begun[-1]
        if left == 1:
            return
        share = (trainer.estimated_stepping_batches - since) / left
        accuracy = trainer.strategy.reduce(outputs["accuracy"], reduce_op="mean")  # ranks advance together
        if accuracy > self.advance_at or trainer.global_step - since >= share:
            self.begun.append(trainer.global_step)
        pl_module.log("train/level", float(self.level))

    def state_dict(self) -> dict[str, list[int]]:
        return {"begun": self.begun}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "begun" not in state:  # of older versions, which kept the last stage's step alone
            state = {"begun": [0] * state["stage"] + [state["began"]]}
        self.begun = list(state["begun"])
