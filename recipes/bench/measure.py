"""How one contestant is measured: time by torch's own timer, peak memory, and what goes wrong as a word."""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

LEAST_SECONDS = 0.02  # of one sample: shorter steps are repeated
MEMORY_BELOW = 60.0  # seconds of a step above which a CPU's peak memory is not traced: tracing slows it down


class Failed(Exception):
    """A contestant that has no figure, and why in a few words."""


@dataclass
class Runner:
    """A step that is ready to be timed.

    Attributes:
        step: one call of what is measured.
        facts: what is known of it beside its time: peak_bytes, state_bytes, kv_bytes, kv_usage.
        repeats: calls that make one sample.
    """

    step: Callable[[], Any]
    facts: dict[str, Any] = field(default_factory=dict)
    repeats: int = 1


def prepare(build: Callable, case) -> Runner:
    """Builds a contestant, warms it up (which compiles what needs compiling) and traces its memory."""
    with failures():
        torch.manual_seed(case.seed)
        runner = build(case)
        if not isinstance(runner, Runner):
            runner = Runner(runner)
        first = _time(runner.step, 1)
        second = _time(runner.step, 1)
        runner.repeats = max(1, int(LEAST_SECONDS / max(second, 1e-6)))
        runner.facts["first_seconds"] = first
        if case.device == "cuda" or second < MEMORY_BELOW:
            runner.facts["peak_bytes"] = peak_bytes(runner.step, case.device)
    return runner


def measure(runner: Runner, threads: int) -> float:
    """Seconds of one call."""
    with failures():
        return _time(runner.step, runner.repeats, threads)


def _time(step: Callable[[], Any], repeats: int, threads: int | None = None) -> float:
    threads = threads or torch.get_num_threads()
    return Timer("step()", globals={"step": step}, num_threads=threads).timeit(repeats).mean


@contextlib.contextmanager
def failures() -> Iterator[None]:
    """Turns what a contestant may raise into Failed: it is a row of the table, not the end of the run."""
    try:
        yield
    except ImportError as error:
        raise Failed(f"not installed: {error.name or error}") from error
    except (torch.OutOfMemoryError, MemoryError) as error:
        _release()
        raise Failed("out of memory") from error
    except (RuntimeError, ValueError, AssertionError) as error:
        text = " ".join(str(error).split())
        if "out of memory" in text or "can't allocate memory" in text:
            _release()
            raise Failed("out of memory") from error
        raise Failed(f"{type(error).__name__}: {text[:160]}") from error


def _release() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_bytes(step: Callable[[], Any], device: str) -> int:
    """The most memory that a step holds beyond what was held before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with tempfile.TemporaryDirectory() as folder, _no_native_stderr():
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
            kept = step()
            del kept
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["args"]["Ev Idx"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _no_native_stderr() -> Iterator[None]:
    """The profiler's C++ side writes lines of its own to stderr, in the middle of the progress bar."""
    sys.stderr.flush()
    saved = os.dup(2)
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)


def machine_peaks(device: str, dtype: str, threads: int) -> dict[str, float]:
    """What the device reaches in this run: TFLOP/s of a large matrix product in `dtype`, TB/s of a copy in memory."""
    cuda = device == "cuda"
    n, numbers = (8192, 2**30) if cuda else (1536, 2**25)
    a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
    x = torch.ones(numbers, dtype=torch.float32, device=device)
    y = torch.empty_like(x)
    product, copy = lambda: a @ b, lambda: y.copy_(x)
    best = []
    for step in (product, copy):
        step()
        best.append(min(_time(step, 3, threads) for _ in range(5)))
    return {"tflops": 2 * n**3 / best[0] / 1e12, "terabytes": 8 * numbers / best[1] / 1e12}
