"""A budget that heads share goes where it lowers the loss, and nothing else of the model changes."""

import pytest
import torch
from torch.nn import functional as F

import mixers.allocation
from mixers import Decoder, SpecError, allocate, set_kv_usage
from mixers.threshold import thresholds_of

SPEC = {"name": "ham", "num_heads": 2, "head_dim": 8}


def make(depth=2, **options):
    torch.manual_seed(0)
    return Decoder(31, dim=16, depth=depth, mixer=SPEC | options).eval()


def batches(count, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(31, (4, 64), generator=draw) for _ in range(count)]


@torch.no_grad()
def usage(model, tokens):
    """Per layer and head (L, H)."""
    return torch.stack([r.usage for r in model(tokens).routing])


def misses(model, layer, head=slice(None)):
    """A loss that falls as the heads that matter store more."""

    def loss(batch):
        return 1 - torch.stack([r.usage for r in model(batch).routing])[layer, head].mean()

    return loss


@pytest.mark.parametrize(
    ("router", "layer"),
    [
        ("residual", 0),
        ({"name": "learned", "form": "error"}, 1),
        pytest.param("cosine", 1, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_layer_that_matters_gets_the_budget(router, layer):
    model = make(router=router, kv_usage=0.25)
    before, after = allocate(model, batches(2), misses(model, layer), kv_usages=[0.125, 0.25])
    assert after < before - 0.05
    found = usage(model, torch.cat(batches(4, seed=2)))
    assert found[layer].mean() > 0.4 and found[1 - layer].mean() < 0.1
    assert abs(found.mean() - 0.25) < 0.03, "the usage is still the one that was asked for"
    set_kv_usage(model, 0.75)
    assert abs(usage(model, torch.cat(batches(4, seed=2))).mean() - 0.75) < 0.03
    set_kv_usage(model, 0)
    assert usage(model, batches(1)[0]).max() == 0


def test_a_head_that_matters_gets_the_budget_of_its_layer_and_of_the_model():
    for options in ({"scope": "layer", "depth": 1}, {"scope": "model", "depth": 2}):
        model = make(kv_usage=0.125, **options)
        allocate(model, batches(2), misses(model, 0, 1))
        found = usage(model, torch.cat(batches(4, seed=2)))
        assert found[0, 1] > 0.8 * found.sum()
    model = make(kv_usage=0.125)
    allocate(model, batches(2), misses(model, 0, 1), heads=False)
    assert usage(model, batches(1)[0])[0].min() > 0.02, "layers alone were tried"


def test_heads_whose_scores_lie_far_apart_are_brought_together():
    model = make(router="residual", kv_usage=0.25)
    model.blocks[1].mixer.head_bias += 8  # all scores are below 1: at first no step of layer 0 changes anything
    allocate(model, batches(2), misses(model, 0))
    assert usage(model, torch.cat(batches(4, seed=2)))[0].mean() > 0.4


def test_nothing_is_moved_without_a_gain_and_nothing_else_ever():
    model = make(router="demand", kv_usage=0.3).train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    before = {name: x.clone() for name, x in model.state_dict().items() if "threshold" not in name}
    assert allocate(model, batches(1), lambda batch: model(batch).hidden.sum() * 0 + 1) == (1, 1)
    for name, x in before.items():
        assert torch.equal(model.state_dict()[name], x), name
    assert [module.training for module in model.modules()] == modes
    assert next(thresholds_of(model)).kv_usage == 0.3


def test_it_is_saved_with_the_model(monkeypatch):
    monkeypatch.setattr(mixers.allocation, "DOUBLINGS", 1)  # how well it allocates is asked above
    model = make(kv_usage=0.25)
    before = usage(model, batches(1)[0])
    allocate(model, batches(2), misses(model, 1))
    assert not torch.equal(usage(model, batches(1)[0]), before)
    again = make(kv_usage=0.25)
    again.load_state_dict(model.state_dict())
    assert torch.equal(usage(again, batches(1)[0]), usage(model, batches(1)[0]))


@pytest.mark.parametrize("threshold", ["calibrated", "learned", pytest.param("controlled", marks=pytest.mark.slow)])
def test_mistakes_and_interruptions_leave_the_model_as_it_was(threshold, monkeypatch):
    monkeypatch.setattr(mixers.allocation, "DOUBLINGS", 1)
    model = make(router="residual", threshold=threshold)
    allocate(model, batches(1), misses(model, 1))
    with torch.no_grad():
        for parameter in next(thresholds_of(model)).parameters():
            parameter += 0.1
    before = {name: x.clone() for name, x in model.state_dict().items()}
    calls = []

    def stops(batch):
        calls.append(batch)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return misses(model, 0)(batch)

    with pytest.raises(KeyboardInterrupt):
        allocate(model, batches(1), stops)
    for name, x in before.items():
        assert torch.equal(model.state_dict()[name], x), name
    lone = make(scope="head")
    with pytest.raises(SpecError, match="nothing to allocate"):
        allocate(lone, batches(1), misses(lone, 0))
    with pytest.raises(SpecError, match="at least one batch"):
        allocate(model, [], misses(model, 0))
    with pytest.raises(SpecError, match="kv_usage must be a number from 0 to 1, got 2"):
        allocate(model, batches(1), lambda batch: F.mse_loss, kv_usages=[2])
