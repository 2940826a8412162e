"""Contestants of a comparison see the same data, also data that others wrote; nothing that was asked for is ignored."""

import json
import sys

import pytest
import yaml

from recipes.compare import command as module
from recipes.compare.run import train
from recipes.compare.sources import written_by_others

SHUFFLED = """
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader


class Shuffled(pl.LightningDataModule):
    metric, vocab_size, seen = "accuracy", 7, []
    defaults = {"model": {"dim": 8, "depth": 1}, "mixer": {"num_heads": 2, "head_dim": 4}, "steps": 9}

    def setup(self, stage):
        self.first = int(torch.randint(7, ()))

    def train_dataloader(self, note=True):
        tokens = (torch.arange(8) + torch.arange(8)[:, None] + self.first) % 7
        rows = [{"tokens": row, "targets": row.roll(-1)} for row in tokens]
        collate = self.noted if note else torch.utils.data.default_collate
        return DataLoader(rows, shuffle=True, batch_size=2, collate_fn=collate)

    def noted(self, rows):
        Shuffled.seen.append([row["tokens"][0].item() for row in rows])
        return torch.utils.data.default_collate(rows)

    def test_dataloader(self):
        return self.train_dataloader(note=False)


class WithoutTest(pl.LightningDataModule):
    metric, vocab_size = "accuracy", 7
    train_dataloader = Shuffled.train_dataloader
"""
RUN = "--steps 2 --seeds 1 --jobs 1 --out out"


@pytest.fixture
def shuffled(here, monkeypatch):
    (here / "shuffled_tasks.py").write_text(SHUFFLED)
    monkeypatch.syspath_prepend(here)
    monkeypatch.setattr(module, "train_all", lambda runs, jobs, unfinished: (train(run, unfinished) for run in runs))
    yield
    sys.modules.pop("shuffled_tasks", None)


def test_data_that_draw_for_themselves_are_the_same_for_all(run, here, shuffled):
    """Over epochs, in setup and in a loader, whatever random numbers a mixer takes for its weights or in training."""
    cells = [{"mixer": "gdn"}, {"mixer": "attention"}, {"mixer": "ham", "router": {"name": "learned", "dither": 1.0}}]
    (here / "cells.yaml").write_text(yaml.safe_dump({"contestants": cells}))
    flags = "--contestants cells.yaml --steps 9 --seeds 1 --jobs 1 --out out"
    result = run(f"compare --data shuffled_tasks.Shuffled {flags}")
    assert result.code == 0, result.err
    from shuffled_tasks import Shuffled

    first, *others = (Shuffled.seen[i : i + 9] for i in (0, 9, 18))  # more follow, that HAM's threshold is fitted on
    assert len(first) == 9 and others == [first, first]
    assert first[:4] != first[4:8]  # each epoch is drawn anew


def test_a_run_is_trained_again_when_what_it_was_made_of_has_changed(run, shuffled, here):
    line = f"compare --data shuffled_tasks.Shuffled --mixers [gdn] {RUN}"
    assert run(line).code == 0
    assert "1 of 1 runs are there already, in out/runs.jsonl" in run(line).out
    (here / "shuffled_tasks.py").write_text((here / "shuffled_tasks.py").read_text() + "\n# changed\n")
    assert "are there already" not in run(line).out
    rows = [json.loads(row) for row in (here / "out/runs.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all([*row["sources"]] == ["shuffled_tasks.Shuffled"] for row in rows)


def test_what_a_run_is_made_of(here):
    cell = {"mixer": [{"name": "ham"}, {"name": "gdn"}], "options": {"router": "cosine"}}
    text = {"data": "text", "data_options": {"paths": ["a"]}}
    assert written_by_others([cell], {"data": "mqar", "data_options": {}}) == {}
    assert written_by_others([cell], text) == {}  # there is no such text, which training says
    (here / "a").mkdir()
    (here / "a/b.txt").write_text("one")
    one = written_by_others([cell], text)["sources"]
    (here / "a/b.txt").write_text("two")
    two = written_by_others([cell], text)["sources"]
    assert [*one] == [*two] == ["a"] and one != two
    tokens = {"data": "tokens", "data_options": {"tokenizer": str(here / "own.json")}}
    (here / "own.json").write_text("{}")
    assert [*written_by_others([cell], tokens)["sources"]] == [str(here / "own.json")]
    idea = {"mixer": "benchmarks.ideas.aged.Aged", "options": {"router": "benchmarks.ideas.correction.Correction"}}
    found = written_by_others([idea, cell], {"data": "mqar", "data_options": {}})["sources"]
    assert [*found] == ["benchmarks.ideas.aged.Aged", "benchmarks.ideas.correction.Correction"]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("--contestants more.yaml", ["more.yaml", "steps beside them", "flags of compare"]),
        ("--contestants plain.yaml --mixers [gdn]", ["--mixers or --contestants, not both"]),
        ("--contestants plain.yaml --routers [cosine]", ["--routers goes with --mixers"]),
        ("--kv_usages [0.5]", ["--kv_usages goes with --mixers"]),
        ("--mixers [gdn,attention] --routers [cosine]", ["none of these mixers has a router: gdn, attention"]),
        ("--mixers [gdn] --kv_usages [0.5]", ["--kv_usages", "none of these mixers has a kv_usage: gdn"]),
        ("--mixers [gdn] --match_to attention", ["--match_to goes with --match"]),
        ("--data shuffled_tasks.WithoutTest --mixers [gdn]", ["WithoutTest has no test_dataloader"]),
        ("--data shuffled_tasks.Shuffled --mixers [gdn] --learning_rates [0.1]", ["Shuffled has no val_dataloader"]),
    ],
)  # fmt: skip
def test_nothing_is_ignored(run, here, shuffled, line, parts):
    (here / "plain.yaml").write_text("contestants: [{mixer: gdn}]")
    (here / "more.yaml").write_text(yaml.safe_dump({"contestants": [{"mixer": "gdn"}], "steps": 2}))
    error = run(f"compare {RUN} {line}").error
    assert [part for part in parts if part not in error] == []
    assert not (here / "out").exists()


def test_quick_takes_the_seeds_that_are_given(run, monkeypatch, here):
    asked = []
    monkeypatch.setattr(module, "train_all", lambda runs, jobs, unfinished: asked.append(len(runs)) or [])
    monkeypatch.setattr("recipes.compare.report.report", lambda *args: None)
    for seeds in ("", "--seeds 5", "--seeds 3"):
        run(f"compare --quick {seeds} --mixers [gdn] --out out")
    assert asked == [2, 5, 3]
