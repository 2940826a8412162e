"""Gradients accumulated over micro-batches are those of the larger batch, and so is all that is learned from it."""

import lightning.pytorch as pl
import pytest
import torch

from lit_modules.data.stream import BatchStream
from mixers.threshold import thresholds_of


class Parts(pl.LightningDataModule):
    """Each batch of a data module in equal parts."""

    def __init__(self, data, parts):
        super().__init__()
        self.data, self.parts = data, parts

    def train_dataloader(self):
        whole = self.data.train_dataloader()

        def make(number):
            batch = whole.make(number // self.parts)
            return {name: x.chunk(self.parts)[number % self.parts] for name, x in batch.items()}

        return BatchStream(make, length=whole.length * self.parts)


@pytest.mark.parametrize(("mixer", "scope"), [("ham", "model"), ("ham", "head"), ("gdn", None)])
def test_four_quarters_are_one_batch(make_trainer, make_model, make_mqar, mixer, scope):
    found = []
    for parts in (1, 4):
        spec = {"name": mixer, "num_heads": 2, "head_dim": 8} | ({"scope": scope} if mixer == "ham" else {})
        model = make_model(mixer=spec)
        data = Parts(make_mqar(batch_size=8, curriculum=None), parts)
        trainer = make_trainer(
            max_steps=6, accumulate_grad_batches=parts, precision="64-true", gradient_clip_val=1.0, limit_val_batches=0
        )
        trainer.fit(model, data)
        assert trainer.global_step == 6
        assert all(threshold.micro_batches == 1 for threshold in thresholds_of(model))
        found.append(model.state_dict())
    whole, quarters = found
    for name, x in whole.items():
        torch.testing.assert_close(quarters[name], x, rtol=1e-6, atol=1e-6)
    assert all(x == 6 for name, x in whole.items() if name.endswith("threshold.steps"))
