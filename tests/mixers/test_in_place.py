"""States of fixed capacity: the same as out of place, where they lie, in a dozen launches, and never past their end."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from kernels import dispatch
from kernels.paged_attention import PAGE
from mixers import Decoder, build_mixer, kv_cache_bytes, set_kv_usage
from mixers.ham import HAM
from mixers.in_place import InPlaceState
from recipes.bench.launches import launches, waits
from tests.mixers.cases import CASES, DIM, assert_same, every_case, make, tokens


@pytest.fixture
def triton(request, monkeypatch):
    """Whether steps in place run by Triton's kernels."""
    if getattr(request, "param", True):
        monkeypatch.setitem(dispatch.PREFERENCE, "cpu", ("triton", "torch"))


def stepped(mixer, x, start, triton=False, tokens=1, spare=0):
    """Tokens from `start` on, one by one in place and out of place, are the same; the states at the end."""
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        state = mixer.init_state(len(x))
        state = mixer(x[:, :start], state).state if start else state
        ours = mixer.reserve(state, x.shape[1] - start + spare)
        places = pointers(ours)
        for t in range(start, x.shape[1]):
            plain = mixer(x[:, t : t + 1], state)
            with patch.context() as inside:
                if triton:
                    inside.setitem(dispatch.PREFERENCE, "cpu", ("triton", "torch"))
                out = mixer(x[:, t : t + 1], ours)
            assert out.state is ours
            assert_same(replace(out, state=ours.select(torch.arange(len(x)))), plain, TOLERANCE[x.dtype])
            if out.routing is not None:
                assert out.routing.window == plain.routing.window
                assert_close(out.routing.kept, plain.routing.kept)
                assert torch.equal(out.routing.tau, plain.routing.tau)
            state = plain.state
        assert pointers(ours) == places
        ours.check()
    return ours, state


TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


def pointers(state):
    """Where the tensors of a state of fixed capacity are."""
    found, todo = {}, [("", state.held)]
    while todo:
        name, x = todo.pop()
        if isinstance(x, torch.Tensor):
            found[name] = x.data_ptr()
        elif isinstance(x, dict):
            todo += [(f"{name}.{key}", value) for key, value in x.items()]
        elif hasattr(x, "__dict__"):
            todo += [(f"{name}.{key}", value) for key, value in vars(x).items()]
    return found


@every_case
def test_a_step_in_place_is_a_step_out_of_place(case):
    mixer, x = make(case), tokens(0, 2, 14)
    if isinstance(mixer, HAM) and mixer.max_tokens:
        with pytest.raises(ValueError, match="a cache with max_tokens has no form of fixed capacity"):
            mixer.reserve(mixer.init_state(2), 4)
    else:
        stepped(mixer, x, 9)


@pytest.mark.parametrize(
    "case",
    [
        *("gated_delta_net", "gdn grouped queries", "attention", "attention all"),
        *("ham cosine", "ham sum", "ham grouped queries", "ham linear_attention", "ham window and sinks"),
        *(pytest.param(case, marks=pytest.mark.slow) for case in ("delta_net", "linear_attention", "gdn grouped")),
        *(pytest.param(case, marks=pytest.mark.slow) for case in ("attention bias", "ham grouped")),
    ],
)
def test_the_kernels_of_a_step_are_the_mixer(case):
    assert case in CASES
    stepped(make(case), tokens(0, 2, 9), 7, triton=True)


@settings(max_examples=5)
@given(
    batch=st.integers(1, 2),
    heads=st.sampled_from([(1, 1), (2, 2), (2, 1)]),
    sizes=st.sampled_from([(1, 1), (5, 3), (4, 8)]),
    start=st.sampled_from([0, 1, PAGE - 2, PAGE - 1, PAGE]),
    usage=st.sampled_from([0.0, 0.5, 1.0]),
    window=st.sampled_from([0, 1, 4]),
    triton=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_at_every_edge(batch, heads, sizes, start, usage, window, triton, dtype):
    """The first token, the ends of pages, heads that store nothing or all, a window of the token itself."""
    torch.manual_seed(0)
    options = dict(num_heads=heads[0], num_kv_heads=heads[1], head_dim=sizes[0], value_dim=sizes[1], window=window)
    mixer = build_mixer("ham", dim=DIM, **options, threshold={"name": "fixed", "tau": 0.0}).to(dtype).eval()
    x = tokens(1, batch, start + 3, dtype=dtype)
    middle = float(mixer(x).routing.scores.median())
    mixer.threshold.fixed = {0.0: 1e9, 0.5: middle + 1e-4, 1.0: -1.0}[usage]
    stepped(mixer, x, start, triton)


def test_several_blocks_of_everything():
    """Values of more than a program's share, a score and a window of several blocks."""
    torch.manual_seed(0)
    mixer = build_mixer("ham", dim=DIM, num_heads=1, head_dim=130, value_dim=70, window=40).double()
    x = tokens(0, 1, 45)
    mixer(x)
    stepped(mixer.eval(), x, 43, triton=True)


@pytest.mark.parametrize(
    ("spec", "most"),
    [
        ({"name": "ham"}, 12),
        ({"name": "ham", "num_kv_heads": 1, "window": 4, "sinks": 2}, 12),
        ({"name": "ham", "combine": "sum", "rule": "linear_attention", "scope": "head"}, 9),
        ({"name": "gdn"}, 8),
        ({"name": "attention", "window": 4}, 6),
    ],
)
def test_a_step_takes_a_dozen_launches_and_never_waits(spec, most, monkeypatch):
    torch.manual_seed(0)
    mixer = build_mixer(spec | {"num_heads": 2, "head_dim": 4}, dim=8)
    mixer(torch.randn(2, 40, 8))
    mixer.eval()
    with torch.no_grad():
        state = mixer.reserve(mixer(torch.randn(2, 9, 8), mixer.init_state(2)).state, 4)
        before = pointers(state)
        monkeypatch.setitem(dispatch.PREFERENCE, "cpu", ("triton", "torch"))
        with launches() as found:
            mixer(torch.randn(2, 1, 8), state)
    assert pointers(state) == before
    assert not waits(found)
    kernels = {"gdn": ("convolve", "recur", "finish"), "attention": ("rotate", "store", "attend", "finish")}
    kernels = kernels.get(spec["name"], ("convolve", "recur", "store", "attend", "finish"))
    ran = {name.removeprefix("triton ").removesuffix("_kernel"): n for name, n in found.items() if " " in name}
    assert ran == dict.fromkeys(kernels, 1)
    assert found.total() - 1 <= most  # less the draw of the token
    assert found["randn"] == 1


def test_a_router_without_a_kernel_waits_for_nothing_either(monkeypatch):
    for name, options in (
        ("ham", {"router": "demand"}),
        ("ham", {"router": "recency"}),
        ("attention", {"conv_size": 2}),
    ):
        mixer = build_mixer(name, dim=8, num_heads=2, head_dim=4, **options)
        mixer(torch.randn(2, 40, 8))
        mixer.eval()
        with torch.no_grad():
            state, x = mixer.reserve(mixer.init_state(2), 4), torch.randn(2, 1, 8)
            with monkeypatch.context() as patch, launches() as found:
                patch.setitem(dispatch.PREFERENCE, "cpu", ("triton", "torch"))
                mixer(x, state)
        assert found.total() > 5 and not waits(found)


def test_a_step_is_one_graph_for_torch_compile(triton):
    torch._dynamo.reset()
    torch.manual_seed(0)
    mixer = build_mixer("ham", dim=8, num_heads=2, head_dim=4, window=2, kv_usage=1.0).double().eval()
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    with torch.no_grad():
        plain = mixer.init_state(1)
        ours = mixer.reserve(plain, 4)
        before = pointers(ours)
        for t in range(4):
            expected = mixer(x[:, t : t + 1], plain)
            plain = expected.state
            with torch.compiler.set_stance("fail_on_recompile" if t else "default"):
                out = compiled(x[:, t : t + 1], ours)
            assert_close(out.hidden, expected.hidden, rtol=1e-10, atol=1e-10)
    assert pointers(ours) == before
    assert ours.held.kv.pages.length.tolist() == [4, 4]


class TestFull:
    def full(self, usage=1.0):
        torch.manual_seed(0)
        mixer = build_mixer("ham", dim=8, num_heads=2, head_dim=4, kv_usage=1.0).double().eval()
        x = torch.randn(2, PAGE + 4, 8, dtype=torch.float64)
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setitem(dispatch.PREFERENCE, "cpu", ("torch",))
            state = mixer.reserve(mixer(x[:, : PAGE - 2], mixer.init_state(2)).state, 2, usage)
            for t in (PAGE - 2, PAGE - 1):
                mixer(x[:, t : t + 1], state)
        return mixer, x, state

    def test_it_is_refused(self):
        mixer, x, state = self.full()
        before = {name: v.clone() for name, v in vars(state.held).items() if isinstance(v, torch.Tensor)}
        with (
            torch.no_grad(),
            pytest.raises(ValueError, match="the cache of fixed capacity is full; `reserve` with more"),
        ):
            mixer(x[:, PAGE : PAGE + 1], state)
        assert all(torch.equal(v, before[name]) for name, v in vars(state.held).items() if name in before)
        with torch.no_grad():
            plain = state.select(torch.arange(2))
            larger = mixer.reserve(state, 1)
            one, other = (mixer(x[:, PAGE : PAGE + 1], s).hidden for s in (plain, larger))
        assert_close(one, other, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("triton", [False, True], indirect=True, ids=["torch", "triton"])
    def test_in_a_graph_it_writes_to_nobody_and_says_so(self, triton, monkeypatch):
        """A graph's replay asks nobody: `begin` is not run."""
        mixer, x, state = self.full()
        monkeypatch.setattr(InPlaceState, "begin", lambda self: None)
        pages = state.held.kv.pages
        before = {name: getattr(pages, name).clone() for name in ("k", "v", "table", "length")}
        with torch.no_grad():
            for t in (PAGE, PAGE + 1):
                mixer(x[:, t : t + 1], state)
        assert torch.equal(pages.k[1:], before["k"][1:]) and torch.equal(pages.v[1:], before["v"][1:])
        assert torch.equal(pages.table, before["table"]) and torch.equal(pages.length, before["length"])
        with pytest.raises(RuntimeError, match="the cache of fixed capacity was full: 8 keys and values were not kept"):
            state.check()

    @pytest.mark.parametrize("triton", [False, True], indirect=True, ids=["torch", "triton"])
    def test_the_last_free_page_goes_to_one_row(self, triton, monkeypatch):
        mixer, x, state = self.full()
        pages = state.held.kv.pages
        pages.table = torch.nn.functional.pad(pages.table, (0, 1))
        pages.free = torch.cat([pages.free, pages.free.new_tensor([len(pages.free)])])
        pages.k, pages.v = (torch.cat([p, torch.zeros_like(p[:1])]) for p in (pages.k, pages.v))
        monkeypatch.setattr(InPlaceState, "begin", lambda self: None)
        with torch.no_grad():
            for t in (PAGE, PAGE + 1):
                mixer(x[:, t : t + 1], state)
        assert sorted(pages.length.tolist()) == [PAGE, PAGE, PAGE, PAGE + 2]
        assert len(set(pages.table.flatten().tolist()) - {0}) == 5
        assert int(pages.lost) == 6


@pytest.mark.parametrize("triton", [False, True], indirect=True, ids=["torch", "triton"])
@pytest.mark.parametrize(
    ("first", "then"), [(torch.no_grad, torch.inference_mode), (torch.inference_mode, torch.no_grad)]
)
def test_inference_mode_may_begin_or_end_on_the_way(first, then, triton):
    torch.manual_seed(0)
    mixer = build_mixer("ham", dim=8, num_heads=2, head_dim=4, window=2, kv_usage=1.0).double().eval()
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    with first():
        plain = mixer(x[:, :4], mixer.init_state(1)).state
        ours = mixer.reserve(plain, 2)
    for t, mode in ((4, first), (5, then)):
        with mode():
            out, expected = (mixer(x[:, t : t + 1], state) for state in (ours, plain))
            assert_close(out.hidden, expected.hidden, rtol=1e-10, atol=1e-10)
            plain = expected.state


@pytest.mark.parametrize("name", ["ham", "gdn", "attention"])
def test_under_autocast_hidden_and_memory_keep_their_dtypes(name, triton):
    torch.manual_seed(0)
    mixer = build_mixer(name, dim=16, num_heads=2, head_dim=8).eval()
    x = torch.randn(2, 3, 16)
    if name == "ham":
        set_kv_usage(mixer, 1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = mixer.init_state(2)
        ours = mixer.reserve(plain, 3)
        kinds = {name: x.dtype for name, x in vars(ours.held).items() if isinstance(x, torch.Tensor)}
        for t in range(3):
            out, expected = (mixer(x[:, t : t + 1], state) for state in (ours, plain))
            plain = expected.state
            assert out.hidden.dtype == expected.hidden.dtype == torch.bfloat16
            assert_close(out.hidden, expected.hidden, rtol=0.05, atol=0.05)
    assert {name: x.dtype for name, x in vars(ours.held).items() if isinstance(x, torch.Tensor)} == kinds


def test_a_share_of_the_tokens_takes_a_share_of_the_bytes():
    mixer = build_mixer("ham", dim=8, num_heads=2, head_dim=4)
    T, entry = 4096, 2 * 4 * 4
    with torch.no_grad():
        whole, eighth = (mixer.reserve(mixer.init_state(3), T, usage) for usage in (1.0, 0.125))
        assert kv_cache_bytes(whole) == 3 * 2 * T * entry
        assert kv_cache_bytes(eighth) == 3 * 2 * (T // 8 + 2 * PAGE) * entry
        assert whole.room == T and 1 <= eighth.room < T
        window = build_mixer("attention", dim=8, num_heads=2, window=3)
        assert kv_cache_bytes(window.reserve(window.init_state(1), T)) == 2 * (2 * PAGE + 3) * entry


def test_a_decoder_goes_on_in_place():
    torch.manual_seed(0)
    decoder = Decoder(11, dim=16, depth=3, mixer="ham,gdn,attention").double().eval()
    words = torch.randint(11, (2, 9))
    with torch.no_grad(), pytest.warns(UserWarning, match="has seen no training step"):
        plain = decoder(words[:, :6], decoder.init_state(2)).state
        ours = decoder.reserve(plain, 3)
        for t in range(6, 9):
            expected, out = (decoder(words[:, t : t + 1], state) for state in (plain, ours))
            plain = expected.state
            assert_close(out.hidden, expected.hidden, rtol=1e-10, atol=1e-10)
    assert all(one is other for one, other in zip(out.state, ours, strict=True))


def test_mistakes():
    mixer = build_mixer("ham", dim=8, num_heads=2, head_dim=4, kv_usage=1.0).eval()
    other, x = build_mixer("gdn", dim=8, num_heads=2, head_dim=4), torch.randn(2, 2, 8)
    with torch.no_grad():
        state = mixer.reserve(mixer.init_state(2), 4)
        for wrong, message in (
            (lambda: mixer(x, state), "takes one token of every sequence, not an input of 2 tokens"),
            (lambda: mixer(x[:1], state, torch.tensor([0, 1, 2])), "not an input packed"),
            (lambda: mixer(x[:, :1], state, padding_mask=torch.ones(2, 1, dtype=torch.bool)), "not an input padded"),
            (lambda: other(x[:, :1], state), "the state is of another mixer"),
            (lambda: other.reserve(state, 4), "the state is of another mixer"),
            (lambda: mixer.reserve(mixer.init_state(2), 0), "tokens must be at least 1, got 0"),
            (lambda: mixer.reserve(mixer.init_state(2), 1.5), "tokens must be a whole number, got 1.5"),
            (lambda: mixer.reserve(mixer.init_state(2), 1, 1.5), "kv_usage must be a number from 0 to 1, got 1.5"),
        ):
            with pytest.raises(ValueError, match=message):
                wrong()
        mixer.window = 3
        with pytest.raises(ValueError, match="the window is 3, the state was reserved for 0; reserve it anew"):
            mixer(x[:, :1], state)
    with pytest.raises(ValueError, match="written in place, without a gradient"):
        mixer(x[:, :1], state)


def test_another_output_projection_is_noticed(triton):
    """The score is that of the weights which the state was reserved for."""
    mixer = build_mixer("ham", dim=8, num_heads=2, head_dim=4, kv_usage=1.0).eval()
    with torch.no_grad():
        state = mixer.reserve(mixer.init_state(1), 4)
        mixer(torch.randn(1, 1, 8), state)
        mixer.out.weight.mul_(2)
        for late in (
            lambda: mixer(torch.randn(1, 1, 8), state),
            state.check,
        ):  # a compiled step cannot ask: `check` does
            with pytest.raises(ValueError, match="the output projection has changed since the state was reserved"):
                late()
        mixer.reserve(state, 4).check()
