"""What the pictures of a comparison show, and when there is none."""

import json
import shutil

import pytest
from matplotlib.figure import Figure

from recipes.compare.bytes_plot import bytes_axis, draw_bytes, named, said_bytes, total_bytes
from recipes.compare.plot import LEVEL, MOST, Line, choose, draw, draw_losses, kind, usage_lines
from recipes.pictures import apart


def rows(label, values, mixer="gdn", **options):
    common = {"label": label, "mixer": mixer, "metric": "accuracy", "options": options}
    return [common | {"seed": seed, "accuracy": value} for seed, value in enumerate(values)]


def test_contestants_that_differ_in_usage_are_one_line_and_know_what_they_are():
    by_label = {
        "ham cosine 0.5": rows("ham cosine 0.5", [0.5, 0.7], "ham", router="cosine", kv_usage=0.5),
        "ham cosine 0.25": rows("ham cosine 0.25", [0.4], "ham", router="cosine", kv_usage=0.25),
        "ham random 0.25": rows("ham random 0.25", [0.4], "ham", router={"name": "random"}, kv_usage=0.25),
        "gdn": rows("gdn", [0.3]),
    }
    cosine, random, gdn = usage_lines(by_label)
    assert (cosine.name, cosine.x, cosine.y) == ("cosine", [0.25, 0.5], [0.4, pytest.approx(0.6)])
    assert [line.kind for line in (cosine, random, gdn)] == ["router", "control", "rival"]
    assert kind(rows("x", [0.1], "gdn,ham")[0]) == "router"


@pytest.mark.parametrize("higher", [True, False])
def test_at_most_eight_lines_of_every_kind_the_best_first(higher):
    sign = 1 if higher else -1
    kinds = {"router": 9, "control": 4, "rival": 4}
    lines = [Line(f"{k}{i}", k, {0.1: [sign * i], 0.2: [sign * i]}) for k, count in kinds.items() for i in range(count)]
    names = [line.name for line in choose(lines, higher)]
    assert len(names) == MOST
    assert set(names) == {*(f"router{i}" for i in (5, 6, 7, 8)), "control2", "control3", "rival0", "rival3"}
    assert [int(name[-1]) for name in names] == sorted((int(name[-1]) for name in names), reverse=True)
    few = [line for line in lines if line.kind == "rival"]
    assert len(choose(few, higher)) == 4


def test_nothing_is_drawn_where_there_is_nothing_to_see(tmp_path):
    path = tmp_path / "plot.png"
    path.write_text("of an older comparison")
    cosine = dict(mixer="ham", router="cosine")
    one = {"ham cosine 0.5": rows("ham cosine 0.5", [0.5], **cosine, kv_usage=0.5), "gdn": rows("gdn", [0.3])}
    draw(one, path)
    draw_losses(one, path)
    assert not path.exists()
    draw(one | {"mine": rows("mine", [0.4], **cosine, kv_usage=0.25)}, path)
    assert not path.exists()  # a label of its own is a line of its own
    draw(one | {"ham cosine 0": rows("ham cosine 0", [0.4], **cosine, kv_usage=0)}, path)
    assert path.stat().st_size > 5000


def test_names_are_moved_apart_and_no_further():
    assert apart([30.0, 0.0, 31.0], 10) == [pytest.approx(25.5), 0.0, pytest.approx(35.5)]
    assert apart([5.0, 5.0, 5.0], 2) == [3.0, 5.0, 7.0]
    assert apart([], 2) == []


def test_plots_are_drawn_anew_and_nothing_else_changes(run, tmp_path):
    folder = tmp_path / "compared"
    folder.mkdir()
    points = [(0.25, [0.4, 0.6]), (0.5, [0.8])]
    runs = [r for u, v in points for r in rows(f"ham cosine {u}", v, "ham", router="cosine", kv_usage=u)]
    curve = [{"asked": u, "kv_usage": u, "accuracy": u} for u in (0.0, 0.5)]
    runs = [r | {"kv_usage": 0.3, "losses": [[1, 2.0], [2, 1.0]], "curve": curve} for r in runs] + rows("gdn", [0.3])
    (folder / "results.json").write_text(json.dumps({"runs": runs}))
    before = (folder / "results.json").read_bytes()
    assert run(f"compare --redraw {folder}").code == 0
    assert sorted(path.name for path in folder.iterdir()) == ["curve.png", "curves.png", "plot.png", "results.json"]
    assert (folder / "results.json").read_bytes() == before

    weighed = [p | {"kv_bytes": 2**20 * p["asked"], "of_attention": p["asked"], "long": 64} for p in curve]
    swept = {"label": "a", "metric": "accuracy", "options": {"budget": "any"}, "curve": weighed}
    shutil.rmtree(folder)
    folder.mkdir()
    for text in ("", "[]", "{}", '{"runs": []}', '{"runs": [5]}', '{"runs": [{"mixer": "gdn"}]}'):
        (folder / "results.json").write_text(text)
        assert "holds no comparison" in run(f"compare --redraw {folder}").error
    (folder / "results.json").write_text(json.dumps({"runs": [swept]}))
    assert run(f"compare --redraw {folder}").code == 0
    assert sorted(path.name for path in folder.iterdir()) == ["curve.png", "results.json"]


def test_bytes_are_those_of_state_and_cache_together_and_every_kind_is_named(tmp_path):
    def weighed(label, value, state, kv, mixer="ham", **options):
        held = {"state_bytes": state, "kv_bytes": 64, "kv_stored_bytes": kv, "tokens": 8}
        return {label: [row | held for row in rows(label, [value, value], mixer, **options)]}

    by_label = weighed("gdn", 0.3, 100, 0, "gdn") | weighed("attention", 0.9, 10, 800, "attention")
    for usage, kv in ((0.25, 200), (0.5, 400)):
        for i in range(6):
            by_label |= weighed(f"ham mine{i} {usage}", i / 10, 100, kv, router=f"mine{i}", kv_usage=usage)
        by_label |= weighed(f"ham random {usage}", 0.1, 100, kv, router="random", kv_usage=usage)
    held = total_bytes(by_label)
    assert held["mine0"] == {0.25: 300, 0.5: 500} and held["attention"] == {LEVEL: 810}
    names = [line.name for line in named(usage_lines(by_label), higher=True)]
    assert names == ["attention", "mine5", "mine4", "mine3", "gdn", "mine2", "random"]
    older = {label: [{k: v for k, v in row.items() if k != "kv_stored_bytes"} for row in runs]
             for label, runs in by_label.items()}  # fmt: skip
    assert total_bytes(older)["mine0"] == {0.25: 164, 0.5: 164}
    draw_bytes(by_label | {"unweighed": rows("unweighed", [0.3])}, tmp_path / "bytes.png")
    assert (tmp_path / "bytes.png").stat().st_size > 5000
    draw_bytes({"unweighed": rows("unweighed", [0.3])}, tmp_path / "bytes.png")
    assert not (tmp_path / "bytes.png").exists()
    assert [said_bytes(count) for count in (512, 4096, 1.5 * 2**20)] == ["512 B", "4 KiB", "1.5 MiB"]


@pytest.mark.parametrize(
    "most, shown",
    [
        (39_500, {"40 KiB", "48 KiB"}),
        (70_000, {"40 KiB", "48 KiB", "64 KiB"}),
        (600_000, {"64 KiB", "128 KiB"}),
    ],
)
def test_bytes_have_ticks_however_near_they_are(most, shown):
    axes = Figure().subplots()
    axes.plot([39_000, most], [0, 1])
    bytes_axis(axes, "", 64)
    labels = axes.xaxis.get_major_formatter().format_ticks(axes.xaxis.get_majorticklocs())
    assert shown < {*labels} and ("40 KiB" in labels) == (most < 100_000)
    assert axes.get_xlim()[1] > 1.99 * axes.get_xlim()[0]


def test_a_label_keeps_its_own_numbers_and_a_level_is_no_part_of_a_curve():
    by_label = {
        f"taps 12 {usage}": rows(f"taps 12 {usage}", [0.5], "ham", router="cosine", kv_usage=usage)
        for usage in (0.25, 1)
    }
    by_label |= {"mine": rows("mine", [0.2], "ham")}
    by_label |= {f"mine {u}": rows(f"mine {u}", [0.5], "ham", router="cosine", kv_usage=u) for u in (0.25, 1)}
    assert [(line.name, line.x) for line in usage_lines(by_label)] == [
        ("taps 12", [0.25, 1]),
        ("mine", [LEVEL]),
        ("mine", [0.25, 1]),
    ]
