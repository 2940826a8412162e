"""What a run cannot go on with ends it in a line that names the thing, and the last good checkpoint stays."""

import multiprocessing
import os
import pickle
import signal
from pathlib import Path

import pytest
import torch

from lit_modules.run_stats import RunStats
from tests.recipes.processes import run as run_apart


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("marker"),)


LINEAR = torch.nn.Linear(2, 2).state_dict()
GIVEN = {
    "pickle": (lambda path: path.write_bytes(pickle.dumps(Evil())), "no checkpoint, or a damaged one"),
    "archive": (lambda path: torch.save({"hyper_parameters": {"dim": Evil()}}, path), "UnpicklingError"),
    "weights": (lambda path: torch.save(LINEAR, path), "no checkpoint with plain hyper-parameters"),
    "other": (lambda path: torch.save({"state_dict": LINEAR, "hyper_parameters": {"lr": 1}}, path), "lr"),
    "model": (lambda path: torch.save(torch.nn.Linear(2, 2), path), "no checkpoint with plain hyper-parameters"),
    "folder": (lambda path: path.mkdir(), "no checkpoint, or a damaged one"),
}  # fmt: skip


@pytest.mark.parametrize("given", GIVEN)
def test_what_is_no_checkpoint_of_ours_is_refused(run, here, given):
    make, message = GIVEN[given]
    make(here / "bad.ckpt")
    error = run("fit --ckpt_path bad.ckpt").error
    assert message in error and ("bad.ckpt" in error or given == "other")
    assert [path.name for path in here.iterdir()] == ["bad.ckpt"]


def at_step_3(happens):
    before = RunStats.on_train_batch_start

    def hook(self, trainer, *args):
        if trainer.global_step == 3:
            happens()
        return before(self, trainer, *args)

    RunStats.on_train_batch_start = hook


def full_disk(rank):
    import resource

    at_step_3(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY)))


def dead_worker(rank):
    at_step_3(lambda: [os.kill(worker.pid, signal.SIGKILL) for worker in multiprocessing.active_children()])


@pytest.mark.parametrize(
    ("task", "happens", "message"),
    [
        ("text", full_disk, "step=4.ckpt cannot be written: File too large"),
        ("workers", dead_worker, "is killed by signal: Killed"),
    ],
)
def test_a_run_ends_in_one_line_and_its_last_checkpoint_stays(here, line_of, task, happens, message):
    codes, said = run_apart(line_of(task), here, change=happens)
    lines = said[0].splitlines()
    assert codes == [2] and message in "".join(line for line in lines if line.startswith("error: ")), said
    assert "Traceback" not in said[0]
    (folder,) = here.glob("runs/*/checkpoints")
    last = os.readlink(folder / "last.ckpt")
    there = {path.name for path in folder.iterdir()}
    if happens == dead_worker:  # its end may be seen a step later, or before the checkpoint that was last is removed
        there -= {"step=2.ckpt"} - {last}
    else:
        assert last == "step=2.ckpt"
    assert there == {"last.ckpt", last}
    codes, said = run_apart("fit --ckpt_path last", here)
    assert codes == [0] and f"last.ckpt -> {last}" in said[0], said
