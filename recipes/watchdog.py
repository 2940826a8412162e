"""Ends a process that waits for another one of its run of which nothing is heard any more."""

import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from recipes.messages import end_bars, one_line

EVERY = 3.0  # seconds between two signs of life
LIMIT = 45.0  # seconds without one
REACH = 10  # seconds to reach the store
WATCHED = 8  # processes that each one looks at: with all looking at all, the store of a thousand has no rest


class Watchdog(Callback):
    """Ends this process, with a line and code 2, when another one of the run gives no sign of life.

    A process that dies closes its connections, and the others fail at once. One that is stopped, or whose machine is
    gone, leaves them waiting until torch.distributed gives up. So a thread in each process counts up in the store
    through which they found each other, and looks at the counts of those that come after it. It does so whatever the
    process is at, a long validation or a file that it alone writes: a process that runs, but never comes to where the
    others wait for it, is not noticed here.

    Time counts as this process lives through it. One that was stopped with all the others, as by a scheduler, does not
    take the hours between for their silence.

    Args:
        go_on: says how to go on with the run.
    """

    def __init__(self, go_on: Callable[[], str]) -> None:
        self.go_on = go_on
        self.over: threading.Event | None = None  # from when on a silence is no accident

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        try:
            store = _store()
            store.set(str(trainer.global_rank), "0")
        except (KeyError, ValueError, RuntimeError):
            store = None
        if not trainer.strategy.reduce_boolean_decision(store is not None):
            rank_zero_warn("the processes do not watch each other, as not all reach a store at MASTER_ADDR:MASTER_PORT")
            return
        self.over = threading.Event()
        args = (store, trainer.global_rank, trainer.world_size)
        threading.Thread(target=self._watch, args=args, daemon=True).start()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.over:
            trainer.strategy.barrier()  # else the first to end would be missed by the others
            self.over.set()

    def on_exception(self, *_: Any) -> None:
        if self.over:
            self.over.set()

    def _watch(self, store: Any, rank: int, processes: int) -> None:
        others = [(rank + i) % processes for i in range(1, min(processes, WATCHED + 1))]
        names, counts = [str(other) for other in others], [b""] * len(others)
        silent, heard, count = [0.0] * len(others), time.monotonic(), 0
        while not self.over.wait(EVERY):
            count += 1
            unanswered = threading.Timer(LIMIT, self._end, (rank, _keeper()))  # torch may wait without an end
            unanswered.daemon = True
            unanswered.start()
            try:
                store.set(str(rank), str(count))
                before, counts = counts, store.multi_get(names)
            except RuntimeError:  # the store is gone: this process ends soon by itself, or by the timer
                return
            unanswered.cancel()
            last, heard = heard, time.monotonic()
            passed = min(heard - last, 2 * EVERY)  # more: it was this process that was stopped
            pairs = zip(silent, counts, before, strict=True)
            silent = [quiet + passed if now == then else 0.0 for quiet, now, then in pairs]
            if max(silent) >= LIMIT:
                return self._end(rank, f"process {others[silent.index(max(silent))]}")

    def _end(self, rank: int, silent: str) -> None:
        if self.over.is_set():
            return
        end_bars()
        why = f"process {rank} has heard nothing of {silent} for {LIMIT:g} s: it is stopped, or cannot be reached"
        print(f"error: {one_line(f'{why}; {self.go_on()}')}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(2)  # the main thread is in the middle of something that does not end


def _keeper() -> str:
    """Whose the store is."""
    return "the launcher" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "process 0"


def _store() -> Any:
    """A client of its own of the store that torch.distributed uses: it answers one question at a time.

    Raises:
        KeyError, ValueError, RuntimeError: there is none that can be reached.
    """
    from torch.distributed import PrefixStore, TCPStore  # not in every build of torch

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=REACH), wait_for_workers=False)
    store.set_timeout(timedelta(seconds=2 * LIMIT))  # it is this side that looks at the time
    return PrefixStore("watchdog", store)
