"""Processes that load data, and the signals that are not meant for them."""

import os
import signal
import threading

IGNORED = [getattr(signal, name) for name in ("SIGINT", "SIGUSR1") if hasattr(signal, name)]


def outlive_signals(worker: int) -> None:
    """Lets a worker go on where all processes of a run are told to stop; a loader's `worker_init_fn`.

    Slurm, torchrun and a terminal signal workers, too. By torch's handlers they would end at once, and the run with
    them, which takes data until its step has ended. SIGTERM ends a worker if the process that it works for sends it.
    """
    for signum in IGNORED:
        signal.signal(signum, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # on Linux: a handler in Python is not told who sends
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)  # as torch's handler does
