"""`--ema`: the mean of the weights is validated and kept, and a run goes on as if it had not stopped."""

import csv
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

import mixers
from lit_modules.averaging import WeightAverage
from lit_modules.strategies import FSDP2
from mixers import SpecError
from recipes.checkpoint.opening import open_checkpoint
from tests.recipes.conftest import CALIBRATED

EVERY_STEP = (
    "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint --trainer.callbacks.save_top_k=-1"
    " --trainer.callbacks.every_n_train_steps=1 --trainer.callbacks.filename=all-{step}"
)


@pytest.fixture(scope="module")
def mean(tiny, tmp_path_factory):
    """The folder of a run of six steps, of two batches each."""
    from recipes.__main__ import main
    from tests.recipes.conftest import cheap_ends

    folder = tmp_path_factory.mktemp("mean")
    with pytest.MonkeyPatch.context() as patch, cheap_ends():
        patch.chdir(folder)
        assert main(f"fit {tiny} --ema 0.5 --accumulate 2 --logger csv {EVERY_STEP}".split()) == 0
    return folder / "runs/ham-text-1"


def saved(folder, step):
    return torch.load(folder / f"checkpoints/all-step={step}.ckpt", weights_only=True)


def test_each_step_moves_the_mean(mean):
    names = [name for name, _ in open_checkpoint(mean / "checkpoints/last.ckpt").load().named_parameters()]
    expected = saved(mean, 1)["current_model_state"]
    for step in range(2, 7):
        checkpoint = saved(mean, step)
        for name in names:
            expected[name] = 0.5 * expected[name] + 0.5 * checkpoint["current_model_state"][name]
            torch.testing.assert_close(checkpoint["state_dict"][name], expected[name], rtol=1e-5, atol=1e-7)


def test_the_mean_is_calibrated_and_validated(mean, run, monkeypatch):
    monkeypatch.chdir(mean.parents[1])
    checkpoint = torch.load(mean / "checkpoints/last.ckpt", weights_only=True)
    opened = open_checkpoint(mean / "checkpoints/last.ckpt")
    model, data = opened.load(), opened.build_data()
    data.setup("fit")
    before = {name: x for name, x in checkpoint["current_model_state"].items() if "threshold" in name}
    model.load_state_dict(before, strict=False)  # what is stored while the first batch is read
    mixers.calibrate(model, islice(data.train_dataloader(), CALIBRATED), run=model.decode)
    name = next(name for name in checkpoint["state_dict"] if name.endswith("threshold.table"))
    torch.testing.assert_close(model.state_dict()[name], checkpoint["state_dict"][name])
    assert not torch.equal(checkpoint["current_model_state"][name], checkpoint["state_dict"][name])
    with (mean / "metrics.csv").open() as file:
        logged = [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]
    again = run(f"validate --ckpt_path {mean}/checkpoints/last.ckpt")
    line = next(line for line in again.out.splitlines() if "val/loss" in line)
    assert float(line.replace("│", " ").split()[-1]) == pytest.approx(logged[-1], rel=1e-5)


@pytest.mark.parametrize("step", [4, pytest.param(2, marks=pytest.mark.slow)])
def test_it_goes_on_to_the_bit(step, mean, run, here):
    assert run(f"fit --ckpt_path {mean}/checkpoints/all-step={step}.ckpt").code == 0
    ours, theirs = saved(here / "runs/ham-text-1", 6), saved(mean, 6)
    for part in ("state_dict", "current_model_state", "averaging_state"):
        assert ours[part].keys() == theirs[part].keys()
        assert all(torch.equal(x, theirs[part][name]) for name, x in ours[part].items())


@pytest.mark.parametrize(
    ("strategy", "precision", "part"), [(FSDP2(), "32-true", "FSDP2 shards"), (None, "bf16-true", "bf16-true")]
)
def test_what_has_no_mean_is_refused(strategy, precision, part, mean):
    from lightning.pytorch.strategies import SingleDeviceStrategy

    trainer = SimpleNamespace(strategy=strategy or SingleDeviceStrategy(), precision=precision)
    with pytest.raises(SpecError, match=part):
        WeightAverage(0.9).setup(trainer, None, "fit")


def test_a_decay_out_of_range_is_refused(run, here, tiny):
    assert "ema must be at least 0 and less than 1" in run(f"fit {tiny} --ema 1").error
