"""`recipes contest`: a retrofitted model against rivals and controls, all with the same bytes; also run as a module.

Every figure is a row of `results.json`, written as soon as it is measured; rows that are there are not measured again.
"""

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from lit_modules.data.files import find_files, read_documents
from lit_modules.data.ruler_tasks import Needle, RulerSample, Task, VariableTracking, ruler_samples
from mixers.registry import SpecError, check_positive, unknown
from mixers.threshold import check_usage
from recipes.retrofit.contest_report import report as write_report
from recipes.retrofit.contest_rows import Results, Row
from recipes.retrofit.methods import METHODS, Contestant, bytes_of, sensitivity_of
from recipes.retrofit.presses import PRESSES, Pressed, those_there
from recipes.retrofit.run import open_host
from recipes.retrofit.scoring import perplexity, recall, windows

USAGES = [0.25, 0.125, 0.5, 0.0625]
TEXT = ("prose", "code")
TASKS: dict[str, Task] = {
    "single": Needle(),
    "multikey": Needle(others=3),
    "tracking": VariableTracking(declared=True),
    "niah_multikey_2": Needle(others=None),
    "variable_tracking": VariableTracking(),
}
HARD = ("niah_multikey_2", "variable_tracking")  # RULER's own: for the host and ham, at the shortest length alone
BLIND = ("oracle",)  # reads the answers: what it would find tells nothing
UNUSED = -1  # seed of the prompts to calibrate on
FILES = 24  # of a folder, to calibrate on


class Job(NamedTuple):
    """What a contestant is measured on at a time."""

    seed: int
    method: str
    usage: float
    tasks: list[tuple[str, int]]


def contest(
    host: str,
    bed: str,
    retrofits: dict[int, str] | list[str],
    out: str = "runs/contest",
    usages: list[float] | None = None,
    seq_len: int = 2048,
    lengths: list[int] | None = None,
    windows: int = 4,
    code_windows: int = 2,
    samples: int = 8,
    calibration: int = 4,
    thresholds: Literal["task", "text"] = "task",
    methods: list[str] | None = None,
    tasks: list[str] | None = None,
    seeds: list[int] | None = None,
    fitted: dict[str, dict[int, str]] | None = None,
    window: int = 32,
    sinks: int = 4,
    report: bool = False,
) -> None:
    """Measures a retrofitted model beside every rival and control, each with the same bytes: cache and state together.

    A usage is a share of the bytes of the host's own cache at the length that is read; a method with a recurrent state
    keeps fewer tokens for it. Thresholds are calibrated for every method and usage on the same text; what was really
    held is measured and reported. Stopped and started again, it goes on where it was.

    Args:
        host: folder of the model that was retrofitted.
        bed: folder that `python -m recipes.retrofit.testbed` made.
        retrofits: folders that `recipes retrofit` wrote, one for each seed, in order or by seed.
        out: folder for results.json, table.md and plot.png.
        usages: shares of the host's bytes, in the order of work; default .25, .125, .5, .0625.
        seq_len: tokens of a window of text.
        lengths: tokens of the prompts; default 1024 and 2048.
        windows: of prose for each seed, others for each.
        code_windows: of code likewise.
        samples: prompts of a task, a length and a seed.
        calibration: windows that thresholds are calibrated on, half prose and half code; a quarter as many prompts.
        thresholds: `task` calibrates them for each task on others of its kind, so that bytes are equal on it; `text` on
            prose and code for all tasks, and what is then held of prompts is what it is.
        methods: which; default all, see `recipes.retrofit.methods`. Those of kvpress are left out where it is not
            installed, and have recall alone: they compress a context that was read to its end.
        tasks: which of prose, code, single, multikey, tracking, niah_multikey_2, variable_tracking; default all.
        seeds: which of those that there are folders for; default all.
        fitted: more retrofitted folders by a name of yours and seed, such as {"key_norm+memory": {0: FOLDER}}.
        window: the last tokens, always seen, of methods that need no fitting.
        sinks: the first tokens likewise.
        report: measure nothing; write tables and picture of what is there.

    Raises:
        SpecError: a folder that is no retrofit, or of another host; a test bed that lacks something; results of another
            contest in `out`; an unknown method or task.
    """
    usages = [check_usage(usage) for usage in usages or USAGES]
    lengths = lengths or [1024, 2048]
    check_positive(seq_len=seq_len, windows=windows, code_windows=code_windows, samples=samples)
    if calibration < 2:
        raise SpecError(f"calibration {calibration}: at least 2, a window of prose and one of code")
    folders = {"ham": retrofits if isinstance(retrofits, dict) else dict(enumerate(retrofits)), **(fitted or {})}
    known = [*METHODS, *PRESSES, *(fitted or {})]
    methods, tasks = _some("method", methods, known), _some("task", tasks, [*TEXT, *TASKS])
    seeds = sorted(folders["ham"]) if seeds is None else seeds
    digests = _check_folders(host, folders, methods, seeds)
    sources = _check_bed(Path(bed))
    settings = {"host": Path(host).name, "text": sources, "seq_len": seq_len, "windows": windows}
    settings |= {"code_windows": code_windows, "samples": samples, "calibration": calibration}
    settings |= {"thresholds": thresholds, "window": window, "sinks": sinks}
    results = Results(Path(out), settings, digests)
    if not report:
        methods = those_there(methods)
        jobs = list(_jobs(seeds, methods, usages, [t for t in tasks if t in TEXT], tasks, seq_len, lengths))
        _measure(results, jobs, Field(host, folders, Path(bed), settings))
    write_report(results.rows, settings, Path(out))


def _jobs(seeds, methods, usages, texts, tasks, seq_len: int, lengths: list[int]) -> Iterator[Job]:
    """The work in its order: what is most asked for first, so that an interrupted run is of use."""
    read = [(task, seq_len) for task in texts]
    find = [(task, length) for task in TASKS if task in tasks and task not in HARD for length in lengths]
    hard = [(task, min(lengths)) for task in HARD if task in tasks]
    others = [name for name in methods if name != "host"]
    for seed in seeds:
        if "host" in methods:
            yield Job(seed, "host", 1.0, read + find + hard)
        for usage in usages:
            for what in (read, find):
                for name in others:
                    if name not in (PRESSES if what is read else BLIND):
                        yield Job(seed, name, usage, what)
        for usage in usages:
            if "ham" in methods:
                yield Job(seed, "ham", usage, hard)


def _measure(results: Results, jobs: list[Job], field: "Field") -> None:
    """Measure what is not there yet."""
    todo = [
        (job, [task for task in job.tasks if not results.has(job.method, job.usage, job.seed, *task)]) for job in jobs
    ]
    total, left = (sum(len(some) for _, some in group) for group in ([(job, job.tasks) for job in jobs], todo))
    if not left:
        return
    results.begin()
    field.open()
    with tqdm(total=total, initial=total - left, desc="contest", unit="row") as bar:
        for job, some in todo:
            bar.set_postfix_str(f"seed {job.seed}, {job.method} at {job.usage:g}")
            one = field.contestant(job) if some else None
            for task, length in some:
                row = {"method": job.method, "usage": job.usage, "seed": job.seed, "task": task, "length": length}
                row |= {"of": results.digests.get((job.method, job.seed), "")}
                started = time.monotonic()
                measured = field.measure(one, job, task, length, results)
                results.add(row | measured | {"seconds": round(time.monotonic() - started, 1)})
                bar.update()


class Field:
    """What all contestants share.

    Args:
        host: folder.
        folders: retrofitted ones, by method and seed.
        bed: folder.
        settings: of the contest.
    """

    def __init__(self, host: str, folders: dict[str, dict[int, str]], bed: Path, settings: dict[str, Any]) -> None:
        self.host, self.folders, self.bed, self.settings = host, folders, bed, settings

    def open(self) -> None:
        """Reads the text, weighs the host's cache."""
        model, tokenizer = open_host(self.host)
        self.bytes_of_host = bytes_of(model)
        self.text = Text(self.bed, tokenizer, self.settings)
        self.metrics = sensitivity_of(self.text.calibration())

    def contestant(self, job: Job) -> Contestant:
        """The model of a job. Raises SpecError if a token takes other bytes than in the host."""
        folder = self.folders.get(_whose(job.method), {}).get(job.seed)
        how = {name: self.settings[name] for name in ("window", "sinks")}
        kind = Pressed if job.method in PRESSES else Contestant
        one = kind(job.method, self.host, folder, seed=job.seed, metrics=self.metrics, **how)
        if one.bytes_per_token != self.bytes_of_host:
            what = f"{one.bytes_per_token} bytes a token, in the host {self.bytes_of_host}"
            raise SpecError(
                f"keys and values take {what}, in {job.method}: not all layers are attached, or another dtype"
            )
        return one

    def measure(self, one: Contestant, job: Job, task: str, length: int, results: Results) -> Row:
        """What is found, and what it took in bytes."""
        drawn = self.text.draw(task, length, job.seed)
        of = results.digests.get((job.method, job.seed), "")
        rows: Any = self.text.calibration()
        if self.settings["thresholds"] == "task":
            of, rows = f"{of} {task} {length}", self.text.calibration_of(task, length)
        lengths = [round(mean(map(len, some))) for some in (_ids(drawn), rows)]  # prompts come close to what is asked
        try:
            one.hold(job.usage, lengths[0], length=lengths[1], rows=rows, tables=results.tables, of=of)
            results.save_tables()
            with one.meter() as meter:
                found = _score(one, task, drawn)
        except SpecError as error:
            return {"value": None, "left_out": str(error)}
        host = self.bytes_of_host * mean(meter.tokens)
        found |= {"bytes_cache": mean(meter.kept), "bytes_pages": mean(meter.pages), "bytes_state": one.state_bytes}
        found |= {"bytes_host": host, "usage_held": mean(meter.kept) / host}
        return found | ({"note": one.method.note} if one.method.note else {})


def _ids(drawn: Tensor | list[RulerSample]) -> Tensor | list[Tensor]:
    """Rows of ids."""
    if isinstance(drawn, Tensor):
        return drawn
    return [torch.tensor(sample.prompt_ids + sample.answer_ids) for sample in drawn]


def _score(one: Contestant, task: str, drawn: Tensor | list[RulerSample]) -> Row:
    if task in TEXT:
        score = perplexity(one.model, drawn)
        return {"value": score.perplexity, "measure": "perplexity", "per_sequence": score.per_sequence.tolist()}
    found = recall(one.model, drawn, read=one.read)
    several = isinstance(TASKS[task], VariableTracking)
    value, measure = (found.answers, "share of the answers") if several else (found.exact, "exact")
    return {"value": value, "measure": measure, "per_sample": [int(one) for one in found.per_sample]}


class Text:
    """Windows of the test bed, and prompts.

    Args:
        bed: its folder.
        tokenizer: of the host.
        settings: of the contest.
    """

    def __init__(self, bed: Path, tokenizer: Any, settings: dict[str, Any]) -> None:
        self.bed, self.tokenizer, self.settings = bed, tokenizer, settings
        self.tests: dict[str, Tensor] = {}
        self.few = settings["calibration"] // 2
        self.fit = {task: self._windows(task, "fit", FILES, self.few) for task in TEXT}

    def calibration(self) -> Tensor:
        """Ids (N, T), half prose and half code, of the part that is for fitting."""
        return torch.cat([*self.fit.values()])

    def calibration_of(self, task: str, length: int) -> Tensor | list[Tensor]:
        """Rows of ids of a task, none of which a seed is measured on."""
        return self.fit[task] if task in TEXT else _ids(self._prompts(task, length, UNUSED, (self.few + 1) // 2))

    def draw(self, task: str, length: int, seed: int) -> Tensor | list[RulerSample]:
        """What a task is measured on, alike for all."""
        return self.test(task, seed) if task in TEXT else self._prompts(task, length, seed, self.settings["samples"])

    def _prompts(self, task: str, length: int, seed: int, count: int) -> list[RulerSample]:
        return ruler_samples(TASKS[task], self.tokenizer, count=count, length=length, seed=seed, chat=True)

    def test(self, task: str, seed: int) -> Tensor:
        """Ids (N, T) of the part that is for testing; other windows for every seed.

        Raises:
            SpecError: the text has not enough.
        """
        if task not in self.tests:
            found = self._windows(task, "test")
            self.tests[task] = found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0))]
        count = self.settings["windows" if task == "prose" else "code_windows"]
        some = self.tests[task][seed * count : (seed + 1) * count]
        if len(some) < count:
            raise SpecError(f"{task} for testing has {len(self.tests[task])} windows: too few for seed {seed}")
        return some

    def _windows(self, task: str, part: str, files: int | None = None, count: int | None = None) -> Tensor:
        paths = sorted(find_files(str(self.bed / task / part)))
        paths = paths[:: max(1, len(paths) // files)] if files else paths
        return windows(read_documents(paths), self.tokenizer, length=self.settings["seq_len"], count=count)


def _whose(method: str) -> str:
    """The name that the folders of a method are given under."""
    return "ham" if method == "demand" else method


def _some(what: str, asked: list[str] | None, known: list[str]) -> list[str]:
    for name in asked or []:
        if name not in known:
            raise unknown(what, name, known)
    return known if asked is None else asked


def _check_folders(host: str, folders, methods: list[str], seeds: list[int]) -> dict[tuple[str, int], str]:
    """What tells the retrofitted folders from others, by method and seed."""
    if not (Path(host) / "config.json").is_file():
        raise SpecError(f"host {host} is no folder of a model: it has no config.json")
    mine = json.loads((Path(host) / "config.json").read_text())
    digests = {}
    for name in methods:
        where = folders.get(_whose(name))
        for seed in seeds if where is not None else ():
            if seed not in where:
                raise SpecError(f"no retrofit is named for seed {seed} of {name}: there are {sorted(where)}")
            folder = Path(where[seed])
            record, config = folder / "retrofit.json", folder / "config.json"
            if not (record.is_file() and config.is_file()):
                raise SpecError(
                    f"{folder} is no retrofit: `recipes retrofit` writes retrofit.json and config.json into it"
                )
            theirs = json.loads(config.read_text())
            for size in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size"):
                if theirs.get(size) != mine.get(size):
                    what = f"its {size} is {theirs.get(size)}, not {mine.get(size)}"
                    raise SpecError(f"{folder} is no retrofit of {host}: {what}")
            digests[name, seed] = hashlib.blake2b(record.read_bytes(), digest_size=6).hexdigest()
    return digests


def _check_bed(bed: Path) -> Any:
    """Where its text is from."""
    for part in TEXT:
        for split in ("fit", "test"):
            folder = bed / part / split
            if not (folder.is_dir() and any(folder.iterdir())):
                raise SpecError(
                    f"test bed {bed} is incomplete: {folder} is missing or empty; "
                    f"`python -m recipes.retrofit.testbed --out {bed}` makes it"
                )
    record = bed / "testbed.json"
    sources = json.loads(record.read_text()) if record.is_file() else {}
    return {part: sources.get(part, {}).get("source", "not said") for part in TEXT}


if __name__ == "__main__":
    from recipes.__main__ import main

    sys.exit(main(["contest", *sys.argv[1:]]))
