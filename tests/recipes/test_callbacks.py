"""The callbacks of a run: their order, and what goes missing with them."""

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint

from lit_modules.callbacks import CalibrateThresholds, NextSteps, RNGState
from lit_modules.routing_monitor import RoutingMonitor
from mixers import build_mixer
from recipes.callbacks import MISSED, LinkedCheckpoint, StepBar, ValidateAtEnd, in_order, missed
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


def test_the_order_in_a_recipe_does_not_matter(run, trained, here, tiny, monkeypatch):
    """A callback that saves, put first, saves thresholds that were fitted; and all runs the same."""
    (here / "own_callbacks.py").write_text(OWN)
    monkeypatch.syspath_prepend(here)
    callbacks = yaml.safe_load(BASE.read_text())["trainer"]["callbacks"]
    (here / "turned.yaml").write_text(
        yaml.safe_dump({"trainer": {"callbacks": [{"class_path": "own_callbacks.Saves"}, *callbacks[::-1]]}})
    )
    turned = run(f"fit {tiny} --config turned.yaml")
    assert (turned.code, turned.err) == (0, "") and "without" not in turned.out
    paths = (folder / "runs/ham-text-1/checkpoints/last.ckpt" for folder in (trained, here))
    one, other = (torch.load(path, weights_only=True) for path in paths)
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
    assert all(f"without {kind.__name__} {what}" in said[0] for kind, what in MISSED.items() if said)


@pytest.mark.parametrize(
    ("mixer", "options", "needless"),
    [
        ("ham", {}, set()),
        ("ham", {"logger": False}, {RoutingMonitor}),
        ("gdn", {}, {RoutingMonitor, CalibrateThresholds}),
        ("ham", {"enable_checkpointing": False}, {LinkedCheckpoint}),
        ("ham", {"callbacks": [ModelCheckpoint(save_on_exception=True)]}, {LinkedCheckpoint}),
        ("ham", {"callbacks": [ModelCheckpoint(), RNGState()]}, {RNGState}),
    ],
)
def test_what_would_do_nothing_is_not_missed(here, mixer, options, needless):
    trainer = Trainer(accelerator="cpu", enable_progress_bar=False, **options)
    line = missed(trainer, build_mixer(mixer, dim=8, num_heads=2))
    assert {kind for kind in MISSED if kind.__name__ not in line} == needless
