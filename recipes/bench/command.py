"""Speed and memory head to head: operations and whole mixers, on whatever device is there."""

import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mixers.registry import SpecError, unknown
from recipes.bench.contestants import GROUPS, PHASES, Case, contestants
from recipes.bench.measure import Failed, Runner, machine_peaks, measure, prepare

LEAST_ROUNDS = 3


def bench(
    groups: list[str] | None = None,
    phases: list[str] | None = None,
    lengths: list[int] | None = None,
    kv_usages: list[float] | None = None,
    skews: list[str] | None = None,
    dtypes: list[str] | None = None,
    only: list[str] | None = None,
    batch: int = 8,
    heads: int = 4,
    head_dim: int = 32,
    tokens: int = 0,
    device: str = "auto",
    threads: int = 1,
    rounds: int = 20,
    minutes: float = 4.0,
    seed: int = 0,
    redraw: str | None = None,
    out: str = "runs/bench",
) -> None:
    """Times contestants side by side: in every round each runs once, in a new order, so that a slow moment hits all.

    Prints and saves a table, plots and the raw samples. The ratio of a row is the median over rounds of its time to
    that of the first contestant of its group in the same round.

    Args:
        groups: of delta_rule, routed_attention, mixers; default all.
        phases: of forward, train (forward and backward), prefill, decode (one token after `length`; both mixers only).
            Default: train.
        lengths: tokens of a sequence, T. Default: 256 and 1024; on CUDA 2048 to 32768.
        kv_usages: for contestants that store tokens. Default: 0.125, 0.25, 0.5.
        skews: even, or one_head: the same mean usage, all of it in as few heads as can hold it. Default: even.
        dtypes: of float32, bfloat16, float16, float64. Default: float32; on CUDA bfloat16.
        only: contestants to run, by the names that the table gives them.
        batch: sequences, B.
        heads: H.
        head_dim: K = V; the mixers are heads * head_dim wide.
        tokens: if given, the batch of every length is tokens / length, at least 1.
        device: cpu, cuda or auto.
        threads: of the CPU.
        rounds: samples of every row, if the time allows.
        minutes: limit for the whole run; what does not fit is left out and said so.
        seed: of the inputs and of the order in which contestants run.
        redraw: a folder with the results.json of a benchmark: writes its table and plots anew, and measures nothing.
        out: folder for results.json, table.md and the plots.
    """
    from recipes.bench.report import redraw_all, report

    if redraw:
        return redraw_all(Path(redraw))

    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    cuda = device == "cuda"
    settings = {
        "groups": groups or list(GROUPS),
        "phases": phases or ["train"],
        "lengths": lengths or ([2048, 8192, 32768] if cuda else [256, 1024]),
        "kv_usages": kv_usages or [0.125, 0.25, 0.5],
        "skews": skews or ["even"],
        "dtypes": dtypes or ["bfloat16" if cuda else "float32"],
        "only": only or [],
        **dict(batch=batch, heads=heads, head_dim=head_dim, tokens=tokens, device=device, threads=threads),
        **dict(rounds=rounds, minutes=minutes, seed=seed),
    }
    cases = list(_cases(settings))
    known = sorted({name for case in cases for name, _ in contestants(case, settings["kv_usages"], settings["skews"])})
    for name in settings["only"]:
        if name not in known:
            raise unknown("contestant", name, known)
    Path(out).mkdir(parents=True, exist_ok=True)  # now, not after all is measured
    torch.set_num_threads(threads)
    peaks = {dtype: machine_peaks(device, dtype, threads) for dtype in settings["dtypes"]}
    rows = _run_all(cases, settings)
    report(rows, settings, peaks, Path(out))


def _cases(settings: dict[str, Any]):
    """Every combination that means something. Raises SpecError for a value that means nothing."""
    for group in settings["groups"]:
        if group not in GROUPS:
            raise unknown("group", group, GROUPS)
    for phase in settings["phases"]:
        if phase not in PHASES:
            raise unknown("phase", phase, PHASES)
    for name in settings["dtypes"]:
        if name not in ("float32", "bfloat16", "float16", "float64"):
            raise unknown("dtype", name, ("float32", "bfloat16", "float16", "float64"))
    for skew in settings["skews"]:
        if skew not in ("even", "one_head"):
            raise unknown("skew", skew, ("even", "one_head"))
    for name in ("batch", "heads", "head_dim", "threads", "rounds", "minutes"):
        if settings[name] <= 0:
            raise SpecError(f"{name} must be positive, got {settings[name]}")
    if settings["tokens"] < 0:
        raise SpecError(f"tokens must not be negative, got {settings['tokens']}")
    if any(length < 1 for length in settings["lengths"]):
        raise SpecError(f"lengths must be positive, got {settings['lengths']}")
    if any(not 0 <= usage <= 1 for usage in settings["kv_usages"]):
        raise SpecError(f"kv_usages must be from 0 to 1, got {settings['kv_usages']}")
    if settings["device"] not in ("cpu", "cuda"):
        raise unknown("device", settings["device"], ("auto", "cpu", "cuda"))
    if settings["device"] == "cuda" and not torch.cuda.is_available():
        raise SpecError("device cuda is not there; known: cpu")
    found = False
    for group in settings["groups"]:
        for phase in settings["phases"]:
            if phase not in GROUPS[group]:
                continue
            for dtype in settings["dtypes"]:
                for length in settings["lengths"]:
                    batch = max(settings["tokens"] // length, 1) if settings["tokens"] else settings["batch"]
                    found = True
                    sizes = settings["heads"], settings["head_dim"]
                    yield Case(group, phase, dtype, batch, length, *sizes, settings["device"], settings["seed"])
    if not found:
        raise SpecError(f"groups {settings['groups']} have none of the phases {settings['phases']}")


def _run_all(cases: list[Case], settings: dict[str, Any]) -> list[dict[str, Any]]:
    from tqdm import tqdm

    end = time.perf_counter() + 60 * settings["minutes"]
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(cases), unit="case") as bar:
        for done, case in enumerate(cases):
            runners: dict[str, Runner] = {}
            mine: dict[str, dict[str, Any]] = {}  # contestant -> its row
            until = time.perf_counter() + (end - time.perf_counter()) / (len(cases) - done)
            for name, build in contestants(case, settings["kv_usages"], settings["skews"]):
                if settings["only"] and name not in settings["only"]:
                    continue
                bar.set_postfix_str(f"{case.group} {case.phase} T={case.length}: {name}")
                row = mine[name] = asdict(case) | {"contestant": name}
                if time.perf_counter() > end:
                    row["error"] = "left out: the time was over"
                    continue
                try:
                    runners[name] = prepare(build, case)
                    row.update(runners[name].facts)
                except Failed as error:
                    row["error"] = str(error)
                    bar.write(f"{name}, {case.group}, T = {case.length}: {error}")
            _rounds(runners, mine, settings, until)
            rows += mine.values()
            bar.update()
    return rows


def _rounds(runners: dict[str, Runner], mine: dict[str, Any], settings: dict[str, Any], until: float) -> None:
    """Fills in the samples of a case, a round at a time, until the rounds or the time are over."""
    order = random.Random(settings["seed"])
    for done in range(settings["rounds"]):
        if done >= LEAST_ROUNDS and time.perf_counter() > until:
            break
        for name in order.sample(list(runners), len(runners)):
            try:
                mine[name].setdefault("seconds", []).append(measure(runners[name], settings["threads"]))
            except Failed as error:
                mine[name]["error"] = str(error)
                mine[name].pop("seconds", None)
                del runners[name]
