"""A frozen model's thresholds are fitted to data, and nothing else of it changes."""

import pytest
import torch
from torch import nn

from mixers import Decoder, SpecError, build_mixer, calibrate, set_kv_usage
from mixers.threshold import thresholds_of

SPEC = {"name": "ham", "num_heads": 2, "head_dim": 8}


def make(depth=2, **options):
    torch.manual_seed(0)
    return Decoder(31, dim=16, depth=depth, mixer=SPEC | options)


def batches(count, seed=1, skewed=False):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(3 if skewed else 31, (8, 100), generator=draw) for _ in range(count)]


@torch.no_grad()
def usage(model, tokens):
    """Per layer and head (L, H)."""
    return torch.stack([r.usage for r in model.eval()(tokens).routing])


@pytest.mark.parametrize(
    ("router", "threshold", "scope"),
    [
        ("cosine", "calibrated", "model"),
        ("residual", "calibrated", "layer"),
        ("learned", "calibrated", "head"),
        ("demand", "calibrated", "model"),
        ({"name": "learned", "form": "error"}, "controlled", "model"),
        ("cosine", "controlled", "head"),
        ("residual", "learned", "model"),
        ("demand", "learned", "layer"),
    ],
    ids=str,
)
def test_the_usage_is_held_over_the_scope_at_any_asked_usage(router, threshold, scope):
    model = make(router=router, threshold=threshold, scope=scope)
    for asked in (0.25, 0.0625, 0.6):
        set_kv_usage(model, asked)
        assert calibrate(model, batches(8)) == 8
        for tokens, tolerance in ((batches(8), 0.02), (batches(8, seed=2), 0.04)):  # the same, and others like them
            found = usage(model, torch.cat(tokens))
            over = {"model": found.mean(), "layer": found.mean(1), "head": found}[scope]
            assert (over - asked).abs().max() < tolerance


def test_it_follows_the_data_and_averages_over_it():
    model = make(depth=1, router="cosine")
    calibrate(model, batches(2))
    one = next(thresholds_of(model)).table.clone()
    calibrate(model, batches(2, skewed=True))
    other = next(thresholds_of(model)).table.clone()
    assert not torch.allclose(one, other, atol=1e-3)
    calibrate(model, batches(2) + batches(2, skewed=True))
    both = next(thresholds_of(model)).table
    torch.testing.assert_close(both, (one + other) / 2)


def test_nothing_else_changes():
    model = nn.ModuleDict({"decoder": make(router="demand"), "dropout": nn.Dropout()}).train()
    model["dropout"].eval()
    before = {name: x.clone() for name, x in model.state_dict().items() if not name.endswith((".table", ".steps"))}
    seen = []
    calibrate(model, batches(1), run=lambda batch: seen.append(model["dropout"].training) or model["decoder"](batch))
    assert seen == [False, False] and model.training and not model["dropout"].training
    assert all(module.training for module in model["decoder"].modules())
    for name, x in before.items():
        assert torch.equal(model.state_dict()[name], x), name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_users_own_threshold_and_the_ends_of_the_dial_stay():
    model = make(threshold={"name": "fixed", "tau": 0.3}, scope="layer")
    calibrate(model, batches(1))
    assert next(thresholds_of(model)).tau().tolist() == pytest.approx([0.3])
    model = make(kv_usage=0)
    calibrate(model, batches(1))
    assert usage(model, batches(1)[0]).max() == 0


def test_mistakes_leave_the_tables_as_they_were():
    with pytest.raises(SpecError, match="no KV threshold"):
        calibrate(build_mixer("gdn", dim=16, num_heads=2), [])
    model = make()
    calibrate(model, batches(1))
    before, tau = next(thresholds_of(model)).table.clone(), next(thresholds_of(model)).tau(False).clone()

    def stops(batch):
        model(batch)
        raise KeyboardInterrupt

    for data, run, error in ((([]), None, SpecError), (batches(1, skewed=True), stops, KeyboardInterrupt)):
        with pytest.raises(error):
            calibrate(model, data, run=run)
        threshold = next(thresholds_of(model))
        assert torch.equal(threshold.table, before) and threshold.steps == 1 and not threshold.averaging
        assert torch.equal(threshold.tau(False), tau)  # nor are scores left that would count as a step under way
