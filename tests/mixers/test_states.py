"""States of every mixer: moved, selected, left alone, of the right dtype and size; usage and what the cache holds."""

import pytest
import torch
from torch.testing import assert_close

from kernels.paged_attention import PAGE
from kernels.sequences import Layout
from mixers import Decoder, build_mixer, calibrate, kv_cache_bytes, set_kv_usage
from mixers.always_seen import stored_behind
from mixers.gated_delta_net import RecurrentState
from mixers.ham import HAM
from mixers.state import full_kv_bytes
from tests.mixers.cases import CASES, DIM, SMALL, every_case, every_ham, made, make, mask_of, tensors_of, tokens


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
def test_a_state_is_left_as_it_was_detached_saved_and_loaded(case, tmp_path):
    mixer, x = made(case), tokens(1, 2, 3)
    state = mixer(tokens(0, 2, 9).requires_grad_(), mixer.init_state(2)).state
    before = {name: value.detach().clone() for name, value in tensors_of(state).items()}
    expected = mixer(x, state).hidden
    for name, value in tensors_of(state).items():
        assert torch.equal(value, before[name]), name
    assert any(value.requires_grad for value in tensors_of(state).values())
    detached = state.detach()
    assert not any(value.requires_grad for value in tensors_of(detached).values())
    torch.save([detached, None], tmp_path / "state.pt")
    loaded, _ = torch.load(tmp_path / "state.pt")
    for each in (detached, loaded):
        assert torch.equal(mixer(x, each).hidden, expected)


@every_case
def test_a_bfloat16_model_keeps_its_memory_in_float32(case):
    mixer = make(case, torch.bfloat16)
    out = mixer(tokens(0, 2, 9, dtype=torch.bfloat16), mixer.init_state(2))
    assert out.hidden.dtype == torch.bfloat16
    if isinstance(out.state, RecurrentState):
        assert out.state.recurrent.dtype == torch.float32
    if out.routing is not None:
        assert {x.dtype for x in (out.routing.scores, out.routing.tau, out.routing.g)} == {torch.float32}
    for cache in out.state.caches:
        assert getattr(cache, "pages", cache).k.dtype == torch.bfloat16


@every_case
def test_the_cache_holds_what_was_stored_and_no_more(case):
    mixer = make(case, torch.float32)
    out = mixer(tokens(0, 3, 30, dtype=torch.float32), mixer.init_state(3))
    spec = CASES[case]
    if isinstance(mixer, HAM):
        window, limit = out.routing.window, out.routing.limit
        kept = stored_behind(out.routing.stored, Layout.of(None, out.hidden), max(window - 1, 0))
        kept = kept.clamp(max=limit) if limit else kept
        assert torch.equal(out.state.kv.counts, kept + min(max(window - 1, 0), 30))
        # what no later token will see has left the window
        assert ((out.routing.kept - out.state.kv.counts.sum(0)).abs() <= 3 * (0 < window <= 30)).all()
        if limit:
            most = int(out.state.kv.counts.max())
            assert kv_cache_bytes(out.state) == 3 * mixer.num_heads * most * 4 * (4 + 4 + 1)  # key, value, score
            return
        age = hasattr(mixer, "forgetting")  # which the idea `aged` keeps with each key
        entry = 4 * (mixer.memory.head_dim + mixer.memory.value_dim + age)
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


def test_a_long_prompt_takes_the_share_of_bytes_that_is_stored():
    """Read at once, then token by token: at usage 1/8 an eighth of attention's bytes, and a page a head in reserve."""
    torch.manual_seed(0)
    mixer, T = build_mixer("ham", dim=16, num_heads=2, head_dim=8, kv_usage=0.125).eval(), 4096
    x = torch.randn(1, T, 16)
    calibrate(mixer, [x])
    with torch.no_grad():
        out = mixer(x, mixer.init_state(1))
        assert kv_cache_bytes(out.state) <= (0.125 + 2 * PAGE / T) * full_kv_bytes(out.state)
        for t in range(3):
            out = mixer(x[:, t : t + 1], out.state)
        assert kv_cache_bytes(out.state) <= (0.125 + 3 * PAGE / T) * full_kv_bytes(out.state)


def test_arguments_that_do_not_fit():
    """The base of all mixers says so."""
    wrong = [
        ({"cu_seqlens": torch.tensor([0, 4, 8])}, "cu_seqlens needs a batch of one packed row, got 2 rows"),
        ({"padding_mask": torch.ones(2, 7, dtype=torch.bool)}, r"padding_mask must be bool \(2, 8\)"),
        ({"padding_mask": torch.ones(2, 8)}, r"padding_mask must be bool \(2, 8\) .*, got torch.float32"),
        ({"state": 3}, "the state is of 3 sequences, the input of 2"),
        ({"x": torch.zeros(2, 8, DIM + 1, dtype=torch.float64)}, rf"x must be \(B, T, {DIM}\), got \(2, 8, 13\)"),
        ({"x": torch.zeros(8, DIM, dtype=torch.float64)}, r"x must be \(B, T, 12\), got \(8, 12\)"),
    ]
    for options, message in wrong:
        for mixer in map(made, ("attention", "gated_delta_net", "ham")):
            given = options | ({"state": mixer.init_state(options["state"])} if "state" in options else {})
            with pytest.raises(ValueError, match=message):
                mixer(**{"x": tokens(0, 2, 8)} | given)


def test_a_state_of_another_mixer():
    x = tokens(0, 1, 3)
    state = {
        name: build_mixer(spec, dim=DIM).double()(x, state=build_mixer(spec, dim=DIM).double().init_state(1)).state
        for name, spec in {
            "gdn": {"name": "gdn", **SMALL}, "wide": {"name": "gdn", "num_heads": 2, "head_dim": 8},
            "ham": {"name": "ham", **SMALL}, "bounded": {"name": "ham", **SMALL, "max_tokens": 4},
            "attention": {"name": "attention", **SMALL},
        }.items()
    }  # fmt: skip
    pairs = ("gated_delta_net", "wide"), ("ham", "gdn"), ("ham", "bounded"), ("ham", "attention"), ("attention", "gdn")
    for case, other in pairs:
        with pytest.raises(ValueError, match=r"the state is of another mixer: its (recurrent|conv|kv) is .*, not"):
            build_mixer(CASES[case], dim=DIM).double()(x, state[other])
    decoder = Decoder(9, dim=16, depth=2, mixer="gdn")
    with pytest.raises(ValueError, match="the state is of 3 layers, the decoder has 2"):
        decoder(torch.zeros(1, 2, dtype=torch.long), state=decoder.init_state(1) + decoder.init_state(1)[:1])


@every_case
def test_no_tokens(case):
    mixer, state = made(case), made(case).init_state(2)
    for mask in (None, torch.ones(2, 0, dtype=torch.bool)):
        out = mixer(tokens(0, 2, 0), state, padding_mask=mask)
        assert out.hidden.shape == (2, 0, DIM)
        assert out.state is state


@every_case
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.filterwarnings("ignore:the KV threshold has seen no training step")
def test_no_sequences(case, training):
    mixer = make(case).train(training)
    for state in (None, mixer.init_state(0), None):
        out = mixer(tokens(0, 0, 5), state)
        assert out.hidden.shape == (0, 5, DIM)
        assert out.aux_loss is None


class TestUsage:
    @every_ham
    def test_at_0_it_is_its_recurrent_mixer(self, case):
        mixer = make(case, kv_usage=0)
        set_kv_usage(mixer, 0)
        options = (*SMALL, "rule", "num_value_heads", "num_kv_heads", "value_dim", "conv_size", "bias")
        spec = {key: x for key, x in CASES[case].items() if key in options}
        gdn = build_mixer("gdn", dim=DIM, **spec).double()
        gdn.load_state_dict({name: x for name, x in mixer.state_dict().items() if name in gdn.state_dict()})
        mixer.window = mixer.sinks = 0  # these stay at any usage
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
            assert out.routing.window == (512 if case == "ham recency" else 3)
        elif mixer.max_tokens:
            held = mixer.max_tokens + max(mixer.window - 1, 0) + mixer.sinks
            assert out.state.kv.counts.tolist() == [[held] * mixer.num_heads] * 2
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
