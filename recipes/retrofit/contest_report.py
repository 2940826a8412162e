"""The tables and the picture of a contest: what each method makes of the same bytes."""

from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from recipes.compare.plot import COLOURS, MOST, Line, band, level, name
from recipes.results import markdown_table
from recipes.retrofit.methods import METHODS

Row = dict[str, Any]
Cells = dict[tuple[str, float], dict[int, float]]
"""(method, usage) -> a value for each seed."""

TEXT = ("prose", "code")
FOUND = ("single", "multikey", "tracking")  # what recall is the mean of
SHOWN = ("host", "ham", "demand", "oracle", "recency", "key_norm", "keydiff", "residual", "random", "cosine", "static")
"""Which lines are drawn first, as there is room for MOST."""


def report(rows: list[Row], settings: dict[str, Any], folder: Path) -> None:
    """Writes table.md and plot.png beside results.json, and prints the tables.

    Args:
        rows: of all methods; those that were left out say why.
        settings: that all of them share.
        folder: where to write.
    """
    measured = [row for row in rows if row["value"] is not None]
    if not measured:
        print(f"nothing was measured yet: {folder}")
        return
    parts = [table(measured), paired(measured), hard(measured), left_out(rows), notes(measured)]
    text = "\n\n".join(part for part in parts if part)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(text + "\n")
    draw(measured, folder / "plot.png")
    print(f"\n{settings['host']}, {settings['text']}\n\n{text}\n\nwritten to {folder}/")


def cells(rows: list[Row], tasks: tuple[str, ...], field: str = "value") -> Cells:
    """The mean over tasks and lengths for each method, usage and seed, where it has all that any has.

    Args:
        rows: measured.
        tasks: that count; lengths of one task count the same.
        field: of a row, or "bytes": all bytes of a sequence as a share of the host's cache.
    """
    rows = [row for row in rows if row["task"] in tasks]
    wanted = {(row["task"], row["length"]) for row in rows}
    found: dict[tuple[str, float], dict[int, dict]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        value = share_of_bytes(row) if field == "bytes" else row[field]
        found[row["method"], row["usage"]][row["seed"]][row["task"], row["length"]] = value
    whole: Cells = {}
    for key, by_seed in found.items():
        values = {seed: mean(some.values()) for seed, some in by_seed.items() if some.keys() == wanted}
        if values:
            whole[key] = values
    return whole


def share_of_bytes(row: Row) -> float:
    """Cache and state, of the host's cache."""
    return (row["bytes_cache"] + row["bytes_state"]) / row["bytes_host"]


def usages_of(rows: list[Row]) -> list[float]:
    """Those asked for, largest first, without the host's."""
    return sorted({row["usage"] for row in rows if row["method"] != "host"}, reverse=True)


def measures(rows: list[Row]) -> dict[str, Cells]:
    """What the columns of the tables are, by their names."""
    there = {row["task"] for row in rows}
    found = {task: cells(rows, (task,)) for task in (*TEXT, *FOUND) if task in there}
    if sum(task in there for task in FOUND) > 1:
        found["recall"] = cells(rows, FOUND)
    return found


def table(rows: list[Row]) -> str:
    """A line for every method and usage: mean [min, max] over seeds, and the share of the host's in brackets."""
    columns = measures(rows)
    weights = [cells(rows, tasks, "bytes") for tasks in (TEXT, FOUND)]
    state = {(row["method"], row["usage"]): row["bytes_state"] / row["bytes_host"] for row in rows}
    header = [
        "usage",
        "method",
        *(f"{c} ppl" if c in TEXT else c for c in columns),
        "bytes of text",
        "of prompts",
        "state",
        "seeds",
    ]
    lines = []
    for method, usage in _order(rows):
        key = method, usage
        if not any(key in column for column in columns.values()):
            continue
        cell = [_spread(column, key) for column in columns.values()]
        seeds = {row["seed"] for row in rows if (row["method"], row["usage"]) == key}
        held = [f"{mean(weight[key].values()):.3f}" if key in weight else "-" for weight in weights]
        lines.append([f"{usage:g}", method, *cell, *held, f"{state[key]:.3f}", str(len(seeds))])
    note = (
        "In brackets [smallest, largest] of the seeds; (x) is the host's times x. Recall is the mean of the three tasks"
    )
    note += " and all lengths. Bytes: cache and state as a share of the host's cache; state is that of the last row."
    return f"{markdown_table(header, lines)}\n\n{note}"


def paired(rows: list[Row]) -> str:
    """In how many seeds ham is ahead of each other method at the same usage."""
    columns = {k: v for k, v in measures(rows).items() if k in (*TEXT, "recall") or k in FOUND and len(v) > 1}
    lines = []
    for method, usage in _order(rows):
        if method in ("ham", "host"):
            continue
        line = []
        for column_name, column in columns.items():
            ours, theirs = column.get(("ham", usage), {}), column.get((method, usage), {})
            shared = sorted(ours.keys() & theirs.keys())
            sign = -1 if column_name in TEXT else 1
            gains = [sign * (ours[seed] - theirs[seed]) for seed in shared]
            ties = sum(gain == 0 for gain in gains)
            tied = f", {ties} even" if ties else ""
            line.append(f"{mean(gains):+.3f} ({sum(g > 0 for g in gains)} of {len(gains)}{tied})" if gains else "-")
        if any(entry != "-" for entry in line):
            lines.append([f"{usage:g}", method, *line])
    header = ["usage", "ham's gain over", *columns]
    said = "Gain: how much lower the perplexity, or higher the recall; in how many seeds ham is ahead."
    return f"{markdown_table(header, lines)}\n\n{said}" if lines else ""


def hard(rows: list[Row]) -> str:
    """RULER's own two tasks, which a small host hardly solves."""
    columns = {(r["task"], r["length"]): cells([r2 for r2 in rows if r2["length"] == r["length"]], (r["task"],))
               for r in rows if r["task"] not in (*TEXT, *FOUND)}  # fmt: skip
    keys = [key for key in _order(rows) if any(key in column for column in columns.values())]
    lines = [[f"{key[1]:g}", key[0], *(_spread(column, key) for column in columns.values())] for key in keys]
    header = ["usage", "method", *(f"{task} at {length}" for task, length in columns)]
    return markdown_table(header, lines) if lines else ""


def left_out(rows: list[Row]) -> str:
    """Why something was not measured, a line each."""
    found = {f"{row['method']} at {row['usage']:g}, {row['length']} tokens: {row['left_out']}": None
             for row in rows if row["value"] is None}  # fmt: skip
    return "\n".join(["Left out:", *(f"- {line}" for line in found)]) if found else ""


def notes(rows: list[Row]) -> str:
    """What is to be known of some methods, a line each."""
    found = {row["method"]: row["note"] for row in rows if "note" in row}
    return "\n".join(f"- {method}: {note}" for method, note in found.items())


def draw(rows: list[Row], path: Path) -> None:
    """Perplexity of prose and of code, and recall, against all bytes; a line for each method, at most MOST."""
    from matplotlib.figure import Figure

    compared = {row["task"] for row in rows if row["method"] != "host"}
    panels = [task for task in TEXT if task in compared]
    recalled = tuple(task for task in FOUND if task in compared)
    panels += ["recall"] if recalled else []
    if not panels:
        return
    there = [method for method in dict.fromkeys([*SHOWN, *_methods(rows)]) if any(r["method"] == method for r in rows)]
    shown = there[:MOST]
    figure = Figure(figsize=(5 * len(panels), 4.6), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        tasks = recalled if panel == "recall" else (panel,)
        values = cells(rows, tasks)
        _panel(axes, values if panel == "recall" else relative(values), cells(rows, tasks, "bytes"), shown, panel)
    if len(shown) < len(there):
        figure.suptitle(
            f"{len(shown)} of {len(there)} methods; table.md has all", fontsize=8, color="0.4", x=0.01, ha="left"
        )
    path.unlink(missing_ok=True)
    figure.savefig(path, dpi=130)


def relative(values: Cells) -> Cells:
    """The values as multiples of the host's, seed by seed; as they are without a host."""
    host = values.get(("host", 1.0))
    if not host:
        return values
    found = {key: {seed: v / host[seed] for seed, v in some.items() if seed in host} for key, some in values.items()}
    return {key: some for key, some in found.items() if some}


def _panel(axes: Any, values: Cells, weights: Cells, shown: list[str], what: str) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "left"]].set_visible(False)
    axes.yaxis.tick_right()
    axes.yaxis.set_label_position("right")
    lines = []
    for method in shown:
        keys = [key for key in values if key[0] == method]
        points = {mean(weights[key].values()): list(values[key].values()) for key in keys}
        if points:
            lines.append((Line(method, "", points), _style(method)))
    ends = []
    asked = sorted({usage for method, usage in values if method != "host"})
    axes.set_xscale("log", base=2)
    for line, style in lines:
        if line.name == "host":
            level(axes, line, style)
        else:
            band(axes, line, marker="o", ms=4, **style)
        x = asked[0] if line.name == "host" else line.x[0]
        ends.append((x, line.y[0], line.name, style["color"]))
    if what != "recall":
        axes.set_yscale("log", base=2)
        low, high = (pick(y for line, _ in lines for y in line.y) for pick in (min, max))
        ticks = [low * (high / low) ** (i / 4) for i in range(5)]
        axes.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.set_xticks(asked, [f"{usage:g}" for usage in asked])
    axes.minorticks_off()
    axes.set_xlim(
        asked[0] * 0.42, max([*asked, *(x for line, _ in lines if line.name != "host" for x in line.x)]) * 1.15
    )
    axes.set_xlabel("cache and state, share of the host's cache", fontsize=9)
    axes.set_ylabel(what if what == "recall" else f"perplexity of {what} / the host's (lower is better)", fontsize=9)
    name(axes, ends, "left", size=8)


def _style(method: str) -> dict[str, Any]:
    kind = METHODS[method].kind if method in METHODS else "rival"
    if method == "ham":
        return {"color": COLOURS[0], "lw": 3, "zorder": 5}
    styles = {
        "ours": {"color": COLOURS[1], "lw": 2.4},
        "ceiling": {"color": COLOURS[3], "ls": "--"},
        "host": {"color": "0.1"},
        "control": {"color": "0.3", "ls": ":"},
    }
    return styles.get(kind, {"color": "0.55"})


def _spread(column: Cells, key: tuple[str, float]) -> str:
    """Mean [min, max] (share of the host's)."""
    if key not in column:
        return "-"
    values = list(column[key].values())
    text = f"{mean(values):.3f}" if mean(values) < 10 else f"{mean(values):.2f}"
    if len(values) > 1:
        text += f" [{min(values):.3g}, {max(values):.3g}]"
    host = column.get(("host", 1.0), {})
    shared = host.keys() & column[key].keys()
    base = mean(host[seed] for seed in shared) if shared else 0
    if base and key[0] != "host":
        text += f" ({mean(column[key][seed] for seed in shared) / base:.3f})"
    return text


def _methods(rows: list[Row]) -> list[str]:
    there = dict.fromkeys(row["method"] for row in rows)
    return [*(method for method in METHODS if method in there), *(method for method in there if method not in METHODS)]


def _order(rows: list[Row]) -> list[tuple[str, float]]:
    """All (method, usage): the host, then usage by usage."""
    there = {(row["method"], row["usage"]) for row in rows}
    wanted = [("host", 1.0), *((method, usage) for usage in usages_of(rows) for method in _methods(rows))]
    return [key for key in wanted if key in there]
