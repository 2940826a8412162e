"""Attention over stored tokens, gathered and masked, against its definition and against causal attention."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from kernels.routed_attention import flex, ranks, routed_attention, torch_gathered, triton_ranked
from kernels.routed_attention.triton_kernels import whole_blocks
from kernels.sequences import Layout, like_sizes


@triton.jit
def whole(out, inner, after, B: tl.constexpr):
    first, last = whole_blocks(inner, after, B)
    tl.store(out, first)
    tl.store(out + 1, last)


USAGES = [0.0, 0.05, 0.5, 1.0]
PATHS = ["gathered", "masked"]


@pytest.fixture(params=PATHS)
def path(request):
    """The torch backend kept to one of its paths, in small blocks; the gathered one fails if it falls back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_gathered, "DENSE_BELOW", 0 if request.param == "gathered" else 1_000_000)
        patch.setattr(torch_gathered, "QUERY_BLOCK", 7)
        masked = torch_gathered._masked

        def only_if_asked_for(q, k, v, stored, bias, scale, window):
            assert request.param == "masked" or q.shape[3] <= 2 * window
            return masked(q, k, v, stored, bias, scale, window)

        patch.setattr(torch_gathered, "_masked", only_if_asked_for)
        yield request.param


def make(*, seed=0, B=1, T=20, H=2, K=4, V=3, groups=1, usages=(0.5,), bias=False):
    """q, k, v, stored, bias; key head h stores a share `usages[h]` of its tokens, cycled over rows and heads."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_()

    share = torch.tensor(usages).repeat(B * H)[: B * H].view(B, 1, H)
    stored = torch.rand(B, T, H, generator=draw) < share
    q, k, v = normal(B, T, H * groups, K), normal(B, T, H, K), normal(B, T, H, V)
    return {"q": q, "k": k, "v": v, "stored": stored, "bias": normal(B, T, H) if bias else None}


def run(inputs, **options):
    """The output and the gradients of a random function of it."""
    o = routed_attention(**inputs, **options)
    weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaves = [x for x in inputs.values() if x is not None and x.requires_grad]
    return [o.detach(), *torch.autograd.grad((o * weight.to(o)).sum(), leaves)]


def check_against_the_definition(inputs, tolerance=1e-12, backend="torch", **options):
    ours, naive = run(inputs, backend=backend, **options), run(inputs, backend="naive", **options)
    for one, other in zip(ours, naive, strict=True):
        assert one.isfinite().all()
        assert_close(one, other, rtol=0, atol=tolerance * (1 + other.abs().max().item()))


shapes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 1000),
        "H": st.integers(1, 3),
        "K": st.integers(1, 5),
        "V": st.integers(1, 5),
        "groups": st.integers(1, 3),
        "usages": st.lists(st.sampled_from(USAGES), min_size=1, max_size=6),
        "bias": st.booleans(),
    }
)
small_shapes = st.fixed_dictionaries(  # the interpreter is slow
    {
        "seed": st.integers(0, 1000),
        "H": st.integers(1, 2),
        "K": st.integers(1, 20),
        "V": st.integers(1, 20),
        "groups": st.integers(1, 2),
        "usages": st.lists(st.sampled_from(USAGES), min_size=1, max_size=6),
        "bias": st.booleans(),
    }
)
documents = st.lists(st.sampled_from([0, 0, 1, 15, 17, 25]), min_size=1, max_size=4).filter(any)
windows = st.sampled_from([0, 0, 0, 1, 3, 100])
scales = st.sampled_from([None, 1.0, 2.5])
one_path_for_all_examples = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@one_path_for_all_examples
@given(shape=shapes, B=st.integers(1, 3), T=st.integers(1, 40), window=windows, scale=scales)
def test_batches(path, shape, B, T, window, scale):
    check_against_the_definition(make(B=B, T=T, **shape), window=window, scale=scale)


@one_path_for_all_examples
@given(
    shape=shapes,
    lengths=st.lists(st.sampled_from([0, 0, 1, 6, 7, 8, 25]), min_size=1, max_size=5).filter(any),
    window=windows,
    scale=scales,
)
def test_packed_sequences(path, shape, lengths, window, scale):
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    check_against_the_definition(make(T=sum(lengths), **shape), cu_seqlens=bounds, window=window, scale=scale)


@pytest.mark.parametrize("usages", [(u,) for u in USAGES] + [(0.9, 0.0, 0.05, 0.0), (1.0, 0.0)], ids=str)
def test_usages_even_and_skewed(path, usages):
    for bias in (False, True):
        check_against_the_definition(make(B=2, T=64, H=4, groups=2, usages=usages, bias=bias))


@pytest.fixture(scope="module")
def in_triton(no_stale_memory):
    """Small blocks, so that there are several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_ranked, "blocks", lambda *args, **kw: (16, 16, 4, 1))
        yield {"backend": "triton", "tolerance": 1e-11}


class TestTriton:
    @settings(max_examples=4)
    @given(shape=small_shapes, B=st.integers(1, 2), T=st.sampled_from([1, 15, 33, 50]), window=windows, scale=scales)
    def test_batches(self, in_triton, shape, B, T, window, scale):
        check_against_the_definition(make(B=B, T=T, **shape), window=window, scale=scale, **in_triton)

    @settings(max_examples=6)
    @given(shape=small_shapes, lengths=documents, window=windows, scale=scales)
    def test_packed_sequences(self, in_triton, shape, lengths, window, scale):
        options = {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), "window": window}
        check_against_the_definition(make(T=sum(lengths), **shape), scale=scale, **options, **in_triton)

    @pytest.mark.parametrize(("usages", "window"), [((0.0,), 0), ((0.05,), 5), ((1.0, 0.0, 0.05), 0)], ids=str)
    def test_usages_even_and_skewed(self, in_triton, usages, window):
        inputs = make(T=40, H=len(usages), groups=2, usages=usages, bias=True)
        check_against_the_definition(inputs, window=window, **in_triton)

    @pytest.mark.parametrize(
        ("bounds", "window", "K"),
        [
            (None, 45, 5),
            ([0, 60, 100], 37, 16),
            *(pytest.param(*at, marks=pytest.mark.slow) for at in ((None, 0, 16), ([0, 60, 63, 100], 0, 5))),
        ],
        ids=str,
    )
    def test_blocks_that_all_queries_see(self, in_triton, bounds, window, K):
        """Whole blocks before a query's own, from the start of its document and of its window, need no mask."""
        inputs = make(T=100, H=1, K=K, V=K, groups=2, usages=(0.9,), bias=True)
        options = {"cu_seqlens": None if bounds is None else torch.tensor(bounds), "window": window}
        check_against_the_definition(inputs, **options, **in_triton)

    @pytest.mark.parametrize("inner, after, blocks", [(0, 0, 0), (0, 16, 1), (1, 33, 1), (17, 31, 0), (-9, 50, 3)])
    def test_blocks_are_whole(self, inner, after, blocks):
        out = torch.zeros(2, dtype=torch.int32)
        whole[(1,)](out, inner, after, 16)
        first, last = out.tolist()
        assert last - first == 16 * blocks and first % 16 == 0
        assert not blocks or (first >= inner and last <= after)

    @pytest.mark.parametrize(
        "K, V, bounds",
        [
            (16, 32, None),
            (128, 128, [0, 70, 70, 150]),
            (256, 256, [0, 9, 80]),
            *(pytest.param(K, K, None, marks=pytest.mark.slow) for K in (128, 256)),
        ],
    )
    def test_at_the_sizes_that_models_have(self, K, V, bounds):
        """In blocks of the size that runs on a GPU."""
        inputs = make(T=bounds[-1] if bounds else 150, H=1, K=K, V=V, bias=True)
        options = {"cu_seqlens": bounds and torch.tensor(bounds)}
        check_against_the_definition(inputs, backend="triton", tolerance=1e-11, **options)

    def test_single_precision(self, in_triton):
        inputs = make(T=64, H=4, usages=(0.9, 0.0, 0.05, 0.5), bias=True)
        rounded = {n: x.detach().float().requires_grad_() if x.is_floating_point() else x for n, x in inputs.items()}
        exact = {n: x.detach().double().requires_grad_() if x.is_floating_point() else x for n, x in rounded.items()}
        for one, other in zip(run(rounded, backend="triton"), run(exact, backend="naive"), strict=True):
            assert_close(one.double(), other, rtol=0, atol=1e-5)

    def test_gradients_are_those_of_finite_differences(self, in_triton):
        inputs = make(T=4, H=1, K=2, V=2, bias=True)
        stored = inputs.pop("stored")

        def function(q, k, v, bias):
            return routed_attention(q, k, v, stored, bias, backend="triton")

        assert torch.autograd.gradcheck(function, list(inputs.values()), fast_mode=True)

    @pytest.mark.parametrize("window", [3, pytest.param(0, marks=pytest.mark.slow)])
    def test_the_operator_is_sound(self, in_triton, window):
        """Fake tensors, autograd registration and aliasing, as torch.compile and FSDP rely on them."""
        inputs = {n: x.float() if x.is_floating_point() else x for n, x in make(T=20, bias=True).items()}
        parts = [inputs[name].detach().requires_grad_() for name in ("q", "k", "v", "bias")]
        arguments = (
            *parts,
            *triton_ranked.plan(inputs["stored"], Layout.of(None, inputs["stored"]), window),
            0.5,
            window,
        )
        torch.library.opcheck(torch.ops.lightning_mixers.routed_attention, arguments)

    @pytest.mark.parametrize("window", [0, 4])
    def test_the_plan_counts_what_is_seen(self, window):
        """Ranks low to high, and the window, are the keys of the definition's mask."""
        stored, bounds = torch.rand(1, 30, 2) < 0.4, torch.tensor([0, 11, 11, 30])
        index, counts, low, high, starts, ends = ranks.plan(stored, Layout.of(bounds, stored), window)
        for row, kept in enumerate(stored[0].T):
            positions = kept.nonzero()[:, 0]
            assert torch.equal(index[row, : counts[row]].long(), positions)
            for t in range(30):
                first, last = (0, 11) if t < 11 else (11, 30)
                assert (starts[0, t], ends[0, t]) == (first, last)
                seen = index[row, low[row, t] : high[row, t]].tolist()
                assert seen == [int(j) for j in positions if first <= j <= t - window]

    @pytest.mark.parametrize("window", [0, 1, 5])
    @pytest.mark.parametrize(
        ("T", "bounds"), [(1, None), (30, None), (1030, None), (30, [0, 11, 11, 30]), (1100, [0, 1025, 1026, 1100])]
    )
    def test_the_plan_of_the_kernel_is_that_of_the_definition(self, window, T, bounds):
        stored = torch.rand(1 if bounds else 2, T, 3) < torch.tensor([0.0, 0.4, 1.0])
        layout = Layout.of(None if bounds is None else torch.tensor(bounds), stored)
        plans = (plan(stored, layout, window) for plan in (triton_ranked.plan, ranks.plan))
        for one, other in zip(*plans, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.filterwarnings("ignore::UserWarning")
class TestFlex:
    """The rivals, forward: on a CPU FlexAttention has no backward pass."""

    @pytest.mark.parametrize("backend", ["flex", "flex_ranked"])
    @pytest.mark.parametrize(
        ("bounds", "bias", "window"),
        [(None, False, 0), (None, True, 5), ([0, 7, 7, 140, 150], True, 0), ([0, 7, 7, 140, 150], False, 5)],
        ids=str,
    )
    def test_it_is_the_definition(self, backend, bounds, bias, window):
        inputs = make(T=150, H=3, K=16, V=16, groups=2, usages=(1.0, 0.0, 0.3), bias=bias)
        inputs = {name: x if x is None else x.detach() for name, x in inputs.items()}
        options = {"window": window, "cu_seqlens": None if bounds is None else torch.tensor(bounds)}
        if backend == "flex_ranked" and window:
            with pytest.raises(ValueError, match="has no window"):
                routed_attention(**inputs, **options, backend=backend)
            return
        with torch.no_grad():
            golden = routed_attention(**inputs, **options, backend="naive")
            assert_close(routed_attention(**inputs, **options, backend=backend), golden, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("T", [1, 128, 300])
    def test_blocks_cover_all_that_is_seen(self, T):
        """On a GPU what is in no block is not visited; here only the mask counts, so the blocks are looked at."""
        stored = torch.rand(2, T, 2) < torch.tensor([0.9, 0.1])
        masks = []
        with pytest.MonkeyPatch.context() as patch:
            plain = flex._blocks
            patch.setattr(flex, "_blocks", lambda *args: masks.append(plain(*args)) or masks[-1])
            x = torch.randn(2, T, 2, 16)
            for backend in ("flex", "flex_ranked"):
                routed_attention(x, x, x, stored, backend=backend)
        over_all, over_ranks = ((mask.to_dense() > 0) for mask in masks)
        blocks = -(-T // flex.BLOCK)
        assert torch.equal(over_all[0, 0], torch.ones(blocks, blocks, dtype=torch.bool).tril())
        high = triton_ranked.plan(stored, Layout.of(None, stored), 0).high.view(2, 2, T)
        for b, h, block in [(b, h, n) for b in range(2) for h in range(2) for n in range(blocks)]:
            most = int(high[b, h, : (block + 1) * flex.BLOCK][-1])
            assert over_ranks[b, h, block].sum() == -(-most // flex.BLOCK)


def test_single_precision(path):
    inputs = make(B=2, T=64, H=4, usages=(0.9, 0.0, 0.05, 0.5), bias=True)
    rounded = {n: x.detach().float().requires_grad_() if x.is_floating_point() else x for n, x in inputs.items()}
    exact = {n: x.detach().double().requires_grad_() if x.is_floating_point() else x for n, x in rounded.items()}
    for one, other in zip(run(rounded, backend="torch"), run(exact, backend="naive"), strict=True):
        assert_close(one.double(), other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("T", [256, 512])
def test_the_work_follows_what_is_stored(T, monkeypatch):
    """Not the length, from a few hundred tokens on: logits computed, of all that there are."""
    plain, logits = scaled_dot_product_attention, []

    def count(q, k, v, **options):
        logits.append(q.shape[:-1].numel() * k.shape[-2])
        return plain(q, k, v, **options)

    monkeypatch.setattr(torch_gathered.F, "scaled_dot_product_attention", count)
    inputs = make(B=2, T=T, H=2, usages=(0.125,))
    routed_attention(**inputs, backend="torch")
    assert sum(logits) < 0.25 * 2 * 2 * T * T


def test_beyond_the_length_where_gathering_begins():
    """As it comes, with more than one block of queries."""
    T = max(torch_gathered.DENSE_BELOW, torch_gathered.QUERY_BLOCK) + 9
    check_against_the_definition(make(T=T, H=2, K=2, V=2, usages=(0.02, 0.3)))


@pytest.mark.parametrize("backend", ["naive", "torch"])
class TestNothingStored:
    def test_reads_exact_zeros_and_has_zero_gradients(self, path, backend):
        for x in run(make(B=2, usages=(0.0,), bias=True), backend=backend):
            assert torch.equal(x, torch.zeros_like(x))

    def test_before_the_first_stored_token(self, path, backend):
        inputs = make(B=2, H=2, usages=(0.0,))
        inputs["stored"][:, 12, 1] = True
        o, *gradients = run(inputs, backend=backend)
        assert torch.equal(o[:, :12], torch.zeros_like(o[:, :12]))
        assert torch.equal(o[:, :, 0], torch.zeros_like(o[:, :, 0]))
        assert torch.equal(o[:, 12:, 1], inputs["v"][:, 12:13, 1].expand(-1, 8, -1))  # one key: its value, exactly
        assert all(x.isfinite().all() for x in gradients)

    def test_however_large_the_logits(self, path, backend):
        inputs = make(B=1, usages=(0.0, 0.1))
        for x in run(inputs | {"q": (1e4 * inputs["q"]).detach().requires_grad_()}, backend=backend):
            assert x.isfinite().all()


@pytest.mark.parametrize("backend", ["naive", "torch"])
class TestMeaning:
    def test_everything_stored_is_causal_attention(self, path, backend):
        for groups in (1, 3):
            inputs = make(B=2, T=30, groups=groups, usages=(1.0,))
            q, k, v = (inputs[name].transpose(1, 2) for name in "qkv")
            golden = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
            assert_close(routed_attention(**inputs, backend=backend), golden, rtol=0, atol=1e-12)

    def test_a_window_as_long_as_the_sequence_is_causal_attention(self, path, backend):
        inputs = make(B=2, T=30, usages=(0.5,))
        everything = inputs | {"stored": torch.ones_like(inputs["stored"])}
        one = routed_attention(**inputs, window=30, backend=backend)
        assert_close(one, routed_attention(**everything, backend=backend), rtol=0, atol=1e-12)

    def test_what_is_not_stored_does_not_matter(self, path, backend):
        inputs = make(B=2, T=30, usages=(0.3,))
        hidden = ~inputs["stored"][..., None]
        other = inputs | {name: torch.where(hidden, 1e3 * inputs[name] + 7, inputs[name]) for name in "kv"}
        assert torch.equal(routed_attention(**inputs, backend=backend), routed_attention(**other, backend=backend))

    def test_no_output_depends_on_a_later_token(self, path, backend):
        inputs, other = make(B=2, T=30, bias=True), make(seed=1, B=2, T=30, bias=True)
        joined = {name: torch.cat([x[:, :17], other[name][:, 17:]], 1) for name, x in inputs.items()}
        for window in (0, 3):
            one, two = (routed_attention(**x, window=window, backend=backend) for x in (inputs, joined))
            assert_close(one[:, :17], two[:, :17], rtol=0, atol=1e-12)
            assert not torch.equal(one[:, 17:], two[:, 17:])


@pytest.mark.parametrize("backend", ["naive", "torch"])
class TestInterface:
    def test_no_tokens_and_no_sequences(self, backend):
        assert routed_attention(**make(T=0, groups=2), backend=backend).shape == (1, 0, 4, 3)
        o = routed_attention(**make(B=0, T=300, groups=2), backend=backend)  # where the torch backend gathers
        assert o.shape == (0, 300, 4, 3)
        o.sum().backward()

    def test_the_output_has_the_dtype_of_the_values(self, backend):
        inputs = {n: x if x is None or n == "stored" else x.bfloat16() for n, x in make().items()}
        assert routed_attention(**inputs, backend=backend).dtype == torch.bfloat16

    def test_arguments_that_do_not_fit(self, backend):
        for changes, message in [
            ({"q": torch.zeros(1, 20, 3, 4)}, "q, k and v do not fit"),
            ({"q": torch.zeros(1, 20, 2, 5)}, "q, k and v do not fit"),
            ({"v": torch.zeros(1, 19, 2, 3)}, "q, k and v do not fit"),
            ({"stored": torch.zeros(1, 20, 1, dtype=torch.bool)}, r"stored must be \(1, 20, 2\)"),
            ({"stored": torch.zeros(1, 20, 2)}, "stored must be bool, got torch.float32"),
            ({"stored": None}, "stored must be bool, got None"),
            ({name: torch.zeros(1, 20, 4) for name in "qkv"}, "q, k and v do not fit"),
            ({"bias": torch.zeros(1, 20)}, r"bias must be \(1, 20, 2\)"),
            ({"window": -1}, "window must not be negative, got -1"),
            ({"cu_seqlens": torch.tensor([0, 19])}, "cu_seqlens must rise from 0 to 20"),
        ]:
            with pytest.raises(ValueError, match=message):
                routed_attention(**make() | changes, backend=backend)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="unknown backend 'flash' for routed_attention; known: auto, naive, torch"):
        routed_attention(**make(), backend="flash")


def test_rows_are_grouped_by_like_size():
    assert like_sizes([1000, 900, 810, 500, 12, 0, 0]) == [3, 1, 3]
    assert like_sizes([5]) == [1]
