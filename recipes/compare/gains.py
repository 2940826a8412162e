"""What each router gains, seed by seed: over the controls at its usage, and over the mixers without a router."""

from collections import defaultdict
from collections.abc import Iterable
from statistics import mean
from typing import Any

from mixers.registry import parse_pattern
from recipes.compare.plot import CONTROLS, higher_is_better, router_of
from recipes.results import markdown_table

Row = dict[str, Any]
Cell = dict[int, float]  # seed -> metric


def over_controls(rows: list[Row]) -> str:
    """A table of what each router gains over each control in the same mixers at the same asked usage, and seeds won.

    Of several contestants of one control (static from the first or the last layer) the best on average is taken.
    """
    routed, routers = _routed(rows), {row["label"]: router_of(row) for row in rows}
    models = {row["label"]: [spec["name"] for spec in parse_pattern(row["mixer"])] for row in rows}
    sign, lines = _sign(rows), []
    for (label, usage), ours in routed.items():
        if routers[label] in CONTROLS:
            continue
        rivals = (
            [
                cell
                for (other, u), cell in routed.items()
                if u == usage and routers[other] == control and models[other] == models[label]
            ]
            for control in CONTROLS
        )
        best = (max(some, key=lambda cell: sign * mean(cell.values()), default={}) for some in rivals)
        lines.append([label, *(_gain(ours, theirs, sign) for theirs in best)])
    return _table(rows, lines, CONTROLS)


def over_references(rows: list[Row]) -> str:
    """A table of what each router gains over every contestant without one; empty if there is no such."""
    references: dict[str, Cell] = defaultdict(dict)
    for row in rows:
        if "router" not in row["options"]:
            references[row["label"]][row["seed"]] = row[row["metric"]]
    sign = _sign(rows)
    lines = [
        [label, *(_gain(ours, theirs, sign) for theirs in references.values())]
        for (label, _), ours in _routed(rows).items()
    ]
    return _table(rows, lines, references)


def _routed(rows: list[Row]) -> dict[tuple[str, float], Cell]:
    cells: dict[tuple[str, float], Cell] = defaultdict(dict)
    for row in rows:
        if "router" in row["options"] and "kv_usage" in row["options"]:
            cells[row["label"], row["options"]["kv_usage"]][row["seed"]] = row[row["metric"]]
    return cells


def _sign(rows: list[Row]) -> int:
    return 1 if higher_is_better(rows[0]) else -1


def _gain(ours: Cell, theirs: Cell, sign: int) -> str:
    gains = [sign * (ours[seed] - theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
    return f"{mean(gains):+.3f} ({sum(gain > 0 for gain in gains)} of {len(gains)})" if gains else "-"


def _table(rows: list[Row], lines: list[list[str]], over: Iterable[str]) -> str:
    lines = [line for line in lines if any(entry != "-" for entry in line[1:])]
    header = [f"gain in {rows[0]['metric']}, and seeds won", *(f"over {name}" for name in over)]
    return markdown_table(header, lines) if lines else ""
