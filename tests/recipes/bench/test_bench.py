"""The benchmark: who runs, what a failure becomes, and what is made of the samples. No test looks at a clock."""

import json
import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from kernels import delta_rule
from mixers import build_mixer
from recipes.bench import command as module
from recipes.bench.contestants import Case, _captured, _mixers, contestants, stored_tokens
from recipes.bench.measure import Failed, peak_bytes, prepare
from recipes.bench.report import add_roofline, summarise

SMALL = "--batch 2 --heads 2 --head_dim 8 --rounds 3 --minutes 600"


def case(group="delta_rule", phase="forward", **changes):
    sizes = dict(batch=2, length=40, heads=4, head_dim=8)
    return Case(**{"group": group, "phase": phase, "dtype": "float32", "device": "cpu", "seed": 0, **sizes, **changes})


@pytest.fixture
def fake(monkeypatch):
    """fake({name: build}) puts these in place of the contestants, and takes the machine's speed as known."""
    monkeypatch.setattr(module, "machine_peaks", lambda *args: {"tflops": 1.0, "terabytes": 1.0})

    def _fake(builds):
        monkeypatch.setattr(module, "contestants", lambda case, usages, skews: iter(builds.items()))

    return _fake


def rows_of(folder):
    return json.loads((folder / "results.json").read_text())["rows"]


def test_every_contestant_of_the_operations_has_samples_or_a_reason(run, tmp_path):
    groups = "--groups [delta_rule,routed_attention] --phases [forward,train] --lengths [40]"
    assert run(f"bench {SMALL} {groups} --out {tmp_path}").code == 0
    rows = rows_of(tmp_path)
    for phase in ("forward", "train"):
        contestants = {row["contestant"] for row in rows if row["phase"] == phase}
        assert contestants >= {"sdpa", "ours (torch)", "transformers (chunked)", "ours (torch) 0.25"}
    for row in rows:
        assert len(row["seconds"]) == 3 and row["p20"] <= row["median"] <= row["p80"] and row["peak_bytes"] > 0
    for name in ("table.md", "delta_rule.png", "routed_attention.png"):
        assert (tmp_path / name).stat().st_size > 100


def test_every_mixer_runs(run, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "machine_peaks", lambda *args: {"tflops": 1.0, "terabytes": 1.0})
    flags = "--phases [forward,train,prefill,decode] --lengths [256] --kv_usages [0.25]"
    assert run(f"bench {SMALL} --rounds 1 --groups [mixers] {flags} --out {tmp_path}").code == 0
    for phase in ("forward", "train", "prefill", "decode"):
        rows = {row["contestant"]: row for row in rows_of(tmp_path) if row["phase"] == phase}
        assert list(rows) == ["attention", "gdn", "ham 0.25", "hybrid gdn*3,attention"]
        assert all("median" in row for row in rows.values())
        if phase in ("prefill", "decode"):
            full = rows["attention"]["kv_bytes"]
            assert rows["gdn"]["kv_bytes"] == 0
            assert rows["hybrid gdn*3,attention"]["kv_bytes"] == full / 4
            assert 0 < rows["ham 0.25"]["kv_bytes"] < full / 2


def test_contestants_of_the_delta_rule_compute_the_same():
    builds = dict(contestants(case(), [], []))
    ours, theirs = (prepare(builds[name], case()).step() for name in ("ours (torch)", "transformers (chunked)"))
    assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("phase", ["forward", "train"])
def test_who_runs_the_delta_rule_on_a_gpu(phase):
    """What gives no gradient is not trained."""
    backends = ["torch", "triton", *(["triton_recurrent"] if phase == "forward" else [])]
    ours = [f"ours ({name}){more}" for name in backends for more in ("", " and writes", " and prediction")]
    names = [name for name, _ in contestants(case(phase=phase, device="cuda"), [], [])]
    assert names == ["sdpa", *ours, "fla", "FlashQLA", "transformers (chunked)"]


def test_fla_and_flashqla_are_two(monkeypatch):
    monkeypatch.setenv("FLA_FLASH_QLA", "1")  # fla hands over to FlashQLA, which is so by default
    asked = []

    def rule(q, k, v, *args, **options):
        asked.append(os.environ["FLA_FLASH_QLA"])
        return v, None, None

    monkeypatch.setattr(delta_rule, "gated_delta_rule", rule)
    builds = dict(contestants(case(device="cuda"), [], []))
    builds["fla"](case()).step()
    assert asked == ["0"]
    with pytest.raises(Failed, match="not installed: flash_qla"):
        prepare(builds["FlashQLA"], case())
    there = SimpleNamespace(chunk_gated_delta_rule=lambda q, k, v, g, beta, output_final_state: (2 * v, None))
    monkeypatch.setitem(sys.modules, "flash_qla", there)
    assert prepare(builds["FlashQLA"], case()).step().shape == (2, 40, 4, 8)
    assert asked == ["0"]


@pytest.mark.parametrize("usage", [0.0, 0.125, 0.25, 0.5, 1.0])
def test_skew_keeps_the_mean(usage):
    big = case(length=4000)
    even, skewed = (stored_tokens(big, usage, skew).float().mean((0, 1)) for skew in ("even", "one_head"))
    assert_close(even, torch.full((4,), usage), rtol=0, atol=0.03)
    assert skewed.mean().item() == pytest.approx(usage, abs=0.01)
    assert skewed[0] == pytest.approx(min(1.0, 4 * usage), abs=0.03)


def test_a_failure_is_a_row_and_the_others_go_on(run, fake, tmp_path):
    def fails(error):
        def build(case):
            raise error

        return build

    fake(
        {
            "works": lambda case: lambda: torch.ones(1),
            "too big": fails(torch.OutOfMemoryError("CUDA out of memory")),
            "absent": fails(ModuleNotFoundError("No module named 'fla'", name="fla")),
            "broken": fails(NotImplementedError("no backward\non CPU")),
            "picky": fails(AssertionError("only bfloat16")),
        }
    )
    assert run(f"bench {SMALL} --groups [mixers] --lengths [8] --out {tmp_path}").code == 0
    rows = {row["contestant"]: row for row in rows_of(tmp_path)}
    assert len(rows["works"]["seconds"]) == 3
    errors = {name: row["error"] for name, row in rows.items() if "error" in row}
    assert errors == {
        "too big": "out of memory",
        "absent": "not installed: fla",
        "broken": "NotImplementedError: no backward on CPU",
        "picky": "AssertionError: only bfloat16",
    }
    assert "out of memory" in (tmp_path / "table.md").read_text()


def test_a_failure_in_the_middle_leaves_no_half_of_the_samples(run, fake, tmp_path):
    calls = []

    def step():
        calls.append(1)
        if len(calls) > 5:
            raise MemoryError

    fake({"works": lambda case: lambda: None, "fails later": lambda case: step})
    assert run(f"bench {SMALL} --groups [mixers] --lengths [8] --out {tmp_path}").code == 0
    _, row = rows_of(tmp_path)
    assert row["error"] == "out of memory" and "seconds" not in row


def test_what_does_not_fit_in_the_time_is_left_out_and_said(run, fake, tmp_path):
    fake({"works": lambda case: lambda: None})
    assert run(f"bench {SMALL} --minutes 1e-9 --groups [mixers] --lengths [8] --out {tmp_path}").code == 0
    assert rows_of(tmp_path)[0]["error"] == "left out: the time was over"


def test_ratios_are_paired_by_round():
    shared = dict(group="g", phase="decode", dtype="d", batch=3, length=8, heads=1, head_dim=1, device="cpu")
    rows = [
        shared | {"contestant": "reference", "seconds": [1.0, 2.0, 4.0]},
        shared | {"contestant": "twice", "seconds": [2.0, 4.0, 8.0]},
        shared | {"contestant": "failed", "error": "out of memory"},
        shared | {"length": 9, "contestant": "alone", "seconds": [5.0]},
    ]
    summarise(rows)
    assert (rows[1]["ratio"], rows[1]["ratio_p20"], rows[1]["ratio_p80"]) == (2, 2, 2)
    assert rows[1]["median"] == 4 and rows[1]["tokens_per_second"] == 3 / 4
    assert "ratio" not in rows[2]
    assert rows[3]["ratio"] == 1


def test_the_roofline_is_the_share_of_the_time_that_the_machine_needs():
    rows = [dict(median=4.0, flops=8e12, moved_bytes=1e12, dtype="float32"), dict(error="none", dtype="float32")]
    add_roofline(rows, {"float32": {"tflops": 4.0, "terabytes": 2.0}})
    assert rows[0]["roofline"] == 0.5
    assert (rows[0]["flops_per_second"], rows[0]["bytes_per_second"]) == (2e12, 0.25e12)
    assert "roofline" not in rows[1]


@pytest.mark.slow
@pytest.mark.parametrize("usage", [0.25])
def test_a_ham_in_one_head_holds_the_bytes_of_an_even_one(usage):
    one = case("mixers", "prefill", length=1024)
    held = {}
    for name, build in contestants(one, [usage], ["even", "one_head"]):
        if name.startswith("ham"):
            held[name] = prepare(build, one).facts["kv_bytes"]
    full = prepare(dict(contestants(one, [], []))["attention"], one).facts["kv_bytes"]
    assert list(held.values()) == pytest.approx([usage * full] * 2, rel=0.2)


def test_decoding_on_a_gpu_is_timed_as_one_graph_too(monkeypatch):
    """What would be captured runs here: a step on copies of the states, then the one that is replayed."""
    one = case(group="mixers", phase="decode", length=8)
    names = [name for name, _ in contestants(replace(one, device="cuda"), [0.25], ["even"])]
    assert names[::2] == [name for name, _ in contestants(one, [0.25], ["even"])]
    assert names[1::2] == [f"{name} (graph)" for name in names[::2]]
    runs = []
    for graph in (False, True):
        torch.manual_seed(0)
        runs.append(_mixers(one, "ham", 0.25, graph=graph))
    plain, graph = runs
    graph.step()
    assert graph.facts == plain.facts

    seen, stack = [], SimpleNamespace(mixers=[build_mixer("gdn", dim=8)])
    state = stack.mixers[0].reserve(stack.mixers[0].init_state(1), 1)
    for name in ("synchronize", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, lambda: SimpleNamespace(replay="replay"))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    assert _captured(stack, seen.append, [state]) == "replay"
    (copy,), (captured,) = seen
    assert captured is state and copy.held.recurrent.data_ptr() != state.held.recurrent.data_ptr()


def test_peak_memory_is_the_most_that_is_held_at_once():
    def step():
        for _ in range(3):
            x = torch.empty(1000, 250)  # 1 MB
            y = x + 1
            del x, y

    assert 2_000_000 <= peak_bytes(step, "cpu") < 2_001_000  # scalars take some bytes as well


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("--groups [mixer]", ["unknown group 'mixer'", "Did you mean 'mixers'?"]),
        ("--phases [trian]", ["unknown phase 'trian'", "Did you mean 'train'?"]),
        ("--dtypes [int8]", ["unknown dtype 'int8'"]),
        ("--skews [odd]", ["unknown skew 'odd'", "even"]),
        ("--groups [delta_rule] --phases [decode]", ["delta_rule", "decode"]),
        ("--batch 0", ["batch", "0"]),
        ("--lengths [0]", ["lengths", "0"]),
        ("--kv_usages [2.0]", ["kv_usages", "2.0"]),
        ("--lengths [many]", ["lengths", "many"]),
        ("--device tpu", ["unknown device 'tpu'", "cuda"]),
        ("--tokens -5", ["tokens", "-5"]),
        ("--only [nobody] --groups [delta_rule] --lengths [8]", ["unknown contestant 'nobody'", "sdpa"]),
    ],
)
def test_mistakes(run, here, flags, parts):
    error = run(f"bench --out runs/b {SMALL} {flags}")
    lines = error.err.strip().splitlines()
    assert error.code == 2 and lines[-1].startswith("error: "), error
    assert [part for part in parts if part not in lines[-1]] == []
    assert not (here / "runs").exists()


def test_table_and_plots_are_written_anew_and_say_what_the_memory_leaves_out(run, fake, tmp_path):
    fake({"a": lambda case: torch.zeros(3).sum})
    line = f"bench {SMALL} --groups [mixers] --phases [train] --lengths [64] --out {tmp_path}"
    assert run(line).code == 0
    table, figures = (tmp_path / "table.md").read_text(), (tmp_path / "results.json").read_bytes()
    assert "Weights, inputs and, in decoding, the cache" in table and "backward pass" in table
    for name in ("table.md", "mixers.png"):
        (tmp_path / name).unlink()
    assert run(f"bench --redraw {tmp_path}").code == 0
    assert (tmp_path / "table.md").read_text() == table and (tmp_path / "mixers.png").exists()
    assert (tmp_path / "results.json").read_bytes() == figures
    (tmp_path / "results.json").write_text('{"runs": []}')
    assert "holds no benchmark" in run(f"bench --redraw {tmp_path}").error


def test_a_mistake_is_found_before_anything_is_measured(run, fake, here):
    fake({"a": lambda case: pytest.fail("measured")})
    line = f"bench {SMALL} --groups [mixers] --lengths [8]"
    assert "unknown contestant 'b'; known: a" in run(f"{line} --only [a,b]").err
    (here / "file").touch()
    assert "file" in run(f"{line} --out file/folder").error
