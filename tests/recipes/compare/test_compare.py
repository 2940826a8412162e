"""The comparison: what is run, what is not run twice, and what the report makes of it."""

import json
import math
import re
from datetime import timedelta

import pytest
import torch
import yaml

from lit_modules.data import DATA
from lit_modules.data.generated import GeneratedData
from mixers.registry import SpecError
from mixers.routers.controls import Random
from recipes.compare import command as module
from recipes.compare import run as run_module
from recipes.compare.command import compare, describe, expand
from recipes.compare.gains import over_controls, over_references
from recipes.compare.report import at_best_rate, name_table, part_table, stage_table, table
from recipes.compare.run import build, remembered, settings_of, train
from recipes.task import sized

TINY = {"num_pairs": 4, "num_keys": 8, "num_values": 8, "num_validation": 16, "num_test": 32, "curriculum": None}
MODEL = {"dim": 16, "mlp_ratio": 1.0}


def tiny_run(mixer, seed=0, **options):
    settings = settings_of("mqar", data_options=TINY, model_options=MODEL, metric=None)
    cell = {"label": describe(mixer, options), "mixer": mixer, "options": options}
    return cell | settings | {"steps": 3, "seed": seed, "key": "k"}


def row(label, seed, accuracy, **options):
    named = {"label": label, "mixer": options.pop("mixer", "ham"), "seed": seed}
    return named | {"accuracy": accuracy, "metric": "accuracy", "options": options}


def test_lists_of_options_stand_for_all_combinations():
    cells = list(
        expand([{"mixer": "ham", "router": ["cosine", "random"], "kv_usage": [0.5, 0.25]}, {"mixer": "gdn*3,ham"}])
    )
    assert [cell["label"] for cell in cells] == [
        "ham cosine 0.5",
        "ham cosine 0.25",
        "ham random 0.5",
        "ham random 0.25",
        "gdn,gdn,gdn,ham",
    ]
    assert cells[3]["options"] == {"router": "random", "kv_usage": 0.25}


def test_what_shares_a_label_is_told_apart_by_what_was_listed():
    cells = expand([{"label": "mine", "mixer": "ham", "router": "cosine", "kv_usage": [0.5, 0.25]}])
    assert [cell["label"] for cell in cells] == ["mine 0.5", "mine 0.25"]
    assert [cell["label"] for cell in expand([{"label": "mine", "mixer": "ham", "kv_usage": 0.5}])] == ["mine"]


def test_a_run_weighs_what_the_model_remembers(tmp_path):
    result = train(tiny_run({"name": "ham", "num_heads": 2, "head_dim": 4}, router="all", kv_usage=1.0), tmp_path)
    assert result["tokens"] == 16
    assert result["kv_bytes"] == 2 * 64 * 2 * (4 + 4) * 4  # layers, tokens of a page, heads, key and value, float32
    assert result["kv_stored_bytes"] == 2 * 16 * 2 * (4 + 4) * 4
    assert [step for step, _ in result["losses"]] == [1, 2, 3]
    assert result["kv_usage"] == 1.0
    assert 0 <= result["accuracy"] <= 1


def test_of_packed_sequences_the_longest_is_weighed():
    run = tiny_run({"name": "attention", "num_heads": 2, "head_dim": 4})
    batch = {"tokens": torch.zeros(1, 20).long(), "cu_seqlens": torch.tensor([0, 3, 14, 20], dtype=torch.int32)}
    found = remembered(build(run)[0], batch)
    assert found["tokens"] == 11 and found["kv_stored_bytes"] == 2 * 11 * 2 * (4 + 4) * 4


def test_bytes_of_full_attention_and_of_a_small_budget_are_exact(tmp_path):
    small = {"num_heads": 2, "head_dim": 4}
    attention = train(tiny_run({"name": "attention"} | small), tmp_path)
    half = train(tiny_run({"name": "ham"} | small, router={"name": "static"}, kv_usage=0.5), tmp_path)
    assert attention["kv_stored_bytes"] == 2 * 16 * 2 * (4 + 4) * 4 < attention["kv_bytes"]
    assert half["kv_stored_bytes"] == half["kv_usage"] * attention["kv_stored_bytes"]


def test_blind_choice_is_drawn_anew_with_every_seed():
    def seeds(router, seed):
        model, _ = build(tiny_run("ham", seed, router=router, kv_usage=0.5))
        return {module.seed for module in model.modules() if isinstance(module, Random)}

    assert [seeds("random", 0), seeds("random", 3)] == [{0}, {3}]
    assert seeds({"name": "static", "begin": "first"}, 3) == {3}
    assert seeds({"name": "random", "seed": 7}, 3) == {7}


def test_a_run_says_when_its_curriculum_went_on(tmp_path):
    run = tiny_run("gdn")
    run["data_options"] = run["data_options"] | {"curriculum": [1, 2, 4], "advance_at": 1.0}
    grown = train(run, tmp_path)
    assert grown["curriculum"] == [(0, 1), (1, 2), (2, 4)]
    assert "| gdn        | 2 [2, 2]             |" in stage_table({"gdn": [grown]})
    assert stage_table({"gdn": [train(tiny_run("gdn"), tmp_path)]}) == ""


def test_a_run_repeats_exactly_and_the_seed_changes_it(tmp_path):
    results = [train(tiny_run("gdn", seed=seed), tmp_path) for seed in (0, 0, 1)]
    assert results[0]["loss"] == results[1]["loss"] != results[2]["loss"]


def test_a_run_that_was_ended_goes_on_where_it_was_saved_and_ends_the_same(tmp_path, monkeypatch):
    run = tiny_run("ham", router="learned", kv_usage=0.5) | {"steps": 6}
    whole = train(run, tmp_path / "never")
    assert not (tmp_path / "never").exists()  # no run of a few seconds is saved
    steps = []

    def count(n):
        steps.append(n)
        if len(steps) == 5:  # on_train_start, and four steps of which three were saved
            raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "count_steps", count)
    monkeypatch.setattr(run_module, "SAVED_EVERY", timedelta(0))
    with pytest.raises(SystemExit):
        train(run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["k.ckpt"]
    again = train(run, tmp_path)
    assert steps == [0, 1, 1, 1, 1, 3, 1, 1, 1]
    apart = ("seconds", "commit")
    assert {k: v for k, v in again.items() if k not in apart} == {k: v for k, v in whole.items() if k not in apart}


def test_a_run_whose_data_cannot_go_on_is_not_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "SAVED_EVERY", timedelta(0))
    monkeypatch.setattr(GeneratedData, "train_dataloader", GeneratedData.val_dataloader)
    train(tiny_run("gdn"), tmp_path)
    assert not [*tmp_path.iterdir()]


def test_finished_runs_are_not_trained_again(tmp_path, monkeypatch, capsys):
    trained = []

    def train_all(runs, jobs, unfinished):
        for run in runs:
            trained.append((run["label"], run["seed"]))
            yield train(run, unfinished)

    monkeypatch.setattr(module, "train_all", train_all)
    options = dict(data_options=TINY, model_options=MODEL, steps=2, out=str(tmp_path))
    compare(mixers=["gdn"], seeds=1, **options)
    compare(mixers=["gdn", "attention"], seeds=2, **options)
    assert trained == [("gdn", 0), ("attention", 0), ("gdn", 1), ("attention", 1)]
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["runs"]) == 4 and results["schema_version"] == 1 and "torch" in results["packages"]
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert not (tmp_path / "plot.png").exists()  # nothing was set to a usage, so there is no curve to see
    assert "attention" in (tmp_path / "table.md").read_text() and "attention" in capsys.readouterr().out

    log = tmp_path / "runs.jsonl"
    whole = log.read_bytes()
    for missing in (1, 40):  # the comparison was ended in the middle of a line
        log.write_bytes(whole[:-missing])
        trained.clear()
        compare(mixers=["gdn", "attention"], seeds=2, **options)
        assert trained == [("attention", 1)]
        assert capsys.readouterr().err.splitlines() == [f"{log}: the last line was cut; that run is trained again"]
        assert [json.loads(line)["seed"] for line in log.read_text().splitlines()] == [0, 0, 1, 1]
    for damage in (b"5", b'{"label": "gdn"}', whole[:50]):
        log.write_bytes(damage + b"\n" + whole)
        with pytest.raises(SpecError, match="runs.jsonl: line 1 is no run of a comparison"):
            compare(mixers=["gdn"], seeds=1, **options)
        assert log.read_bytes() == damage + b"\n" + whole


def test_all_are_trained_at_every_learning_rate_and_the_best_on_validation_is_shown(tmp_path, monkeypatch, run):
    monkeypatch.setattr(module, "train_all", lambda runs, jobs, unfinished: (train(run, unfinished) for run in runs))
    data = (
        "--data_options.num_pairs 4 --data_options.num_validation 16 --data_options.num_test 16 --model_options.dim 16"
    )
    line = f"compare --mixers [gdn,attention] --seeds 1 --steps 2 --out {tmp_path} {data}"
    result = run(f"{line} --learning_rates [0.01,1e-9,0.01]")
    assert result.code == 0 and "| validation at learning rate | 1e-09 | 0.01" in result.out
    results = json.loads((tmp_path / "results.json").read_text())
    tried = [(row["label"], row["options"]["learning_rate"]) for row in results["runs"]]
    assert tried == [("gdn", 0.01), ("gdn", 1e-9), ("attention", 0.01), ("attention", 1e-9)]
    assert results["runs"][0]["losses"][0][1] == results["runs"][1]["losses"][0][1]  # the same start and data
    assert results["runs"][0]["loss"] != results["runs"][1]["loss"]  # but another rate
    for label, some in (("gdn", results["runs"][:2]), ("attention", results["runs"][2:])):
        seen = {str(row["options"]["learning_rate"]): row["validation"]["accuracy"] for row in some}
        assert results["learning_rates"][label]["validation"] == seen
    assert "positive, got -1" in run(f"{line} --learning_rates [-1]").error
    assert "not both" in run(f"{line} --learning_rates [1] --model_options.learning_rate 1").error


def test_the_best_rate_has_the_best_validation_and_the_fewest_failures():
    def runs(rate, *values, label="a"):
        some = [row(label, seed, 0.5, learning_rate=rate) for seed in range(len(values))]
        return [r | {"validation": {"accuracy": value}} for r, value in zip(some, values, strict=True)]

    rows = runs(1.0, 0.9) + runs(0.1, 0.6, 0.4) + runs(0.01, 0.6, 0.6) + runs(0.001, 0.9, math.nan) + [row("b", 0, 0.5)]
    best, rates = at_best_rate(rows)
    assert [(r["label"], r["options"].get("learning_rate")) for r in best] == [("a", 0.01), ("a", 0.01), ("b", None)]
    assert rates["a"]["best"] == 0.01 and rates["a"]["validation"]["0.1"] == 0.5 and "b" not in rates


def test_the_other_seeds_are_trained_at_the_best_rate_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "train_all", lambda runs, jobs, unfinished: (train(run, unfinished) for run in runs))
    options = dict(mixers=["gdn"], data_options=TINY, model_options=MODEL, steps=2, seeds=3, out=str(tmp_path))
    compare(**options, learning_rates=[1e-9, 0.01], rate_seeds=1)
    results = json.loads((tmp_path / "results.json").read_text())
    best = results["learning_rates"]["gdn"]["best"]
    tried = [(run["seed"], run["options"]["learning_rate"]) for run in results["runs"]]
    assert tried == [(0, 1e-9), (0, 0.01), (1, best), (2, best)]
    first = {str(run["options"]["learning_rate"]): run["validation"]["accuracy"] for run in results["runs"][:2]}
    assert results["learning_rates"]["gdn"]["validation"] == first  # of the seed that both were tried on
    with pytest.raises(SpecError, match="give these, too"):
        compare(**options, rate_seeds=1)


def test_every_part_of_a_test_set_is_shown():
    runs = [
        row("a", s, v) | {"mean_accuracy": v, "accuracy/64x4": v, "accuracy/32x8": 0.25} for s, v in enumerate((0, 1))
    ]
    assert part_table({"a": runs}).splitlines() == [
        "| accuracy in part | 64x4  | 32x8  |",
        "|------------------|-------|-------|",
        "| a                | 0.500 | 0.250 |",
    ]
    assert part_table({"a": [row("a", 0, 0.5)]}) == ""


def test_names_that_come_back_are_shown_apart():
    runs = [
        row("a", s, 0.5) | {"name_bits_per_byte": v, "name_bytes": 1200.0, "rest_bits_per_byte": 2.0, "rest_bytes": 9.0}
        for s, v in enumerate((0.5, 1.0))
    ]
    assert name_table({"a": runs}).splitlines() == [
        "| bits per byte of | name (1,200 bytes)   | rest (9 bytes)       |",
        "|------------------|----------------------|----------------------|",
        "| a                | 0.750 [0.500, 1.000] | 2.000 [2.000, 2.000] |",
    ]
    assert name_table({"a": runs, "b": [row("b", 0, 0.5)]}) == ""


def test_gains_are_paired_by_seed_and_usage():
    rows = [row("surprise", s, a, router="cosine", kv_usage=0.1) for s, a in enumerate((0.9, 0.5))]
    rows += [row("chance", s, a, router={"name": "random"}, kv_usage=0.1) for s, a in enumerate((0.6, 0.7))]
    rows += [row("elsewhere", 0, 0.0, router="static", kv_usage=0.2)]
    text = over_controls(rows)
    assert "+0.050 (1 of 2)" in text  # (.3 - .2) / 2
    assert "elsewhere" not in text and "surprise" in text


def test_gains_are_over_the_better_of_two_static_controls():
    rows = [row("ours", s, a, router="residual", kv_usage=0.1) for s, a in enumerate((0.9, 0.9))]
    rows += [row("last", s, 0.2, router="static", kv_usage=0.1) for s in range(2)]
    rows += [row("first", s, a, router={"name": "static"}, kv_usage=0.1) for s, a in enumerate((0.8, 0.95))]
    assert "+0.025 (1 of 2)" in over_controls(rows)


def test_gains_are_over_controls_in_the_same_mixers():
    rows = []
    for mixer, (chosen, blind) in {"ham": (0.5, 0.4), "gdn,ham": (0.9, 0.8)}.items():
        for router, accuracy in (("cosine", chosen), ("random", blind)):
            rows += [row(f"{mixer} {router}", s, accuracy, mixer=mixer, router=router, kv_usage=0.25) for s in range(2)]
    assert over_controls(rows).count("+0.100 (2 of 2)") == 2
    assert over_controls(rows[:2] + rows[6:]) == ""  # no control of its own


def test_gains_are_over_every_mixer_without_a_router_too():
    rows = [row("ours", s, a, router="residual", kv_usage=0.1) for s, a in enumerate((0.9, 0.5))]
    rows += [row("gdn", s, a) for s, a in enumerate((0.6, 0.7))] + [row("hybrid", 0, 0.4)]
    assert over_references(rows).splitlines()[0].endswith("| over gdn        | over hybrid     |")
    assert "+0.050 (1 of 2) | +0.500 (1 of 1)" in over_references(rows) and over_controls(rows) == ""
    assert over_references(rows[:2]) == ""


def test_the_table_counts_the_seeds_that_failed():
    weighed = {"parameters": 1, "state_bytes": 100, "kv_bytes": 300, "kv_stored_bytes": 20, "tokens": 3, "seconds": 4.0}
    rows = {"a": (0.9, 0.2), "b": (0.8, 0.8)}
    text = table({label: [row(label, s, v) | weighed for s, v in enumerate(some)] for label, some in rows.items()})
    assert [line.split("|")[4].strip() for line in text.splitlines()[2:4]] == ["1", "0"]
    assert "below 0.400" in text and "| 120 " in text


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_runs_that_ended_in_an_error_have_failed(metric):
    weighed = {"parameters": 1, "state_bytes": 100, "kv_bytes": 300, "tokens": 3, "seconds": 4.0}
    rows = {
        label: [row(label, s, v) | weighed | {"metric": metric, metric: v} for s, v in enumerate(values)]
        for label, values in {"a": (0.5, 0.75), "b": (0.75,), "c": (0.5, math.nan)}.items()
    }
    text = table(rows, dict.fromkeys("abcd", 2))
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")] for line in text.splitlines()[2:5]}
    assert [cells[label][3:5] for label in "bc"] == [["1 of 2", "1"], ["2", "1"]]
    assert cells["a"][3:5] == ["2", "0" if metric == "accuracy" else "-"]
    assert text.endswith("no part of the means: 1 of b, 2 of d")


def test_the_table_shows_mean_and_range():
    runs = [
        row("a", s, v) | {"parameters": 1234, "state_bytes": 1, "kv_bytes": 2, "tokens": 3, "seconds": 4.0}
        for s, v in enumerate((0.25, 0.75))
    ]
    assert "0.500 [0.250, 0.750]" in table({"a": runs}) and "1,234" in table({"a": runs})
    exact = [run | {"kv_stored_bytes": 5678} for run in runs]
    assert "5,678" in table({"a": exact}) and "learning rate" not in table({"a": exact})


def options_in(path) -> dict[str, dict]:
    """The options of model and data in the command that a file of contestants gives for itself."""
    given = {"model_options": {}, "data_options": {}}
    for part, name, value in re.findall(r"--(model_options|data_options)\.(\w+) ([\w.]+)", path.read_text()):
        given[part][name] = yaml.safe_load(value)
    return given


@pytest.mark.parametrize("path", sorted((module.HERE / "contestants").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_contestants_of_every_file_can_be_built(path):
    data = next((name for name in (path.stem, *path.stem.split("_")) if name in DATA), "mqar")
    settings = settings_of(data, **options_in(path), metric=None)
    cells = [cell | {"mixer": sized(cell["mixer"], data)} for cell in expand(module._read(path))]
    module.check(cells, settings)
    assert len(cells) > 2 and path.read_text().startswith("# ")


@pytest.mark.parametrize(
    "name, data",
    [("rewrite", "rewrite"), ("facts", "facts"), ("mqar48_bytes", "mqar"), ("mqar256", "mqar"), ("text_names", "text")],
)
def test_rivals_of_equal_bytes_hold_as_much_as_ham_does(name, data):
    path = module.HERE / "contestants" / f"{name}.yaml"
    settings = settings_of(data, **options_in(path), metric=None)
    held, batch = {}, None
    for cell in expand(module._read(path)):
        usage = re.search(r"(?:bytes of|ham residual|ham window.sinks) 0?(\.\d+)$", cell["label"])
        if usage is None:
            continue
        model, module_of_data = build(cell | settings | {"mixer": sized(cell["mixer"], data), "seed": 0})
        if data == "text":  # a sequence of the whole length, whatever texts there are
            batch = {"tokens": torch.randint(256, (1, settings["data_options"]["seq_len"]))}
        elif batch is None:
            module_of_data.setup("test")
            batch = {key: x[:2] for key, x in next(iter(module_of_data.test_dataloader())).items()}
        ours = "residual" in cell["label"]
        weighed = remembered(model, {key: x[:, :2] for key, x in batch.items()} if ours else batch)
        stored = weighed["kv_stored_bytes"]
        if ours:  # whose thresholds know nothing yet: what is asked counts
            memories = [block.mixer.memory for block in model.decoder.blocks]
            widths = sum(memory.num_states * (memory.head_dim + memory.value_dim) for memory in memories)
            stored = 4 * widths * batch["tokens"].shape[1] * float(usage[1])
        held.setdefault(usage[1], {})[cell["label"]] = weighed["state_bytes"] + stored
    assert sum(map(len, held.values())) > 3
    for some in held.values():
        ours = some.pop(next(label for label in some if label.startswith("ham residual")))
        assert all(abs(rival / ours - 1) < 0.13 for rival in some.values()), (ours, some)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(mixers=["hamm"]), "unknown mixer 'hamm'"),
        (dict(mixers=["ham"], routers=["cosin"]), "unknown router 'cosin'"),
        (dict(mixers=["ham"], kv_usages=[1.5]), "1.5"),
        (dict(contestants=[{"mixer": "ham", "routr": "cosine"}]), "unknown key 'routr'"),
        (dict(contestants=[{"mixer": "gdn"}, {"mixer": "gdn"}]), "share a label: gdn"),
        (dict(contestants="nowhere.yaml"), "nowhere.yaml"),
        (dict(data="mqr"), "unknown data 'mqr'"),
        (dict(mixers=["gdn"], data_options={"num_pears": 4}), "num_pears"),
        (dict(mixers=["gdn"], model_options={"dept": 4}), "dept"),
    ],
)
def test_a_mistake_is_named_before_anything_is_written(arguments, message, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(SpecError, match=message):
        compare(**arguments, out=str(out))
    assert not out.exists()


def test_a_trained_model_is_tested_at_other_usages_too(tmp_path, run):
    budgets = "budget: [fixed, {name: any, allocate: false}]"
    cell = f"{{mixer: {{name: ham, num_heads: 2, head_dim: 4}}, router: [cosine], {budgets}}}"
    contestants = tmp_path / "cells.yaml"
    contestants.write_text(f"contestants: [{cell}, {{mixer: {{name: gdn, num_heads: 2, head_dim: 4}}}}]")
    out = tmp_path / "out"
    line = (
        f"compare --contestants {contestants} --test_usages [0,0.5,1] --steps 4 --seeds 1 --jobs 1 --out {out}"
        " --data_options.num_pairs 4 --data_options.num_validation 8 --data_options.num_test 8 --model_options.dim 16"
    )
    result = run(line)
    assert result.code == 0 and "accuracy when tested at" in result.out
    rows = {row["label"]: row for row in json.loads((out / "results.json").read_text())["runs"]}
    assert list(rows) == ["ham cosine fixed", "ham cosine any(allocate=False)", "gdn"]
    for label in ("ham cosine fixed", "ham cosine any(allocate=False)"):
        curve = rows[label]["curve"]
        assert [point["asked"] for point in curve] == [0, 0.5, 1]
        assert curve[0]["kv_usage"] == 0 and curve[2]["kv_usage"] == 1
    assert "curve" not in rows["gdn"] and (out / "curve.png").stat().st_size > 5000
    assert "kv_usage must be a number from 0 to 1, got 2" in run(f"{line} --test_usages [2]").error
