"""Trains several mixers on one task, the same data in the same order for all, over several seeds.

Where a curriculum grows with what a contestant has learned (`mqar`), each sees the same examples of a level, but comes
to the next level in its own time; each row says when. `--data_options.curriculum null` trains all on the full task.
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from mixers.registry import SpecError, check_positive, check_range, parse_pattern, unknown
from recipes.compare.pool import train_all

HERE = Path(__file__).parents[1]
GRID = ("mixer", "router", "kv_usage", "scope", "combine", "budget")
QUICK = {"steps": 150, "seeds": 2, "data": {"num_pairs": 24, "num_test": 256}}

Spec = str | dict[str, Any]


def compare(
    contestants: str | list[dict[str, Any]] | None = None,
    mixers: list[str] | None = None,
    routers: list[str] | None = None,
    kv_usages: list[float] | None = None,
    data: str = "mqar",
    metric: str | None = None,
    data_options: dict[str, Any] | None = None,
    model_options: dict[str, Any] | None = None,
    steps: int | None = None,
    seeds: int | None = None,
    learning_rates: list[float] | None = None,
    rate_seeds: int = 0,
    test_usages: list[float] | None = None,
    match: str | None = None,
    match_to: str | None = None,
    jobs: int = 0,
    quick: bool = False,
    redraw: str | None = None,
    out: str = "runs/compare",
) -> None:
    """Trains contestants head to head; prints and saves one table, the plots and the raw figures.

    A run that is already in the output folder, with the same settings, texts and classes of yours, is not trained
    again: an interrupted comparison goes on, within a run where it was saved last, every five minutes; and a longer one
    adds to a shorter.

    Args:
        contestants: YAML file, or list of {mixer, router, kv_usage, scope, combine, budget, label}; lists of them, but
            for labels, stand for all combinations. Default: recipes/contestants/<data>.yaml, or tasks.yaml there.
        mixers: in place of contestants: names, patterns such as gdn*3,attention, or class paths.
        routers: for each of these mixers that takes one.
        kv_usages: for each of these mixers that takes one.
        data: as of fit: a task (`ls data`), a file or folder of text, or the class path of a data module. Model, heads,
            learning rate and steps are those of `fit --data`, which the data module says.
        metric: what is compared: one of the model's metrics, such as accuracy, loss or bits_per_byte. Default: what the
            data module's attribute `metric` names.
        data_options: of the data module, such as {num_pairs: 64}.
        model_options: of the model, in place of the task's, such as {dim: 64, depth: 2, learning_rate: 0.006}.
        steps: training steps of every run. Default: the task's.
        seeds: runs of every contestant; seed i draws the same data for all. Default: 5, with quick 2.
        learning_rates: trains every contestant at each of them; of each, the one that is best on the validation split
            goes into the table and the plots, and all go into results.json.
        rate_seeds: seeds that all learning rates are tried on; the other seeds are trained at the best alone. 0: all.
        test_usages: KV usages at which each trained model that has one is tested as well; they are drawn in curve.png.
        match: parameters or flops: gives every contestant MLPs as wide as it takes to have as many as with `match_to`.
        match_to: the mixer, or pattern, of the model that is matched; default: ham.
        jobs: runs side by side, one thread each; 0 is the number of cores.
        quick: a smaller task and fewer contestants: an answer in about 5 minutes on two cores.
        redraw: a folder with the results.json of a comparison or of a sweep: draws its plots anew, and trains nothing.
        out: folder for runs.jsonl, results.json, table.md and, where there is something to see, plot.png (the metric
            against KV usage), bytes.png (against the bytes of state and cache), curve.png (see test_usages) and
            curves.png (the training losses).
    """
    from mixers.threshold import check_usage
    from recipes.compare.report import at_best_rate, redraw_plots, report

    if redraw:
        return redraw_plots(Path(redraw))
    seeds = seeds if seeds is not None else QUICK["seeds"] if quick else 5
    check_positive(seeds=seeds, **({} if steps is None else {"steps": steps}))
    check_range(0, jobs=jobs, rate_seeds=rate_seeds)
    _check_together(
        rate_seeds=(rate_seeds, "learning_rates", learning_rates),
        match_to=(match_to, "match", match),
        routers=(routers, "mixers", mixers),
        kv_usages=(kv_usages, "mixers", mixers),
    )
    if mixers and contestants is not None:
        raise SpecError("give --mixers or --contestants, not both")
    from recipes.compare.run import settings_of
    from recipes.compare.sources import written_by_others
    from recipes.task import sized

    given = (QUICK["data"] if quick and data == "mqar" else {}) | (data_options or {})
    settings = settings_of(data, data_options=given, model_options=model_options or {}, metric=metric)
    if steps or quick:
        settings["steps"] = steps or QUICK["steps"]
    if test_usages:
        settings["test_usages"] = [check_usage(usage) for usage in test_usages]
    if mixers:
        contestants = [{"mixer": mixer} | _grid_options(mixer, routers, kv_usages) for mixer in mixers]
        for flag, key, values in (("routers", "router", routers), ("kv_usages", "kv_usage", kv_usages)):
            if values and not any(key in one for one in contestants):
                raise SpecError(f"--{flag} were given, but none of these mixers has a {key}: {', '.join(mixers)}")
    elif contestants is None:
        own = HERE / "contestants" / f"{settings['data']}.yaml"
        contestants = str(
            own.with_name("quick.yaml") if quick else own if own.exists() else own.with_name("tasks.yaml")
        )
    if isinstance(contestants, str):
        contestants = _read(Path(contestants))
    cells = [cell | {"mixer": sized(cell["mixer"], settings["data"])} for cell in expand(contestants)]
    if match:
        cells = [*_matched(cells, match, sized(match_to or "ham", settings["data"]), settings)]
    check(cells, settings, validated=bool(learning_rates))
    settings |= written_by_others(cells, settings)
    cells = list(_at_each_rate(cells, learning_rates or [], model_options or {}))

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    tried = min(rate_seeds or seeds, seeds)
    rows = _trained([cell | settings | {"seed": seed} for seed in range(tried) for cell in cells], folder, jobs)
    if tried < seeds:
        best = {label: found["best"] for label, found in at_best_rate(rows, tried)[1].items()}
        cells = [cell for cell in cells if cell["options"]["learning_rate"] == best.get(cell["label"])]
        rows += _trained(
            [cell | settings | {"seed": seed} for seed in range(tried, seeds) for cell in cells], folder, jobs
        )
    report(rows, settings, folder, tried, dict.fromkeys((cell["label"] for cell in cells), seeds))


def _trained(wanted: list[dict[str, Any]], folder: Path, jobs: int) -> list[dict[str, Any]]:
    """The rows of these runs; those that the folder does not have yet are trained, and kept there as they end."""
    log, unfinished = folder / "runs.jsonl", folder / "unfinished"
    done = _finished(log)
    keys = [_key(run) for run in wanted]
    missing = [run | {"key": key} for run, key in zip(wanted, keys, strict=True) if key not in done]
    if taken := len(wanted) - len(missing):
        print(f"{taken} of {len(wanted)} runs are there already, in {log}")
    for row in train_all(missing, jobs or os.cpu_count() or 1, unfinished):
        done[row["key"]] = row
        with log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        (unfinished / f"{row['key']}.ckpt").unlink(missing_ok=True)
    if unfinished.exists() and not any(unfinished.iterdir()):
        unfinished.rmdir()
    return [done[key] | {"label": run["label"]} for key, run in zip(keys, wanted, strict=True) if key in done]


def _matched(cells: list[dict[str, Any]], what: str, to: Spec, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The cells, with MLPs that make their models as large as that with the mixer `to`."""
    from lit_modules.base import with_options
    from recipes.compare.run import OF_MODEL
    from recipes.matching import matched

    sizes = {
        key: settings["model_options"][key] for key in ("dim", "depth", "mlp_ratio") if key in settings["model_options"]
    }
    length = settings["data_options"].get("seq_len")
    for cell in cells:
        options = {key: value for key, value in cell["options"].items() if key not in OF_MODEL}
        found = matched(what, with_options(cell["mixer"], **options), to, **sizes, seq_len=length)
        print(f"{cell['label']}: {found}")
        yield cell | {"options": cell["options"] | {"mlp_ratio": found.mlp_ratio}}


def expand(contestants: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One {label, mixer, options} per combination of the listed options.

    Args:
        contestants: mappings of GRID's keys and `label`; a list stands for all of its values in turn, which a label is
            told apart by.

    Raises:
        SpecError: another key.
    """
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
            apart = [value for value, choice in zip(values, choices, strict=True) if len(choice) > 1]
            name = " ".join([label, *map(_short, apart)]) if label else describe(mixer, options)
            yield {"label": name, "mixer": mixer, "options": options}


def describe(mixer: Any, options: dict[str, Any]) -> str:
    """A short name: `ham residual(space=value) 0.125`; a mixer's own options are not in it."""
    return " ".join([",".join(spec["name"] for spec in parse_pattern(mixer)), *map(_short, options.values())])


def _short(spec: Any) -> str:
    if not isinstance(spec, dict):
        return str(spec)
    inner = ",".join(f"{key}={value}" for key, value in spec.items() if key != "name")
    return f"{spec['name']}({inner})" if inner else spec["name"]


def check(cells: list[dict[str, Any]], settings: dict[str, Any], *, validated: bool = False) -> None:
    """Builds every contestant once, so that a mistake is one line now and not a traceback in an hour.

    Args:
        cells, settings: of the runs.
        validated: whether a learning rate is chosen on the validation split.

    Raises:
        SpecError: a mistake in one of them, two of one label, data that lack a split, or a metric over what the data do
            not mark.
    """
    labels = [cell["label"] for cell in cells]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise SpecError(f"contestants share a label: {', '.join(sorted(twice))}")
    from lightning.pytorch.utilities.model_helpers import is_overridden

    from recipes.compare.run import MARKED, build, check_marked, check_settable

    for cell in cells:
        model, data = build(cell | settings | {"seed": 0})
        check_settable(model, settings.get("test_usages", []), cell["label"])
    for split in ("train", "test", *(["val"] if validated else [])):
        if not is_overridden(f"{split}_dataloader", data):
            raise SpecError(f"{type(data).__name__} has no {split}_dataloader, which compare needs")
    if settings["metric"] in MARKED and getattr(data, "metric", None) != settings["metric"]:
        data.prepare_data()
        for split, stage in {"val": "validate", "test": "test"}.items():
            if split == "test" or validated:
                data.setup(stage)
                check_marked(settings["metric"], data, split)


def _at_each_rate(
    cells: list[dict[str, Any]], rates: list[float], model_options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """The contestants, each at every learning rate; as they are, if none is given."""
    if rates and "learning_rate" in model_options:
        raise SpecError("give --learning_rates or --model_options.learning_rate, not both")
    for rate in rates:
        if not (math.isfinite(rate) and rate > 0):
            raise SpecError(f"learning_rates must be positive, got {rate}")
    for cell in cells:
        choices = [{"learning_rate": rate} for rate in dict.fromkeys(rates)] or [{}]
        yield from (cell | {"options": cell["options"] | choice} for choice in choices)


def _finished(log: Path) -> dict[str, dict[str, Any]]:
    """key -> row of the runs in a log. A last line that was cut when the comparison was ended is dropped.

    Raises:
        SpecError: another line is no run.
    """
    lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
    rows = {}
    for number, line in enumerate(lines, 1):
        whole = line.endswith(b"\n")
        try:
            row = json.loads(line) if whole else {}
            rows[row["key"]] = row
        except (ValueError, KeyError, TypeError) as error:
            if whole:
                raise SpecError(f"{log}: line {number} is no run of a comparison") from error
            print(f"{log}: the last line was cut; that run is trained again", file=sys.stderr)
            os.truncate(log, sum(map(len, lines[:-1])))
    return rows


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        content = yaml.safe_load(path.read_text())
        found = content["contestants"]
    except (OSError, KeyError, TypeError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SpecError(f"{path} is no list of contestants: {' '.join(str(error).split())}") from error
    if not (isinstance(found, list) and found and all(isinstance(contestant, dict) for contestant in found)):
        raise SpecError(f"{path} is no list of contestants: it has {found!r}")
    if others := content.keys() - {"contestants"}:
        names = ", ".join(map(str, others))
        raise SpecError(f"{path} has contestants, and {names} beside them: give these as flags of compare")
    return found


def _check_together(**options: tuple[Any, str, Any]) -> None:
    """Raises SpecError for an option (its value, the name of the one it goes with, that one's value) that is alone."""
    for name, (value, other, given) in options.items():
        if value and not given:
            raise SpecError(f"--{name} goes with --{other}: give these, too")


def _grid_options(mixer: Spec, routers: list[str] | None, kv_usages: list[float] | None) -> dict[str, Any]:
    from mixers.registry import MIXERS

    known = {option for spec in parse_pattern(mixer) for option in MIXERS.options(spec["name"])}
    given = {"router": routers, "kv_usage": kv_usages}
    return {key: value for key, value in given.items() if value and key in known}


def _key(run: dict[str, Any]) -> str:
    content = {key: value for key, value in run.items() if key != "label"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
