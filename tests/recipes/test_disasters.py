"""What a run cannot go on with ends it in a line that names the thing, and the last good checkpoint stays."""

import errno
import multiprocessing
import os
import pickle
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import lit_modules.strategies
from lit_modules.run_stats import RunStats
from recipes.run_folder import RunFolder
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


def test_a_run_goes_on_over_the_same_text_alone(run, trained, here, texts):
    line = f"fit --ckpt_path {trained}/runs/ham-text-1/checkpoints/all-step=3.ckpt --data.paths [moved]"
    moved = shutil.copytree(texts, here / "moved", copy_function=shutil.copyfile)  # touched, too
    assert run(line).code == 0
    paths = (folder / "runs/ham-text-1/checkpoints/last.ckpt" for folder in (trained, here))
    whole, resumed = (torch.load(path, weights_only=True)["state_dict"] for path in paths)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    (moved / "one.txt").write_text((moved / "one.txt").read_text().replace("e", "E", 1))
    error = run(line).error
    assert error.startswith("the text in moved changed since the checkpoint was written: give the same to go on")
    assert [path.name for path in here.glob("runs/*")] == ["ham-text-1"]


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


def unwritable():
    """No folder here may be written, by nobody: root may write into any."""
    for folder in Path().glob("**/"):
        folder.chmod(0o555)
    if os.getuid() == 0:
        os.setuid(65534)


def unwritable_at_step_3(rank):
    at_step_3(unwritable)


def unwritable_at_first(rank):
    make = RunFolder.make
    RunFolder.make = lambda *args: unwritable() or make(*args)


def meta_lost(rank):
    """Of a sharded checkpoint, the file that the first process writes alone."""

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    at_step_3(lambda: vars(lit_modules.strategies).update(open=full))


def dead_worker(rank):
    at_step_3(lambda: [os.kill(worker.pid, signal.SIGKILL) for worker in multiprocessing.active_children()])


ONE_FILE = "--trainer.strategy.save_distributed_checkpoint false"


@pytest.mark.parametrize(
    ("task", "flags", "happens", "message"),
    [
        ("text", "", full_disk, "step=4.ckpt cannot be written: File too large"),
        pytest.param(
            "text",
            "--strategy fsdp2",
            full_disk,
            "step=4.ckpt cannot be written: File too large",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "text",
            "--strategy fsdp2",
            meta_lost,
            "step=4.ckpt cannot be written: No space left",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "text",
            f"--strategy fsdp2 {ONE_FILE}",
            full_disk,
            "step=4.ckpt cannot be written: File too large",
            marks=pytest.mark.slow,
        ),
        pytest.param("mqar", "", unwritable_at_step_3, "Permission denied", marks=pytest.mark.slow),
        ("workers", "", dead_worker, "is killed by signal: Killed"),
    ],
)
def test_a_run_ends_in_one_line_and_its_last_checkpoint_stays(run, here, line_of, task, flags, happens, message):
    processes = 2 if "fsdp2" in flags else 1
    codes, said = run_apart(f"{line_of(task)} {flags}", here, processes=processes, change=happens)
    for path in here.glob("**/"):
        path.chmod(0o755)
    assert codes == [2] * processes, said
    for lines in said:
        assert message in "".join(line for line in lines.splitlines() if line.startswith("error: ")), said
        assert "Traceback" not in lines
    (folder,) = here.glob("runs/*/checkpoints")
    last = os.readlink(folder / "last.ckpt")
    there = {path.name for path in folder.iterdir()}
    if happens == dead_worker:  # its end may be seen a step later, or before the checkpoint that was last is removed
        there -= {"step=2.ckpt"} - {last}
    else:
        assert last == "step=2.ckpt"
    assert there == {"last.ckpt", last}
    if processes == 1:
        result = run("fit --ckpt_path last")
        codes, said = [result.code], [result.out + result.err]
    else:
        codes, said = run_apart("fit --ckpt_path last", here, processes=processes)
    assert codes == [0] * processes and f"last.ckpt -> {last}" in said[0], said


def test_a_run_does_not_begin_where_nothing_may_be_written(here, line_of):
    codes, said = run_apart(line_of("mqar"), here, change=unwritable_at_first)
    here.chmod(0o755)
    assert codes == [2] and said[0].splitlines()[-1] == "error: runs: Permission denied", said
    assert "Traceback" not in said[0] and [path.name for path in here.iterdir()] == ["said-0"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_large_shard_that_does_not_fit_says_why(tmp_path):
    """torch fails once more where it ends the file, and its error reaches the other processes without the first."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        with pytest.raises(CheckpointException) as raised:
            writer = lit_modules.strategies._Writer(tmp_path)
            dcp.save({"weight": torch.zeros(100_000)}, storage_writer=writer, no_dist=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert lit_modules.strategies._said(pickle.loads(pickle.dumps(raised.value))) == "File too large"
