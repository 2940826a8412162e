"""Every precision of the trainer, from fit to sample, and what can be done with the checkpoint."""

import pytest
import torch

DTYPES = {"bf16-true": torch.bfloat16, "64-true": torch.float64}


@pytest.mark.parametrize(
    "precision",
    ["bf16-mixed", "bf16-true", *(pytest.param(p, marks=pytest.mark.slow) for p in ("16-mixed", "64-true"))],
)
def test_fits_from_the_first_step_to_the_sample(run, here, tiny, precision):
    result = run(f"fit {tiny} --trainer.precision {precision}")
    assert result.code == 0, result.err
    assert "sample" in result.out and "validation after 6 steps" in result.out
    saved = torch.load("runs/ham-text-1/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    weights = [x for name, x in saved.items() if name.endswith("weight")]
    assert {x.dtype for x in weights} == {DTYPES.get(precision, torch.float32)}
    assert saved["decoder.blocks.0.mixer.threshold.table"].dtype == torch.float32
    result = run("generate --prompt a --max_new_tokens 4")
    assert result.code == 0, result.err


def test_a_precision_that_cannot_train_is_refused(run, here, tiny):
    assert "16-true cannot train" in run(f"fit {tiny} --trainer.precision 16-true").error
    assert not [*here.glob("runs/*")]
