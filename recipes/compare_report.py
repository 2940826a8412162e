"""The table, the plot and the JSON of a comparison."""

from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from recipes.compare_curve import curve_table, draw_curves
from recipes.results import markdown_table, stamp, write_json

CONTROLS = ("random", "recency", "static")
HIGHER_IS_BETTER = {"accuracy": True, "bits_per_byte": False}

Row = dict[str, Any]


def report(rows: list[Row], settings: dict[str, Any], folder: Path) -> None:
    """Writes results.json, table.md and plot.png into the folder, and prints the table."""
    if not rows:
        raise RuntimeError("every run failed; see the messages above")
    by_label: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_label[row["label"]].append(row)
    text = "\n\n".join(part for part in (table(by_label), paired(rows), curve_table(by_label)) if part)
    stamped = stamp()  # before the repository is dirty with these files
    (folder / "table.md").write_text(text + "\n")
    write_json(folder / "results.json", stamped | {"settings": settings, "runs": rows})
    draw(rows, folder / "plot.png")
    draw_curves(by_label, folder / "curve.png")
    print(
        f"\n{settings['data']}, {settings['steps']} steps, {settings['data_options']}\n\n{text}\n\nwritten to {folder}/"
    )


def table(by_label: dict[str, list[Row]]) -> str:
    """One line a contestant: mean [worst, best] over seeds, usage, size, bytes, time."""
    metric = next(iter(by_label.values()))[0]["metric"]
    header = ["contestant", f"{metric} [min, max]", "seeds", "KV usage", "per head, layer by layer", "parameters"]
    header += ["state bytes", "KV bytes", "tokens", "s/run"]
    return markdown_table(header, [_line(label, runs, metric) for label, runs in by_label.items()])


def _line(label: str, runs: list[Row], metric: str) -> list[str]:
    values = [run[metric] for run in runs]
    usage = [run["kv_usage"] for run in runs if "kv_usage" in run]
    return [
        label,
        f"{mean(values):.3f} [{min(values):.3f}, {max(values):.3f}]",
        str(len(runs)),
        f"{mean(usage):.3f}" if usage else "-",
        _split(runs) or "-",
        f"{runs[0]['parameters']:,}",
        f"{runs[0]['state_bytes']:,}",
        f"{mean(run['kv_bytes'] for run in runs):,.0f}",
        str(runs[0]["tokens"]),
        f"{mean(run['seconds'] for run in runs):.0f}",
    ]


def _split(runs: list[Row]) -> str:
    """Mean usage of every head: `.12 .31 / .00 .04`, layers apart."""
    layers: dict[str, list[float]] = defaultdict(list)
    for name in runs[0]:
        if "/head" in name:
            layers[name.split("/")[1]].append(mean(run[name] for run in runs))
    return " / ".join(" ".join(f"{u:.2f}".removeprefix("0") for u in heads) for heads in layers.values())


def paired(rows: list[Row]) -> str:
    """What each router gains over each control at the same asked usage, seed by seed.

    Of several contestants of one control (static from the first or the last layer) the best on average is taken.
    """
    metric = rows[0]["metric"]
    sign = 1 if HIGHER_IS_BETTER[metric] else -1
    cells: dict[tuple[str, float], dict[int, float]] = defaultdict(dict)
    for row in rows:
        options = row["options"]
        if "router" in options and "kv_usage" in options:
            cells[row["label"], options["kv_usage"]][row["seed"]] = row[metric]
    routers = {row["label"]: _router(row) for row in rows}
    lines = []
    for (label, usage), ours in cells.items():
        if routers[label] in CONTROLS:
            continue
        cell = [label]
        for control in CONTROLS:
            rivals = [c for (other, u), c in cells.items() if u == usage and routers[other] == control]
            theirs = max(rivals, key=lambda c: sign * mean(c.values()), default={})
            shared = sorted(ours.keys() & theirs.keys())
            gains = [sign * (ours[seed] - theirs[seed]) for seed in shared]
            wins = sum(gain > 0 for gain in gains)
            cell.append(f"{mean(gains):+.3f} ({wins} of {len(gains)})" if gains else "-")
        if any(entry != "-" for entry in cell[1:]):
            lines.append(cell)
    header = [f"gain in {metric}, and seeds won", *(f"over {control}" for control in CONTROLS)]
    return markdown_table(header, lines) if lines else ""


def _router(row: Row) -> str | None:
    router = row["options"].get("router")
    return router["name"] if isinstance(router, dict) else router


def draw(rows: list[Row], path: Path) -> None:
    """The metric against KV usage: a line a router, a level for what has no usage to set, a dot a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    metric = rows[0]["metric"]
    lines: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    levels: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        usage = row["options"].get("kv_usage")
        if usage is None:
            levels[row["label"]].append(row[metric])
        else:
            lines[row["label"].replace(f" {usage}", "").removeprefix("ham ")][usage].append(row[metric])
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    colours = plt.get_cmap("tab20").colors
    for i, (label, points) in enumerate(sorted(lines.items(), key=lambda item: -mean(item[1][min(item[1])]))):
        usages = sorted(points)
        style = ":" if label.split(" ")[0].split("(")[0] in CONTROLS else "-"
        axes.plot(
            usages, [mean(points[u]) for u in usages], style, color=colours[i % 20], marker="o", ms=5, label=label
        )
        for u in usages:
            axes.plot([u] * len(points[u]), points[u], ".", color=colours[i % 20], alpha=0.4, ms=4)
    for i, (label, values) in enumerate(levels.items()):
        axes.axhline(mean(values), color="black", ls=("-", "--", "-.", ":")[i % 4], lw=1, label=f"{label} (level)")
    if lines:
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({u for points in lines.values() for u in points if u > 0}))
        axes.xaxis.set_major_formatter(lambda u, _: f"{u:g}")
    axes.set(xlabel="KV usage (stored tokens / tokens)", ylabel=f"test {metric.replace('_', ' ')}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.savefig(path, dpi=130)
    plt.close(figure)
