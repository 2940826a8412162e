"""The table and the JSON of a comparison."""

import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import mean, median
from typing import Any

from mixers.registry import SpecError
from recipes.compare.bytes_plot import draw_bytes
from recipes.compare.curve import curve_table, draw_curves
from recipes.compare.gains import over_controls, over_references
from recipes.compare.plot import draw, draw_losses, higher_is_better
from recipes.results import markdown_table, stamp, write_json

Row = dict[str, Any]


def report(
    rows: list[Row],
    settings: dict[str, Any],
    folder: Path,
    tried: int | None = None,
    wanted: dict[str, int] | None = None,
) -> None:
    """Writes results.json, table.md and the plots into the folder, and prints the table.

    Args:
        rows: of all runs.
        settings: that all of them share.
        folder: where to write.
        tried: see :func:`at_best_rate`.
        wanted: label -> seeds that it was to have; those without a row count as failed. None: as many as there are.

    Raises:
        SpecError: there are no rows.
    """
    if not rows:
        raise SpecError("every run failed; see the messages above")
    best, rates = at_best_rate(rows, tried)
    by_label = _by_label(best)
    parts = [
        table(by_label, wanted),
        unweighed(by_label),
        part_table(by_label),
        name_table(by_label),
        rate_table(rates),
    ]
    parts += [stage_table(by_label)]
    parts += [over_controls(best), over_references(best)]
    text = "\n\n".join(part for part in [*parts, curve_table(by_label)] if part)
    stamped = stamp()  # before the repository is dirty with these files
    (folder / "table.md").write_text(text + "\n")
    chosen = {"learning_rates": rates} if rates else {}
    write_json(folder / "results.json", stamped | {"settings": settings} | chosen | {"runs": rows})
    _draw_all(best, folder)
    print(
        f"\n{settings['data']}, {settings['steps']} steps, {settings['data_options']}\n\n{text}\n\nwritten to {folder}/"
    )


def redraw_plots(folder: Path) -> None:
    """Draws the plots of a results.json that is there; all else stays as it is.

    Raises:
        SpecError: there is none, or it is not that of a comparison or a sweep.
    """
    path = folder / "results.json"
    try:
        rows = json.loads(path.read_text())["runs"]
        rows[0]["label"]
        if all("mixer" in row for row in rows):
            _draw_all(at_best_rate(rows)[0], folder)
        else:  # of a sweep
            draw_curves(_by_label(rows), folder / "curve.png")
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise SpecError(f"{path} holds no comparison: {type(error).__name__}: {error}") from error


def _draw_all(rows: list[Row], folder: Path) -> None:
    by_label = _by_label(rows)
    draw(by_label, folder / "plot.png")
    draw_bytes(by_label, folder / "bytes.png")
    draw_curves(by_label, folder / "curve.png")
    draw_losses(by_label, folder / "curves.png")


def _by_label(rows: list[Row]) -> dict[str, list[Row]]:
    by_label: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_label[row["label"]].append(row)
    return dict(by_label)


def at_best_rate(rows: list[Row], tried: int | None = None) -> tuple[list[Row], dict[str, Any]]:
    """The runs of every contestant at its best learning rate, that of the best mean on the validation split.

    A rate at which seeds failed is not chosen over one at which fewer did.

    Args:
        rows: of all runs.
        tried: how many seeds all rates were tried on, whose mean counts; None: all there are.

    Returns:
        The runs, and what was compared: label -> {"best": rate, "validation": {rate: mean}}.
    """
    chosen, rates = [], {}
    for label, runs in _by_label(rows).items():
        by_rate: dict[float, list[Row]] = defaultdict(list)
        for run in runs:
            by_rate[run["options"].get("learning_rate")].append(run)
        if None in by_rate:  # all at one rate, that of the settings
            chosen += runs
            continue
        metric = runs[0]["metric"]
        sign = 1 if higher_is_better(runs[0]) else -1
        means = {
            rate: mean(run["validation"][metric] for run in some if tried is None or run["seed"] < tried)
            for rate, some in by_rate.items()
        }

        def merit(rate: float, sign=sign, means=means, by_rate=by_rate) -> tuple[int, float]:
            return len(by_rate[rate]), sign * means[rate] if math.isfinite(means[rate]) else -math.inf

        best = max(by_rate, key=merit)
        chosen += by_rate[best]
        rates[label] = {"best": best, "validation": {str(rate): means[rate] for rate in sorted(means)}}
    return chosen, rates


def part_table(by_label: dict[str, list[Row]]) -> str:
    """Mean accuracy over seeds in each part of the test set, where the data name such."""
    columns = [name for name in next(iter(by_label.values()))[0] if name.startswith("accuracy/")]
    lines = [[label, *(f"{mean(run[c] for run in runs):.3f}" for c in columns)] for label, runs in by_label.items()]
    header = ["accuracy in part", *(name.removeprefix("accuracy/") for name in columns)]
    return markdown_table(header, lines) if columns else ""


def name_table(by_label: dict[str, list[Row]]) -> str:
    """Bits per byte of names that come back and of the rest, mean [min, max] over seeds, where the data mark such."""
    rows = [run for runs in by_label.values() for run in runs]
    kinds = [what for what in ("name", "unknown_name", "rest") if all(f"{what}_bytes" in row for row in rows)]
    lines = []
    for label, runs in by_label.items():
        columns = [[run[f"{what}_bits_per_byte"] for run in runs] for what in kinds]
        lines.append([label, *(f"{mean(values):.3f} [{min(values):.3f}, {max(values):.3f}]" for values in columns)])
    header = [f"{what.replace('_', ' ')} ({rows[0][f'{what}_bytes']:,.0f} bytes)" for what in kinds]
    return markdown_table(["bits per byte of", *header], lines) if kinds else ""


def rate_table(rates: dict[str, Any]) -> str:
    """What every contestant reached on the validation split at every learning rate; see :func:`at_best_rate`."""
    columns = sorted({rate for found in rates.values() for rate in found["validation"]}, key=float)
    lines = []
    for label, found in rates.items():
        means = [found["validation"].get(rate) for rate in columns]
        lines.append([label, *("-" if value is None else f"{value:.3f}" for value in means)])
    header = ["validation at learning rate", *(f"{float(rate):g}" for rate in columns)]
    return markdown_table(header, lines) if lines else ""


def stage_table(by_label: dict[str, list[Row]]) -> str:
    """When each contestant came to the full task, where a curriculum grew with what it had learned: mean [min, max]."""
    lines = []
    for label, runs in by_label.items():
        if all(len(run.get("curriculum", ())) > 1 for run in runs):
            begun = [run["curriculum"][-1][0] for run in runs]
            lines.append([label, f"{mean(begun):.0f} [{min(begun)}, {max(begun)}]"])
    return markdown_table(["curriculum", "last stage from step"], lines) if lines else ""


def table(by_label: dict[str, list[Row]], wanted: dict[str, int] | None = None) -> str:
    """One line a contestant: mean [worst, best] over seeds, usage, size, bytes, time. `wanted`: see :func:`report`."""
    metric = next(iter(by_label.values()))[0]["metric"]
    rated = any("learning_rate" in runs[0]["options"] for runs in by_label.values())
    rate = ["learning rate"] if rated else []
    held = ["state bytes", "KV bytes", "in all", "in pages of 64"]
    header = ["contestant", f"{metric} [min, max]", "seeds", "failed", *rate, "KV usage", "per head, layer by layer"]
    low = _failure(by_label)
    wanted = wanted or {}
    lines = [_line(label, runs, metric, rated, low, wanted.get(label, 0)) for label, runs in by_label.items()]
    notes = [f"failed: seeds below {low:.3f}, half of what half of all runs reach"] if low is not None else []
    lost = {label: seeds - len(by_label.get(label, [])) for label, seeds in wanted.items()}
    if any(missing > 0 for missing in lost.values()):
        said = ", ".join(f"{missing} of {label}" for label, missing in lost.items() if missing > 0)
        notes.append(f"runs that ended in an error, which count as failed and are no part of the means: {said}")
    return "\n\n".join([markdown_table([*header, "parameters", *held, "tokens", "s/run"], lines), *notes])


def _failure(by_label: dict[str, list[Row]]) -> float | None:
    """Below this a run failed to train: half of the median over all runs, where more is better."""
    rows = [run for runs in by_label.values() for run in runs]
    values = [run[run["metric"]] for run in rows if math.isfinite(run[run["metric"]])]
    return median(values) / 2 if values and higher_is_better(rows[0]) else None


def _line(label: str, runs: list[Row], metric: str, rated: bool, low: float | None, seeds: int) -> list[str]:
    values = [run[metric] for run in runs]
    ended = max(seeds - len(runs), 0)
    failed = ended + sum(not (math.isfinite(value) and (low is None or value >= low)) for value in values)
    usage = [run["kv_usage"] for run in runs if "kv_usage" in run]
    exact = [run["kv_stored_bytes"] for run in runs if "kv_stored_bytes" in run]  # not in the results of older versions
    weighed = "state_bytes" in runs[0]
    return [
        label,
        f"{mean(values):.3f} [{min(values):.3f}, {max(values):.3f}]",
        f"{len(runs)} of {seeds}" if ended else str(len(runs)),
        "-" if low is None and not failed else str(failed),
        *([f"{runs[0]['options']['learning_rate']:g}"] if rated else []),
        f"{mean(usage):.3f}" if usage else "-",
        _split(runs) or "-",
        f"{runs[0]['parameters']:,}",
        f"{runs[0]['state_bytes']:,.0f}" if weighed else "-",
        f"{mean(exact):,.0f}" if exact else "-",
        f"{mean(exact) + runs[0]['state_bytes']:,.0f}" if exact and weighed else "-",
        f"{mean(run['kv_bytes'] for run in runs):,.0f}" if weighed else "-",
        str(runs[0]["tokens"]),
        f"{mean(run['seconds'] for run in runs):.0f}",
    ]


def unweighed(by_label: dict[str, list[Row]]) -> str:
    """Which contestants have no bytes in the table and why: a line each."""
    reasons = {label: runs[0]["unweighed"] for label, runs in by_label.items() if "unweighed" in runs[0]}
    return "\n".join(f"{label}: its bytes are left out, {reason}" for label, reason in reasons.items())


def _split(runs: list[Row]) -> str:
    """Mean usage of every head: `.12 .31 / .00 .04`, layers apart."""
    layers: dict[str, list[float]] = defaultdict(list)
    for name in runs[0]:
        if "/head" in name:
            layers[name.split("/")[1]].append(mean(run[name] for run in runs))
    return " / ".join(" ".join(f"{u:.2f}".removeprefix("0") for u in heads) for heads in layers.values())
