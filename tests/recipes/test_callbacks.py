"""The callbacks of a run: their order, and what goes missing with them."""

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint

from lit_modules.callbacks import CalibrateThresholds, NextSteps, RNGState
from recipes.callbacks import LinkedCheckpoint, StepBar, ValidateAtEnd, in_order
from recipes.flags import BASE

OWN = """
import torch
from lightning.pytorch import Callback


class Saves(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == trainer.max_steps:
            torch.save(trainer.lightning_module.state_dict(), "saved.pt")
"""


def test_callbacks_come_in_the_order_that_a_run_needs():
    own, other = LambdaCallback(), NextSteps(commands={})
    whole = [StepBar(), CalibrateThresholds(), ValidateAtEnd(), own, other, RNGState(), LinkedCheckpoint()]
    assert in_order(whole) == whole
    assert in_order([own, *reversed([c for c in whole if c is not own])]) == whole
    assert in_order([ModelCheckpoint(), own])[0] is own and in_order([]) == []


def test_the_order_in_a_recipe_does_not_matter(run, here, tiny, monkeypatch):
    """A callback that saves, put first, saves thresholds that were fitted; and all runs the same."""
    (here / "own_callbacks.py").write_text(OWN)
    monkeypatch.syspath_prepend(here)
    callbacks = yaml.safe_load(BASE.read_text())["trainer"]["callbacks"]
    (here / "turned.yaml").write_text(
        yaml.safe_dump({"trainer": {"callbacks": [{"class_path": "own_callbacks.Saves"}, *callbacks[::-1]]}})
    )
    assert run(f"fit {tiny}").code == 0
    turned = run(f"fit {tiny} --config turned.yaml")
    assert (turned.code, turned.err) == (0, "") and "without" not in turned.out
    one, other = (torch.load(f"runs/ham-text-{i}/checkpoints/last.ckpt", weights_only=True) for i in (1, 2))
    saved = torch.load("saved.pt", weights_only=True)
    for name, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name]) and torch.equal(value, saved[name]), name
    assert other["callbacks"]["ValidateAtEnd"] == {"done": True}


@pytest.mark.parametrize("sign", ["=", "+="])
def test_callbacks_that_replace_the_recipes_say_what_is_missed(run, here, tiny, sign):
    result = run(f"fit {tiny} --trainer.callbacks{sign}lightning.pytorch.callbacks.LearningRateMonitor")
    assert result.code == 0
    said = [line for line in result.out.splitlines() if line.startswith("these callbacks replace the recipe's")]
    assert len(said) == (sign == "=")
    assert all(name in said[0] for name in ("CalibrateThresholds", "ValidateAtEnd", "RNGState") if said)
