"""The pictures of a comparison: the metric against KV usage, and the training losses.

At most MOST lines, named where they begin or end: routers coloured, controls dotted, mixers without a router grey;
bars and bands are the range over seeds.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from mixers.registry import MIXERS, parse_pattern
from recipes.pictures import COLOURS, MARKERS, name, new_axes, save

CONTROLS = ("random", "recency", "static")
MOST = 8
APART = 2.5  # points between the bars of two lines
SEEDS = "means; bars from the worst to the best seed"
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
    shift = -APART * (sum(line.x != [LEVEL] for line in shown) - 1) / 2
    for (line, style), marker in zip(styled(shown), MARKERS, strict=False):
        if line.x == [LEVEL]:
            level(axes, line, style)
            starts.append((usages[0], line.y[0], line.name, style["color"]))
        else:
            ranges(axes, line, shift, marker=marker, **style)
            shift += APART
            whole = line.x[0] == usages[0]
            named = line.x[0] if whole else line.x[-1], line.y[0] if whole else line.y[-1], line.name, style["color"]
            (starts if whole else alone).append(named)
    usage_axis(axes, usages)
    room = (-15, 90 if alone else 15)  # for bars beside their place, and names
    ends = [axes.transData.transform((x, 0))[0] + more for x, more in zip((usages[0], usages[-1]), room, strict=True)]
    axes.set_xlim(*(axes.transData.inverted().transform((end, 0))[0] for end in ends))
    axes.yaxis.tick_right()
    axes.yaxis.set_label_position("right")
    axes.set(xlabel="KV usage (stored tokens / tokens)", ylabel=metric_name(first))
    left_out(axes, shown, lines, SEEDS)
    name(axes, starts, "left")
    name(axes, alone, "right")
    save(figure, path)


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
    save(figure, path)


def usage_lines(by_label: dict[str, list[Row]]) -> list[Line]:
    """Contestants that differ in their KV usage alone are one line."""
    lines: dict[tuple[str, bool], Line] = {}  # what stands at one level is another line, even under one name
    for label, runs in by_label.items():
        usage, short = runs[0]["options"].get("kv_usage"), name_of_line(label, runs[0])
        line = lines.setdefault((short, usage is None), Line(short, kind(runs[0]), {}))
        line.points.setdefault(LEVEL if usage is None else usage, []).extend(run[run["metric"]] for run in runs)
    return list(lines.values())


def name_of_line(label: str, row: Row) -> str:
    """A contestant's label without its KV usage."""
    usage = row["options"].get("kv_usage")
    if usage is None:
        return label
    return re.sub(rf" {re.escape(str(usage))}(?= |$)", "", label, count=1).removeprefix("ham ")


def kind(row: Row) -> str:
    """router, control or rival: whether the contestant chooses tokens, does so blindly, or does not."""
    routed = any("router" in MIXERS.options(spec["name"]) for spec in parse_pattern(row["mixer"]))
    return "control" if router_of(row) in CONTROLS else "router" if routed else "rival"


def router_of(row: Row) -> str | None:
    """The name of a row's router, None if it was given none."""
    router = row["options"].get("router")
    return router["name"] if isinstance(router, dict) else router


def choose(lines: list[Line], higher_is_better: bool, at: float | None = None, most: int = MOST) -> list[Line]:
    """At most `most` lines, the best first.

    Half of them are routers, beside the best and the worst rival and the two best controls, as far as there are so
    many.

    Args:
        lines: all of them.
        higher_is_better: whether the best is the largest.
        at: the value of x to compare at; default: the mean at the usages that all longer lines share.
        most: how many there may be.
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
    return sorted(list(chosen.values())[:most], key=merit, reverse=True)


def styled(lines: list[Line]) -> Iterator[tuple[Line, dict[str, Any]]]:
    """Lines with their colours and dashes. Where all are rivals, they are told apart by colour."""
    grey = any(line.kind == "router" for line in lines)
    colours = iter(COLOURS)
    for line in lines:
        if line.kind == "control":
            yield line, {"color": "0.3", "ls": ":"}
        else:
            yield line, {"color": "0.55" if grey and line.kind == "rival" else next(colours)}


def band(axes: Any, line: Line, **style: Any) -> None:
    """A line through the means, over the range of the seeds."""
    axes.plot(line.x, line.y, **({"lw": 1.8} | style))
    low, high = ([pick(line.points[x]) for x in line.x] for pick in (min, max))
    axes.fill_between(line.x, low, high, color=style["color"], alpha=0.1, lw=0)


def ranges(axes: Any, line: Line, shift: float, **style: Any) -> None:
    """A line through the means, the range of the seeds as bars; moved `shift` points aside, so that bars stay apart."""
    from matplotlib.transforms import ScaledTranslation

    figure = axes.figure
    place = dict(transform=axes.transData + ScaledTranslation(shift / 72, 0, figure.dpi_scale_trans), clip_on=False)
    axes.plot(line.x, line.y, **({"lw": 1.8, "ms": 5} | style | place))
    for x in line.x:
        ends = [(x, min(line.points[x])), (x, max(line.points[x]))]
        axes.plot(*zip(*ends, strict=True), color=style["color"], lw=1, alpha=0.6, **place)
        axes.update_datalim(ends)  # matplotlib leaves out what has a transform of its own
    axes.autoscale_view()


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


def left_out(axes: Any, shown: list[Line], lines: list[Line], said: str = "") -> None:
    """Says above the picture what its lines are and, where not all are shown, how many."""
    some = f"{len(shown)} of {len(lines)} lines; table.md has all" if len(shown) < len(lines) else ""
    axes.set_title("; ".join(filter(None, (said, some))), fontsize=8, loc="left", color="0.4")
