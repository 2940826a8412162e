"""Attention to pages against its definition, and what pages hold: in order, unshared, no more than needed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from kernels import dispatch
from kernels.paged_attention import BACKENDS, PAGE, PagedCache, attend
from kernels.routed_attention import routed_attention

FAST = [name for name in BACKENDS if name != "naive" and not dispatch.unavailable(name, "cpu")]


def held(stored, K=6, V=5, seed=0, dtype=torch.float64):
    """A cache of R rows that were given tokens (R, T), and the keys and values of all of them."""
    draw = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(*stored.shape, d, generator=draw, dtype=torch.float64).to(dtype) for d in (K, V))
    return PagedCache.empty(len(stored), K, V, dtype=dtype).append(k, v, stored), k, v


@pytest.mark.parametrize("backend", FAST)
@settings(max_examples=10)
@given(
    seed=st.integers(0, 1000),
    lengths=st.lists(st.sampled_from([0, 1, 5, PAGE, PAGE + 1, 3 * PAGE]), min_size=1, max_size=4),
    K=st.integers(1, 9),
    V=st.integers(1, 9),
    G=st.integers(1, 3),
)
def test_rows_that_differ_wildly(backend, seed, lengths, K, V, G, no_stale_memory):
    stored = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    cache, k, v = held(stored, K, V, seed)
    q = torch.randn(len(lengths), G, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    o = attend(q, cache, scale=0.7, backend=backend)
    for row, count in enumerate(lengths):
        golden = (0.7 * q[row] @ k[row, :count].T).softmax(-1) @ v[row, :count]  # zeros where nothing is held
        assert_close(o[row], golden, rtol=0, atol=1e-12)
    assert_close(attend(q, cache, scale=0.7, backend="naive"), o, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["naive", *FAST])
def test_tokens_beside_the_pages(backend):
    """Of rows that hold much, one token or nothing; none, some or all of what is beside them is seen."""
    draw = torch.Generator().manual_seed(0)
    lengths, W = [0, 0, 1, 2 * PAGE + 1, 2 * PAGE + 1], 4
    cache, k, v = held(torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None])
    q, keys, values = (torch.randn(5, n, d, generator=draw, dtype=torch.float64) for n, d in ((3, 6), (W, 6), (W, 5)))
    seen = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    o = attend(5 * q, cache, scale=0.7, beside=(keys, values, seen), backend=backend)
    for row, count in enumerate(lengths):
        all_k, all_v = (torch.cat([a[row, :count], b[row, seen[row]]]) for a, b in ((k, keys), (v, values)))
        assert_close(o[row], (3.5 * q[row] @ all_k.T).softmax(-1) @ all_v, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", FAST)
def test_token_by_token_is_the_sequence_read_at_once(backend):
    """Across the end of a page, with one head that stores everything, one that stores some, one that stores nothing."""
    T, H = PAGE + 3, 3
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, T, H, 8, generator=draw, dtype=torch.float64) for _ in range(3))
    stored = torch.rand(1, T, H, generator=draw) < torch.tensor([1.0, 0.3, 0.0])
    cache, o = PagedCache.empty(H, 8, 8, dtype=torch.float64), []
    for t in range(T):
        cache = cache.append(*(x[0, t][:, None] for x in (k, v, stored)))
        o.append(attend(q[0, t][:, None], cache, scale=0.5, backend=backend)[:, 0])
    golden = routed_attention(q, k, v, stored, scale=0.5, backend="naive")
    assert_close(torch.stack(o)[None], golden, rtol=0, atol=1e-12)
    assert cache.length.tolist() == stored.sum((0, 1)).tolist()


@pytest.mark.parametrize(
    ("shape", "backend", "message"),
    [
        ((1, 1, 6), "auto", r"q must be \(2, G, 6\) .*, got \(1, 1, 6\)"),
        ((2, 1, 5), "auto", r"q must be \(2, G, 6\)"),
        ((2, 1, 6), "cuda", "unknown backend 'cuda' for paged_attention; known: auto, naive, torch, triton"),
    ],
)
def test_mistakes(shape, backend, message):
    cache, *_ = held(torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=message):
        attend(torch.zeros(shape), cache, backend=backend)


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
            assert_close(attend(q, each), attend(q, each, backend="naive"), rtol=0, atol=1e-12)

    def test_a_prefill_writes_what_is_stored_and_nothing_else(self):
        """Page 0 is nobody's: it takes what one token at a time does not store."""
        cache, _ = self.filled([0.5, 0.0, 1.0])
        assert not cache.k[0].any() and not cache.v[0].any()

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

    def test_a_prefill_takes_pages_for_what_is_stored_alone(self):
        """And every device takes the same way: there is one."""
        T, rows = 4096, 4
        stored = torch.rand(rows, T, generator=torch.Generator().manual_seed(0)) < 0.125
        cache, *_ = held(stored, 8, 8, dtype=torch.float32)
        everything = rows * T * (8 + 8) * 4
        assert cache.bytes <= (stored.float().mean() + rows * PAGE / stored.numel()) * everything

    def test_decoding_holds_one_page_a_row_in_reserve(self):
        cache, rows = PagedCache.empty(3, 4, 4, dtype=torch.float32), 3
        stored = torch.tensor([[True], [False], [True]])
        for t in range(5 * PAGE):
            one = torch.full((rows, 1, 4), float(t))
            cache = cache.append(one, one, stored)
        assert cache.length.tolist() == [5 * PAGE, 0, 5 * PAGE]
        k, _, there = cache.rows(torch.arange(3))
        assert torch.equal(k[0, :, 0], torch.arange(5.0 * PAGE)) and not there[1].any()
        assert (len(cache.k) - 1) <= 2 * 5 + rows

    def test_decoding_asks_the_device_once_a_page(self, monkeypatch):
        asked, reserve = [], PagedCache.reserve
        monkeypatch.setattr(PagedCache, "reserve", lambda self, n: asked.append(n) or reserve(self, n))
        cache, one = PagedCache.empty(2, 4, 4, dtype=torch.float32), torch.ones(2, 1, 4)
        for _ in range(2 * PAGE):
            cache = cache.append(one, one, torch.ones(2, 1, dtype=torch.bool))
        assert asked == [PAGE, PAGE]


def test_a_gradient_is_given_or_refused(monkeypatch):
    """Triton's kernel has none; `auto` takes what has one."""
    cache, _, _ = held(torch.ones(2, PAGE + 6).bool())
    q = torch.randn(2, 1, 6, dtype=torch.float64, requires_grad=True)
    golden = torch.autograd.grad(attend(q, cache, backend="naive").square().sum(), q)[0]
    monkeypatch.setitem(dispatch.PREFERENCE, "cpu", ("triton", "torch"))  # as on a GPU
    assert_close(torch.autograd.grad(attend(q, cache).square().sum(), q)[0], golden, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="'triton' of paged_attention gives no gradient; use 'torch'"):
        attend(q, cache, backend="triton")
    with torch.no_grad():
        assert dispatch.CHOSEN["paged_attention"] == "torch"
        attend(q, cache)
        assert dispatch.CHOSEN["paged_attention"] == "triton"


@pytest.mark.parametrize("backend", ["naive", *FAST])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(backend, dtype):
    cache, _, _ = held(torch.ones(2, PAGE + 6).bool(), dtype=torch.float32)
    q = torch.randn(2, 1, 6)
    expected = attend(q, cache, backend=backend)
    with torch.autocast("cpu", dtype):
        assert torch.equal(attend(q, cache, backend=backend), expected)


def test_sums_over_many_pages_do_not_overflow():
    """Of 16,384 values of 20 in float16, whose largest number is 65,504."""
    k, v = torch.zeros(1, 16384, 4).half(), torch.full((1, 16384, 4), 20.0).half()
    cache = PagedCache.empty(1, 4, 4, dtype=torch.float16).append(k, v, torch.ones(1, 16384).bool())
    assert torch.equal(attend(torch.ones(1, 1, 4).half(), cache, backend="torch"), torch.full((1, 1, 4), 20.0).half())
