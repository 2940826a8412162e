"""The step of a threshold that is under way: who looks does not change it, and scores that say nothing are named."""

import copy
import math
import warnings

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from mixers import calibrate
from mixers import threshold as module
from mixers.registry import THRESHOLDS
from tests.mixers.test_threshold import ROUTERS, draw, evaluate, feed, make, train


def buffers_of(model):
    return {name: x.clone() for name, x in model.named_buffers()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, x in one.items():
        assert torch.equal(x, other[name]), name


class TestStepUnderWay:
    """Between a forward pass and the next one: who looks at a model does not change it."""

    KINDS = pytest.mark.parametrize("kind", ["calibrated", "controlled", "learned", "fixed"])

    def halfway(self, kind):
        torch.manual_seed(3)
        model = make(threshold=kind)
        train(model, 2)
        model(draw())
        return model

    @KINDS
    def test_looking_changes_neither_the_threshold_nor_the_training_after_it(self, kind):
        one, other = self.halfway(kind), self.halfway(kind)
        before = buffers_of(one)
        for look in (
            lambda: one.state_dict(),
            lambda: one.eval().train(),
            lambda: (evaluate(one), one.train()),
            lambda: (evaluate(one), one.state_dict(), evaluate(one), one.train()),
        ):
            look()
            assert_equal(buffers_of(one), before)
        for model in (one, other):
            torch.manual_seed(4)
            train(model, 3)
        assert_equal(dict(one.state_dict()), dict(other.state_dict()))

    @KINDS
    def test_what_is_saved_is_what_evaluation_uses_and_where_training_goes_on(self, kind):
        model, other = self.halfway(kind), make(threshold=kind)
        other(draw())  # has a step of its own under way, which loading ends
        other.load_state_dict(model.state_dict())
        tokens = draw()
        assert torch.equal(model.eval()(tokens).hidden, other.eval()(tokens).hidden)
        for each in (model, other):
            torch.manual_seed(4)
            train(each, 2)
        assert_equal(dict(model.state_dict()), dict(other.state_dict()))

    def test_it_counts_in_evaluation_and_only_there(self):
        model = make(kv_usage=0.5)
        threshold = next(module.thresholds_of(model))
        model(draw())
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            usage = evaluate(model).mean()
        assert not seen
        assert usage.item() == pytest.approx(0.5, abs=0.05)
        assert threshold.steps == 0 and not threshold.table.any()
        assert model.state_dict()["blocks.0.mixer.threshold.steps"] == 1

    def test_evaluation_in_inference_mode_leaves_training_possible(self):
        model = make(threshold="controlled")
        model(draw())
        with torch.inference_mode():
            evaluate(model)
            model.state_dict()
        train(model, 2)
        assert next(module.thresholds_of(model)).steps == 2

    def test_checkpointed_blocks_run_again_as_they_ran_after_an_evaluation_between(self):
        model = make(depth=1, router="learned", threshold="controlled")
        train(model, 1)
        gradients, x = [], model.embedding(draw(B=4)).detach()
        for look in (False, True):
            each = copy.deepcopy(model)
            y = checkpoint(lambda x, m=each: m.blocks[0](x)[0], x, use_reentrant=False)
            if look:
                evaluate(each)
                each.train()
            y.square().sum().backward()
            gradients.append([w.grad for w in each.blocks.parameters()])
        for one, other in zip(*gradients, strict=True):
            assert torch.equal(one, other)

    def test_calibration_and_allocation_do_not_mix_it_in(self):
        model, tokens = make(), draw()
        model(tokens)
        calibrate(model, [tokens])
        threshold = next(module.thresholds_of(model))
        before = threshold.table.clone()
        model.train()
        threshold.close_step()
        assert torch.equal(threshold.table, before)


class TestWarnings:
    @pytest.mark.parametrize(
        ("scores", "message"),
        [
            (
                torch.full((4, 50, 2), 0.5),
                "router mine gives too many tokens the same score: the KV usage 0.25 becomes 0",
            ),
            (torch.rand(4, 50, 2).clamp(max=0.5), "router mine gives too many tokens the same score"),
            (torch.full((4, 50, 2), math.inf), "router mine gives .* the same score: the KV usage 0.25 becomes 1"),
            (torch.rand(4, 50, 2).masked_fill(torch.arange(50)[:, None] == 7, math.nan), "router mine gave NaN"),
        ],
        ids=["constant", "ties", "inf", "nan"],
    )
    def test_scores_that_no_threshold_tells_apart(self, scores, message):
        for scope in module.SCOPES:
            threshold = THRESHOLDS.build("calibrated", 2, kv_usage=0.25, scope=scope)
            threshold.router = "mine"
            with pytest.warns(UserWarning, match=message) as seen:
                feed(threshold, *[scores] * 2 * module.CHECK_EVERY)
            assert len(seen) == 1

    def test_scores_that_become_constant_in_training(self):
        threshold = THRESHOLDS.build("calibrated", 2, kv_usage=0.25)
        threshold.router = "mine"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            feed(threshold, torch.rand(4, 50, 2))
        with pytest.warns(UserWarning, match="router mine gives too many tokens the same score"):
            feed(threshold, *[torch.ones(4, 50, 2)] * module.CHECK_EVERY)

    @pytest.mark.parametrize("router", [*ROUTERS.values(), "static", "recency", "all", "none"], ids=str)
    def test_ours_give_no_cause(self, router):
        model = make(router=router)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(model, 3)

    def test_calibrating_a_new_model_is_no_cause_either(self):
        """Not even where, as at the end of a fit, nothing was evaluated before."""
        model = make()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            calibrate(model, [draw()])
            evaluate(model)


class TestCheckpointing:
    """A block that is run again in the backward pass must decide as it did, and count its tokens once."""

    def train(self, options, reentrant):
        model = make(**options)
        torch.manual_seed(1)
        gradients = []
        for _ in range(4):
            x = model.embedding(draw())
            for block in model.blocks:
                if reentrant is None:
                    x, _ = block(x)
                else:
                    x = checkpoint(lambda x, block=block: block(x)[0], x, use_reentrant=reentrant)
            model.zero_grad()
            model.norm(x).square().mul(torch.linspace(-1, 1, 16)).sum().backward()
            gradients.append([None if w.grad is None else w.grad.clone() for w in model.parameters()])
        return model, gradients

    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.parametrize(
        "options", [{}, {"scope": "head", "threshold": "controlled"}, {"router": "learned"}], ids=str
    )
    def test_gradients_are_those_of_a_plain_block(self, options, reentrant):
        (plain, plain_gradients), (model, gradients) = self.train(options, None), self.train(options, reentrant)
        for one, other in zip(gradients, plain_gradients, strict=True):
            for gradient, golden in zip(one, other, strict=True):
                assert (gradient is None) == (golden is None)
                if golden is not None:
                    assert_close(gradient, golden, rtol=0, atol=0)
        for one, other in zip(module.thresholds_of(model), module.thresholds_of(plain), strict=True):
            assert one.steps == other.steps == 3
            assert torch.equal(one.table, other.table)
