"""Runs of a comparison side by side: workers that end when their parent does, and one bar that counts every step."""

import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from recipes import plugins

Run = dict[str, Any]
_steps: Any = None  # of all runs together, in a worker


def train_all(runs: list[Run], jobs: int, unfinished: Path) -> Iterator[Run]:
    """Trains `jobs` runs at a time, in processes of their own; whoever stops asking for rows ends these.

    Args:
        runs: settings of each.
        jobs: how many side by side, one thread each.
        unfinished: folder of runs that are under way, which go on where they were when they were last saved.

    Yields:
        Rows as they come. A run that fails is reported in one line and left out; the others go on.
    """
    from tqdm import tqdm

    from recipes.compare.run import train

    if not runs:
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # before the workers load torch
    context = get_context("spawn")
    leash, held = context.Pipe(duplex=False)
    steps = context.Value("q", 0)
    begin = (leash, steps, list(plugins.NAMED))
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=begin)
    with tqdm(total=sum(run["steps"] for run in runs), unit="step") as bar:
        try:
            futures = {pool.submit(train, run, unfinished): run for run in runs}
            waiting = set(futures)
            bar.set_postfix_str(f"0 of {len(runs)} runs")
            while waiting:
                done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                bar.update(steps.value - bar.n)
                for future in done:
                    run = futures[future]
                    if error := future.exception():
                        text = " ".join(f"{type(error).__name__}: {error}".split())
                        bar.write(f"{run['label']}, seed {run['seed']}, failed: {text}", file=sys.stderr)
                        continue
                    row = future.result()
                    score = f"{run['label']}: {row['metric']} {row[row['metric']]:.3f}"
                    bar.set_postfix_str(f"{len(runs) - len(waiting)} of {len(runs)} runs; {score}")
                    yield row
        finally:
            held.close()
            pool.shutdown(cancel_futures=True)


def count_steps(steps: int) -> None:
    """Tells the bar of steps of training."""
    if _steps is not None:
        with _steps.get_lock():
            _steps.value += steps


def _begin(leash: Any, steps: Any, named: list[str]) -> None:
    global _steps
    _steps = steps
    plugins.take([f"--plugin={given}" for given in named])
    threading.Thread(target=_end_with_parent, args=(leash,), daemon=True).start()


def _end_with_parent(leash: Any) -> None:
    """The parent alone holds the other end of this pipe, which the system closes however the parent ends."""
    try:
        leash.recv()
    except EOFError:
        os._exit(1)
