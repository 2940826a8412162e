"""What every mixer keeps to: one that is registered is tested by being registered."""

from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from kernels.decode import PAGE
from mixers import build_mixer, kv_cache_bytes, list_mixers, list_routers, set_kv_usage
from mixers.ham import HAM
from mixers.threshold import Fixed

DIM = 12
SMALL = {"num_heads": 2, "head_dim": 4}
HAMS = {
    **{f"ham {router}": {"router": router} for router in list_routers()},
    "ham residual value": {"router": {"name": "residual", "space": "value"}},
    "ham learned error": {"router": {"name": "learned", "form": "error"}},
    "ham window": {"router": {"name": "recency", "window": 3}},
    "ham sum": {"combine": "sum"},
    "ham delta_net": {"rule": "delta_net"},
    "ham linear_attention": {"rule": "linear_attention", "router": "cosine"},
    "ham grouped": {"num_value_heads": 4, "value_dim": 3, "conv_size": 2},
    "ham layer": {"scope": "layer"},
    "ham head": {"scope": "head"},
    "ham controlled": {"threshold": "controlled"},
    "ham fixed": {"threshold": {"name": "fixed", "tau": 0.9}, "router": "cosine"},
    "ham learned threshold": {"threshold": "learned", "scope": "head"},
}
CASES = {
    **{name: {"name": name, **SMALL} for name in list_mixers()},
    **{case: {"name": "ham", **SMALL, **options} for case, options in HAMS.items()},
    "gdn grouped": {"name": "gdn", **SMALL, "num_value_heads": 4, "value_dim": 3, "conv_size": 2},
    "attention window": {"name": "attention", **SMALL, "window": 4},
    "attention grouped": {"name": "attention", **SMALL, "num_heads": 4, "num_kv_heads": 2},
    "attention conv": {"name": "attention", **SMALL, "conv_size": 3, "rope": False},
    "attention all": {"name": "attention", **SMALL, "num_heads": 4, "num_kv_heads": 1, "window": 5, "conv_size": 4},
}
every_case = pytest.mark.parametrize("case", CASES)
every_ham = pytest.mark.parametrize("case", [case for case, spec in CASES.items() if spec["name"] == "ham"])
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def make(case, dtype=torch.float64, kv_usage=0.4):
    """A mixer with every weight off its start, and a threshold that has seen scores."""
    torch.manual_seed(0)
    mixer = build_mixer(CASES[case], dim=DIM)
    with torch.no_grad():
        for weight in mixer.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.3)
    if isinstance(mixer, HAM):
        mixer(torch.randn(4, 40, DIM))
        mixer.threshold.close_step()
        if not isinstance(mixer.threshold, Fixed):
            set_kv_usage(mixer, kv_usage)
    return mixer.to(dtype).eval()


@cache
def made(case, dtype=torch.float64):
    """The same for tests that only call it."""
    return make(case, dtype)


def tokens(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def bounds_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def mask_of(lengths, T):
    return torch.arange(T) < torch.tensor(lengths)[:, None]


def tensors_of(state):
    """The tensors of a state, by name."""
    found = {}
    for name, value in vars(state).items():
        found |= entries_of(value) if name == "kv" and value is not None else {name: value}
    return {name: value for name, value in found.items() if value is not None}


def entries_of(cache):
    """What a cache holds, sequence by sequence and head by head, wherever it lies."""
    k, v, there = cache.pages.rows(torch.arange(len(cache.pages.length)))
    found = {
        "k": k[there],
        "v": v[there],
        "counts": cache.counts,
        "recent k": k[:0].flatten(0, 1),
        "recent v": v[:0].flatten(0, 1),
    }
    if cache.recent is not None:
        seen = cache.recent.seen.transpose(1, 2)
        found |= {f"recent {name}": getattr(cache.recent, name).transpose(1, 2)[seen] for name in "kv"}
    return found


def assert_same(one, other, tolerance):
    """Hidden, routing and state of two outputs."""
    assert_close(one.hidden, other.hidden, rtol=tolerance, atol=tolerance)
    assert (one.routing is None) == (other.routing is None)
    if one.routing is not None:
        assert torch.equal(one.routing.stored, other.routing.stored)
        assert torch.equal(one.routing.lengths, other.routing.lengths)
        for name in ("scores", "g"):
            # scores and decay are float32 in any model
            assert_close(getattr(one.routing, name), getattr(other.routing, name), rtol=1e-5, atol=1e-5)
    if one.state is not None and other.state is not None:
        one, other = tensors_of(one.state), tensors_of(other.state)
        assert one.keys() == other.keys()
        for name in one:
            assert_close(one[name], other[name], rtol=10 * tolerance, atol=10 * tolerance)


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


@every_case
def test_state_follows_functions_over_its_tensors(case):
    mixer = made(case)
    state = mixer(tokens(0, 2, 9), mixer.init_state(2)).state
    assert any(x.requires_grad for x in tensors_of(state).values())
    detached = state.detach()
    assert not any(x.requires_grad for x in tensors_of(detached).values())
    one, other = (mixer(tokens(1, 2, 3), s).hidden for s in (state, detached))
    assert torch.equal(one, other)


@every_case
def test_sequences_of_a_state_are_selected_and_repeated(case):
    """As beam search does, with caches of different sizes, and with two ways on from one state."""
    mixer, index = made(case), torch.tensor([2, 0, 0])
    state = mixer(tokens(0, 3, 9), mixer.init_state(3), padding_mask=mask_of([9, 1, 5], 9)).state
    x = tokens(1, 3, 4)
    for _ in range(2):
        out = mixer(x, state.select(index))
        for row, chosen in enumerate(index.tolist()):
            alone = mixer(x[row : row + 1], state.select(torch.tensor([chosen])))
            assert_close(out.hidden[row], alone.hidden[0], rtol=1e-9, atol=1e-9)
        mixer(x, state)


@every_case
def test_a_call_leaves_its_state_as_it_was(case):
    mixer = made(case)
    state = mixer(tokens(0, 2, 9), mixer.init_state(2)).state
    before = {name: x.clone() for name, x in tensors_of(state).items()}
    mixer(tokens(1, 2, 3), state)
    for name, value in tensors_of(state).items():
        assert torch.equal(value, before[name])


@every_case
def test_a_bfloat16_model_keeps_its_memory_in_float32(case):
    mixer = make(case, torch.bfloat16)
    out = mixer(tokens(0, 2, 9, dtype=torch.bfloat16), mixer.init_state(2))
    assert out.hidden.dtype == torch.bfloat16
    if out.state.recurrent is not None:
        assert out.state.recurrent.dtype == torch.float32
    if out.routing is not None:
        assert {x.dtype for x in (out.routing.scores, out.routing.tau, out.routing.g)} == {torch.float32}
    if out.state.kv is not None:
        assert out.state.kv.pages.k.dtype == torch.bfloat16


@every_case
def test_autocast(case):
    """Matrix products of the projections in bfloat16; memory, scores and threshold in float32."""
    mixer = make(case, torch.float32).train()
    x = tokens(0, 2, 20, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = mixer(x, mixer.init_state(2))
    (out.hidden.float().sum() + (0 if out.aux_loss is None else out.aux_loss)).backward()
    assert all(weight.grad.isfinite().all() for weight in mixer.parameters() if weight.grad is not None)
    if out.state.recurrent is not None:
        assert out.state.recurrent.dtype == torch.float32
    if out.routing is not None:
        assert {x.dtype for x in (out.routing.scores, out.routing.tau, out.routing.g)} == {torch.float32}


@every_case
def test_the_cache_holds_what_was_stored_and_no_more(case):
    mixer = make(case, torch.float32)
    out = mixer(tokens(0, 3, 30, dtype=torch.float32), mixer.init_state(3))
    spec = CASES[case]
    if isinstance(mixer, HAM):
        window = out.routing.window
        kept = out.routing.kept.long() - 3 * (0 < window <= 30)  # what no later token will see has left the window
        assert torch.equal(out.state.kv.counts.sum(0), kept)
        entry = 4 * (mixer.memory.head_dim + mixer.memory.value_dim)
    elif spec["name"] == "attention":
        window = spec.get("window", 0)
        assert out.state.kv.counts.tolist() == [[window - 1 if window else 30] * mixer.num_kv_heads] * 3
        entry = 4 * 2 * mixer.head_dim
    else:
        assert kv_cache_bytes(out.state) == 0
        return
    pages = int(-(-out.state.kv.pages.length // PAGE).sum())
    recent = 0 if out.state.kv.recent is None else out.state.kv.recent.seen.numel()
    assert kv_cache_bytes(out.state) == (pages * PAGE + recent) * entry
    assert kv_cache_bytes([out.state, out.state, None]) == 2 * kv_cache_bytes(out.state)


@every_case
@pytest.mark.parametrize(
    ("T", "options", "message"),
    [
        (8, {"cu_seqlens": torch.tensor([0, 4, 8])}, "cu_seqlens needs a batch of one packed row, got 2 rows"),
        (8, {"padding_mask": torch.ones(2, 7, dtype=torch.bool)}, r"padding_mask must be bool \(2, 8\)"),
        (8, {"padding_mask": torch.ones(2, 8)}, r"padding_mask must be bool \(2, 8\) .*, got torch.float32"),
        (8, {"state": 3}, "the state is of 3 sequences, the input is not"),
    ],
)
def test_arguments_that_do_not_fit(case, T, options, message):
    mixer = made(case)
    if "state" in options:
        options = {"state": mixer.init_state(options["state"])}
    with pytest.raises(ValueError, match=message):
        mixer(tokens(0, 2, T), **options)


@every_case
def test_no_tokens(case):
    mixer, state = made(case), made(case).init_state(2)
    for mask in (None, torch.ones(2, 0, dtype=torch.bool)):
        out = mixer(tokens(0, 2, 0), state, padding_mask=mask)
        assert out.hidden.shape == (2, 0, DIM)
        assert out.state is state


class TestUsage:
    @every_ham
    def test_at_0_it_is_its_recurrent_mixer(self, case):
        mixer = make(case, kv_usage=0)
        set_kv_usage(mixer, 0)
        options = (*SMALL, "rule", "num_value_heads", "value_dim", "conv_size")
        spec = {key: x for key, x in CASES[case].items() if key in options}
        gdn = build_mixer("gdn", dim=DIM, **spec).double()
        gdn.load_state_dict({name: x for name, x in mixer.state_dict().items() if name in gdn.state_dict()})
        x = tokens(0, 2, 30)
        out = mixer(x, mixer.init_state(2))
        assert not out.routing.stored.any()
        assert kv_cache_bytes(out.state) == 0
        if mixer.combine == "gates":  # open the gate of the recurrent read-out
            torch.nn.init.zeros_(mixer.read_gates.weight)
            torch.nn.init.constant_(mixer.read_gates.bias, 100)
        assert torch.equal(mixer(x).hidden, gdn(x).hidden)
        assert torch.equal(mixer(x, mixer.init_state(2)).hidden, gdn(x).hidden)

    @every_ham
    def test_at_1_it_stores_everything(self, case):
        mixer = make(case)
        set_kv_usage(mixer, 1)
        out = mixer(tokens(0, 2, 30), mixer.init_state(2))
        name = mixer.router.__class__.__name__
        if name == "Recency":  # the last tokens: as many as the cache's window has room for
            assert out.routing.window == (3 if case == "ham window" else 512)
        elif name != "Nothing":
            assert out.routing.stored.all()
            assert torch.equal(out.routing.usage, torch.ones(mixer.num_heads))
            assert out.state.kv.counts.tolist() == [[30] * mixer.num_heads] * 2

    def test_it_may_change_on_the_way(self):
        """A window that opens later sees what was stored before, and keeps no more than a window."""
        mixer = make("ham recency")
        mixer.router.length = 10
        x, state = tokens(0, 1, 40), mixer.init_state(1)
        for start, usage, held in ((0, 0, 0), (10, 0.3, 3), (20, 0.5, 5), (30, 0, 0)):
            set_kv_usage(mixer, usage)
            state = mixer(x[:, start : start + 10], state).state
            assert state.kv.counts.tolist() == [[max(held - 1, 0)] * 2]
