"""`calibrate` refits thresholds and nothing else."""

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


def test_what_is_no_text_is_no_default(run, here):
    sizes = "--data.seq_len 512 --data.num_validation 2 --data.num_test 2 --data.batch_size 2"
    fitted = run(f"fit --data ruler --mixer ham --dim 16 --depth 1 --steps 1 {sizes}")
    assert fitted.code == 0, fitted.err
    assert "which is no text: give --text" in run("calibrate --ckpt_path last").error
