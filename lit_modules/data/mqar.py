"""Multi-query associative recall (Zoology, arXiv 2312.04927), with a curriculum of growing difficulty.

A sequence states ``num_pairs`` pairs of a key and its value, then asks for each key once::

    tokens    k1 v1 k2 v2 ... kn vn   0  k2  0  k1 ...
    targets    .  .  .  . ...  .  .   .  v2  .  v1 ...        . is -100: nothing is asked

Ids: 0 is the filler, then the keys, then the values. Keys are distinct within a sequence; values are drawn
independently, so that no answer can be found by elimination.
"""

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from lit_modules.data.stream import Batch, BatchStream, FixedBatches
from mixers.registry import SpecError

TRAIN, VALIDATION, TEST = 0, 1, 2
IGNORED = -100
GROWTH = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


def mqar_batch(
    rng: np.random.Generator,
    *,
    batch_size: int,
    num_pairs: int,
    seq_len: int | None = None,
    num_keys: int = 64,
    num_values: int = 64,
    power: float = 0.01,
) -> Batch:
    """Draws a batch of MQAR sequences.

    Args:
        rng: source of all randomness.
        batch_size: sequences B.
        num_pairs: pairs per sequence, at most ``num_keys``.
        seq_len: T, at least 4 * num_pairs (the default): the pairs take 2 * num_pairs, and queries stand on every
            other of the remaining slots.
        power: exponent a of the density ~ gap**(a - 1) with which queries fall soon after the pairs.

    Returns:
        ``tokens`` and ``targets``, both (B, T) int64.
    """
    seq_len = seq_len or 4 * num_pairs
    tokens = np.zeros((batch_size, seq_len), dtype=np.int64)
    targets = np.full((batch_size, seq_len), IGNORED, dtype=np.int64)

    keys = 1 + rng.random((batch_size, num_keys)).argsort(axis=1)[:, :num_pairs]
    values = 1 + num_keys + rng.integers(num_values, size=(batch_size, num_pairs))
    context = 2 * num_pairs
    tokens[:, 0:context:2], tokens[:, 1:context:2] = keys, values

    # Weighted sampling without replacement: the slots with the smallest Exp(1) / weight, in that order.
    num_slots = (seq_len - context) // 2
    weight = np.arange(1, num_slots + 1, dtype=np.float64) ** (power - 1)
    slots = (rng.standard_exponential((batch_size, num_slots)) / weight).argsort(axis=1)[:, :num_pairs]
    np.put_along_axis(tokens, context + 2 * slots, keys, axis=1)
    np.put_along_axis(targets, context + 2 * slots, values, axis=1)
    return {"tokens": torch.from_numpy(tokens), "targets": torch.from_numpy(targets)}


class Curriculum(pl.Callback):
    """Steps through ``stages`` as the model learns; checkpoints carry where it stands.

    A stage ends when the accuracy on a training batch passes ``advance_at``, or when its share of the step budget is
    used up: the steps that were left when the stage began, divided by the stages that were left. The last stage keeps
    what remains.

    Args:
        stages: number of pairs in each stage.
        advance_at: accuracy in 0..1; above 1 only the budget ends a stage.
    """

    def __init__(self, stages: list[int], *, advance_at: float):
        self.stages = stages
        self.advance_at = advance_at
        self.stage = 0
        self.began = 0

    @property
    def num_pairs(self) -> int:
        return self.stages[self.stage]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        left = len(self.stages) - self.stage
        if left == 1:
            return
        share = (trainer.estimated_stepping_batches - self.began) / left
        if outputs["accuracy"].item() > self.advance_at or trainer.global_step - self.began >= share:
            self.stage += 1
            self.began = trainer.global_step
        pl_module.log("train/num_pairs", float(self.num_pairs))

    def state_dict(self) -> dict[str, int]:
        return {"stage": self.stage, "began": self.began}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.stage, self.began = state["stage"], state["began"]


class MQARData(pl.LightningDataModule):
    """Generated MQAR batches; batch number, seed and number of pairs determine a batch, whatever the model.

    Args:
        num_pairs: pairs in validation, test and the last stage; at most ``num_keys``.
        seq_len: T, even and at least 4 * num_pairs, which is the default. Earlier stages shrink it in proportion.
        num_keys, num_values: ``vocab_size`` is 1 + num_keys + num_values.
        power: see :func:`mqar_batch`.
        batch_size: sequences per step and rank.
        curriculum: number of pairs in each stage, the last being ``num_pairs``; "auto" takes 4, 8, 16, 24, 32, 48, ...
            up to it; None trains on the full task from the start.
        advance_at: training accuracy that ends a stage early.
        batches_per_epoch: training batches between validations.
        num_validation, num_test: sequences in the fixed validation and test sets.
        seed: of all data.

    Raises:
        SpecError: sizes that contradict each other.
    """

    model = "language_model"

    def __init__(
        self,
        *,
        num_pairs: int = 48,
        seq_len: int | None = None,
        num_keys: int = 64,
        num_values: int = 64,
        power: float = 0.01,
        batch_size: int = 16,
        curriculum: list[int] | str | None = "auto",
        advance_at: float = 0.85,
        batches_per_epoch: int = 100,
        num_validation: int = 256,
        num_test: int = 1024,
        seed: int = 0,
    ):
        super().__init__()
        seq_len = seq_len or 4 * num_pairs
        if not 1 <= num_pairs <= num_keys:
            raise SpecError(f"num_pairs {num_pairs} must be in 1..num_keys ({num_keys}), for keys are distinct")
        if seq_len < 4 * num_pairs or seq_len % 2:
            raise SpecError(f"seq_len {seq_len} must be even and at least 4 * num_pairs ({4 * num_pairs})")
        if curriculum == "auto":
            curriculum = [n for n in GROWTH if n < num_pairs] + [num_pairs]
        stages = [num_pairs] if curriculum is None else list(curriculum)
        if not stages or min(stages) < 1 or max(stages) > num_pairs or stages[-1] != num_pairs:
            raise SpecError(f"curriculum {stages} must stay in 1..num_pairs and end with num_pairs ({num_pairs})")
        self.sizes = {"num_keys": num_keys, "num_values": num_values, "power": power}
        self.num_pairs = num_pairs
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.batches_per_epoch = batches_per_epoch
        self.num_validation = num_validation
        self.num_test = num_test
        self.seed = seed
        self.curriculum = Curriculum(stages, advance_at=advance_at)

    @property
    def vocab_size(self) -> int:
        return 1 + self.sizes["num_keys"] + self.sizes["num_values"]

    def setup(self, stage: str) -> None:
        # Before the trainer's other callbacks, so that a checkpoint written after this batch holds the new stage.
        if self.trainer and self.curriculum not in self.trainer.callbacks:
            self.trainer.callbacks.insert(0, self.curriculum)

    def batch(self, split: int, number: int, *, num_pairs: int, batch_size: int, rank: int = 0) -> Batch:
        """The batch with this number: a pure function of the arguments and the seed."""
        rng = np.random.default_rng([self.seed, split, number, num_pairs, rank])
        seq_len = 2 * (self.seq_len * num_pairs // self.num_pairs // 2)
        return mqar_batch(rng, batch_size=batch_size, num_pairs=num_pairs, seq_len=seq_len, **self.sizes)

    def train_dataloader(self) -> BatchStream:
        rank = getattr(self.trainer, "global_rank", 0)

        def make(number: int) -> Batch:
            num_pairs = self.curriculum.num_pairs
            return self.batch(TRAIN, number, num_pairs=num_pairs, batch_size=self.batch_size, rank=rank)

        return BatchStream(make, length=self.batches_per_epoch)

    def _fixed(self, split: int, num_sequences: int) -> FixedBatches:
        sizes = [min(self.batch_size, num_sequences - i) for i in range(0, num_sequences, self.batch_size)]
        batches = [self.batch(split, i, num_pairs=self.num_pairs, batch_size=size) for i, size in enumerate(sizes)]
        rank, world_size = getattr(self.trainer, "global_rank", 0), getattr(self.trainer, "world_size", 1)
        return FixedBatches(batches, rank=rank, world_size=world_size)

    def val_dataloader(self) -> FixedBatches:
        return self._fixed(VALIDATION, self.num_validation)

    def test_dataloader(self) -> FixedBatches:
        return self._fixed(TEST, self.num_test)

    def predict_dataloader(self) -> FixedBatches:
        return self.test_dataloader()
