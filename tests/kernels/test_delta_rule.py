"""The chunked delta rule against its definition, token by token, and both against transformers' implementation."""

import logging

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from kernels import dispatch
from kernels.delta_rule import BACKENDS, gated_delta_rule, torch_chunks, triton_chunks, triton_sizes
from kernels.delta_rule.triton_forward import inverse
from kernels.sequences import Layout
from tests.kernels.delta_rule_cases import lengths_of_documents, make, small_shapes


@triton.jit
def inverse_of(matrix, x, C: tl.constexpr):
    at = tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(x + at, inverse(tl.load(matrix + at), C, "ieee"))


AVAILABLE = [name for name in BACKENDS if not dispatch.unavailable(name, "cpu")]
AVAILABLE.remove("triton_recurrent")  # gives no gradient: tests/kernels/test_delta_rule_recurrent.py
FAST = [name for name in AVAILABLE if name != "naive"]
OUTPUTS = ("o", "prediction", "final_state")


def run(inputs, outputs=OUTPUTS, **options):
    """Results and gradients, by name; the gradients are of a random function of the named outputs."""
    results = dict(zip(OUTPUTS, gated_delta_rule(**inputs, **options), strict=True))
    draw = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(x.shape, generator=draw, dtype=torch.float64) for name, x in results.items()}
    loss = sum((results[name] * weights[name].to(results[name])).sum() for name in outputs)
    present = {name: x for name, x in inputs.items() if x is not None}
    gradients = torch.autograd.grad(loss, list(present.values()), allow_unused=True, materialize_grads=True)
    return {name: x.detach() for name, x in results.items()} | {
        f"gradient of {name}": x for name, x in zip(present, gradients, strict=True)
    }


def compare(one, other, tolerance):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].isfinite().all(), name
        size = 1 + other[name].abs().max().item() if other[name].numel() else 1
        assert_close(one[name].double(), other[name], rtol=0, atol=tolerance * size, msg=lambda m, n=name: f"{n}: {m}")


shapes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 1000),
        "H": st.integers(1, 3),
        "K": st.integers(1, 6),
        "V": st.integers(1, 6),
        "groups": st.integers(1, 3),
        "keys": st.sampled_from(["any", "alike", "zero", "some zero"]),
        "decay": st.sampled_from(["none", "any", "slow", "reset", "fast"]),
        "beta": st.sampled_from(["any", "0", "1"]),
    }
)


@pytest.fixture(scope="module")
def small_chunks():
    """Chunks of 32 in the Triton kernels: more of them in as many tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_chunks, "chunk_size", lambda *size: 32)
        yield


def check_batch(backend, delta, shape, B, T, first):
    inputs = make(B=B, T=T, **shape) | ({} if first else {"initial_state": None})
    compare(run(inputs, backend=backend, delta=delta), run(inputs, backend="naive", delta=delta), 1e-9)


def check_packed(backend, delta, shape, lengths, first):
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    inputs = make(T=sum(lengths), N=len(lengths), **shape) | ({} if first else {"initial_state": None})
    options = {"delta": delta, "cu_seqlens": bounds}
    compare(run(inputs, backend=backend, **options), run(inputs, backend="naive", **options), 1e-9)


class TestShapes:
    @settings(max_examples=25)
    @given(
        delta=st.booleans(),
        shape=shapes,
        B=st.integers(1, 3),
        T=st.sampled_from([1, 2, 15, 16, 17, 32, 43]),
        first=st.booleans(),
    )
    def test_batches(self, delta, shape, B, T, first):
        check_batch("torch", delta, shape, B, T, first)

    @settings(max_examples=25)
    @given(delta=st.booleans(), shape=shapes, lengths=lengths_of_documents, first=st.booleans())
    def test_packed_sequences(self, delta, shape, lengths, first):
        check_packed("torch", delta, shape, lengths, first)

    @settings(max_examples=4)
    @given(
        delta=st.booleans(),
        shape=small_shapes,
        B=st.integers(1, 2),
        T=st.sampled_from([1, 31, 33, 70, 97]),
        first=st.booleans(),
    )
    def test_batches_in_triton(self, delta, shape, B, T, first, small_chunks, no_stale_memory):
        check_batch("triton", delta, shape, B, T, first)

    @settings(max_examples=4)
    @given(delta=st.booleans(), shape=small_shapes, lengths=lengths_of_documents, first=st.booleans())
    def test_packed_sequences_in_triton(self, delta, shape, lengths, first, small_chunks, no_stale_memory):
        check_packed("triton", delta, shape, lengths, first)


@pytest.mark.parametrize("backend", FAST)
class TestAgainstTheDefinition:
    @pytest.mark.parametrize("output", OUTPUTS)
    def test_gradients_of_one_output_alone(self, backend, output):
        for delta in (True, False):
            inputs, options = make(T=18, H=1), {"delta": delta, "outputs": [output]}
            compare(run(inputs, backend=backend, **options), run(inputs, backend="naive", **options), 1e-9)

    @pytest.mark.parametrize(("keys", "decay"), [("any", "any"), ("alike", "none"), ("alike", "reset")])
    def test_single_precision(self, backend, keys, decay):
        exact = make(T=100, H=1, K=16, V=16, keys=keys, decay=decay, beta="1" if keys == "alike" else "any")
        rounded = {name: x.detach().float() for name, x in exact.items()}
        exact = {name: x.double().requires_grad_() for name, x in rounded.items()}
        for x in rounded.values():
            x.requires_grad_()
        compare(run(rounded, backend=backend), run(exact, backend="naive"), 1e-5)

    def test_defaults(self, backend):
        """No decay, a write strength of one, and a scale of K ** -0.5."""
        inputs = make(T=20) | {"initial_state": None}
        inputs |= {"g": torch.zeros_like(inputs["g"]), "beta": torch.ones_like(inputs["beta"])}
        told = gated_delta_rule(**inputs, scale=0.5, backend="naive")
        for one, other in zip(gated_delta_rule(*(inputs[n] for n in "qkv"), backend=backend), told, strict=True):
            assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("bounds", [None, [0, 1, 33, 70]], ids=str)
def test_a_decay_of_minus_infinity_leaves_nothing(backend, bounds):
    """Its gradient is zero, as in the definition; what is no number stays none."""
    inputs = make(T=70, H=1, decay="nothing left", N=3 if bounds else 1)
    ends = torch.tensor([0, 69])
    inputs["g"] = inputs["g"].detach().index_fill(1, ends, -torch.inf).requires_grad_()
    gone = inputs["g"].isneginf()
    assert 4 < gone.sum() < gone.numel()
    options = {"cu_seqlens": None if bounds is None else torch.tensor(bounds)}
    ours = run(inputs, backend=backend, **options)
    compare(ours, run(inputs, backend="naive", **options), 1e-9)
    assert ours["gradient of g"][gone].abs().max() < 1e-12
    inputs["g"] = inputs["g"].detach().clone()
    inputs["g"][0, 40] = torch.nan
    assert gated_delta_rule(**inputs, backend=backend, **options)[0][0, 40].isnan().all()


def test_a_reset_forgets_and_what_follows_is_exact():
    """After a log-decay of -1e4 single precision could no longer tell the small decays that follow apart."""
    inputs = make(B=1, T=16, decay="slow")
    inputs["g"] = torch.where(torch.arange(16)[None, :, None] == 3, -1e4, inputs["g"].detach()).requires_grad_()
    rounded = {name: x.detach().float().requires_grad_() for name, x in inputs.items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in rounded.items()}
    one, other = run(rounded, backend="torch"), run(exact, backend="naive")
    compare(one, other, 2e-6)
    changed = exact | {"initial_state": exact["initial_state"] * 7}
    assert torch.equal(run(changed, backend="naive")["o"][:, 3:], other["o"][:, 3:])


LARGE = [(256, 256, 16, [0, 17, 24]), (256, 256, 16, None), (128, 128, 64, None)]


@pytest.mark.parametrize(
    "K, V, C, bounds",
    [
        (32, 80, 32, None),
        (128, 128, 64, [0, 3, 3, 70]),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in LARGE),
    ],
)
def test_triton_at_the_sizes_that_models_have(K, V, C, bounds, no_stale_memory, monkeypatch):
    """More than one block of K and of V, in chunks of the sizes that run on a GPU."""
    monkeypatch.setattr(triton_chunks, "chunk_size", lambda *size: C)
    inputs = make(T=bounds[-1] if bounds else 75, H=1, K=K, V=V, N=len(bounds) - 1 if bounds else 1)
    options = {"cu_seqlens": bounds and torch.tensor(bounds)}
    compare(run(inputs, backend="triton", **options), run(inputs, backend="naive", **options), 1e-9)


@pytest.mark.parametrize(("few", "block"), [(0, 64), (3, 32)])
def test_few_programs_take_narrower_blocks(few, block, monkeypatch):
    monkeypatch.setattr(triton_sizes, "FEW", few)
    assert triton_sizes.scan_block(64, 100, 1) == block
    assert triton_sizes.scan_block(32, 100, 1) == 32


@pytest.mark.parametrize("keys", ["any", "alike"])
@pytest.mark.parametrize("C", [16, 32, 64])
def test_the_triangular_inverse(keys, C):
    """In single precision, with a write strength of one: keys that are alike make a series diverge."""
    k = make(T=C, H=1, K=8, keys=keys, dtype=torch.float32)["k"][0, :, 0].detach()
    L = (k @ k.T).tril(-1)
    X = torch.empty(C, C)
    inverse_of[(1,)](L, X, C)
    golden = torch.linalg.inv(torch.eye(C, dtype=torch.float64) + L.double())
    assert_close(X.double(), golden, rtol=0, atol=1e-5)


@pytest.mark.parametrize("delta", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_triton_gradients_are_those_of_finite_differences(delta, small_chunks):
    inputs = make(T=3, H=1, K=2, V=2)

    def function(*parts):
        return gated_delta_rule(*parts[:5], 0.7, parts[5], backend="triton", delta=delta)

    assert torch.autograd.gradcheck(function, list(inputs.values()), fast_mode=True)


def test_the_operator_is_sound(small_chunks):
    """Fake tensors, autograd registration and aliasing, as torch.compile and FSDP rely on them."""
    q, k, v, g, beta, state = (x.detach().float().requires_grad_() for x in make(T=20, H=1, K=4, V=4).values())
    flat = (x[0] for x in (q, k, v, g, beta))
    tables = triton_chunks.chunk_tables(torch.tensor([0, 20], dtype=torch.int32), 20, 32)
    torch.library.opcheck(torch.ops.lightning_mixers.gated_delta_rule, (*flat, state, *tables, 32, 0.5, True, 1))


@pytest.mark.parametrize("delta", [True, False])
def test_chunked_gradients_are_those_of_finite_differences(delta):
    inputs = make(T=5, H=1, K=2, V=3)
    options = {"scale": 0.7, "layout": Layout.of(None, inputs["v"]), "delta": delta, "chunk_size": 2}

    def function(q, k, v, g, beta, initial_state):
        return torch_chunks.gated_delta_rule(q, k, v, g, beta, initial_state=initial_state, **options)

    assert torch.autograd.gradcheck(function, list(inputs.values()))


@pytest.fixture(scope="module")
def transformers_rule():
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule as rule

    return getattr(rule, "__wrapped__", rule)  # where fla is installed, the rule is wrapped to run on a GPU alone


@given(shape=shapes, T=st.sampled_from([1, 16, 21]))
@pytest.mark.parametrize("backend", [name for name in AVAILABLE if name != "triton"])
def test_transformers_says_the_same(transformers_rule, backend, shape, T):
    inputs = {name: x.detach().float() for name, x in make(B=2, T=T, **shape).items()}
    o, prediction, state = gated_delta_rule(**inputs, backend=backend)

    golden = {name: inputs[name].repeat_interleave(shape["groups"], 2) for name in "qk"}
    golden = {"query": golden["q"], "key": golden["k"], "value": inputs["v"], "g": inputs["g"], "beta": inputs["beta"]}

    def golden_rule(tokens):
        parts = {name: x[:, :tokens] for name, x in golden.items()}
        first = inputs["initial_state"]
        return transformers_rule(**parts, initial_state=first, output_final_state=True) if tokens else (None, first)

    golden_o, golden_state = golden_rule(T)
    _, before = golden_rule(T - 1)  # what the memory held when the last token came
    decayed = before * inputs["g"][:, -1].exp()[..., None, None]
    golden_prediction = torch.einsum("bhk,bhkv->bhv", golden["key"][:, -1], decayed)
    assert_close(o, golden_o, rtol=1e-5, atol=1e-5)
    assert_close(state, golden_state, rtol=1e-5, atol=1e-5)
    assert_close(prediction[:, -1], golden_prediction, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", AVAILABLE)
class TestInterface:
    def test_a_bfloat16_model_keeps_prediction_and_state_in_float32(self, backend):
        inputs = make(B=2, T=20, dtype=torch.bfloat16)
        o, prediction, state = gated_delta_rule(**inputs, backend=backend)
        assert (o.dtype, prediction.dtype, state.dtype) == (torch.bfloat16, torch.float32, torch.float32)
        wide = {name: x.float() for name, x in inputs.items()}
        for one, other in zip((prediction, state), gated_delta_rule(**wide, backend=backend)[1:], strict=True):
            assert torch.equal(one, other)

    def test_autocast_leaves_the_recurrence_alone(self, backend):
        inputs = make(B=1, T=20, dtype=torch.float32)
        plain = run(inputs, backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            cast = run(inputs, backend=backend)
        for name in plain if backend in FAST else OUTPUTS:  # backward() of torch's own operations follows autocast
            assert torch.equal(plain[name], cast[name]), name

    @pytest.mark.parametrize(("delta", "cu_seqlens"), [(True, [0, 10, 40]), (False, None)], ids=str)
    def test_less_of_the_prediction_changes_nothing_else(self, backend, delta, cu_seqlens, small_chunks):
        """Writes and statistics are those of the values; outputs and gradients do not depend on what is asked for."""
        inputs = make(T=40, H=1, K=5, V=70, N=2 if cu_seqlens else 1)
        bounds = None if cu_seqlens is None else torch.tensor(cu_seqlens)
        options = dict(cu_seqlens=bounds, backend=backend, delta=delta)

        def results(predict):
            o, p, state = gated_delta_rule(**inputs, **options, predict=predict)
            draw = torch.Generator().manual_seed(1)
            loss = sum((x * torch.randn(x.shape, generator=draw, dtype=x.dtype)).sum() for x in (o, state))
            return p, [o, state, *torch.autograd.grad(loss, list(inputs.values()))]

        p, golden = results("values")
        p, v = p.detach(), inputs["v"].detach()
        nothing, with_nothing = results("none")
        assert nothing is None
        for predict, expected in {
            "writes": inputs["beta"].detach()[..., None] * (v - p),
            "statistics": torch.stack([(p * v).sum(-1), p.square().sum(-1)], -1),
        }.items():
            answer, with_answer = results(predict)
            assert not answer.requires_grad
            assert_close(answer, expected, rtol=0, atol=1e-10 * (1 + expected.abs().max().item()))
            for one, two, other in zip(with_answer, with_nothing, golden, strict=True):
                assert_close(one, other, rtol=0, atol=1e-10)
                assert torch.equal(one, two) or (predict == "writes" and not delta)

    def test_several_query_heads_read_one_state(self, backend, small_chunks):
        """As if the memory were run once for each of them."""
        inputs = make(T=40, H=2, K=5, V=7, N=2)
        draw = torch.Generator().manual_seed(1)
        queries = torch.randn(1, 40, 4, 5, generator=draw, dtype=torch.float64, requires_grad=True)
        options = dict(cu_seqlens=torch.tensor([0, 7, 40]), backend=backend)
        o, p, state = gated_delta_rule(**inputs | {"q": queries}, **options)
        _, writes, _ = gated_delta_rule(**inputs | {"q": queries}, **options, predict="writes")
        assert_close(writes, (inputs["beta"][..., None] * (inputs["v"] - p)).detach(), rtol=0, atol=1e-10)
        alone = [gated_delta_rule(**inputs | {"q": queries[:, :, i::2]}, **options) for i in range(2)]
        golden = torch.stack([one[0] for one in alone], 3).flatten(2, 3), alone[0][1], alone[0][2]
        wanted = [queries, *(x for name, x in inputs.items() if name != "q")]
        weights = [torch.randn(x.shape, generator=draw, dtype=x.dtype) for x in golden]
        gradients = []
        for found in ((o, p, state), golden):
            loss = sum((x * w).sum() for x, w in zip(found, weights, strict=True))
            gradients.append([*found, *torch.autograd.grad(loss, wanted)])
        for one, other in zip(*gradients, strict=True):
            assert_close(one, other, rtol=0, atol=1e-10)

    def test_no_tokens_leave_the_state_as_it_was(self, backend):
        inputs = make(B=2, T=0)
        o, prediction, state = gated_delta_rule(**inputs, backend=backend)
        assert o.shape == prediction.shape == (2, 0, 2, 4)
        assert torch.equal(state, inputs["initial_state"])


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_arguments_that_do_not_fit(backend):
    for changes, message in [
        ({"q": torch.zeros(1, 8, 2, 5)}, "q, k .* do not fit"),
        ({"q": torch.zeros(1, 7, 2, 4), "k": torch.zeros(1, 7, 2, 4)}, "q, k .* do not fit"),
        ({"v": torch.zeros(1, 8, 3, 4)}, r"the value heads \(3\) must be a multiple of the key heads \(2\)"),
        ({"g": torch.zeros(1, 8, 1)}, r"g must be \(1, 8, 2\)"),
        ({"beta": torch.zeros(1, 8)}, r"beta must be \(1, 8, 2\)"),
        ({"initial_state": torch.zeros(2, 2, 4, 4)}, r"initial_state must be \(1, 2, 4, 4\)"),
        ({"cu_seqlens": torch.tensor([0, 4, 8])}, r"initial_state must be \(2, 2, 4, 4\)"),
        ({"cu_seqlens": torch.tensor([0, 5, 4, 8])}, r"cu_seqlens must rise from 0 to 8 .*, got \[0, 5, 4, 8\]"),
        ({"cu_seqlens": torch.tensor([0, 7])}, "cu_seqlens must rise from 0 to 8"),
        ({"cu_seqlens": torch.tensor([1, 8])}, "cu_seqlens must rise from 0 to 8"),
        ({"cu_seqlens": torch.tensor([0])}, "cu_seqlens must rise from 0 to 8"),
        (make(B=2) | {"cu_seqlens": torch.tensor([0, 8, 16])}, "needs a batch of one packed row, got 2 rows"),
        ({name: torch.zeros(1, 8, 4) for name in "qkv"}, "do not fit"),
        (
            {name: torch.ones(1, 8, 2, 4).long() for name in "qkv"},
            "v must be of a floating-point dtype, got torch.int64",
        ),
        ({"predict": "all"}, "predict must be one of values, writes, statistics, none, got 'all'"),
    ]:
        with pytest.raises(ValueError, match=message):
            gated_delta_rule(**make() | changes, backend=backend)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="unknown backend 'trition' for delta_rule; known: auto, naive, torch"):
        gated_delta_rule(**make(), backend="trition")


def test_the_choice_of_backend_is_logged_once_and_kept(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "CHOSEN", {})
    with caplog.at_level(logging.INFO, dispatch.__name__):
        for backend in ("auto", "torch", "naive"):
            gated_delta_rule(**make(), backend=backend)
            assert dispatch.CHOSEN["delta_rule"] == ("naive" if backend == "naive" else "torch")
    assert [record.getMessage() for record in caplog.records] == [
        "delta_rule runs on the torch backend",
        "delta_rule runs on the naive backend",
    ]


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_no_sequence_at_all(backend):
    qk, v, g = torch.randn(0, 5, 2, 3), torch.randn(0, 5, 2, 4), torch.randn(0, 5, 2)
    o, p, state = gated_delta_rule(qk.requires_grad_(), qk, v, g, g, backend=backend)
    assert (o.shape, p.shape, state.shape) == ((0, 5, 2, 4), (0, 5, 2, 4), (0, 2, 3, 4))
    o.sum().backward()
    assert qk.grad.shape == qk.shape
