"""`calibrate` refits thresholds and nothing else."""

import json

import torch

from mixers.threshold import thresholds_of
from recipes.checkpoint.opening import open_checkpoint


def test_thresholds_move_and_weights_stay(run, checkpoint, texts, tmp_path):
    """With --allocate: `test_export`."""
    out = tmp_path / "again.ckpt"
    result = run(f"calibrate --ckpt_path {checkpoint} --text [{texts}] --batches 2 --kv_usage 0.5 --out {out}")
    assert result.code == 0, result.err
    assert f"for 0.5; written to {out}" in result.out and "allocated" not in result.out
    before, after = (open_checkpoint(str(path)).language_model(of_bytes=True) for path in (checkpoint, out))
    assert [threshold.kv_usage for threshold in thresholds_of(after)] == [0.5]
    for (name, one), (_, other) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    tables = [next(thresholds_of(model)).table for model in (before, after)]
    assert not torch.equal(*tables)


def test_layers_keep_usages_of_their_own(run, here, texts):
    sizes = "--dim 16 --steps 2 --seq_len 48 --batch_tokens 192 --data.validation_tokens 192 --data.test_tokens 192"
    mixer = [{"name": "ham", "num_heads": 1, "head_dim": 16, "kv_usage": usage} for usage in (0.1, 0.6)]
    fitted = run(f"fit --data {texts} --mixer {json.dumps(mixer, separators=(',', ':'))} --depth 2 {sizes}")
    assert fitted.code == 0, fitted.err
    result = run("calibrate --ckpt_path last --batches 2 --out again.ckpt")
    assert result.code == 0, result.err
    assert "pieces of at most 48 tokens" in result.out and "for 0.1 and 0.6; written" in result.out
    assert [threshold.kv_usage for threshold in thresholds_of(open_checkpoint("again.ckpt").load())] == [0.1, 0.6]
    assert run("test --ckpt_path again.ckpt").code == 0
    assert run("sweep --ckpt_paths [again.ckpt] --kv_usages [0.9] --out swept").code == 0  # a path without a folder
    (swept,) = json.loads((here / "swept/results.json").read_text())["runs"]
    assert 0.1 < swept["kv_usage"] < 0.6 < swept["curve"][0]["kv_usage"]


def test_a_fixed_threshold_is_not_calibrated(run, here, tiny):
    assert run(f"fit {tiny} --model.mixer.threshold fixed").code == 0
    assert "the model has no KV threshold to calibrate" in run("calibrate --ckpt_path last").error
    assert "a fixed threshold has no KV usage to set, got 0.1" in run("export --kv_usage 0.1 --out exported").error
    assert not [*here.rglob("*calibrated*")]


def test_what_is_no_text_is_no_default(run, here):
    sizes = "--data.seq_len 512 --data.num_validation 2 --data.num_test 2 --data.batch_size 2"
    fitted = run(f"fit --data ruler --mixer ham --dim 16 --depth 1 --steps 1 {sizes}")
    assert fitted.code == 0, fitted.err
    assert "which is no text: give --text" in run("calibrate --ckpt_path last").error
    # Its batches name their parts, which are no tensors.
    drawn = run("figures --ckpt_path last --what scores --sequences 2 --out scores.png")
    assert drawn.code == 0, drawn.err
