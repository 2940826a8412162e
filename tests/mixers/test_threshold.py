"""Thresholds hold the usage that was asked for, over their scope, and go through whatever training does to a model."""

import copy
import math
import warnings

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from mixers import Decoder, SpecError, build_mixer, set_kv_usage, share_threshold
from mixers import threshold as module
from mixers.registry import THRESHOLDS

VOCABULARY = 31
ROUTERS = {
    "cosine": "cosine",
    "residual": "residual",
    "residual in value space": {"name": "residual", "space": "value"},
    "learned": "learned",
    "learned from the error": {"name": "learned", "form": "error"},
    "demand": "demand",
    "random": "random",
}


def make(depth=2, **options):
    torch.manual_seed(0)
    spec = {"name": "ham", "num_heads": 2, "head_dim": 8, "router": "cosine"} | options
    return Decoder(VOCABULARY, dim=16, depth=depth, mixer=spec)


def draw(B=16, T=64):
    """Tokens of which some are asked for again, so that there is something to learn."""
    tokens = torch.randint(VOCABULARY, (B, T))
    tokens[:, T // 2 :: 2] = tokens[:, : T // 2 : 2]
    return tokens


def train(model, steps):
    """Plain PyTorch, as anyone would."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        tokens = draw()
        out = model.train()(tokens)
        loss = cross_entropy(model.logits(out.hidden)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()) + out.aux_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def usage_of(out):
    """(layers, heads)."""
    return torch.stack([routing.usage for routing in out.routing])


@torch.no_grad()
def evaluate(model):
    return usage_of(model.eval()(draw(B=96)))


def over(scope, usage):
    """Mean usage over the parts of a scope."""
    return {"model": usage.mean()[None], "layer": usage.mean(1), "head": usage.flatten()}[scope]


def feed(threshold, *steps, layers=1):
    """Let a threshold see scores, one (B, T, H) a step, the same for every layer."""
    for scores in steps:
        for layer in range(layers):
            threshold.observe(layer, scores)
    threshold.close_step()


class TestCalibrated:
    @pytest.mark.parametrize("usage", [0.03125, 0.1, 0.5, 0.77])
    def test_tau_is_the_quantile_of_the_scores(self, usage):
        threshold = THRESHOLDS.build("calibrated", 2, kv_usage=usage, scope="head")
        scores = torch.rand(4, 2000, 2) * torch.tensor([1.0, 10.0])
        feed(threshold, scores)
        assert_close(threshold.tau(), (1 - usage) * torch.tensor([1.0, 10.0]), rtol=0.03, atol=0)
        assert_close((scores > threshold.tau()).float().mean((0, 1)), torch.full((2,), usage), rtol=0, atol=2e-3)

    def test_it_follows_scores_that_drift(self):
        threshold = THRESHOLDS.build("calibrated", 2, kv_usage=0.5)
        feed(threshold, torch.zeros(1, 100, 2))
        assert threshold.tau() == 0
        feed(threshold, *torch.ones(2, 1, 100, 2))
        assert 0.1 < threshold.tau() < 0.9
        feed(threshold, *torch.ones(100, 1, 100, 2))
        assert threshold.tau() > 0.99

    def test_scores_that_are_not_finite_do_no_harm_for_long(self):
        threshold = THRESHOLDS.build("calibrated", 1, kv_usage=0.5)
        scores = torch.rand(1, 1000, 1)
        for wrong in (math.nan, math.inf, -math.inf):
            feed(threshold, torch.where(scores > 0.99, wrong, scores))
            assert threshold.tau().item() == pytest.approx(0.5, abs=0.05)


class TestUsageAsked:
    """In training a step is stored at the table of those before; one that has seen the data holds the usage asked."""

    @pytest.mark.parametrize(
        ("router", "scope"), [*((router, "model") for router in ROUTERS), ("cosine", "layer"), ("residual", "head")]
    )
    def test_calibrated(self, router, scope):
        model = make(router=ROUTERS[router], scope=scope, kv_usage=0.25)
        tokens = draw(B=64)
        for _ in range(5):  # what a layer scores depends on what the layers before it store
            out = model(tokens)
        for usage in (over(scope, usage_of(out)), over(scope, usage_of(model.eval()(tokens)))):
            assert_close(usage, torch.full_like(usage, 0.25), rtol=0, atol=0.03)  # 31 tokens score much alike
            assert_close(usage.mean(), torch.tensor(0.25), rtol=0, atol=0.02)

    @pytest.mark.parametrize("usage", [0.125, 0.5])
    def test_another_usage_after_training(self, usage):
        """Less exactly in a second layer, whose scores depend on what the first one stores."""
        model, tokens = make(depth=1, router="residual", kv_usage=0.25), draw(B=64)
        model(tokens)
        set_kv_usage(model, usage)
        assert_close(usage_of(model.eval()(tokens)).mean(), torch.tensor(usage), rtol=0, atol=0.01)


class TestControlled:
    def test_it_reaches_the_usage_of_every_head(self):
        threshold = THRESHOLDS.build({"name": "controlled", "rate": 0.3}, 2, kv_usage=0.25, scope="head")
        scores = torch.rand(1, 2000, 2) * torch.tensor([1.0, 0.6]) + torch.tensor([0.0, 0.7])
        feed(threshold, *[scores] * 100)
        usage = (scores > threshold.tau()).float().mean((0, 1))
        assert_close(usage, torch.full((2,), 0.25), rtol=0, atol=0.01)

    def test_a_step_is_the_rate_times_the_gap(self):
        options = {"rate": 0.2, "start": 0.4, "freeze_after": 2}
        threshold = THRESHOLDS.build({"name": "controlled", **options}, 2, kv_usage=0.25, scope="head")
        scores = torch.tensor([[0.1, 0.5], [0.2, 0.6], [0.3, 0.7], [0.9, 0.8]])[None]  # usage 1/4 and 1
        feed(threshold, scores)
        assert_close(threshold.tau(), torch.tensor([0.4, 0.4 + 0.2 * 0.75]))
        feed(threshold, scores, scores, scores)
        assert_close(threshold.tau(), torch.tensor([0.4, 0.55 + 0.2 * 0.5]))

    def test_its_usage_can_be_set_once_it_is_trained(self):
        threshold = THRESHOLDS.build("controlled", 1, kv_usage=0.25)
        set_kv_usage(threshold, 0.5)
        assert threshold.tau() == 0.5  # where it starts
        feed(threshold, torch.rand(1, 4000, 1))
        set_kv_usage(threshold, 0.125)
        assert threshold.tau().item() == pytest.approx(0.875, abs=0.01)


class TestFixed:
    def test_tau_stays(self):
        model = make(threshold={"name": "fixed", "tau": 0.8})
        train(model, 2)
        assert all((routing.tau == 0.8).all() for routing in model(draw()).routing)

    def test_only_the_ends_can_be_set(self):
        threshold = THRESHOLDS.build({"name": "fixed", "tau": 0.8}, 1, kv_usage=0.5)
        with pytest.raises(SpecError, match="a fixed threshold has no KV usage to set, got 0.25"):
            set_kv_usage(threshold, 0.25)
        set_kv_usage(threshold, 0)
        assert threshold.tau() == math.inf

    def test_it_needs_no_training(self):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            make(threshold="fixed").eval()(draw())
        assert not seen


class TestLearned:
    @pytest.mark.parametrize(("start", "gradient"), [(0.6, -3.0), (0.75, 0.0), (0.9, 2.53)])
    def test_the_penalty_pulls_it_to_the_usage(self, start, gradient):
        """Of scores spread evenly over 0..1 a quarter is above 0.75; the soft usage is 0.05 log(1 + e^20(1 - tau))."""
        threshold = THRESHOLDS.build({"name": "learned", "start": start}, 1, kv_usage=0.25)
        threshold.loss(torch.linspace(0, 1, 2001).view(1, -1, 1)).backward()
        assert threshold.current.grad.item() == pytest.approx(gradient, abs=0.02)

    def test_the_task_moves_it_too(self):
        mixer = build_mixer("ham", dim=16, num_heads=2, threshold={"name": "learned", "weight": 0.0}, scope="head")
        mixer(torch.randn(2, 30, 16)).hidden.square().sum().backward()
        assert (mixer.threshold.current.grad != 0).all()

    def test_its_usage_can_be_set_once_it_is_trained(self):
        threshold = THRESHOLDS.build("learned", 1, kv_usage=0.25)
        feed(threshold, torch.rand(1, 4000, 1))
        set_kv_usage(threshold, 0.125)
        assert threshold.tau().item() == pytest.approx(0.875, abs=0.01)


class TestScope:
    def test_layers_of_a_model_share_one_threshold(self):
        model = make(depth=3)
        thresholds = {block.mixer.threshold for block in model.blocks}
        assert len(thresholds) == 1 == len(list(module.thresholds_of(model)))
        assert [block.mixer.layer_index for block in model.blocks] == [0, 1, 2]

    def test_its_budget_is_shared_out_unevenly(self):
        threshold = THRESHOLDS.build("calibrated", 2, kv_usage=0.25)
        low, high = torch.rand(1, 3000, 2), torch.rand(1, 3000, 2) + 1
        for layer, scores in enumerate((low, high)):
            threshold.observe(layer, scores)
        threshold.close_step()
        assert not (low > threshold.tau()).any()
        assert (high > threshold.tau()).float().mean().item() == pytest.approx(0.5, abs=0.01)

    @pytest.mark.parametrize("scope", ["layer", "head"])
    def test_other_scopes_keep_layers_apart(self, scope):
        model = make(scope=scope)
        one, other = (block.mixer.threshold for block in model.blocks)
        assert one is not other
        assert one.table.shape == ((2 if scope == "head" else 1), module.LEVELS)

    def test_a_model_of_ones_own(self):
        model = torch.nn.ModuleDict({name: build_mixer("ham", dim=16, num_heads=2) for name in "ab"})
        share_threshold(model)
        assert model["a"].threshold is model["b"].threshold
        assert (model["a"].layer_index, model["b"].layer_index) == (0, 1)


class TestInterface:
    def test_all_layers_of_a_step_have_the_same_tau(self):
        model = make()
        for _ in range(3):
            one, other = (routing.tau for routing in model(draw()).routing)
            assert torch.equal(one, other)

    @pytest.mark.parametrize("kind", ["calibrated", "controlled", "learned"])
    def test_a_state_dict_brings_it_back(self, kind):
        model = make(threshold=kind, scope="head")
        train(model, 3)
        other = make(threshold=kind, scope="head")
        other.load_state_dict(model.state_dict())
        tokens = draw()
        one, two = model.eval()(tokens), other.eval()(tokens)
        assert torch.equal(one.hidden, two.hidden)
        for each in (model, other):
            set_kv_usage(each, 0.7)
        assert torch.equal(model(tokens).hidden, other(tokens).hidden)

    def test_evaluation_changes_nothing(self):
        model = make()
        train(model, 3)
        before = copy.deepcopy(model.state_dict())
        evaluate(model)
        for name, x in model.state_dict().items():
            assert torch.equal(x, before[name])

    def test_more_scores_than_torch_quantile_takes(self):
        """As of more than 2048 layers times heads, each with as many tokens as are looked at."""
        table = module.quantiles(torch.arange(2.0**24 + 1)[None])
        assert table[0, ::64].tolist() == [0, 2**23, 2**24]

    @pytest.mark.parametrize("n", [1, 2, 7, 1000])
    def test_quantiles_are_those_of_torch(self, n):
        x = torch.randn(3, n)
        golden = torch.quantile(x, torch.linspace(0, 1, module.LEVELS), dim=1).T
        assert_close(module.quantiles(x), golden, rtol=0, atol=1e-6)

    def test_an_untrained_one_warns_once(self):
        model = make().eval()
        with pytest.warns(UserWarning, match="the KV threshold has seen no training step"):
            model(draw())
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            model(draw())
        assert not seen

    @pytest.mark.parametrize("kind", ["calibrated", "controlled", "learned"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
    def test_it_stays_in_float32_whatever_the_model_is(self, kind, dtype):
        threshold = THRESHOLDS.build(kind, 2, kv_usage=0.3)
        feed(threshold, torch.rand(1, 100, 2))
        tau = threshold.tau()
        other = torch.nn.Sequential(copy.deepcopy(threshold), torch.nn.Linear(2, 2)).to(dtype)
        assert other[1].weight.dtype == dtype
        assert torch.equal(other[0].tau(), tau)
        assert other.to("meta")[0].table.is_meta

    @pytest.mark.parametrize("usage", [-0.1, 1.1, math.nan, "half", None, True])
    def test_a_usage_outside_0_and_1_is_refused(self, usage):
        with pytest.raises(SpecError, match="kv_usage must be a number from 0 to 1"):
            set_kv_usage(make(), usage)
        with pytest.raises(SpecError, match="kv_usage.* must be"):
            make(kv_usage=usage)

    def test_a_model_without_routing_has_no_usage_to_set(self):
        with pytest.raises(SpecError, match="the model has no KV usage to set"):
            set_kv_usage(Decoder(VOCABULARY, dim=16, depth=1, mixer="gdn"), 0.5)
