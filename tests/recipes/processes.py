"""Runs of the command line in processes of their own, to be signalled and killed.

They are forked from one that has imported everything: another interpreter takes ten seconds to start. Those of one run
find each other as those of torchrun do.
"""

import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable
from multiprocessing import get_context, set_start_method
from multiprocessing.connection import wait
from pathlib import Path

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

import lit_modules.data.text
import lit_modules.data.tokens  # noqa: F401
import recipes.cli  # noqa: F401
import recipes.compare.run  # noqa: F401
from lit_modules.callbacks import CalibrateThresholds
from lit_modules.run_stats import RunStats
from recipes.__main__ import main
from recipes.callbacks import LinkedCheckpoint
from tests.recipes.conftest import cheap_ends

FORKS = get_context("forkserver")
FORKS.set_forkserver_preload([__name__])
# What a blow may come in: method, and how many steps are done.
PLACES = {
    "training": (RunStats, "on_train_batch_start"),
    "step": (RunStats, "on_before_optimizer_step"),
    "end": (RunStats, "on_train_batch_end"),
    "checkpointing": (LinkedCheckpoint, "_save_checkpoint"),
    "validation": (RunStats, "on_validation_start"),
    "calibration": (CalibrateThresholds, "on_train_end"),
}


def arm(rank: int, *, to: int, place: str, step: int, signum: int, after: int = 0) -> None:
    """Lets one process of a run signal itself where it is at a place, when so many steps are done.

    Args:
        rank: of this process.
        to: of the process meant.
        place: of PLACES.
        step: the first at which it may be.
        signum: the signal.
        after: calls of functions, in Python or C, that are let pass first.
    """
    if rank != to:
        return
    owner, name = PLACES[place]
    before, calls = getattr(owner, name), []

    def count(frame: object, event: str, arg: object) -> None:
        calls.append(event)
        if len(calls) > after:
            sys.setprofile(None)
            os.kill(os.getpid(), signum)

    def armed(self, trainer, *args, **kwargs):
        if trainer.global_step >= step and not calls:
            calls.append("here")
            sys.setprofile(count)
        return before(self, trainer, *args, **kwargs)

    setattr(owner, name, armed)


def _process(line: str, folder: str, rank: int, port: int, change: Callable | None) -> None:
    os.chdir(folder)
    output = os.open(f"said-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    warnings.simplefilter("ignore", DeprecationWarning)
    torch.set_num_threads(1)
    set_start_method("fork", force=True)  # of workers, as it is where nothing else is said
    if port:
        os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        rank_zero_only.rank = rank  # which Lightning reads when it is imported
    if change:
        change(rank)
    with cheap_ends():
        code = main(line.split())
    sys.stdout.flush()
    sys.exit(code)


def run(
    line: str,
    folder: Path,
    *,
    processes: int = 1,
    change: Callable | None = None,
    within: float = 240,
    rest: float | None = None,
):
    """Runs a command line.

    Args:
        line: its words, split at spaces.
        folder: the working directory.
        processes: how many.
        change: called with its rank in each of them, before.
        within: seconds after which all are killed, for the test to fail.
        rest: seconds after the end of the first after which the others are killed; as many as `within` if not given.

    Returns:
        The exit codes, and what each of the processes said.
    """
    port = 0
    if processes > 1:
        line += f" --trainer.accelerator cpu --devices {processes}"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    ranks = range(processes)
    started = [FORKS.Process(target=_process, args=(line, folder, rank, port, change)) for rank in ranks]
    for process in started:
        process.start()
    wait([process.sentinel for process in started], within)
    for process in started:
        process.join(within if rest is None else rest)
    for process in started:
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
    return [process.exitcode for process in started], [Path(folder, f"said-{rank}").read_text() for rank in ranks]
