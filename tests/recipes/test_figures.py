"""The picture of what a checkpoint keeps, and the figures beside it."""

import json

import pytest


def test_the_picture_and_its_figures(run, checkpoint, tmp_path):
    out = tmp_path / "deep/ham.png"
    result = run(f"figures --ckpt_path {checkpoint} --tokens 60 --kv_usages [0.0,0.5,1.0] --out {out}")
    assert result.code == 0 and "of all keys and values kept" in result.out
    assert out.stat().st_size > 5000
    figures = json.loads(out.with_suffix(".json").read_text())
    assert len(figures["kept_per_token"]) == 60
    assert figures["kv_usage"] == pytest.approx(sum(figures["kept_per_token"]) / 60)
    kept = figures["kept_at_the_end"]
    assert kept["0.0"] == 0 < kept["0.5"] < kept["1.0"] == 60
    assert figures["model"]["mixer"] and figures["schema_version"]


def test_a_file_that_is_not_there(run, checkpoint, here):
    assert "nowhere.ckpt" in run("figures --ckpt_path nowhere.ckpt").error
    assert "nowhere.txt" in run(f"figures --ckpt_path {checkpoint} --text nowhere.txt").error
    assert not list(here.iterdir())
