"""What every mixer keeps to: one that is registered is tested by being registered."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.mixers.cases import TOLERANCE, assert_same, bounds_of, every_case, made, make, tensors_of, tokens

seeds = st.integers(0, 1000)
lengths_of_documents = st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(any)


few_for_each_case = settings(max_examples=-(-settings.default.max_examples // 2))


def cuts(T):
    return st.lists(st.integers(0, T), max_size=4).map(sorted)


@every_case
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@few_for_each_case
@given(data=st.data(), seed=seeds, B=st.integers(1, 3), T=st.integers(1, 40))
def test_any_split_through_the_state_is_one_call(case, dtype, data, seed, B, T):
    mixer, x = made(case, dtype), tokens(seed, B, T, dtype=dtype)
    whole, state = mixer(x), mixer.init_state(B)
    hidden, stored = [], []
    for start, stop in pairwise([0, *data.draw(cuts(T)), T]):
        out = mixer(x[:, start:stop], state)
        state = out.state
        hidden.append(out.hidden)
        stored.append(out.routing.stored if out.routing else None)
    assert_close(torch.cat(hidden, 1), whole.hidden, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    if whole.routing is not None:
        assert torch.equal(torch.cat([s for s in stored if s is not None], 1), whole.routing.stored)
    assert whole.state is None
    once = mixer(x, mixer.init_state(B))
    assert_same(once, whole, TOLERANCE[dtype])
    out.hidden, out.routing = once.hidden, once.routing
    assert_same(out, once, TOLERANCE[dtype])


@every_case
@few_for_each_case
@given(seed=seeds, lengths=lengths_of_documents)
def test_packed_documents_are_separate_sequences(case, seed, lengths):
    mixer, x = made(case), tokens(seed, 1, sum(lengths))
    packed = mixer(x, mixer.init_state(len(lengths)), bounds_of(lengths))
    assert_same(mixer(x, cu_seqlens=bounds_of(lengths)), packed, 1e-10)
    states = []
    for n, part in enumerate(x.split(lengths, 1)):
        alone = mixer(part, mixer.init_state(1))
        here = slice(sum(lengths[:n]), sum(lengths[: n + 1]))
        assert_close(packed.hidden[:, here], alone.hidden, rtol=1e-10, atol=1e-10)
        if alone.routing is not None:
            assert torch.equal(packed.routing.stored[:, here], alone.routing.stored)
        states.append(tensors_of(alone.state))
    for name, value in tensors_of(packed.state).items():
        assert_close(value, torch.cat([state[name] for state in states]), rtol=1e-9, atol=1e-9)


@every_case
@few_for_each_case
@given(data=st.data(), seed=seeds, lengths=lengths_of_documents)
def test_packed_documents_go_on_from_their_states(case, data, seed, lengths):
    """Each document is cut at a place of its own; the first parts are packed, then the second ones."""
    mixer, x = made(case), tokens(seed, 1, sum(lengths))
    whole = mixer(x, mixer.init_state(len(lengths)), bounds_of(lengths))
    first = [data.draw(st.integers(0, length)) for length in lengths]
    second = [length - n for length, n in zip(lengths, first, strict=True)]
    pieces = list(x.split([n for pair in zip(first, second, strict=True) for n in pair], 1))
    one = mixer(torch.cat(pieces[::2], 1), mixer.init_state(len(lengths)), bounds_of(first))
    two = mixer(torch.cat(pieces[1::2], 1), one.state, bounds_of(second))
    parts = zip(one.hidden.split(first, 1), two.hidden.split(second, 1), strict=True)
    hidden = torch.cat([part for pair in parts for part in pair], 1)
    assert_close(hidden, whole.hidden, rtol=1e-10, atol=1e-10)
    two.hidden, two.routing = whole.hidden, whole.routing
    assert_same(two, whole, 1e-10)


@every_case
@few_for_each_case
@given(data=st.data(), seed=seeds, B=st.integers(1, 3), T=st.integers(1, 20), with_state=st.booleans())
def test_padding_does_not_matter(case, data, seed, B, T, with_state):
    """Wherever it is, whatever it holds, and even where all of a row is padding."""
    mixer, x = made(case), tokens(seed, B, T)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=B * T, max_size=B * T))).view(B, T)
    hint = data.draw(st.sampled_from(["holes", "left", "right"]))
    if hint != "holes":
        mask = mask.sort(1, descending=hint == "right").values
    state = mixer(tokens(seed + 1, B, 5), mixer.init_state(B)).state if with_state else None
    out = mixer(x, state, padding_mask=mask)
    other = mixer(torch.where(mask[..., None], x, 1e6 * tokens(seed + 2, B, T)), state, padding_mask=mask)
    assert torch.equal(out.hidden, other.hidden)
    assert not out.hidden[~mask].any()
    if out.routing is not None:
        assert torch.equal(out.routing.scores, other.routing.scores)
        assert torch.equal(out.routing.stored, other.routing.stored)
        assert not out.routing.stored[~mask].any()
        assert torch.equal(out.routing.usage, other.routing.usage)
    if with_state:
        for name, value in tensors_of(out.state).items():
            assert torch.equal(value, tensors_of(other.state)[name])
        assert torch.equal(out.state.length, 5 + mask.sum(1))
    for n in range(B):
        before = mixer(tokens(seed + 1, B, 5)[n : n + 1], mixer.init_state(1)).state if with_state else None
        alone = mixer(x[n : n + 1, mask[n]], before)
        assert_close(out.hidden[n, mask[n]], alone.hidden[0], rtol=1e-10, atol=1e-10)
        if alone.routing is not None:
            assert torch.equal(out.routing.stored[n, mask[n]], alone.routing.stored[0])


@every_case
@few_for_each_case
@given(data=st.data(), seed=seeds, lengths=lengths_of_documents)
def test_padding_within_packed_documents(case, data, seed, lengths):
    mixer, x = made(case), tokens(seed, 1, sum(lengths))
    mask = torch.tensor([data.draw(st.lists(st.booleans(), min_size=x.shape[1], max_size=x.shape[1]))])
    real = [int(part.sum()) for part in mask[0].split(lengths)]
    out = mixer(x, mixer.init_state(len(lengths)), bounds_of(lengths), mask)
    without = mixer(x[mask][None], mixer.init_state(len(lengths)), bounds_of(real))
    assert torch.equal(out.hidden[mask], without.hidden[0])
    for name, value in tensors_of(out.state).items():
        assert torch.equal(value, tensors_of(without.state)[name])


@every_case
@few_for_each_case
@given(data=st.data(), seed=seeds, T=st.integers(2, 40))
def test_nothing_depends_on_a_later_token(case, data, seed, T):
    mixer, x = made(case), tokens(seed, 2, T)
    place = data.draw(st.integers(1, T - 1))
    other = torch.cat([x[:, :place], tokens(seed + 1, 2, T - place)], 1)
    one, two = mixer(x), mixer(other)
    assert_close(one.hidden[:, :place], two.hidden[:, :place], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(one.hidden[:, place:], two.hidden[:, place:])
    if one.routing is not None:
        assert torch.equal(one.routing.scores[:, :place], two.routing.scores[:, :place])
        assert torch.equal(one.routing.stored[:, :place], two.routing.stored[:, :place])
        x.requires_grad_()
        gradient = torch.autograd.grad(mixer(x).hidden[:, :place].sum(), x)[0]
        assert not gradient[:, place:].any()


EXTREMES = ["no decay", "much decay", "beta 0", "beta 1", "zero inputs", "nothing stored", "everything stored"]


@every_case
@pytest.mark.parametrize("extreme", EXTREMES)
def test_gradients_are_finite(case, extreme):
    usage = {"nothing stored": 0, "everything stored": 1}.get(extreme, 0.4)
    mixer = make(case, torch.float32, usage).train()
    x = tokens(0, 1, 24, dtype=torch.float32) * (extreme != "zero inputs")
    memory = getattr(mixer, "memory", None)
    with torch.no_grad():
        if extreme in ("no decay", "much decay") and hasattr(memory, "A_log"):
            memory.A_log.fill_(-200 if extreme == "no decay" else 12)
        if extreme in ("beta 0", "beta 1") and hasattr(memory, "beta"):
            x[..., 0], memory.beta.weight[:] = 1, 0
            memory.beta.weight[:, 0] = -200 if extreme == "beta 0" else 200
    x.requires_grad_()
    for bounds in (None, bounds_of([7, 0, 1, 16])):  # the second time the threshold has moved
        out = mixer(x, cu_seqlens=bounds)
        loss = out.hidden.square().sum() + (0 if out.aux_loss is None else out.aux_loss)
        wanted = [x, *mixer.parameters()]
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        assert all(tensor.isfinite().all() for tensor in (out.hidden, loss, *gradients))
