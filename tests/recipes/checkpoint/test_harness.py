"""EleutherAI's harness on a checkpoint, with a task that local files define."""

import pytest
import torch
from lm_eval.api.instance import Instance
from torch.testing import assert_close

from lit_modules.generation import generate
from lit_modules.language_model import LanguageModel
from mixers import SpecError, set_kv_usage
from recipes.checkpoint.harness import LightningMixersLM


def request(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


@torch.no_grad()
@pytest.mark.parametrize("usage", [None, 0.0, 1.0])
def test_it_scores_as_the_model_does(checkpoint, usage):
    theirs = LightningMixersLM(str(checkpoint), kv_usage=usage, device="cpu")
    model = LanguageModel.load_from_checkpoint(checkpoint, weights_only=True).eval()
    if usage is not None:
        set_kv_usage(model, usage)
    context, continuation = "import", " os # \u00e9"
    ids = torch.tensor([list((context + continuation).encode())])
    log_p = model(ids).log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[len(context) - 1 :].sum()
    [(value, greedy)] = theirs.loglikelihood([request("loglikelihood", context, continuation)])
    assert_close(value, log_p.item(), rtol=1e-5, atol=1e-5)
    assert greedy is False
    whole = torch.tensor([list(f"\n{context}".encode())])
    log_p = model(whole).log_softmax(-1)[0, :-1].gather(1, whole[0, 1:, None]).sum()
    [value] = theirs.loglikelihood_rolling([request("loglikelihood_rolling", context)])
    assert_close(value, log_p.item(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_it_writes_as_the_model_does(checkpoint):
    """Prompts of two lengths in one batch."""
    theirs = LightningMixersLM(str(checkpoint), device="cpu", batch_size=2)
    model = LanguageModel.load_from_checkpoint(checkpoint, weights_only=True).eval()
    prompts = ["import os", "def f(x):\n    return"]
    options = {"max_gen_toks": 8, "until": ["never this"], "do_sample": False}
    written = theirs.generate_until([request("generate_until", prompt, options) for prompt in prompts])
    ragged = [torch.tensor([*prompt.encode()]) for prompt in prompts]
    alone = [generate(model.decoder, one[None], num_tokens=8, temperature=0)[0, len(one) :] for one in ragged]
    assert written == [bytes(tokens.tolist()).decode(errors="replace").replace("\0", "") for tokens in alone]


def test_the_command_line(run, checkpoint, brackets):
    result = run(
        f"lm_eval --model_args pretrained={checkpoint},kv_usage=0.1 --tasks brackets --include_path {brackets}"
        " --device cpu"
    )
    assert result.code == 0
    assert "lightning_mixers" in result.out and "brackets" in result.out and "0.5" in result.out
    error = run(f"lm_eval --model_args pretrained={checkpoint} --tasks no_such_task --device cpu").err
    assert error.strip().splitlines()[-1] == "error: lm_eval: Tasks not found: no_such_task"


def test_mistakes(tmp_path):
    with pytest.raises(SpecError, match="nowhere: no such checkpoint"):
        LightningMixersLM("nowhere")
    with pytest.raises(SpecError, match="kv_usage must be a number from 0 to 1, got 2"):
        LightningMixersLM("nowhere", kv_usage=2)
