"""Ctrl-C, so that a run goes on later as if nothing had happened."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only

say = rank_zero_only(print)


@contextmanager
def stopping_between_steps(trainer: Trainer) -> Iterator[list[int]]:
    """Within it Ctrl-C lets the step under way end before the run does, as SIGTERM does.

    A checkpoint from the middle of a step would resume after a batch that was drawn and never learned from. A second
    one ends the run at once, and so does the first after the last step, where there is nothing to wait for, or with
    several processes, which would have to agree.

    Yields:
        A list that is not empty once a Ctrl-C waits for the end of a step.
    """
    waiting: list[int] = []

    def note(signum: int, frame: object) -> None:
        signal.signal(signal.SIGINT, before)
        trained = 0 < trainer.max_steps <= trainer.global_step
        if trained or trainer.world_size > 1 or not callable(signal.getsignal(signal.SIGTERM)):
            raise KeyboardInterrupt
        waiting.append(signum)
        say("\nstopping after this step; Ctrl-C again stops at once, and goes on from the last checkpoint")
        signal.raise_signal(signal.SIGTERM)  # Lightning, which answers it only while it trains, looks after each step

    if threading.current_thread() is not threading.main_thread():
        yield waiting  # signals are the main thread's
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield waiting
    finally:
        signal.signal(signal.SIGINT, before)
