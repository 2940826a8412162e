"""What a run writes down, and where: loggers by name, and one curve from runs that go on from each other."""

import csv

import pytest
from lightning.pytorch.loggers import CSVLogger

from lit_modules.run_stats import RunStats
from recipes import cli

EVERY_STEP = "--trainer.log_every_n_steps 1 --trainer.val_check_interval 2 --keep 3 --logger csv"


def rows(folder):
    """(step, training loss, validation loss) of every row that has one."""
    with (folder / "metrics.csv").open() as file:
        found = [(int(row["step"]), row["train/loss"], row.get("val/loss", "")) for row in csv.DictReader(file)]
    return [row for row in found if any(row[1:])]


def test_a_curve_goes_on_where_the_checkpoint_is(run, here, tiny, monkeypatch):
    written, first = [], RunStats.on_train_batch_start

    def note(self, trainer, *args):
        if trainer.global_step:
            written.append(rows(here / "runs/ham-text-1")[-1][0])
        first(self, trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(RunStats, "on_train_batch_start", note)
        assert run(f"fit {tiny} {EVERY_STEP}").code == 0
    assert written == [0, 1, 2, 3, 4]  # whatever ends a run, the steps that it took are on the disk
    folder = here / "runs/ham-text-1"
    assert sorted(file.name for file in folder.iterdir() if "events" in file.name) == []
    whole = rows(folder)
    assert [row[0] for row in whole] == [0, 1, 1, 2, 3, 3, 4, 5, 5]
    log = (folder / "metrics.csv").read_text()
    (folder / "metrics.csv").write_text(log[:-40])  # as of a run that was killed while it wrote
    assert run(f"fit --ckpt_path {folder}/checkpoints/step=4.ckpt").code == 0
    assert rows(here / "runs/ham-text-2") == whole
    (folder / "metrics.csv").unlink()
    assert run(f"fit --ckpt_path {folder}/checkpoints/step=4.ckpt").code == 0
    assert rows(here / "runs/ham-text-3") == whole[6:]


def test_as_many_checkpoints_stay_as_asked(run, here, tiny):
    assert run(f"fit {tiny} --trainer.val_check_interval 2 --keep 2 --logger csv").code == 0
    names = {file.name for file in (here / "runs/ham-text-1/checkpoints").iterdir()}
    assert names == {"step=4.ckpt", "step=6.ckpt", "last.ckpt"}
    replaced = "--trainer.callbacks lightning.pytorch.callbacks.ModelCheckpoint"
    assert "LinkedCheckpoint, which --trainer.callbacks replaced" in run(f"fit {tiny} --keep 2 {replaced}").error


class Elsewhere(CSVLogger):
    """Has a folder of its own, as W&B's logger."""

    def __init__(self, name, save_dir, id):
        super().__init__(save_dir, name="project", version=name)


def test_loggers_go_by_name(run, here, tiny, monkeypatch):
    monkeypatch.setattr(cli, "WandbLogger", Elsewhere)
    monkeypatch.setattr(cli, "find_spec", lambda name: name)
    assert run(f"fit {tiny} --steps 1 --logger wandb").code == 0
    folder = here / "runs/ham-text-1"
    assert (folder / "checkpoints/last.ckpt").exists() and (folder / "project/ham-text-1/metrics.csv").exists()
    assert not (folder / "metrics.csv").exists() and not list(folder.glob("*events*"))
    assert run("fit --ckpt_path last --steps 2 --logger csv,tensorboard").code == 0
    assert (here / "runs/ham-text-2/metrics.csv").exists() and list(here.glob("runs/ham-text-2/*events*"))


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("fit --logger papyrus", ["papyrus", "csv", "tensorboard", "wandb"]),
        ("fit --logger csv --trainer.logger false", ["--logger or --trainer.logger"]),
        ("fit --keep 0", ["--keep", "at least 1", "0"]),
        ("test --ckpt_path last --logger csv", ["test takes no --logger; fit does"]),
        ("fit --logger wandb", ["--logger wandb", "pip install wandb"]),
    ],
)
def test_what_cannot_be_logged_is_refused(words, parts, run, here, tiny, monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    error = run(f"{words} {tiny}").error
    assert [part for part in parts if part not in error] == [] and not (here / "runs").exists()
