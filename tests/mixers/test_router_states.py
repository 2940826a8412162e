"""Routers with a memory of their own: it goes with the mixer's state, however a sequence is split, packed or moved."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import cosine_similarity
from torch.testing import assert_close

from kernels.sequences import Layout
from lit_modules.generation import generate
from mixers import Decoder, Router, SpecError, build_mixer, register_router
from mixers.registry import ROUTERS
from mixers.state import state_bytes
from tests.mixers.cases import bounds_of, mask_of, tensors_of, tokens

DIM, HEADS = 12, 2


class Unusual(Router):
    """How far the surprise of a token is above its exponential mean: the example of `mixers.routers.base`."""

    def init_state(self, batch_size, device=None, dtype=None):
        return torch.ones(batch_size, self.num_heads, device=device, dtype=dtype)

    def forward(self, inputs):
        surprise = 1 - cosine_similarity(inputs.prediction, inputs.v, dim=-1)

        def step(mean, now):
            return mean.lerp(now, 0.1), now - mean

        return inputs.scan(step, surprise)


class Twice(Unusual):
    """The same with a state of two tensors, one of them integers, and without `scan`."""

    def init_state(self, batch_size, device=None, dtype=None):
        seen = torch.zeros(batch_size, dtype=torch.long, device=device)
        return {"mean": super().init_state(batch_size, device, dtype), "seen": seen}

    def forward(self, inputs):
        surprise = 1 - cosine_similarity(inputs.prediction, inputs.v, dim=-1)

        def step(state, now):
            mean, seen = state["mean"], state["seen"]
            return {"mean": mean.lerp(now, 0.1), "seen": seen + 1}, (now - mean) * (seen % 3 > 0)[:, None]

        return inputs.scan(step, surprise)


def make(router=Unusual, dtype=torch.float64, **options):
    torch.manual_seed(0)
    mixer = build_mixer("ham", dim=DIM, num_heads=HEADS, head_dim=4, kv_usage=0.3, **options)
    mixer.router = router(DIM, HEADS)
    mixer(torch.randn(4, 40, DIM))
    return mixer.to(dtype).eval()


def by_hand(mixer, x):
    """Scores (T, H) of one sequence, from the definition."""
    m = mixer.memory(x, None, None, Layout.of(None, x))
    surprise, mean, scores = 1 - cosine_similarity(m.prediction, m.v, dim=-1)[0], torch.ones(HEADS), []
    for now in surprise:
        scores.append(now - mean)
        mean = 0.9 * mean + 0.1 * now
    return torch.stack(scores).float()


ROUTERS_WITH_STATE = pytest.mark.parametrize("router", [Unusual, Twice])


def test_scores_are_those_of_the_definition():
    mixer, x = make(), tokens(1, 1, 30)
    assert_close(mixer(x).routing.scores[0], by_hand(mixer, x), rtol=0, atol=1e-6)


@ROUTERS_WITH_STATE
@pytest.mark.parametrize("cuts", [[1], [10, 10, 25], list(range(1, 30))], ids=["one", "few", "token by token"])
@pytest.mark.parametrize("options", [{}, {"max_tokens": 4}], ids=str)
def test_any_split_stores_the_same(router, cuts, options):
    mixer, x = make(router, **options), tokens(1, 2, 30)
    whole, state, parts = mixer(x), mixer.init_state(2), []
    for start, stop in pairwise([0, *cuts, 30]):
        parts.append(mixer(x[:, start:stop], state))
        state = parts[-1].state
    assert 0 < whole.routing.usage.mean() < 1
    assert_close(torch.cat([part.hidden for part in parts], 1), whole.hidden, rtol=0, atol=1e-10)
    stored = [part.routing.stored for part in parts if part.routing is not None]  # None of no tokens
    assert torch.equal(torch.cat(stored, 1), whole.routing.stored)


@ROUTERS_WITH_STATE
def test_packed_and_padded_sequences_are_as_if_alone(router):
    mixer, x, lengths = make(router), tokens(1, 3, 12), [12, 1, 7]
    mask = mask_of(lengths, 12)
    padded = mixer(x, mixer.init_state(3), padding_mask=mask)
    packed = mixer(x[mask][None], mixer.init_state(4), bounds_of([12, 1, 0, 7]))
    for n, row in enumerate([0, 1, 3]):
        alone = mixer(x[n : n + 1, : lengths[n]], mixer.init_state(1))
        assert torch.equal(padded.routing.stored[n, mask[n]], alone.routing.stored[0])
        assert_close(padded.hidden[n, mask[n]], alone.hidden[0], rtol=0, atol=1e-10)
        for name, value in tensors_of(alone.state).items():
            if name.startswith("router"):
                assert_close(tensors_of(packed.state)[name][row : row + 1], value, rtol=0, atol=1e-10)
    goes_on, fresh = packed.state.select(torch.tensor([2])), mixer.init_state(1)
    assert torch.equal(mixer(x[:1], goes_on).hidden, mixer(x[:1], fresh).hidden), "an empty sequence has not begun"


@ROUTERS_WITH_STATE
def test_states_are_selected_moved_saved_and_told_apart(router, tmp_path):
    mixer, x = make(router), tokens(2, 2, 5)
    state = mixer(tokens(1, 2, 9), mixer.init_state(2)).state
    assert state_bytes(state) > state_bytes(make(lambda *sizes: ROUTERS.build("cosine", *sizes)).init_state(2))
    out = mixer(x, state)
    beams = mixer(x[[1, 0, 1]], state.select(torch.tensor([1, 0, 1])))
    assert_close(beams.hidden, out.hidden[[1, 0, 1]], rtol=0, atol=1e-10)
    torch.save(state.to("cpu").detach(), tmp_path / "state.pt")
    assert torch.equal(mixer(x, torch.load(tmp_path / "state.pt")).hidden, out.hidden)
    with pytest.raises(ValueError, match="the state is of another mixer: its router is None"):
        mixer(x, make(lambda *sizes: ROUTERS.build("cosine", *sizes)).init_state(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_it_is_at_least_float32(dtype):
    mixer = make(dtype=dtype)
    state = mixer(tokens(1, 2, 9, dtype=dtype), mixer.init_state(2)).state
    assert state.router.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_model_is_trained_and_writes_with_it(monkeypatch):
    monkeypatch.setattr(ROUTERS, "_registered", dict(ROUTERS._registered))
    register_router("unusual")(Unusual)
    torch.manual_seed(0)
    model = Decoder(31, dim=DIM, depth=2, mixer={"name": "ham", "num_heads": 2, "head_dim": 4, "router": "unusual"})
    text = torch.randint(31, (3, 20))
    for bounds in (None, torch.tensor([0, 20, 45, 60])):
        out = model(text if bounds is None else text.view(1, -1), cu_seqlens=bounds)
        model.logits(out.hidden).logsumexp(-1).mean().backward()
    model.eval()
    one = generate(model, [text[0], text[1, :7]], num_tokens=5, temperature=0, prefill=4)
    other = [generate(model, t[None], num_tokens=5, temperature=0)[0] for t in (text[0], text[1, :7])]
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Forgets(Unusual):
    """What looks right in training: a mean over the tokens of this call."""

    init_state = Router.init_state

    def forward(self, inputs):
        return super().forward(replace(inputs, state=torch.ones_like(inputs.g[:, 0])))[0]


class KeepsOld(Unusual):
    def forward(self, inputs):
        scores, _ = super().forward(inputs)
        return scores, inputs.state


def gives(value):
    return type("Wrong", (Router,), {"forward": lambda self, inputs: value(inputs)})


WRONG = {
    "nan": (gives(lambda i: i.g.masked_fill(i.positions[..., None] == 3, torch.nan)), "gave NaN for 4 of 80 scores"),
    "inf": (gives(lambda i: torch.full_like(i.g, torch.inf)), "gave inf for every token"),
    "shape": (gives(lambda i: i.g[..., 0]), r"floating-point scores \(2, 20, 2\) \(B, T, H\), not .* \(2, 20\)"),
    "heads": (gives(lambda i: i.g[..., :1]), r"scores \(2, 20, 2\) \(B, T, H\), not torch.float32 \(2, 20, 1\)"),
    "dtype": (gives(lambda i: i.positions[..., None].expand_as(i.g)), "not torch.int64"),
    "bool": (gives(lambda i: i.g > -0.1), "not torch.bool"),
    "list": (gives(lambda i: i.g.tolist()), "must give a tensor of scores .*, not list"),
    "none": (gives(lambda i: None), "must give a tensor of scores .*, not NoneType"),
    "pair": (gives(lambda i: (i.g, i.g[:, -1])), "not tuple; a router that remembers needs init_state"),
    "later": (gives(lambda i: i.beta - i.beta.mean(1, keepdim=True)), "looks at later tokens"),
    "next": (gives(lambda i: i.beta.roll(-1, 1)), "looks at later tokens"),
    "chance": (gives(lambda i: torch.rand_like(i.g)), "differently each time"),
    "forgets": (Forgets, "remembers tokens of the same call alone: .* see init_state"),
    "keeps old": (KeepsOld, "does not go on from its state"),
    "no state": (
        type("Wrong", (Unusual,), {"forward": lambda self, i: super(type(self), self).forward(i)[0]}),
        r"has init_state, so it must give \(scores, state\), not torch.float32 \(2, 20, 2\)",
    ),
    "other state": (
        type("Wrong", (Unusual,), {"forward": lambda self, i: (i.g, {"mean": i.g[:, 0]})}),
        "must give a state like that of init_state, torch.float32 .*, not {'mean': ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_router_is_named_at_the_first_step(wrong):
    router, message = WRONG[wrong]
    for training in (False, True):
        mixer = build_mixer("ham", dim=DIM, num_heads=HEADS, head_dim=4)
        mixer.router = router(DIM, HEADS)
        with pytest.raises(SpecError, match=rf"router .*\.{router.__name__} .*{message}") as error:
            mixer.train(training)(torch.randn(2, 20, DIM))
        assert "\n" not in str(error.value)


def test_the_first_step_is_looked_at_without_a_trace():
    """Dropout in a router is no chance of its scores, and nobody's random numbers are used up."""

    class Dropped(Router):
        def forward(self, inputs):
            return torch.nn.functional.dropout(inputs.beta, 0.5, self.training)

    mixer = build_mixer("ham", dim=DIM, num_heads=HEADS, head_dim=4)
    mixer.router = Dropped(DIM, HEADS)
    x = torch.randn(2, 20, DIM)
    torch.manual_seed(5)
    first = mixer(x).routing.scores
    torch.manual_seed(5)
    assert torch.equal(mixer(x).routing.scores, first)
    assert mixer.router.training
    mixer(x * torch.nan)  # what is not the router's fault is not looked at
    mixer._examined = False
    assert mixer(x * torch.nan).hidden.isnan().any()
