"""Signals, so that a run goes on later as if nothing had happened; and processes that a run cannot go on without."""

import logging
import os
import signal
import threading
from typing import Any

import torch.multiprocessing
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from recipes.callbacks import accumulates

say = rank_zero_only(print)
ASKED_TO_STOP = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]
# How gloo, NCCL and their store say that the other end is gone.
LOST = (
    "closed by peer",
    "reset by peer",
    "refused",
    "Broken pipe",
    "remote process exited",
    "Socket Timeout",
    "Timed out",
)


class StopBetweenSteps(Callback):
    """SIGTERM, SIGUSR1 and Ctrl-C let the step under way end before the run does, in all its processes.

    A checkpoint from the middle of a step would resume after a batch that was drawn and never learned from. Whichever
    processes are signalled, after each step all agree to stop; Lightning's own handler waits for the others within the
    signal, where they may be in the middle of something else. A single process stops in a validation, too. A second
    Ctrl-C ends the run at once, and so does the first after the last step, where there is nothing to wait for. What
    Lightning does under Slurm for SIGUSR1, to save wherever it is and to queue the job again, is left to the script.

    Attributes:
        signum: the signal that came first, if one did.
    """

    def __init__(self) -> None:
        self.signum: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def note(signum: int, frame: object) -> None:
            self.signum = self.signum or signum
            if signum != signal.SIGINT:
                return
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if 0 < trainer.max_steps <= trainer.global_step:
                raise KeyboardInterrupt
            say("\nstopping after this step; Ctrl-C again stops at once, and goes on from the last checkpoint")

        if threading.current_thread() is threading.main_thread():  # signals are its own
            for signum in ASKED_TO_STOP:
                signal.signal(signum, note)  # until Lightning puts back what was there before the run

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if not accumulates(trainer) and trainer.strategy.reduce_boolean_decision(self.signum is not None, all=False):
            trainer._signal_connector.received_sigterm = True  # Lightning looks at it after the step

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.world_size == 1 and self.signum is not None:
            trainer._signal_connector.received_sigterm = True


def end_with_the_launcher() -> None:
    """Lets Linux end this process with the one that started it, if that is a launcher: a run's first, or torchrun.

    Without it the others wait for the messages of one that was killed, with NCCL for minutes.
    """
    if "LOCAL_RANK" in os.environ and hasattr(signal, "SIGKILL"):
        torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)
    # Lightning looks after the processes that it starts, and says at this level which one it ends the others for.
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)


def lost_process(error: Exception) -> str | None:
    """The words of an error that say that a process cannot be reached any more; None if it is about something else."""
    return next((words for words in LOST if words in str(error)), None)
