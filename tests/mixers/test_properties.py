"""What every mixer keeps to: one that is registered is tested by being registered."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mixers import checks
from tests.mixers.cases import TOLERANCE, assert_same, bounds_of, every_case, made, make, tensors_of, tokens

seeds = st.integers(0, 1000)
lengths_of_documents = st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(any)


few_for_each_case = settings(max_examples=-(-settings.default.max_examples // 2))


def cuts(T):
    return st.lists(st.integers(0, T), max_size=4).map(sorted)


@every_case
@few_for_each_case
@given(data=st.data(), dtype=st.sampled_from([*TOLERANCE]), seed=seeds, B=st.integers(1, 3), T=st.integers(1, 40))
def test_any_split_through_the_state_is_one_call(case, data, dtype, seed, B, T):
    mixer, x = made(case, dtype), tokens(seed, B, T, dtype=dtype)
    last, once = checks.splitting(mixer, x, data.draw(cuts(T)), TOLERANCE[dtype])
    assert_same(once, mixer(x), TOLERANCE[dtype])
    last.hidden, last.routing = once.hidden, once.routing
    assert_same(last, once, TOLERANCE[dtype])


@every_case
@few_for_each_case
@given(seed=seeds, lengths=lengths_of_documents)
def test_packed_documents_are_separate_sequences(case, seed, lengths):
    mixer, x = made(case), tokens(seed, 1, sum(lengths))
    packed, alone = checks.packing(mixer, x, lengths, 1e-10)
    assert_same(mixer(x, cu_seqlens=bounds_of(lengths)), packed, 1e-10)
    states = [tensors_of(out.state) for out in alone]
    for name, value in tensors_of(packed.state).items():
        assert_close(value, torch.cat([state[name] for state in states]), rtol=1e-9, atol=1e-9)


@every_case
@few_for_each_case
@given(data=st.data(), seed=seeds, lengths=lengths_of_documents)
def test_packed_documents_go_on_from_their_states(case, data, seed, lengths):
    """Each document is cut at a place of its own; the first parts are packed, then the second ones."""
    mixer, x = made(case), tokens(seed, 1, sum(lengths))
    first = [data.draw(st.integers(0, length)) for length in lengths]
    two, whole = checks.resuming(mixer, x, lengths, first, 1e-10)
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
    out = checks.padding(mixer, x, mask, state, 1e-10)
    other = mixer(torch.where(mask[..., None], x, 1e6 * tokens(seed + 2, B, T)), state, padding_mask=mask)
    if out.routing is not None:
        assert torch.equal(out.routing.usage, other.routing.usage)
    if with_state:
        for name, value in tensors_of(out.state).items():
            assert torch.equal(value, tensors_of(other.state)[name])


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
    checks.causality(mixer, x, place, 1e-12)
    if mixer(x).routing is not None:
        x.requires_grad_()
        gradient = torch.autograd.grad(mixer(x).hidden[:, :place].sum(), x)[0]
        assert not gradient[:, place:].any()


EXTREMES = ["no decay", "much decay", "beta 0", "beta 1", "zero inputs", "nothing stored", "everything stored"]


@every_case
def test_gradients_are_finite(case):
    for extreme in EXTREMES:
        check_gradients(case, extreme)


def check_gradients(case, extreme):
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
        assert all(tensor.isfinite().all() for tensor in (out.hidden, loss, *gradients)), extreme
