"""Trains several mixers on one task, the same data in the same order for all, over several seeds."""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

from mixers.registry import SpecError, parse_pattern, unknown

HERE = Path(__file__).parent
GRID = ("mixer", "router", "kv_usage", "scope", "combine", "budget")
QUICK = {"steps": 150, "seeds": 2, "data": {"num_pairs": 24, "num_test": 256}}

Spec = str | dict[str, Any]


def compare(
    contestants: str | list[dict[str, Any]] | None = None,
    mixers: list[str] | None = None,
    routers: list[str] | None = None,
    kv_usages: list[float] | None = None,
    data: str = "mqar",
    data_options: dict[str, Any] | None = None,
    model_options: dict[str, Any] | None = None,
    steps: int = 300,
    seeds: int = 5,
    test_usages: list[float] | None = None,
    jobs: int = 0,
    quick: bool = False,
    out: str = "runs/compare",
) -> None:
    """Trains contestants head to head; prints and saves one table, one plot and the raw figures.

    A run that is already in the output folder, with the same settings, is not trained again: an interrupted comparison
    goes on, and a longer one adds to a shorter.

    Args:
        contestants: YAML file, or list of {mixer, router, kv_usage, scope, combine, budget, label}; lists of them, but
            for labels, stand for all combinations. Default: those of recipes/contestants/mqar.yaml.
        mixers: in place of contestants: names, patterns such as gdn*3,attention, or class paths.
        routers: for each of these mixers that takes one.
        kv_usages: for each of these mixers that takes one.
        data: mqar, text or classification.
        data_options: of the data module, such as {num_pairs: 64}.
        model_options: of the model, such as {dim: 64, depth: 2, learning_rate: 0.006}.
        steps: training steps of every run.
        seeds: runs of every contestant; seed i draws the same data for all.
        test_usages: KV usages at which each trained model that has one is tested as well; they are drawn in curve.png.
        jobs: runs side by side, one thread each; 0 is the number of cores.
        quick: a smaller task and fewer contestants: an answer in about 5 minutes on two cores.
        out: folder for runs.jsonl, results.json, table.md and plot.png.
    """
    from mixers.threshold import check_usage
    from recipes.compare_report import report

    settings = {
        "data": data,
        "data_options": (QUICK["data"] if quick and data == "mqar" else {}) | (data_options or {}),
        "model_options": model_options or {},
        "steps": QUICK["steps"] if quick and steps == 300 else steps,
    }
    if test_usages:
        settings["test_usages"] = [check_usage(usage) for usage in test_usages]
    if mixers:
        contestants = [{"mixer": mixer} for mixer in mixers]
        contestants = [c | _grid_options(c["mixer"], routers, kv_usages) for c in contestants]
    elif contestants is None:
        contestants = str(HERE / "contestants" / ("quick.yaml" if quick else "mqar.yaml"))
    if isinstance(contestants, str):
        contestants = _read(Path(contestants))
    cells = list(expand(contestants))
    seeds = QUICK["seeds"] if quick and seeds == 5 else seeds
    check(cells, settings)

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "runs.jsonl"
    done = {row["key"]: row for row in map(json.loads, log.read_text().splitlines())} if log.exists() else {}
    wanted = [cell | settings | {"seed": seed} for seed in range(seeds) for cell in cells]
    keys = [_key(run) for run in wanted]
    missing = [run | {"key": key} for run, key in zip(wanted, keys, strict=True) if key not in done]
    for row in _train_all(missing, jobs or os.cpu_count() or 1):
        done[row["key"]] = row
        with log.open("a") as file:
            file.write(json.dumps(row) + "\n")
    report([done[key] for key in keys if key in done], settings, folder)


def expand(contestants: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One {label, mixer} per combination of the listed options."""
    for contestant in contestants:
        given = dict(contestant)
        label = given.pop("label", None)
        for key in given:
            if key not in GRID:
                raise unknown("key", key, [*GRID, "label"], of=" of a contestant")
        mixer = given.pop("mixer", "ham")
        choices = [value if isinstance(value, list) else [value] for value in given.values()]
        for values in product(*choices):
            options = dict(zip(given, values, strict=True))
            yield {"label": label or describe(mixer, options), "mixer": mixer, "options": options}


def describe(mixer: Any, options: dict[str, Any]) -> str:
    """A short name: `ham residual(space=value) 0.125`; a mixer's own options are not in it."""

    def short(spec: Any) -> str:
        if not isinstance(spec, dict):
            return str(spec)
        inner = ",".join(f"{key}={value}" for key, value in spec.items() if key != "name")
        return f"{spec['name']}({inner})" if inner else spec["name"]

    names = ",".join(spec["name"] for spec in parse_pattern(mixer))
    return " ".join([names, *(short(value) for value in options.values())])


def check(cells: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    """Builds every contestant once, so that a mistake is one line now and not a traceback in an hour."""
    labels = [cell["label"] for cell in cells]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise SpecError(f"contestants share a label: {', '.join(sorted(twice))}")
    from recipes.compare_run import build

    for cell in cells:
        build(cell | settings | {"seed": 0})


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        return yaml.safe_load(path.read_text())["contestants"]
    except (OSError, KeyError, TypeError, yaml.YAMLError) as error:
        raise SpecError(f"{path} is no list of contestants: {' '.join(str(error).split())}") from error


def _grid_options(mixer: Spec, routers: list[str] | None, kv_usages: list[float] | None) -> dict[str, Any]:
    from mixers.registry import MIXERS

    known = {option for spec in parse_pattern(mixer) for option in MIXERS.options(spec["name"])}
    given = {"router": routers, "kv_usage": kv_usages}
    return {key: value for key, value in given.items() if value and key in known}


def _key(run: dict[str, Any]) -> str:
    content = {key: value for key, value in run.items() if key != "label"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _train_all(runs: list[dict[str, Any]], jobs: int) -> Iterator[dict[str, Any]]:
    """Results as they come. A run that fails is reported and left out; the others go on."""
    from tqdm import tqdm

    from recipes.compare_run import train

    if not runs:
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # before the workers load torch
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool, tqdm(total=len(runs), unit="run") as bar:
        futures = {pool.submit(train, run): run for run in runs}
        try:
            for future in as_completed(futures):
                bar.update()
                run = futures[future]
                if error := future.exception():
                    bar.write(f"{run['label']}, seed {run['seed']}, failed: {type(error).__name__}: {error}")
                    continue
                row = future.result()
                bar.set_postfix_str(f"{run['label']}: {row['metric']} {row[row['metric']]:.3f}")
                yield row
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
