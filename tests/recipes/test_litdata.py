"""Run by .ci/run apart, see tests/lit_modules/data/test_litdata_folder.py."""

import pytest
import torch

from tests.recipes.test_tokenizing import EVERY_STEP, TINY

pytest.importorskip("litdata", exc_type=ImportError, reason="not in the test extra")


def test_a_run_on_chunks_is_gone_on_with_by_another_number_of_workers(run, here, line_of):
    from tests.lit_modules.data.test_litdata_folder import write_chunks

    write_chunks(here / "chunks")
    words = line_of("tokens").split()
    tokenizer = " ".join(words[words.index("--data.tokenizer") :][:4])
    sizes = "--data.held_out 0.1 --data.validation_tokens 64 --steps 6"
    result = run(f"fit --data tokens --data.paths chunks {tokenizer} {TINY} {sizes} {EVERY_STEP}")
    assert result.code == 0, result.err
    result = run("fit --ckpt_path runs/ham-tokens-1/checkpoints/all-step=3.ckpt --data.num_workers 2")
    assert result.code == 0 and "resumes with num_workers 2 (was 0)" in result.out, result.err
    runs = (here / f"runs/ham-tokens-{number}/checkpoints/last.ckpt" for number in (1, 2))
    whole, resumed = (torch.load(path, weights_only=True)["state_dict"] for path in runs)
    learned = [name for name in whole if "threshold" not in name]  # fitted last, on what a new loader gives first
    assert learned and all(torch.equal(whole[name], resumed[name]) for name in learned)
