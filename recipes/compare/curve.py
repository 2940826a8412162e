"""One trained model at many KV usages: what each budget costs, as a table and as a picture."""

from pathlib import Path
from statistics import mean
from typing import Any

from lit_modules.budgets import build_budget
from recipes.compare.plot import (
    LEVEL,
    Line,
    band,
    choose,
    higher_is_better,
    kind,
    left_out,
    level,
    metric_name,
    styled,
    usage_axis,
)
from recipes.pictures import name, new_axes, save
from recipes.results import markdown_table

Row = dict[str, Any]
LEAST_SPAN = 0.05  # of a metric, as a share of it: less would make noise look like a trend


def _points(runs: list[Row]) -> dict[float, list[Row]]:
    """Asked usage -> what every seed gave there."""
    points: dict[float, list[Row]] = {}
    for run in runs:
        for point in run.get("curve", []):
            points.setdefault(point["asked"], []).append(point)
    return points


def curve_table(by_label: dict[str, list[Row]]) -> str:
    """One line a model, one column a usage: mean [min, max] over seeds; "" if nothing was tested so."""
    curves = {label: points for label, runs in by_label.items() if (points := _points(runs))}
    if not curves:
        return ""
    metric = next(iter(by_label.values()))[0]["metric"]
    usages = sorted({usage for points in curves.values() for usage in points})
    lines = []
    for label, points in curves.items():
        cells = [[point[metric] for point in points.get(usage, [])] for usage in usages]
        lines.append([label, *(f"{mean(c):.3f} [{min(c):.3f}, {max(c):.3f}]" if c else "-" for c in cells)])
    return markdown_table([f"{metric} when tested at", *(f"{usage:g}" for usage in usages)], lines)


def draw_curves(by_label: dict[str, list[Row]], path: Path) -> None:
    """The metric against the KV usage that was measured, or against bytes where a cache was weighed.

    A line a model with its seeds as a band, a star where it was trained, a level for models without a usage. Nothing is
    drawn if nothing was tested so.
    """
    curves = {label: points for label, runs in by_label.items() if (points := _points(runs))}
    if not curves:
        return
    first = next(iter(by_label.values()))[0]
    metric = first["metric"]
    every = [point for points in curves.values() for some in points.values() for point in some]
    weighed = all("kv_bytes" in point for point in every)
    lines = []
    for label, runs in by_label.items():
        if label not in curves:
            lines.append(Line(label, "rival", {LEVEL: [run[metric] for run in runs]}))
            continue
        points: dict[float, list[float]] = {}
        for some in curves[label].values():
            x = mean(point["kv_bytes"] / 2**20 if weighed else point["kv_usage"] for point in some)
            points[x] = [point[metric] for point in some]
        lines.append(Line(label, kind(runs[0]) if "mixer" in runs[0] else "router", points))  # a sweep has no mixer
    shown = choose(lines, higher_is_better(first))
    left = min(x for line in shown for x in line.x if x != LEVEL)
    figure, axes = new_axes()
    starts = []
    for line, style in styled(shown):
        if line.x == [LEVEL]:
            level(axes, line, style)
        else:
            band(axes, line, marker="o", ms=4, **style)
            runs = by_label[line.name]
            if not weighed and build_budget(runs[0]["options"].get("budget", "fixed")) is None:
                place = mean(run["kv_usage"] for run in runs), mean(run[metric] for run in runs)
                axes.plot(*place, marker="*", ms=13, color=style["color"], mec="black", mew=0.5, ls="")
        starts.append((left, line.y[0], line.name, style["color"]))
    if weighed:
        _bytes_axis(axes, every, metric)
    else:
        usage_axis(axes, sorted({usage for points in curves.values() for usage in points}))
        axes.set(xlim=(left, 1.02), xlabel="KV usage when tested (stored tokens / tokens)")
    low, high = axes.get_ylim()
    missing = max(LEAST_SPAN * abs(high) - (high - low), 0)
    axes.set_ylim(low - missing / 2, high + missing / 2)
    axes.set_ylabel(metric_name(first))
    if weighed:
        axes.legend([line.name for line, _ in styled(shown)], fontsize=8.5, frameon=False)
    else:
        axes.yaxis.tick_right()
        axes.yaxis.set_label_position("right")
        name(axes, starts, "left")
    left_out(axes, shown, lines)
    save(figure, path)


def _bytes_axis(axes: Any, points: list[Row], metric: str) -> None:
    """MiB of keys and values, pages included; at the points their usage, and where softmax attention would be."""
    for point in points:
        at = point["kv_bytes"] / 2**20, point[metric]
        axes.annotate(f"usage {point['asked']:g}", at, (0, 8), textcoords="offset points", ha="center", fontsize=8)
    wholes = [point["kv_bytes"] / point["of_attention"] / 2**20 for point in points if point["of_attention"]]
    if wholes:
        axes.axvline(max(wholes), color="0.55", lw=1.5)
        where = dict(transform=axes.get_xaxis_transform(), rotation=90, ha="right")
        axes.text(max(wholes), 0.02, "softmax attention ", fontsize=8.5, color="0.4", **where)
        axes.set_xlim(0, 1.05 * max(wholes))
    tokens = points[0]["long"]
    axes.set_xlabel(f"MiB of keys and values held after {tokens:,} tokens, pages included")
