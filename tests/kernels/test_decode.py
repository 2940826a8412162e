"""Decoding step by step: against the definition, and against the kernels that see a whole sequence at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize
from torch.testing import assert_close

from kernels import decode, dispatch
from kernels.decode import BACKENDS, PAGE, PagedCache, naive
from kernels.delta_rule import gated_delta_rule
from kernels.routed_attention import routed_attention

FAST = [name for name in BACKENDS if name != "naive" and not dispatch.unavailable(name, "cpu")]


def make(*, seed=0, N=2, T=4, H=2, K=5, V=3, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    q, k = (normalize(normal(N, T, H, K), dim=-1) for _ in range(2))
    parts = q, k, normal(N, T, H, V), -normal(N, T, H).exp(), normal(N, T, H).sigmoid()
    W = normal(H, 7, V)
    return [x.to(dtype) for x in (*parts, normal(N, H, K, V), W.mT @ W)]


def cache_of(N, H, K, V, dtype=torch.float64, pages=1, slots=1):
    return PagedCache.empty(N * H, K, V, pages=pages, slots=slots, dtype=dtype)


def decode_all(inputs, score, tau, backend, scale=0.7, delta=True, G=1):
    """Every token in turn; what each step gave, the state, and what every row holds in the end."""
    q, k, v, g, beta, state, gram = inputs
    state = state.clone()
    N, T, H, V = v.shape
    cache = cache_of(N, H, k.shape[-1], V, v.dtype)
    seen = []
    for t in range(T):
        cache = cache.reserve(1)
        options = dict(scale=scale, delta=delta, cache=cache, tau=tau, score=score, gram=gram, backend=backend)
        out = decode.step(*(x[:, t] for x in (q, k, v, g, beta)), state, **options)
        queries = q[:, t].flatten(0, 1)[:, None] * torch.arange(1, G + 1, dtype=v.dtype)[:, None]
        seen.append((*out, decode.attend(queries, cache, scale=0.5, backend=backend)))
    held = [naive.rows(cache, row) for row in range(N * H)]
    return [torch.stack(x) for x in zip(*seen, strict=True)], state, held, cache


@pytest.mark.parametrize("backend", FAST)
@settings(max_examples=8)
@given(
    seed=st.integers(0, 1000),
    N=st.integers(1, 3),
    H=st.integers(1, 3),
    K=st.integers(1, 9),
    V=st.integers(1, 9),
    G=st.integers(1, 2),
    T=st.integers(1, 6),
    score=st.sampled_from(decode.SCORES),
    tau=st.sampled_from([-torch.inf, 0.7, 1.3, torch.inf]),
    delta=st.booleans(),
)
def test_steps_are_those_of_the_definition(backend, seed, N, H, K, V, G, T, score, tau, delta):
    inputs = make(seed=seed, N=N, T=T, H=H, K=K, V=V)
    tau = torch.full((H,), tau)
    tau[0] = 1.0
    ours, state, held, cache = decode_all(inputs, score, tau, backend, delta=delta, G=G)
    golden, golden_state, golden_held, golden_cache = decode_all(inputs, score, tau, "naive", delta=delta, G=G)
    for one, other in zip(ours, golden, strict=True):
        assert_close(one, other, rtol=0, atol=1e-6 if one.dtype == torch.float32 else 1e-10)
    assert_close(state, golden_state, rtol=0, atol=1e-10)
    for one, other in zip(held, golden_held, strict=True):
        assert_close(one, other, rtol=0, atol=0)
    assert cache.used == golden_cache.used


@pytest.mark.parametrize("backend", FAST)
def test_a_sequence_read_token_by_token_is_the_sequence_read_at_once(backend):
    """Across the end of a page, with one head that stores everything, one that stores some, one that stores nothing."""
    q, k, v, g, beta, state, gram = inputs = make(N=1, T=PAGE + 3, H=3, K=8, V=8)
    tau = torch.tensor([-torch.inf, 1.5, torch.inf])
    (read, scores, stored, o), last, _, cache = decode_all(inputs, "value", tau, backend)
    whole, prediction, final = gated_delta_rule(q, k, v, g, beta, 0.7, state, backend="naive")
    assert_close(read.transpose(0, 1), whole, rtol=0, atol=1e-9)
    assert_close(last, final, rtol=0, atol=1e-9)
    write = beta[..., None] * (v - prediction)
    assert_close(scores.transpose(0, 1), write.norm(dim=-1).float(), rtol=0, atol=1e-5)
    attended = routed_attention(q, k, v, stored.transpose(0, 1), scale=0.5, backend="naive")
    assert_close(o[:, :, 0][None], attended, rtol=0, atol=1e-9)
    counts = stored.sum((0, 1))
    assert counts.tolist() == cache.length.tolist() and 0 < counts[1] < PAGE
    pages = sum(-(-count // PAGE) for count in counts.tolist())
    assert cache.used - 1 == pages
    assert pages <= cache.bytes / (PAGE * (8 + 8) * 8) <= pages + 3  # room was made for one more token in every head


@pytest.mark.parametrize("backend", FAST)
def test_rows_that_differ_wildly(backend):
    """Pages go to the rows that store; the others hold none."""
    cache = cache_of(4, 1, 6, 5)
    draw = torch.Generator().manual_seed(0)
    wanted = [3 * PAGE, 1, 0, PAGE + 1]
    for t in range(max(wanted)):
        cache = cache.reserve(1)
        stored = torch.tensor([t < count for count in wanted])
        keys, values = (torch.randn(4, d, generator=draw, dtype=torch.float64) for d in (6, 5))
        for row in stored.nonzero()[:, 0].tolist():
            naive.put(cache, row, keys[row], values[row])
    q = torch.randn(4, 2, 6, generator=draw, dtype=torch.float64)
    o = decode.attend(q, cache, backend=backend)
    assert_close(o, decode.attend(q, cache, backend="naive"), rtol=0, atol=1e-12)
    assert torch.equal(o[2], torch.zeros_like(o[2]))
    assert cache.used - 1 == 3 + 1 + 0 + 2


def test_room_is_made_once_for_many_steps():
    cache = cache_of(2, 1, 4, 4).reserve(PAGE + 1)
    k, pages = cache.k, len(cache.k)
    assert cache.table.shape[1] >= 2 and pages >= 1 + 4
    for _ in range(PAGE + 1):
        for row in range(2):
            naive.put(cache, row, torch.ones(4), torch.ones(4))
    assert cache.reserve(0) is cache and cache.k is k
    assert sorted(cache.table[:, :2].flatten().tolist()) == [1, 2, 3, 4]


class TestAppend:
    def filled(self, counts, T=2 * PAGE, seed=0, cache=None):
        """A cache and what went into each row."""
        draw = torch.Generator().manual_seed(seed)
        k, v = (torch.randn(len(counts), T, d, generator=draw, dtype=torch.float64) for d in (3, 2))
        stored = torch.rand(len(counts), T, generator=draw) < torch.tensor(counts)[:, None]
        cache = PagedCache.empty(len(counts), 3, 2, dtype=torch.float64) if cache is None else cache
        return cache.append(k, v, stored), [k[row, s] for row, s in enumerate(stored)]

    def same(self, cache, keys):
        assert cache.length.tolist() == [len(k) for k in keys]
        k, _, there = cache.rows(torch.arange(len(keys)))
        for row, expected in enumerate(keys):
            assert torch.equal(k[row, there[row]], expected)
            assert torch.equal(naive.rows(cache, row)[0], expected)

    @given(counts=st.lists(st.sampled_from([0.0, 0.1, 0.9, 1.0]), min_size=1, max_size=4), calls=st.integers(1, 3))
    def test_rows_hold_what_was_appended_in_order_and_no_page_is_shared(self, counts, calls):
        cache, keys = None, None
        for seed in range(calls):
            cache, new = self.filled(counts, T=PAGE // 2 + 40 * seed, seed=seed, cache=cache)
            keys = new if keys is None else [torch.cat(pair) for pair in zip(keys, new, strict=True)]
        self.same(cache, keys)
        pages = [p for row in range(len(counts)) for p in cache.table[row, : -(-len(keys[row]) // PAGE)].tolist()]
        assert sorted(pages) == list(range(1, len(pages) + 1))
        assert cache.bytes <= (1.02 * len(pages) + 1) * PAGE * (3 + 2) * 8

    def test_an_older_cache_may_be_gone_on_from(self):
        """Two continuations of one cache, and the cache itself, do not disturb each other."""
        cache, keys = self.filled([0.5, 0.0, 1.0])
        (one, first), (other, second) = (self.filled([1.0, 0.5, 0.1], seed=s, cache=cache) for s in (1, 2))
        self.same(cache, keys)
        self.same(one, [torch.cat(pair) for pair in zip(keys, first, strict=True)])
        self.same(other, [torch.cat(pair) for pair in zip(keys, second, strict=True)])
        assert one.k.data_ptr() != other.k.data_ptr()
        q = torch.randn(3, 1, 3, dtype=torch.float64)
        for each in (cache, one, other):
            assert_close(decode.attend(q, each), decode.attend(q, each, backend="naive"), rtol=0, atol=1e-12)

    def test_rows_are_selected_and_repeated(self):
        cache, keys = self.filled([0.5, 0.0, 1.0])
        chosen = cache.select(torch.tensor([2, 2, 0]))
        self.same(chosen, [keys[2], keys[2], keys[0]])
        one = torch.ones(1, 3, dtype=torch.float64)
        chosen = chosen.append(one.expand(3, 1, 3), one[:, :2].expand(3, 1, 2), torch.ones(3, 1, dtype=torch.bool))
        self.same(chosen, [torch.cat([k, one]) for k in (keys[2], keys[2], keys[0])])
        self.same(cache, keys)

    def test_gradients_pass(self):
        cache = PagedCache.empty(1, 3, 2, dtype=torch.float64)
        parts = [torch.randn(1, 5, d, dtype=torch.float64, requires_grad=True) for d in (3, 2)]
        stored = torch.tensor([[True, False, True, True, False]])

        def attend(k, v):
            later = cache.append(k[:, :2], v[:, :2], stored[:, :2]).append(k[:, 2:], v[:, 2:], stored[:, 2:])
            return later.rows(torch.tensor([0]))[:2]

        assert torch.autograd.gradcheck(attend, parts)

    def test_a_cache_of_inference_mode_may_be_gone_on_from_outside_it(self):
        with torch.inference_mode():
            cache, keys = self.filled([0.5])
        later, new = self.filled([0.5], seed=1, cache=cache)
        self.same(later, [torch.cat([keys[0], new[0]])])


@pytest.mark.parametrize("backend", FAST)
def test_the_recurrence_alone(backend):
    q, k, v, g, beta, state, _ = make(T=1)
    one, other = state.clone(), state.clone()
    parts = [x[:, 0] for x in (q, k, v, g, beta)]
    read, scores, stored = decode.step(*parts, one, backend=backend)
    assert_close(read, decode.step(*parts, other, backend="naive")[0], rtol=0, atol=1e-12)
    assert_close(one, other, rtol=0, atol=1e-12)
    assert not stored.any() and not scores.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": "surprise"}, "unknown score 'surprise'; known: cosine, value, output"),
        ({"tau": None}, "storing needs tau"),
        ({"gram": None}, "storing needs tau, and score 'output' the Gram"),
        ({"backend": "cuda"}, "unknown backend 'cuda' for decode"),
    ],
)
def test_mistakes(changes, message):
    q, k, v, g, beta, state, gram = make(T=1)
    options = dict(cache=cache_of(2, 2, 5, 3), tau=torch.zeros(2), gram=gram) | changes
    with pytest.raises(ValueError, match=message):
        decode.step(*(x[:, 0] for x in (q, k, v, g, beta)), state, **options)
