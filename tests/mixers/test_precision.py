"""Under autocast the operations get what they were written for: q, k and v narrow, all that accumulates in float32."""

import pytest
import torch
from torch.nn import functional as F

import mixers.caches.paged
import mixers.memory
from mixers import build_mixer
from mixers.attention import Attention
from mixers.gated_delta_net import GatedDeltaNet, RecurrentState
from tests.mixers.cases import BUILTIN, CASES, DIM, every_ham

SEEN = {
    "gated_delta_rule": ("q", "k", "v", "g", "beta", "initial_state"),
    "routed_attention": ("q", "k", "v", "stored"),
    "scaled_dot_product_attention": ("q", "k", "v"),
}


@pytest.fixture
def seen(monkeypatch):
    """(operation, argument, dtype) of every call, and of what the delta rule answers."""
    found = set()

    def spy(module, name):
        operation = getattr(module, name)

        def call(*args, **options):
            given = dict(zip(SEEN[name], args, strict=False)) | options
            found.update((name, key, given[key].dtype) for key in SEEN[name] if given.get(key) is not None)
            out = operation(*args, **options)
            if name == "gated_delta_rule":
                _, prediction, state = out
                found.update((name, key, x.dtype) for key, x in (("p", prediction), ("S", state)) if x is not None)
            return out

        monkeypatch.setattr(module, name, call)

    spy(mixers.memory, "gated_delta_rule")
    spy(mixers.caches.paged, "routed_attention")
    spy(F, "scaled_dot_product_attention")
    return found


@pytest.mark.parametrize(
    ("case", "width"),
    [*((case, torch.bfloat16) for case in CASES), *((name, torch.float16) for name in BUILTIN)],
    ids=str,
)
def test_what_reaches_the_operations_under_autocast(seen, case, width):
    mixer = build_mixer(CASES[case], dim=DIM)
    x = torch.randn(2, 9, DIM, requires_grad=True)  # the residual stream stays in float32
    with torch.autocast("cpu", dtype=width):
        out = mixer(x)
        mixer.eval()
        read = mixer(x, state=mixer.init_state(2))
        read = mixer(x[:, :1], state=read.state)
    assert out.hidden.dtype == width
    assert seen or not isinstance(mixer, GatedDeltaNet | Attention)  # others may use none of these
    for operation, argument, dtype in seen:
        exact = torch.bool if argument == "stored" else torch.float32
        narrow = argument in ("q", "k", "v")
        assert dtype == (width if narrow else exact), f"{argument} of {operation} is {dtype}"
    if out.routing is not None:
        assert out.routing.scores.dtype == out.routing.tau.dtype == out.routing.g.dtype == torch.float32
    if isinstance(read.state, RecurrentState):
        assert read.state.recurrent.dtype == torch.float32
    out.hidden.sum().backward()
    for parameter in mixer.parameters():
        if parameter.grad is not None:
            assert parameter.grad.dtype == parameter.dtype == torch.float32
            assert width == torch.float16 or parameter.grad.isfinite().all()  # in float16 the loss needs a scale


@every_ham
def test_a_step_of_the_threshold_does_not_mind_the_default_dtype(case):
    """Trainers in "true" precision change it."""
    before = torch.get_default_dtype()
    for dtype in (torch.bfloat16, torch.float64):
        mixer = build_mixer(CASES[case], dim=DIM).to(dtype)
        torch.set_default_dtype(dtype)
        try:
            mixer(torch.randn(2, 9, DIM, dtype=dtype))
            mixer.threshold.close_step()
        finally:
            torch.set_default_dtype(before)
        assert mixer.threshold.steps == 1 and mixer.threshold.table.dtype == torch.float32


def test_under_autocast_a_router_sees_the_input_as_it_was_given():
    """The projections share one cast of it."""
    mixer, seen = build_mixer("ham", dim=16, num_heads=2, router="demand"), []
    mixer.router.register_forward_pre_hook(lambda router, given: seen.append(given[0].x))
    x = torch.randn(1, 9, 16)
    with torch.autocast("cpu", torch.bfloat16):
        mixer(x)
    assert torch.equal(seen[-1], x) and seen[-1].dtype == torch.float32
