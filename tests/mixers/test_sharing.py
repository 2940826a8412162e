"""A mixer of a user's own that routes: its threshold is shared, calibrated, allocated and checked as HAM's is."""

import pytest
import torch
from torch import nn

from mixers import (
    Mixer,
    MixerOutput,
    Routing,
    SpecError,
    allocate,
    calibrate,
    check_mixer,
    set_kv_usage,
    share_threshold,
)
from mixers.registry import ROUTERS, THRESHOLDS

HEADS = 2


class Scored(Mixer):
    """Tells tokens apart, and does nothing with it: the least that routes."""

    routes = True

    def __init__(self, dim, kv_usage=0.25, scope="model"):
        super().__init__()
        self.dim, self.score = dim, nn.Linear(dim, HEADS, bias=False)
        self.router = ROUTERS.build("cosine", dim, HEADS)
        self.threshold = THRESHOLDS.build("calibrated", HEADS, kv_usage=kv_usage, scope=scope)
        self.register_buffer("head_bias", torch.zeros(HEADS))

    def mix(self, x, state, layout):
        scores = (self.score(x).detach() + self.head_bias).float()
        if self.training:
            self.threshold.observe(self.layer_index, scores)
        tau = self.threshold.tau(self.training).expand(HEADS)
        return MixerOutput(x, state, Routing(scores, scores > tau, tau, torch.zeros_like(scores), layout.lengths))


class Undeclared(Scored):
    routes = False


def stored(model, x):
    return torch.stack([model[name](x).routing.stored.float().mean() for name in "ab"]).mean().item()


def test_it_is_treated_as_ham_is():
    torch.manual_seed(0)
    model, x = nn.ModuleDict({name: Scored(8) for name in "ab"}).eval(), torch.randn(4, 64, 8)
    share_threshold(model)
    assert model["a"].threshold is model["b"].threshold and model["b"].layer_index == 1

    def run(batch):
        return sum(model[name](batch).hidden.mean() for name in "ab")

    for asked in (0.25, 0.75):
        set_kv_usage(model, asked)
        assert calibrate(model, [x], run=run) == 1
        assert stored(model, x) == pytest.approx(asked, abs=0.01)
    before, after = allocate(model, [x], run)
    assert before == after and not model.training


def test_a_layer_in_another_mode_shares_the_threshold_too():
    layers = nn.ModuleList([Scored(8), Scored(8).eval()])
    share_threshold(layers)
    assert layers[0].threshold is layers[1].threshold


def test_what_holds_a_threshold_must_say_that_it_routes():
    model = nn.ModuleDict({name: Undeclared(8) for name in "ab"})
    for call in (share_threshold, lambda model: calibrate(model, [torch.zeros(1, 4, 8)])):
        with pytest.raises(SpecError, match="test_sharing.Undeclared holds a threshold .* `routes = True`"):
            call(model)
    Outer = type("Outer", (Mixer,), {})  # one around a mixer that routes says nothing
    outer = Outer()
    outer.inner = Scored(8)
    share_threshold(outer)
    assert (outer.layer_index, outer.inner.layer_index) == (0, 1)


def test_the_check_looks_at_its_usage():
    Loose = type("Loose", (Scored,), {"mix": lambda self, x, s, layout: _all_stored(Scored.mix(self, x, s, layout))})
    with pytest.raises(AssertionError, match="the KV usage asked for is stored: no, 1.000 of the tokens"):
        check_mixer(Loose)


def _all_stored(out):
    out.routing.stored.fill_(True)
    return out
