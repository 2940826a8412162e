"""Checkpoints along the dial."""

import json


def test_a_checkpoint_is_tested_at_every_usage(run, checkpoint, tmp_path):
    result = run(f"sweep --ckpt_paths [{checkpoint}] --kv_usages [0,0.5,1] --out {tmp_path}")
    assert result.code == 0 and "bits_per_byte when tested at" in result.out
    (row,) = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [point["asked"] for point in row["curve"]] == [0, 0.5, 1]
    assert row["curve"][0]["kv_usage"] == 0 < row["curve"][1]["kv_usage"] < row["curve"][2]["kv_usage"] == 1
    assert row["bits_per_byte"] > 0 and row["options"] == {"budget": "fixed"}
    assert (tmp_path / "curve.png").stat().st_size > 5000


def test_the_cache_of_a_long_text_is_weighed(run, checkpoint, tmp_path):
    result = run(f"sweep --ckpt_paths [{checkpoint}] --kv_usages [0,0.5,1] --long 256 --out {tmp_path}")
    assert result.code == 0 and "cache after 256 tokens" in result.out
    (row,) = json.loads((tmp_path / "results.json").read_text())["runs"]
    none, half, full = (point["of_attention"] for point in row["curve"])
    assert none == 0 and full == 1 and 0.3 < half < 0.8  # 256 tokens fill whole pages
    error = run(f"sweep --ckpt_paths [{checkpoint}] --long 1000000000 --out {tmp_path / 'no'}").error
    assert "less than the 1,000,000,000 asked for" in error and not (tmp_path / "no").exists()


def test_mistakes(run, checkpoint, here):
    assert "kv_usage must be a number from 0 to 1" in run(f"sweep --ckpt_paths [{checkpoint}] --kv_usages [2]").error
    assert "long must be a number of tokens" in run(f"sweep --ckpt_paths [{checkpoint}] --long -1").error
    assert "no run runs/* has a last checkpoint" in run("sweep").error
    assert not list(here.iterdir())
