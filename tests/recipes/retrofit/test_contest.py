"""The contest on a tiny model: all are held to the same bytes, each row is measured once, mistakes are one line."""

import json

import pytest
import torch
import transformers

from mixers.hf import byte_tokenizer
from mixers.registry import SpecError
from mixers.state import kv_cache_bytes, kv_stored_bytes, state_bytes
from recipes.retrofit.command import retrofit
from recipes.retrofit.contest import contest
from recipes.retrofit.contest_report import cells, paired, report, share_of_bytes, table
from recipes.retrofit.methods import METHODS, Contestant, Meter, bytes_of, sensitivity_of, share_to_ask

T, WINDOW, SINKS = 192, 8, 2


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A host, a test bed and a retrofit of it."""
    folder = tmp_path_factory.mktemp("contest")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "host")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    tokenizer.save_pretrained(folder / "host")
    for part in ("prose", "code"):
        for split in ("fit", "test"):
            (folder / "bed" / part / split).mkdir(parents=True)
            text = " ".join(f"{part} {split} {number * number}" for number in range(200))
            (folder / "bed" / part / split / "one.txt").write_text(text)
    text = [str(folder / "bed" / part / "fit") for part in ("prose", "code")]
    small = dict(seq_len=T, sequences=4, window=WINDOW, sinks=SINKS)
    retrofit(str(folder / "host"), text, str(folder / "retrofit"), **small)
    return folder


def ids_of(count: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(256, (count, length), generator=torch.Generator().manual_seed(seed))


def run(made, out, **options):
    small = dict(seq_len=T, windows=2, code_windows=1, samples=1, calibration=2, window=WINDOW, sinks=SINKS)
    small |= dict(usages=[0.5], tasks=["prose", "code"], methods=["host", "ham", "random"], lengths=[480])
    retrofits = options.pop("retrofits", [str(made / "retrofit")])
    contest(str(made / "host"), str(made / "bed"), retrofits, str(out), **small | options)
    return json.loads((out / "results.json").read_text())


@pytest.mark.parametrize("name", [name for name in METHODS if name != "oracle"])
def test_bytes_are_those_of_a_real_cache(made, name):
    one = Contestant(name, str(made / "host"), str(made / "retrofit"), seed=0, window=WINDOW, sinks=SINKS)
    one.hold(0.5, T, length=T, rows=ids_of(2, T, 0), tables={}, of="")
    ids = ids_of(1, T, 1)
    with torch.no_grad(), Meter(one) as meter:
        cache = one.model(input_ids=ids, use_cache=True).past_key_values
    if name == "host":
        held = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
        assert meter.kept == meter.pages == [held] and one.state_bytes == 0
        return
    states = [layer.state for layer in cache.layers]
    assert meter.pages == [kv_cache_bytes(states)]
    assert one.state_bytes == state_bytes(states)
    near = kv_stored_bytes(states)  # the next token will not see the oldest of the window
    assert 0 <= meter.kept[0] - near <= 4 * one.bytes_per_token
    assert one.bytes_per_token == bytes_of(transformers.AutoModelForCausalLM.from_pretrained(made / "host"))


@pytest.mark.parametrize("tokens", [T, T // 2, 2 * T])
@pytest.mark.parametrize("name", ["ham", "demand", "recency", "random"])
def test_all_hold_what_they_are_asked(made, name, tokens):
    """Random ids are alike everywhere, so that thresholds calibrated on some fit others."""
    one = Contestant(name, str(made / "host"), str(made / "retrofit"), seed=0, window=WINDOW, sinks=SINKS)
    one.hold(0.5, tokens, length=T, rows=ids_of(4, T, 0), tables={}, of="")
    with torch.no_grad(), Meter(one) as meter:
        for row in ids_of(3, tokens, 1):
            one.model(input_ids=row[None], use_cache=False)
    total = sum(meter.kept) / 3 + one.state_bytes
    assert total / (one.bytes_per_token * tokens) == pytest.approx(0.5, abs=0.07)


def test_the_memorys_bytes_are_given_to_the_cache(made):
    ham, demand = (
        Contestant(name, str(made / "host"), str(made / "retrofit"), seed=0, window=WINDOW, sinks=SINKS)
        for name in ("ham", "demand")
    )
    assert ham.state_bytes > demand.state_bytes + 2 * 2 * 8 * 8 * 4 - 1  # layers, heads, K, V, float32
    assert not any(part.adds_memory for part in demand.parts.values())


@pytest.mark.parametrize("share, tokens, expected", [(0.25, 100, 0.2), (0.5, 200, (10 + 85 / 190 * 90) / 100)])
def test_the_share_to_ask(share, tokens, expected):
    """Of what a threshold decides on, the same part at every length."""
    assert share_to_ask(share, tokens, length=100, always=10, state=5) == pytest.approx(expected)


def test_a_share_that_window_and_sinks_exceed_is_refused():
    with pytest.raises(SpecError, match="alone exceed 0.1 of 100"):
        share_to_ask(0.1, 100, length=100, always=10, state=1)


def test_the_oracle_scores_by_what_comes(made):
    rows = ids_of(2, T, 0)
    one = Contestant(
        "oracle", str(made / "host"), None, seed=0, window=WINDOW, sinks=SINKS, metrics=sensitivity_of(rows)
    )
    one.hold(0.5, T, length=T, rows=rows, tables={}, of="")
    early = []
    for ids in (rows[0], torch.cat([rows[0, : T // 2], rows[1, T // 2 :]])):
        with torch.no_grad():
            one.model(input_ids=ids[None], use_cache=False)
        early.append(next(iter(one.parts.values())).routing.scores[:, : T // 4])
    assert early[0].isfinite().all() and not early[0].equal(early[1])


def test_a_contest_goes_on_where_it_was(made, tmp_path, monkeypatch):
    whole = run(made, tmp_path / "whole")
    assert [(row["method"], row["task"]) for row in whole["rows"]] == [
        (method, task) for method in ("host", "ham", "random") for task in ("prose", "code")
    ]
    assert all(len(row["per_sequence"]) == (2 if row["task"] == "prose" else 1) for row in whole["rows"])
    seen = []
    measure = "recipes.retrofit.contest.perplexity"
    from recipes.retrofit.scoring import perplexity

    def stopping(model, rows):
        seen.append(1)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return perplexity(model, rows, progress=False)

    monkeypatch.setattr(measure, stopping)
    with pytest.raises(KeyboardInterrupt):
        run(made, tmp_path / "parts")
    assert len(json.loads((tmp_path / "parts/results.json").read_text())["rows"]) == 3
    parts = run(made, tmp_path / "parts")
    assert len(seen) == 4 + 3  # three rows, one that was broken off, the three that were left
    assert [row["value"] for row in parts["rows"]] == [row["value"] for row in whole["rows"]]
    run(made, tmp_path / "parts")
    assert len(seen) == 7
    assert (tmp_path / "parts/plot.png").stat().st_size and "ham" in (tmp_path / "parts/table.md").read_text()


def test_rows_of_a_retrofit_that_was_replaced_are_measured_anew(made, tmp_path, capsys):
    before = run(made, tmp_path)["rows"]
    record = made / "retrofit/retrofit.json"
    text = record.read_text()
    try:
        record.write_text(text + " ")
        after = run(made, tmp_path)["rows"]
    finally:
        record.write_text(text)
    assert "2 rows" in capsys.readouterr().err
    assert len(after) == len(before)
    assert {row["of"] for row in after if row["method"] == "ham"} != {r["of"] for r in before if r["method"] == "ham"}


def test_recall_is_measured_and_what_cannot_be_held_says_so(made, tmp_path):
    options = dict(tasks=["single"], usages=[0.01, 0.5], methods=["ham", "oracle", "recency"])
    rows = run(made, tmp_path, **options)["rows"]
    assert all(row["method"] != "oracle" for row in rows)  # it reads the answers
    by = {(row["method"], row["usage"]): row for row in rows}
    assert by["ham", 0.5]["per_sample"] in ([0], [1]) and by["ham", 0.5]["length"] == 480
    assert by["ham", 0.01]["value"] is None and "alone exceed" in by["ham", 0.01]["left_out"]
    assert share_of_bytes(by["recency", 0.5]) == pytest.approx(0.5, abs=0.01)


def test_mistakes_are_one_line(made, tmp_path):
    for options, message in (
        ({"retrofits": [str(made / "host")]}, "host is no retrofit"),
        ({"methods": ["hamm"]}, "unknown method 'hamm'"),
        ({"tasks": ["single_1"]}, "unknown task"),
        ({"seeds": [1]}, r"no retrofit is named for seed 1 of ham: there are \[0\]"),
    ):
        with pytest.raises(SpecError, match=message) as error:
            run(made, tmp_path / "out", **options)
        assert "\n" not in str(error.value)
    (tmp_path / "prose/fit").mkdir(parents=True)
    with pytest.raises(SpecError, match="is incomplete"):
        contest(str(made / "host"), str(tmp_path), [str(made / "retrofit")], str(tmp_path / "out"))
    run(made, tmp_path / "out", methods=["host"])
    with pytest.raises(SpecError, match="is of another contest .windows=2."):
        run(made, tmp_path / "out", windows=1)


def test_tables_and_picture(tmp_path, capsys):
    """Two seeds; a method that lacks a task of the others has no mean over tasks."""
    rows = []
    for seed in (0, 1):
        for method, usage, value in (("host", 1.0, 10.0), ("ham", 0.25, 11.0), ("random", 0.25, 11.0 + seed)):
            for task in ("prose", "code", "single", "multikey"):
                if (method, task) == ("random", "multikey"):
                    continue
                size = {"bytes_cache": usage * 100, "bytes_state": 0, "bytes_host": 100}
                rows.append({"method": method, "usage": usage, "seed": seed, "task": task, "length": 8,
                             "value": value if task in ("prose", "code") else value / 20} | size)  # fmt: skip
    assert cells(rows, ("prose",))["random", 0.25] == {0: 11.0, 1: 12.0}
    assert ("random", 0.25) not in cells(rows, ("single", "multikey"))
    assert "11.50 [11, 12] (1.150)" in table(rows)
    assert "+0.500 (1 of 2, 1 even)" in paired(rows)
    report(rows, {"host": "tiny", "text": {}}, tmp_path)
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert "| ham" in capsys.readouterr().out


def test_prompts_get_thresholds_of_their_own(made, tmp_path):
    """Prompts are another kind of text: bytes are equal on them only with thresholds that have seen such."""
    off = {}
    for thresholds in ("task", "text"):
        options = dict(tasks=["single"], methods=["key_norm"], thresholds=thresholds, samples=2, calibration=4)
        [row] = run(made, tmp_path / thresholds, **options)["rows"]
        off[thresholds] = abs(share_of_bytes(row) - 0.5)
    assert off["task"] < min(0.05, off["text"]), off
    with pytest.raises(SpecError, match="thresholds=text"):
        run(made, tmp_path / "text", tasks=["single"], methods=["key_norm"], samples=2, calibration=4)
