"""The picture of what a checkpoint keeps, and the figures beside it."""

import json

import pytest

from mixers.registry import SpecError
from recipes.figures.facts import FACTS, SEQUENCES, draw_facts


def test_the_picture_and_its_figures(run, checkpoint, tmp_path):
    out = tmp_path / "deep/ham.png"
    result = run(f"figures --ckpt_path {checkpoint} --tokens 60 --kv_usages [0.0,0.5,1.0] --out {out}")
    assert result.code == 0 and "kept of all keys and values: textwrap.py" in result.out
    assert out.stat().st_size > 5000
    figures = json.loads(out.with_suffix(".json").read_text())
    assert len(figures["kept_per_token"]) == 60
    assert figures["kv_usage"] == pytest.approx(sum(figures["kept_per_token"]) / 60)
    kept = figures["kept_at_the_end"]
    assert kept["0.0"] == 0 < kept["0.5"] < kept["1.0"] == 60
    assert figures["model"]["mixer"] and figures["schema_version"] and figures["backends"]["delta_rule"]


def test_without_a_name_the_picture_goes_among_the_runs(run, checkpoint, here):
    result = run(f"figures --ckpt_path {checkpoint} --tokens 20")
    assert result.code == 0 and "runs/figures/ham-text-1.png" in result.out
    assert sorted(str(path.relative_to(here)) for path in here.rglob("*.*")) == [
        "runs/figures/ham-text-1.json",
        "runs/figures/ham-text-1.png",
    ]


def test_of_recall_the_picture_is_of_facts(run, recall, tmp_path, monkeypatch):
    monkeypatch.chdir(recall)
    assert run(f"figures --out {tmp_path}/facts.png").code == 0  # of the newest run
    assert (tmp_path / "facts.png").stat().st_size > 5000
    shown = json.loads((tmp_path / "facts.json").read_text())
    assert set(shown["kept"].values()) == {1.0} and shown["kept_along"][-1] == 5 * 16
    assert "are for models that read bytes" in run(f"figures --ckpt_path last --text {tmp_path}/facts.json").error


def test_facts_are_told_again_in_another_order_and_then_changed():
    told, again, new, third, changed = draw_facts(num_keys=20, num_values=9).unbind(1)
    assert told.shape == (SEQUENCES, FACTS, 2) and told[..., 0].max() <= 20 < told[..., 1].min()
    for i in range(0, SEQUENCES, 50):
        first = {tuple(fact) for fact in told[i].tolist()}
        assert len(first) == FACTS
        assert {tuple(fact) for fact in again[i].tolist()} == {tuple(fact) for fact in third[i].tolist()} == first
        assert not {fact[0] for fact in new[i].tolist()} & {fact[0] for fact in first}
    assert (changed[..., 0] == told[..., 0]).all() and not (changed == told).all() and not (again == told).all()
    with pytest.raises(SpecError, match="needs 16 keys, and the model was trained on 15"):
        draw_facts(num_keys=15, num_values=9)


def test_a_file_that_is_not_there(run, checkpoint, here):
    assert "nowhere.ckpt" in run("figures --ckpt_path nowhere.ckpt").error
    assert "nowhere.txt" in run(f"figures --ckpt_path {checkpoint} --text nowhere.txt").error
    assert not list(here.iterdir())
