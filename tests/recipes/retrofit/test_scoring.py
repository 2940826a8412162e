"""Scores of a model by one pass: the perplexity is the loss's, what counts as found is what it would generate."""

import math

import pytest
import torch
import transformers

from lit_modules.data.ruler_tasks import RulerSample, ruler_samples
from mixers.hf import byte_tokenizer
from mixers.registry import SpecError
from recipes.retrofit.scoring import generated_recall, perplexity, recall, windows


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config)
    for weight in model.parameters():
        weight.data *= 3  # so that it does not say the same all the time
    return model


def sample_of(prompt: list[int], *answers: list[int]) -> RulerSample:
    ids = [token for answer in answers for token in answer]
    return RulerSample("", ("x",) * len(answers), tuple(prompt), tuple(ids), tuple(map(len, answers)), 0)


@pytest.mark.parametrize("length", [8, 300])  # 300: more than is scored at a time
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_perplexity_is_that_of_the_models_own_loss(model, dtype, length):
    ids = torch.randint(256, (3, length), generator=torch.Generator().manual_seed(0))
    model.to(dtype).train()
    score = perplexity(model, ids, progress=False)
    assert model.training
    with torch.no_grad():
        losses = torch.stack([model.eval()(input_ids=row[None], labels=row[None]).loss for row in ids]).double()
    model.float()
    torch.testing.assert_close(score.per_sequence, losses, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=0)
    assert score.tokens == 3 * (length - 1)
    assert score.perplexity == pytest.approx(math.exp(score.per_sequence.mean()))


def test_the_mean_is_over_tokens(model):
    short, long = torch.arange(3), torch.arange(100)
    score = perplexity(model, [short, long], progress=False)
    assert score.nll == pytest.approx(float(score.per_sequence @ torch.tensor([2.0, 99.0]).double()) / 101)


def test_found_is_what_greedy_decoding_gives(model):
    prompts = torch.randint(256, (12, 20), generator=torch.Generator().manual_seed(1))
    plain = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    greedy = model.eval().generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=6, **plain)
    answers = greedy[:, 20:].tolist()
    for number, answer in enumerate(answers):
        if number % 3:
            answer[2 * (number % 3)] ^= 1  # wrong in the first part of two, or in the second
    samples = [sample_of(prompt.tolist(), a[:4], a[4:]) for prompt, a in zip(prompts, answers, strict=True)]
    score = recall(model, samples, progress=False)
    assert score.per_sample.tolist() == [number % 3 == 0 for number in range(12)]
    assert score.exact == pytest.approx(4 / 12)
    assert 4 / 12 + 4 / 24 <= score.answers < 1


def test_a_model_without_logits_to_keep(model):
    class Plain(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids, use_cache):
            return model(input_ids=input_ids, use_cache=use_cache)

    samples = [sample_of([1, 2, 3], [number]) for number in range(256)]
    mine, own = recall(Plain(), samples, progress=False), recall(model, samples, progress=False)
    assert mine.per_sample.equal(own.per_sample) and mine.per_sample.sum() == 1


def test_generated_text_is_searched_for_the_answers(model):
    tokenizer = byte_tokenizer()
    samples = ruler_samples("niah_single_1", tokenizer, count=2, length=600)
    assert generated_recall(model, tokenizer, samples, max_new_tokens=4, progress=False) == 0

    class Knows:
        device, training = torch.device("cpu"), False

        def eval(self): ...
        def train(self, mode): ...
        def generate(self, ids, **how):
            [sample] = [s for s in samples if list(s.prompt_ids) == ids[0].tolist()]
            told = f" it is{sample.answer}." if sample is samples[0] else " I do not know"
            return torch.cat([ids, torch.tensor([list(told.encode())])], 1)

    assert generated_recall(Knows(), tokenizer, samples, progress=False) == 0.5


def test_windows_do_not_overlap_and_lie_in_one_document():
    tokenizer = byte_tokenizer()
    texts = ["abcdefg", "xy", "0123456789"]
    assert [bytes(row).decode() for row in windows(texts, tokenizer, length=3).tolist()] == [
        *("abc", "def"),
        *("012", "345", "678"),
    ]
    assert [bytes(row).decode() for row in windows(texts, tokenizer, length=3, count=2).tolist()] == ["abc", "012"]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda model: windows(["abc"], byte_tokenizer(), length=4), "no text is as long as a window of 4 tokens.* 3"),
        (lambda model: windows(["abcd"], byte_tokenizer(), length=2, count=3), "make 2 windows of 2 tokens, not 3"),
        (lambda model: windows(["abcd"], byte_tokenizer(), length=1), "length 1 .* at least 2"),
        (lambda model: perplexity(model, torch.zeros(2, 1, dtype=torch.long)), "at least 2 tokens"),
        (lambda model: perplexity(model, []), "at least 2 tokens"),
        (lambda model: recall(model, []), "at least one sample"),
    ],
)
def test_mistakes_are_named(model, call, said):
    with pytest.raises(SpecError, match=said):
        call(model)
