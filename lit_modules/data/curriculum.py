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
        self.stage = 0
        self.began = 0

    @property
    def level(self) -> int:
        return self.stages[self.stage]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        left = len(self.stages) - self.stage
        if left == 1:
            return
        share = (trainer.estimated_stepping_batches - self.began) / left
        accuracy = trainer.strategy.reduce(outputs["accuracy"], reduce_op="mean")  # ranks advance together
        if accuracy > self.advance_at or trainer.global_step - self.began >= share:
            self.stage += 1
            self.began = trainer.global_step
        pl_module.log("train/level", float(self.level))

    def state_dict(self) -> dict[str, int]:
        return {"stage": self.stage, "began": self.began}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.stage, self.began = state["stage"], state["began"]
