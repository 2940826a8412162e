"""Writing on from prompts: what the state gives is what reading everything again gives."""

import copy
from itertools import islice, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lit_modules import generation
from lit_modules.generation import Continuation, generate
from mixers import Decoder, SpecError, calibrate, set_kv_usage
from mixers.in_place import InPlaceState
from mixers.threshold import thresholds_of

VOCAB = 33
CALIBRATED = {"name": "ham", "num_heads": 2, "head_dim": 8}
MIXERS = {
    "ham": {"name": "ham", "num_heads": 2, "head_dim": 8, "threshold": {"name": "fixed", "tau": 0.05}},
    "ham recency": {"name": "ham", "num_heads": 2, "head_dim": 8, "router": {"name": "recency", "window": 4}},
    "ham cosine": CALIBRATED | {"router": "cosine"},
    "ham learned": CALIBRATED | {"router": {"name": "learned", "form": "error"}, "scope": "head"},
    "ham demand": CALIBRATED | {"router": "demand", "combine": "sum"},
    "linear_attention": {"name": "linear_attention", "num_heads": 2, "head_dim": 8},
    "delta_net": {"name": "delta_net", "num_heads": 2, "head_dim": 8},
    "gdn": {"name": "gdn", "num_heads": 2, "head_dim": 8},
    "attention": {"name": "attention", "num_heads": 2, "num_kv_heads": 1},
    "window": {"name": "attention", "num_heads": 2, "window": 3},
    "hybrid": [{"name": "gdn", "num_heads": 2, "head_dim": 8}, {"name": "attention", "num_heads": 2}],
}


@pytest.fixture(scope="module")
def decoders():
    made = {}
    for name, spec in MIXERS.items():
        torch.manual_seed(0)
        made[name] = Decoder(VOCAB, dim=16, depth=2, mixer=spec).double().eval()
        if any(threshold.follows_usage for threshold in thresholds_of(made[name])):
            calibrate(made[name], [torch.randint(VOCAB, (4, 100))])
    return made


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
@settings(max_examples=4)
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


@pytest.mark.parametrize("mixer", MIXERS)
@settings(max_examples=8)
@given(data=st.data())
@torch.no_grad()
def test_any_batch_of_padded_prompts_in_any_parts_gives_the_logits_of_each_alone(decoders, mixer, data):
    """At any usage; in float64 to 1e-9, in float32 to 1e-4. Pages hold 64 tokens: some prompts end on their edge."""
    lengths = data.draw(st.lists(st.sampled_from([1, 5, 63, 64, 65, 128, 130]), min_size=1, max_size=3))
    left, double = data.draw(st.booleans()), data.draw(st.booleans())
    decoder = copy.deepcopy(decoders[mixer]).to(torch.float64 if double else torch.float32)
    tolerance = 1e-9 if double else 1e-4
    if any(threshold.follows_usage for threshold in thresholds_of(decoder)):
        set_kv_usage(decoder, data.draw(st.sampled_from([0, 0.1, 0.5, 1])))
    most, prompts = max(lengths), prompts_of(lengths, seed=1)
    tokens, real = torch.zeros(len(lengths), most, dtype=torch.long), torch.zeros(len(lengths), most, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        place = slice(most - len(prompt), most) if left else slice(0, len(prompt))
        tokens[row, place], real[row, place] = prompt, True
    cuts = sorted({0, most, *data.draw(st.lists(st.integers(1, most), max_size=3))})
    state, logits = decoder.init_state(len(lengths)), []
    for start, stop in pairwise(cuts):
        out = decoder(tokens[:, start:stop], state=state, padding_mask=real[:, start:stop])
        state, logits = out.state, [*logits, decoder.logits(out.hidden)]
    together = torch.cat(logits, 1)
    for row, prompt in enumerate(prompts):
        alone = decoder.logits(decoder(prompt[None]).hidden)[0]
        assert_close(together[row, real[row]], alone, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mixer", MIXERS)
def test_in_states_of_fixed_capacity_the_same_is_written(decoders, mixer, monkeypatch):
    """Which are made anew when there is no room: here at the end of a page."""
    monkeypatch.setattr(generation, "RESERVED", 2)
    decoder, prompts = decoders[mixer], prompts_of([60, 33])
    if any(threshold.follows_usage for threshold in thresholds_of(decoder)):
        set_kv_usage(decoder, 0.5)
    plain, ours = (Continuation(decoder, prompts, temperature=0, in_place=wanted) for wanted in (False, True))
    for _ in range(9):
        assert torch.equal(next(plain), next(ours))
        assert not any(isinstance(state, InPlaceState) for state in plain.state)
    assert all(isinstance(state, InPlaceState) for state in ours.state)


def test_where_there_is_no_fixed_capacity_states_grow(decoders):
    prompts = prompts_of([9])
    bounded = Decoder(VOCAB, dim=16, depth=2, mixer=["gdn", MIXERS["ham"] | {"max_tokens": 4}]).double().eval()
    limited = dict(in_place=True, max_kv_bytes=10**6)
    for decoder, options in ((bounded, {"in_place": True}), (decoders["attention"], limited), (decoders["gdn"], {})):
        tokens = Continuation(decoder, prompts, temperature=0, **options)
        assert len([*islice(tokens, 3)]) == 3
        assert not any(isinstance(state, InPlaceState) for state in tokens.state)


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


def test_a_prompt_that_needs_more_memory_than_allowed(decoders):
    """Found while it is read, and later when the answer grows too long."""
    decoder, (prompt,) = decoders["attention"], prompts_of([300])
    held = Continuation(decoder, [prompt]).kv_cache_bytes
    with pytest.raises(SpecError, match=r"bytes after 200 tokens, more than max_kv_bytes .*; set a smaller kv_usage"):
        Continuation(decoder, [prompt], prefill=100, max_kv_bytes=held // 2)
    grows = Continuation(decoder, [prompt], max_kv_bytes=held)
    with pytest.raises(SpecError, match="more than max_kv_bytes"):
        [*islice(grows, 200)]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([torch.zeros(0, dtype=torch.long)], {}, "a prompt must have at least one token"),
        ([], {}, "a prompt must have at least one token"),
        (None, {"temperature": -1}, "temperature must be finite and at least 0, got -1"),
        (None, {"top_p": 0}, "top_p must be above 0 and at most 1, got 0"),
        (None, {"prefill": 0}, "prefill must be at least 1, got 0"),
        (None, {"max_kv_bytes": -1}, "max_kv_bytes must be at least 1, got -1"),
    ],
)
def test_mistakes(decoders, prompts, options, message):
    with pytest.raises(SpecError, match=message):
        Continuation(decoders["gdn"], prompts_of([3]) if prompts is None else prompts, **options)


def test_a_temperature_that_single_precision_takes_for_zero():
    torch.manual_seed(0)
    decoder = Decoder(11, dim=8, depth=1, mixer="gdn").eval()
    coldest = generate(decoder, torch.ones(2, 3).long(), num_tokens=5, temperature=1e-46)
    assert torch.equal(coldest, generate(decoder, torch.ones(2, 3).long(), num_tokens=5, temperature=0))
    for options, message in (({"temperature": float("nan")}, "finite"), ({"num_tokens": 0}, "num_tokens")):
        with pytest.raises(SpecError, match=message):
            generate(decoder, torch.ones(1, 3).long(), **{"num_tokens": 2} | options)
