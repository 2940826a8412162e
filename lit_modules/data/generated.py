"""Data modules whose batches are drawn, not read."""

from abc import abstractmethod

import lightning.pytorch as pl
import numpy as np

from lit_modules.data.stream import Batch, BatchStream, FixedBatches
from mixers.registry import SpecError, check_range

TRAIN, VALIDATION, TEST = 0, 1, 2


class GeneratedData(pl.LightningDataModule):
    """Batches that seed, split, number, rank and level determine, whatever the model and whatever was drawn before.

    Args:
        batch_size: sequences per step and rank.
        batches_per_epoch: training batches between validations.
        num_validation, num_test: sequences in the fixed validation and test sets.
        seed: of all data.

    Raises:
        SpecError: a size below 1.
    """

    level = 0
    """How hard validation and test sequences are, where a subclass has levels."""

    def __init__(
        self,
        *,
        batch_size: int = 16,
        batches_per_epoch: int = 100,
        num_validation: int = 256,
        num_test: int = 1024,
        seed: int = 0,
    ):
        super().__init__()
        sizes = {"batch_size": batch_size, "batches_per_epoch": batches_per_epoch}
        for name, size in (sizes | {"num_validation": num_validation, "num_test": num_test}).items():
            if size < 1:
                raise SpecError(f"{name} {size} must be at least 1")
        check_range(0, seed=seed)
        self.batch_size = batch_size
        self.batches_per_epoch = batches_per_epoch
        self.num_validation = num_validation
        self.num_test = num_test
        self.seed = seed

    @property
    def train_level(self) -> int:
        """How hard the next training batch is."""
        return self.level

    @abstractmethod
    def draw(self, rng: np.random.Generator, *, batch_size: int, level: int) -> Batch:
        """A batch of ``batch_size`` sequences, all of whose randomness is from ``rng``."""

    def batch(self, split: int, number: int, *, batch_size: int, level: int, rank: int = 0) -> Batch:
        """The batch with this number: a pure function of the arguments and the seed."""
        rng = np.random.default_rng([self.seed, split, number, level, rank])
        return self.draw(rng, batch_size=batch_size, level=level)

    def train_dataloader(self) -> BatchStream:
        rank = getattr(self.trainer, "global_rank", 0)

        def make(number: int) -> Batch:
            return self.batch(TRAIN, number, batch_size=self.batch_size, level=self.train_level, rank=rank)

        return BatchStream(make, length=self.batches_per_epoch)

    def _fixed(self, split: int, num_sequences: int) -> FixedBatches:
        sizes = [min(self.batch_size, num_sequences - i) for i in range(0, num_sequences, self.batch_size)]
        batches = [self.batch(split, i, batch_size=size, level=self.level) for i, size in enumerate(sizes)]
        rank, world_size = getattr(self.trainer, "global_rank", 0), getattr(self.trainer, "world_size", 1)
        return FixedBatches(batches, rank=rank, world_size=world_size)

    def val_dataloader(self) -> FixedBatches:
        return self._fixed(VALIDATION, self.num_validation)

    def test_dataloader(self) -> FixedBatches:
        return self._fixed(TEST, self.num_test)

    def predict_dataloader(self) -> FixedBatches:
        return self.test_dataloader()
