"""The pictures of a comparison: the metric against KV usage, and the training losses.

At most MOST lines, named where they begin or end: routers coloured, controls dotted, mixers without a router grey;
bands are the range over seeds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from mixers.registry import MIXERS, parse_pattern

CONTROLS = ("random", "recency", "static")
MOST = 8
COLOURS = ("#d1495b", "#30638e", "#00798c", "#c77d0a", "#6a4c93", "#5b8e4e", "#a05195", "#3d5a80")
LEVEL = -1.0  # the x of what has no usage to set

Row = dict[str, Any]


@dataclass
class Line:
    """x -> values over seeds, of one contestant or of one at several usages; `kind`: router, control or rival."""

    name: str
    kind: str
    points: dict[float, list[float]]

    @property
    def x(self) -> list[float]:
        return sorted(self.points)

    @property
    def y(self) -> list[float]:
        return [mean(self.points[x]) for x in self.x]


def draw(by_label: dict[str, list[Row]], path: Path) -> None:
    """The metric against KV usage: a line a router, a level for what has no usage to set.

    Without a contestant at two usages there is nothing to see that the table does not say, and no picture.

    Args:
        by_label: rows of each contestant, one a seed.
        path: PNG to write; one that is there is removed.
    """
    first = next(iter(by_label.values()))[0]
    lines = usage_lines(by_label)
    path.unlink(missing_ok=True)
    if all(len(line.points) < 2 for line in lines):
        return
    shown = choose(lines, higher_is_better(first))
    usages = sorted({x for line in shown for x in line.x} - {LEVEL})
    figure, axes = new_axes()
    starts, alone = [], []
    for line, style in styled(shown):
        if line.x == [LEVEL]:
            level(axes, line, style)
            starts.append((usages[0], line.y[0], line.name, style["color"]))
        else:
            band(axes, line, marker="o", ms=4, **style)
            whole = line.x[0] == usages[0]
            named = line.x[0] if whole else line.x[-1], line.y[0] if whole else line.y[-1], line.name, style["color"]
            (starts if whole else alone).append(named)
    usage_axis(axes, usages)
    right = axes.transData.transform((usages[-1], 0))[0] + (90 if alone else 12)
    axes.set_xlim(usages[0], axes.transData.inverted().transform((right, 0))[0])
    axes.yaxis.tick_right()
    axes.yaxis.set_label_position("right")
    axes.set(xlabel="KV usage (stored tokens / tokens)", ylabel=metric_name(first))
    left_out(axes, shown, lines)
    name(axes, starts, "left")
    name(axes, alone, "right")
    figure.savefig(path, dpi=130)


def draw_losses(by_label: dict[str, list[Row]], path: Path) -> None:
    """The training loss of every contestant against the step; nothing if no run kept it."""
    kept = {label: [run["losses"] for run in runs if run.get("losses")] for label, runs in by_label.items()}
    lines = []
    for label, runs in kept.items():
        points: dict[float, list[float]] = {}
        for step, loss in (point for run in runs for point in run):
            points.setdefault(step, []).append(loss)
        lines += [Line(label, kind(by_label[label][0]), points)] if points else []
    path.unlink(missing_ok=True)
    if not lines:
        return
    shown = choose(lines, higher_is_better=False, at=max(x for line in lines for x in line.x))
    figure, axes = new_axes()
    for line, style in styled(shown):
        band(axes, line, **style)
    axes.set(xlabel="step", ylabel="training loss (nats)", xlim=(0, max(x for line in shown for x in line.x)))
    left_out(axes, shown, lines)
    name(axes, [(line.x[-1], line.y[-1], line.name, style["color"]) for line, style in styled(shown)], "right")
    figure.savefig(path, dpi=130)


def usage_lines(by_label: dict[str, list[Row]]) -> list[Line]:
    """Contestants that differ in their KV usage alone are one line."""
    lines: dict[str, Line] = {}
    for label, runs in by_label.items():
        usage = runs[0]["options"].get("kv_usage")
        short = label if usage is None else label.replace(f" {usage}", "").removeprefix("ham ")
        line = lines.setdefault(short, Line(short, kind(runs[0]), {}))
        line.points.setdefault(LEVEL if usage is None else usage, []).extend(run[run["metric"]] for run in runs)
    return list(lines.values())


def kind(row: Row) -> str:
    """router, control or rival: whether the contestant chooses tokens, does so blindly, or does not."""
    routed = any("router" in MIXERS.options(spec["name"]) for spec in parse_pattern(row["mixer"]))
    return "control" if router_of(row) in CONTROLS else "router" if routed else "rival"


def router_of(row: Row) -> str | None:
    """The name of a row's router, None if it was given none."""
    router = row["options"].get("router")
    return router["name"] if isinstance(router, dict) else router


def choose(lines: list[Line], higher_is_better: bool, at: float | None = None) -> list[Line]:
    """At most MOST lines, the best first.

    Half of them are routers, beside the best and the worst rival and the two best controls, as far as there are so
    many.

    Args:
        lines: all of them.
        higher_is_better: whether the best is the largest.
        at: the value of x to compare at; default: the mean at the usages that all longer lines share.
    """
    longer = [line for line in lines if len(line.points) > 1]
    shared = set.intersection(*(set(line.points) for line in longer)) if longer and at is None else {at}

    def merit(line: Line) -> float:
        values = [mean(v) for x, v in line.points.items() if x in shared] or line.y
        return mean(values) if higher_is_better else -mean(values)

    ranked = sorted(lines, key=merit, reverse=True)
    by_length = sorted(ranked, key=lambda line: len(line.points) < 2)  # what is at one usage only has less to show
    rivals = [line for line in ranked if line.kind == "rival"]
    routers, controls = ([line for line in by_length if line.kind == k] for k in ("router", "control"))
    wanted = [*rivals[:1], *rivals[-1:], *controls[:2], *routers[: MOST // 2], *routers, *rivals, *controls]
    chosen = {id(line): line for line in wanted}
    return sorted(list(chosen.values())[:MOST], key=merit, reverse=True)


def styled(lines: list[Line]) -> Iterator[tuple[Line, dict[str, Any]]]:
    """Lines with their colours and dashes. Where all are rivals, they are told apart by colour."""
    grey = any(line.kind == "router" for line in lines)
    colours = iter(COLOURS)
    for line in lines:
        if line.kind == "control":
            yield line, {"color": "0.3", "ls": ":"}
        else:
            yield line, {"color": "0.55" if grey and line.kind == "rival" else next(colours)}


def new_axes() -> tuple[Any, Any]:
    """A figure with one pair of axes, as all these pictures have it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def band(axes: Any, line: Line, **style: Any) -> None:
    """A line through the means, over the range of the seeds."""
    axes.plot(line.x, line.y, **({"lw": 1.8} | style))
    low, high = ([pick(line.points[x]) for x in line.x] for pick in (min, max))
    axes.fill_between(line.x, low, high, color=style["color"], alpha=0.1, lw=0)


def level(axes: Any, line: Line, style: dict[str, Any]) -> None:
    """A mean that holds at every x, over the range of the seeds."""
    (values,) = line.points.values()
    axes.axhline(mean(values), **({"lw": 1.5} | style))
    axes.axhspan(min(values), max(values), color=style["color"], alpha=0.1, lw=0)


def usage_axis(axes: Any, usages: list[float]) -> None:
    """Small usages are where curves differ: logarithmic, down to zero."""
    axes.set_xscale("symlog", base=2, linthresh=1 / 16, linscale=1)
    axes.set_xticks(usages, [f"{usage:g}" for usage in usages], fontsize=9)
    axes.minorticks_off()


def higher_is_better(row: Row) -> bool:
    """Of a row's metric. Rows of older versions do not say; theirs is accuracy or bits per byte."""
    return row.get("higher_is_better", row["metric"] == "accuracy")


def metric_name(row: Row) -> str:
    """What the axis of a row's metric says."""
    return f"test {row['metric'].replace('_', ' ')}" + ("" if higher_is_better(row) else " (lower is better)")


def left_out(axes: Any, shown: list[Line], lines: list[Line]) -> None:
    """Says above the picture how many lines are shown, where not all are."""
    if len(shown) < len(lines):
        axes.set_title(f"{len(shown)} of {len(lines)} lines; table.md has all", fontsize=8, loc="left", color="0.4")


def name(axes: Any, ends: list[tuple[float, float, str, str]], side: str, size: float = 8.5) -> None:
    """Writes names beside line ends (x, y, name, colour), moved apart where they would overlap."""
    if not ends:
        return
    axes.figure.draw_without_rendering()  # settles the layout
    pixels = axes.transData.transform([(x, y) for x, y, _, _ in ends])
    points = 72 / axes.figure.dpi
    sign, align = (-1, "right") if side == "left" else (1, "left")
    for (x, y, text, colour), at, before in zip(ends, apart([p[1] * points for p in pixels], 1.25 * size), pixels,
                                                strict=True):  # fmt: skip
        moved = at - before[1] * points
        style = dict(color=colour, lw=0.6, alpha=0.7, shrinkA=0, shrinkB=1)
        axes.annotate(text, (x, y), (14 * sign, moved), textcoords="offset points", ha=align, va="center", color=colour,
                      fontsize=size, annotation_clip=False, bbox=dict(fc="white", ec="none", pad=0.5, alpha=0.8),
                      arrowprops=dict(arrowstyle="-", relpos=(side == "left", 0.5),
                                                                            **style))  # fmt: skip


def apart(places: list[float], gap: float) -> list[float]:
    """The places nearest to these, in their order, that are at least `gap` from each other (least squares)."""
    order = sorted(range(len(places)), key=places.__getitem__)
    blocks: list[list[float]] = []  # without the gaps: runs of places that share a mean
    for rank, i in enumerate(order):
        blocks.append([places[i] - rank * gap])
        while len(blocks) > 1 and mean(blocks[-2]) > mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    moved = [mean(block) for block in blocks for _ in block]
    result = [0.0] * len(places)
    for rank, i in enumerate(order):
        result[i] = moved[rank] + rank * gap
    return result
