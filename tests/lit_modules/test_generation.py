"""Writing on from prompts: what the state gives is what reading everything again gives."""

from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from lit_modules.generation import Continuation, generate
from mixers import Decoder, SpecError, set_kv_usage

VOCAB = 33
MIXERS = {
    "ham": {"name": "ham", "num_heads": 2, "head_dim": 8, "threshold": {"name": "fixed", "tau": 0.05}},
    "ham recency": {"name": "ham", "num_heads": 2, "head_dim": 8, "router": {"name": "recency", "window": 4}},
    "gdn": {"name": "gdn", "num_heads": 2, "head_dim": 8},
    "attention": {"name": "attention", "num_heads": 2, "num_kv_heads": 1},
    "window": {"name": "attention", "num_heads": 2, "window": 3},
    "hybrid": [{"name": "gdn", "num_heads": 2, "head_dim": 8}, {"name": "attention", "num_heads": 2}],
}


@pytest.fixture(scope="module")
def decoders():
    torch.manual_seed(0)
    return {name: Decoder(VOCAB, dim=16, depth=2, mixer=spec).double().eval() for name, spec in MIXERS.items()}


def prompts_of(lengths, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (length,), generator=draw) for length in lengths]


@torch.no_grad()
def by_reading_again(decoder, prompt, num_tokens):
    tokens = prompt
    for _ in range(num_tokens):
        answer = decoder.logits(decoder(tokens[None]).hidden)[0, -1].argmax()
        tokens = torch.cat([tokens, answer[None]])
    return tokens


@pytest.mark.parametrize("mixer", MIXERS)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=3),
    prefill=st.sampled_from([1, 7, 64, 2048]),
    seed=st.integers(0, 100),
)
def test_ragged_prompts_read_in_parts_are_as_each_alone_read_again_and_again(decoders, mixer, lengths, prefill, seed):
    """Prompts across the ends of pages, too."""
    prompts = prompts_of(lengths, seed)
    written = generate(decoders[mixer], prompts, num_tokens=4, temperature=0, prefill=prefill)
    for prompt, tokens in zip(prompts, written, strict=True):
        assert torch.equal(tokens, by_reading_again(decoders[mixer], prompt, 4))


@pytest.mark.parametrize("mixer", MIXERS)
def test_logits_are_those_of_the_full_forward(decoders, mixer):
    decoder = decoders[mixer]
    tokens = torch.stack(prompts_of([70, 70]))
    with torch.no_grad():
        whole = decoder.logits(decoder(tokens).hidden)
        out = decoder(tokens[:, :60], state=decoder.init_state(2))
        for t in range(60, 70):
            assert_close(decoder.logits(out.hidden[:, -1]), whole[:, t - 1], rtol=1e-9, atol=1e-9)
            out = decoder(tokens[:, t : t + 1], state=out.state)


def test_prompts_of_one_length_come_back_as_one_tensor(decoders):
    prompts = torch.stack(prompts_of([5, 5]))
    tokens = generate(decoders["ham"], prompts, num_tokens=3)
    assert tokens.shape == (2, 8) and torch.equal(tokens[:, :5], prompts)


def test_draws_follow_the_seed_and_the_likeliest_tokens_alone_are_drawn(decoders):
    prompts = torch.stack(prompts_of([5, 5]))
    options = dict(num_tokens=20, temperature=2.0)
    first, again, other = (generate(decoders["gdn"], prompts, seed=s, **options) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    greedy = generate(decoders["gdn"], prompts, num_tokens=20, temperature=0)
    assert torch.equal(generate(decoders["gdn"], prompts, top_p=1e-9, **options), greedy)


def test_top_p_draws_among_the_likeliest(decoders):
    continuation = Continuation(decoders["gdn"], prompts_of([3]), temperature=1.0, top_p=0.7)
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(2000, 4)
    drawn = continuation._draw(logits)
    assert set(drawn.tolist()) == {0, 1}
    assert (drawn == 0).float().mean().item() == pytest.approx(0.5 / 0.8, abs=0.04)


def test_it_says_how_far_the_prompt_is_read_and_what_is_held(decoders):
    calls = []
    prompts = prompts_of([10, 4])
    decoder = decoders["ham"]
    set_kv_usage(decoder, 1)
    full = Continuation(decoder, prompts, prefill=6, progress=lambda *call: calls.append(call))
    assert calls == [(10, 14), (14, 14)]
    before = full.kv_cache_bytes
    assert [*islice(full, 100)] and full.kv_cache_bytes > before > 0 and full.state_bytes > 0
    set_kv_usage(decoder, 0)
    assert Continuation(decoder, prompts).kv_cache_bytes == 0


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([torch.zeros(0, dtype=torch.long)], {}, "a prompt must have at least one token"),
        ([], {}, "a prompt must have at least one token"),
        (None, {"temperature": -1}, "temperature must be at least 0, got -1"),
        (None, {"top_p": 0}, "top_p must be above 0 and at most 1, got 0"),
        (None, {"prefill": 0}, "prefill must be at least 1, got 0"),
    ],
)
def test_mistakes(decoders, prompts, options, message):
    with pytest.raises(SpecError, match=message):
        Continuation(decoders["gdn"], prompts_of([3]) if prompts is None else prompts, **options)
