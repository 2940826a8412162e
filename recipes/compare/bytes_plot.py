"""The metric against the bytes that a model holds after a sequence: state and cache together (Zoology's plot)."""

import math
from collections import defaultdict
from itertools import cycle
from pathlib import Path
from statistics import mean
from typing import Any

from recipes.compare.plot import (
    LEVEL,
    SEEDS,
    Line,
    choose,
    higher_is_better,
    left_out,
    metric_name,
    name_of_line,
    styled,
    usage_lines,
)
from recipes.pictures import MARKERS, new_axes, save

Row = dict[str, Any]
MOST_OF = {"router": 4, "control": 1, "rival": 3}  # named; rivals are grey
UNITS = (("B", 1), ("KiB", 2**10), ("MiB", 2**20), ("GiB", 2**30))


def draw_bytes(by_label: dict[str, list[Row]], path: Path) -> None:
    """A line a router or control over its KV usages, a point a mixer without one; the legend is sorted, best first.

    Those that `named` picks are named, the others are faint dots. Nothing is drawn where fewer than two were weighed.

    Args:
        by_label: rows of each contestant, one a seed; those that could not be weighed are left out.
        path: PNG to write; one that is there is removed.
    """
    path.unlink(missing_ok=True)
    by_label = {label: runs for label, runs in by_label.items() if all("state_bytes" in run for run in runs)}
    weights = total_bytes(by_label)
    if len({x for line in weights.values() for x in line.values()}) < 2:
        return
    first = next(iter(by_label.values()))[0]
    lines = usage_lines(by_label)
    shown = named(lines, higher_is_better(first))
    figure, axes = new_axes(8.5, 4.5)
    for line in lines:
        if line not in shown:
            axes.plot([weights[line.name][usage] for usage in line.x], line.y, "o", color="0.8", ms=3, zorder=1)
    for (line, style), marker in zip(styled(shown), cycle(MARKERS)):
        places = [weights[line.name][usage] for usage in line.x]
        style |= {"ls": ""} if len(places) < 2 else {}
        axes.plot(places, line.y, marker=marker, ms=6, lw=1.6, label=line.name, **style)
        for x, values in zip(places, map(line.points.get, line.x), strict=True):
            axes.plot([x, x], [min(values), max(values)], color=style["color"], lw=1, alpha=0.5)
    bytes_axis(axes, "pages included, " * (not _exact(by_label)), first["tokens"])
    axes.set_ylabel(metric_name(first))
    figure.legend(loc="outside right upper", fontsize=8.5, frameon=False)
    left_out(axes, shown, lines, SEEDS)
    save(figure, path)


def total_bytes(by_label: dict[str, list[Row]]) -> dict[str, dict[float, float]]:
    """Name of a line of `recipes.compare.plot.usage_lines` -> KV usage -> mean bytes of state and cache."""
    kv = "kv_stored_bytes" if _exact(by_label) else "kv_bytes"
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for label, runs in by_label.items():
        usage = runs[0]["options"].get("kv_usage")
        held = found[name_of_line(label, runs[0])][LEVEL if usage is None else usage]
        held += [run["state_bytes"] + run[kv] for run in runs]
    return {name: {usage: mean(held) for usage, held in line.items()} for name, line in found.items()}


def named(lines: list[Line], higher: bool) -> list[Line]:
    """The best of every kind, as many as MOST_OF says; the best point first, so that more budgets are no handicap."""
    wanted = []
    for kind, most in MOST_OF.items():
        wanted += choose([line for line in lines if line.kind == kind], higher, most=most)
    best = max if higher else min
    return sorted(wanted, key=lambda line: best(line.y), reverse=higher)


def bytes_axis(axes: Any, what: str, tokens: int) -> None:
    """Logarithmic, with ticks at powers of two in the units that memory has; at quarters between if these are few."""
    from matplotlib.ticker import LogLocator

    axes.set_xscale("log", base=2)
    least, most = axes.get_xlim()
    if most < 2 * least:  # bytes that are all but equal are not to look far apart
        middle = math.sqrt(least * most)
        axes.set_xlim(middle / math.sqrt(2), middle * math.sqrt(2))
    if most < 4 * least:
        axes.xaxis.set_major_locator(LogLocator(base=2, subs=(1, 1.25, 1.5, 1.75)))
    axes.xaxis.set_major_formatter(lambda x, _: said_bytes(x))
    axes.set_xlabel(f"bytes of state and cache, {what}after {tokens:,} tokens")


def said_bytes(count: float) -> str:
    """`512 B`, `4 KiB`, `1.5 MiB`."""
    unit, size = next((unit, size) for unit, size in reversed(UNITS) if count >= size or size == 1)
    return f"{count / size:g} {unit}"


def _exact(by_label: dict[str, list[Row]]) -> bool:
    """Whether all rows have the bytes of what is stored; those of older versions have those of its pages alone."""
    return all("kv_stored_bytes" in run for runs in by_label.values() for run in runs)
