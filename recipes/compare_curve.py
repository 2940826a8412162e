"""One trained model at many KV usages: what each budget costs, as a table and as a picture."""

from pathlib import Path
from statistics import mean
from typing import Any

from lit_modules.budgets import build_budget
from recipes.results import markdown_table

Row = dict[str, Any]


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
    """The metric against the KV usage that was measured: a line a model with its seeds as a band, a star where it was
    trained, a level for models without a usage. Nothing is drawn if nothing was tested so."""
    from matplotlib.figure import Figure

    curves = {label: points for label, runs in by_label.items() if (points := _points(runs))}
    if not curves:
        return
    metric = next(iter(by_label.values()))[0]["metric"]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, (label, points) in enumerate(curves.items()):
        some = [points[usage] for usage in sorted(points)]
        x = [mean(point["kv_usage"] for point in seeds) for seeds in some]
        values = [[point[metric] for point in seeds] for seeds in some]
        axes.plot(x, [mean(v) for v in values], marker="o", ms=4, color=f"C{i}", label=label)
        axes.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=f"C{i}", alpha=0.15, lw=0)
        runs = by_label[label]
        if build_budget(runs[0]["options"].get("budget", "fixed")) is None:
            place = mean(run["kv_usage"] for run in runs), mean(run[metric] for run in runs)
            axes.plot(*place, marker="*", ms=13, color=f"C{i}", mec="black", mew=0.5, ls="")
    for i, (label, runs) in enumerate((name, runs) for name, runs in by_label.items() if name not in curves):
        axes.axhline(
            mean(run[metric] for run in runs), color="black", ls=("-", "--", "-.", ":")[i % 4], lw=1, label=label
        )
    asked = sorted({usage for points in curves.values() for usage in points})
    axes.set_xscale("symlog", base=2, linthresh=1 / 16, linscale=1)  # small budgets are where curves differ
    axes.set_xticks(asked, [f"{usage:g}" for usage in asked], fontsize=8)
    axes.set_xlim(left=-1 / 100)
    axes.minorticks_off()
    axes.set(xlabel="KV usage when tested (stored tokens / tokens)", ylabel=f"test {metric.replace('_', ' ')}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
