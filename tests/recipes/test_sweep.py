"""Checkpoints along the dial."""

import json

import pytest


@pytest.fixture
def checkpoint(trained):
    return trained / "runs/ham-text-1/checkpoints/last.ckpt"


def test_a_checkpoint_is_tested_at_every_usage(run, checkpoint, tmp_path):
    result = run(f"sweep --ckpt_paths [{checkpoint}] --kv_usages [0,0.5,1] --out {tmp_path}")
    assert result.code == 0 and "bits_per_byte when tested at" in result.out
    (row,) = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [point["asked"] for point in row["curve"]] == [0, 0.5, 1]
    assert row["curve"][0]["kv_usage"] == 0 < row["curve"][1]["kv_usage"] < row["curve"][2]["kv_usage"] == 1
    assert row["bits_per_byte"] > 0 and row["options"] == {"budget": "fixed"}
    assert (tmp_path / "curve.png").stat().st_size > 5000


def test_mistakes(run, checkpoint, here):
    assert "kv_usage must be a number from 0 to 1" in run(f"sweep --ckpt_paths [{checkpoint}] --kv_usages [2]").error
    assert "no run runs/* has a last checkpoint" in run("sweep").error
    assert not list(here.iterdir())
