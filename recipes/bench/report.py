"""The table, the plots and the JSON of a benchmark."""

import json
from collections import defaultdict
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from mixers.registry import SpecError
from recipes.bench.cost_model import Cost, Machine
from recipes.results import markdown_table, stamp, write_json

Row = dict[str, Any]
PEAK = (
    "Peak MiB is the most that one step holds beyond what was there before it. Weights, inputs and, in decoding, the"
    " cache (KV MiB) and the states (state MiB) are not in it."
)
TRAINING = (
    "In training on a CPU the recurrent memory of gdn and ham keeps more for its backward pass than attention does: the"
    " short convolution's input alone (as large as q, k and v together), what normalises q and k, the chunks of the"
    " delta rule, gates and norms; ham also keeps attention's masks, a float32 for every query and stored key."
)
SHARED = ("group", "phase", "dtype", "batch", "length", "heads", "head_dim", "device")


def report(rows: list[Row], settings: dict[str, Any], peaks: dict[str, dict[str, float]], folder: Path) -> None:
    """Writes results.json, table.md and a plot a group into the folder, and prints the table.

    Args:
        rows: of the runs; figures that follow from their samples are added.
        settings: of the whole run, as they were asked for.
        peaks: what the machine reaches in a plain product (FLOP/s) and a plain copy (bytes/s), for each dtype.
        folder: where to write.
    """
    summarise(rows)
    add_roofline(rows, peaks)
    stamped = stamp()  # before the repository is dirty with these files
    text = _write(rows, folder)
    write_json(folder / "results.json", stamped | {"settings": settings, "peaks": peaks, "rows": rows})
    print(f"\n{text}\n\nwritten to {folder}/")


def redraw_all(folder: Path) -> None:
    """Writes the table and the plots of a results.json that is there; the figures stay as they are."""
    path = folder / "results.json"
    try:
        _write(json.loads(path.read_text())["rows"], folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SpecError(f"{path} holds no benchmark: {type(error).__name__}: {error}") from error


def _write(rows: list[Row], folder: Path) -> str:
    """The table, and below it what its memory means."""
    text = "\n\n".join(_table(case, some) for case, some in _by_case(rows).items())
    notes = [PEAK]
    if any((row["group"], row["phase"], row["device"]) == ("mixers", "train", "cpu") for row in rows):
        notes.append(TRAINING)
    text += "\n\n" + "\n".join(notes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(text + "\n")
    for group in dict.fromkeys(row["group"] for row in rows):
        draw([row for row in rows if row["group"] == group], folder / f"{group}.png")
    return text


def summarise(rows: list[Row]) -> None:
    """Adds median, p20 and p80 (seconds), tokens_per_second and the median ratio of the rounds to the reference.

    That is the first contestant of the same case that has a time.
    """
    for some in _by_case(rows).values():
        timed = [row for row in some if row.get("seconds")]
        for row in timed:
            row["median"] = median(row["seconds"])
            row["p20"], row["p80"] = _p20_p80(row["seconds"])
            new = 1 if row["phase"] == "decode" else row["length"]
            row["tokens_per_second"] = row["batch"] * new / row["median"]
            ratios = [a / b for a, b in zip(row["seconds"], timed[0]["seconds"], strict=False)]
            row["reference"] = timed[0]["contestant"]
            row["ratio"] = median(ratios)
            row["ratio_p20"], row["ratio_p80"] = _p20_p80(ratios)


def add_roofline(rows: list[Row], peaks: dict[str, dict[str, float]]) -> None:
    """Adds what was achieved, flops_per_second and bytes_per_second, and `roofline`.

    The work is what `recipes.bench.cost_model` says must be done; `roofline` is the share of the measured time, 0..1,
    that this machine would need at its own peaks.
    """
    for row in rows:
        if "median" in row and "flops" in row:
            row["flops_per_second"] = row["flops"] / row["median"]
            row["bytes_per_second"] = row["moved_bytes"] / row["median"]
            work = Cost(row["flops"], row["moved_bytes"])
            row["roofline"] = work.floor(Machine(**peaks[row["dtype"]])) / row["median"]


def _p20_p80(samples: list[float]) -> tuple[float, float]:
    if len(samples) == 1:
        return samples[0], samples[0]
    fifths = quantiles(samples, n=5, method="inclusive")
    return fifths[0], fifths[3]


def _by_case(rows: list[Row]) -> dict[tuple, list[Row]]:
    cases: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        cases[tuple(row[key] for key in SHARED)].append(row)
    return cases


def _table(case: tuple, rows: list[Row]) -> str:
    c = dict(zip(SHARED, case, strict=True))
    sizes = f"B {c['batch']}, T {c['length']}, H {c['heads']}, K = V {c['head_dim']}"
    title = f"**{c['group']}, {c['phase']}**, {sizes}, {c['dtype']}, {c['device']}"
    reference = next((row["reference"] for row in rows if "reference" in row), "-")
    header = [
        "contestant",
        "ms [p20, p80]",
        f"x {reference}",
        "[p20, p80]",
        "tokens/s",
        "GFLOP/s",
        "GB/s",
        "of roofline",
        "peak MiB",
    ]
    held = any("kv_bytes" in row for row in rows)
    header += ["KV MiB", "state MiB"] if held else []
    return f"{title}\n\n" + markdown_table(header, [_line(row, held) for row in rows])


def _line(row: Row, held: bool) -> list[str]:
    if "median" not in row:
        return [row["contestant"], row.get("error", "no sample"), *["-"] * (9 if held else 7)]

    def mebibytes(key: str) -> str:
        return f"{row[key] / 2**20:.2f}" if key in row else "-"

    achieved = ["-"] * 3
    if "roofline" in row:
        rates = row["flops_per_second"] / 1e9, row["bytes_per_second"] / 1e9
        achieved = [*(f"{rate:,.1f}" for rate in rates), f"{row['roofline']:.0%}"]
    return [
        row["contestant"],
        f"{1e3 * row['median']:.2f} [{1e3 * row['p20']:.2f}, {1e3 * row['p80']:.2f}]",
        f"{row['ratio']:.2f}",
        f"[{row['ratio_p20']:.2f}, {row['ratio_p80']:.2f}]",
        f"{row['tokens_per_second']:,.0f}",
        *achieved,
        mebibytes("peak_bytes"),
        *([mebibytes("kv_bytes"), mebibytes("state_bytes")] if held else []),
    ]


def draw(rows: list[Row], path: Path) -> None:
    """Time and memory against T, a line of panels a phase; bars where there is one length only.

    The memory is the peak of a step or, in decoding, what is held from step to step.

    Args:
        rows: of one group, summarised.
        path: PNG to write.
    """
    from matplotlib.figure import Figure

    rows = [row for row in rows if "median" in row]
    if not rows:
        return
    phases = list(dict.fromkeys((row["phase"], row["dtype"]) for row in rows))
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    colour = {name: f"C{i}" if i < 10 else "grey" for i, name in enumerate(names)}
    figure = Figure(figsize=(11, 0.8 + 3.4 * len(phases)), layout="constrained")
    panels = figure.subplots(len(phases), 2, squeeze=False)
    for (phase, dtype), line in zip(phases, panels, strict=True):
        some = [row for row in rows if (row["phase"], row["dtype"]) == (phase, dtype)]
        memory = (line[1], "peak_bytes", 2**-20, "peak MiB beside the weights")
        if phase == "decode":
            some = [row | {"held_bytes": row["kv_bytes"] + row["state_bytes"]} for row in some]
            memory = (line[1], "held_bytes", 2**-20, "MiB held: keys, values, states")
        for axes, key, unit, label in ((line[0], "median", 1e3, "ms"), memory):
            _panel(axes, [row for row in some if key in row], key, unit, colour)
            axes.set_title(f"{some[0]['group']}, {phase}, {dtype}: {label}", fontsize=10, loc="left")
            axes.spines[["top", "right"]].set_visible(False)
    handles, labels = [], []
    for axes in panels.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def _panel(axes, rows: list[Row], key: str, unit: float, colour: dict[str, str]) -> None:
    lengths = sorted({row["length"] for row in rows})
    if len(lengths) == 1:
        rows = rows[::-1]
        bars = [row[key] * unit for row in rows]
        names = [row["contestant"] for row in rows]
        axes.barh(names, bars, color=[colour[name] for name in names])
        for place, value in enumerate(bars):
            axes.text(value, place, f" {value:.3g}", va="center", fontsize=8)
        axes.tick_params(labelsize=8)
        return
    for name in dict.fromkeys(row["contestant"] for row in rows):
        points = sorted((row["length"], row[key] * unit) for row in rows if row["contestant"] == name)
        axes.plot(*zip(*points, strict=True), marker="o", ms=4, color=colour[name], label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
    axes.tick_params(which="both", labelsize=8)
    axes.set_xlabel("T", fontsize=9)
    axes.grid(alpha=0.3)
