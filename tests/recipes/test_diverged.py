"""Numbers that are none stop a run in one line, and are neither saved nor used."""

import csv

import pytest
import torch

from lit_modules.language_model import LanguageModel
from mixers import SpecError
from recipes.checkpoint import opening


def poison(monkeypatch, step, part):
    """Makes the output of a part of the model NaN, once `step` steps are done."""
    decode = LanguageModel.decode

    def poisoned(self, batch):
        if self.training and self.trainer.global_step == step:
            with torch.no_grad():
                part(self).fill_(torch.nan)
        return decode(self, batch)

    monkeypatch.setattr(LanguageModel, "decode", poisoned)


def test_a_learning_rate_that_diverges_keeps_the_last_good_checkpoint(run, here, tiny):
    """No step is finite after one as large as this on any machine."""
    error = run(f"fit {tiny} --steps 400 --model.learning_rate 1e38 --model.warmup_steps 0").error
    assert "training diverged in step" in error and "is not finite" in error and "learning_rate below 1e+38" in error
    assert any(part in error for part in ("output of decoder", "the gradient", "the loss"))


def test_what_is_not_finite_is_named_and_the_last_checkpoint_resumes(run, here, tiny, monkeypatch):
    with monkeypatch.context() as patch:
        poison(patch, 5, lambda model: model.decoder.blocks[1].mlp.up.weight)
        error = run(f"fit {tiny} --trainer.log_every_n_steps 1").error
    assert "in step 6: the output of decoder.blocks.1.mlp.up (Linear) is not finite" in error
    assert "the last checkpoint is " in error and "checkpoints/last.ckpt" in error
    saved = torch.load("runs/ham-text-1/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 4
    rows = list(csv.DictReader((here / "runs/ham-text-1/metrics.csv").open()))
    assert float(next(row for row in rows if row["trainer/gradient_norm"])["trainer/gradient_norm"]) > 0
    result = run("fit --ckpt_path last")
    assert result.code == 0, result.err


def test_weights_that_are_not_finite_are_not_saved(run, here, tiny, monkeypatch):
    with monkeypatch.context() as patch:
        before = LanguageModel.on_train_batch_end

        def overflow(self, *args):
            if self.trainer.global_step == 6:
                with torch.no_grad():
                    self.decoder.norm.weight[0] = torch.inf
            return before(self, *args)

        patch.setattr(LanguageModel, "on_train_batch_end", overflow)
        result = run(f"fit {tiny}")
    assert result.code == 2  # the last validation, which comes before, may warn
    assert "error: training diverged: decoder.norm.weight is not finite at step 6" in result.err.splitlines()[-1]
    assert torch.load("runs/ham-text-1/checkpoints/last.ckpt", weights_only=True)["global_step"] == 4


@pytest.mark.parametrize("command", ["test", "export --out x", "generate --prompt a", "fit --steps 9"])
def test_what_diverged_is_not_used(run, here, checkpoint, command):
    saved = torch.load(checkpoint, weights_only=True)
    saved["state_dict"]["decoder.norm.weight"][3] = torch.nan
    torch.save(saved, "bad.ckpt")
    assert "bad.ckpt is of a run that diverged: decoder.norm.weight" in run(f"{command} --ckpt_path bad.ckpt").error


def test_masks_may_be_infinite(tmp_path):
    opening.check_finite([("mask", torch.full((2, 2), -torch.inf)), ("ids", torch.ones(2, dtype=torch.long))], tmp_path)
    with pytest.raises(SpecError, match="weight is not finite"):
        opening.check_finite([("weight", torch.tensor([torch.inf]))], tmp_path)
