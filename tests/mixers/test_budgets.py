"""A usage for every sequence: what one model for all KV budgets is trained with."""

import pytest
import torch

from mixers import Decoder, calibrate, set_kv_usage
from mixers.threshold import thresholds_of, usage_per_sequence

HAM = {"name": "ham", "num_heads": 2, "head_dim": 8}


def make(**options):
    torch.manual_seed(0)
    model = Decoder(31, dim=16, depth=2, mixer=HAM | options).double()
    calibrate(model, [tokens(8, 100)])
    return model


def tokens(*shape, seed=0):
    return torch.randint(31, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scope", ["model", "layer", "head"])
@pytest.mark.parametrize("router", ["residual", "learned", "demand"])
def test_each_sequence_is_as_it_would_be_alone_at_its_usage(scope, router):
    """Dense, packed and padded; in training the loss of each sequence is that of its own budget."""
    model, x = make(scope=scope, router=router).train(), tokens(4, 50, seed=1)
    usages, lengths = torch.tensor([0.0, 0.3, 0.77, 1.0]), torch.tensor([50, 13, 50, 7])
    mask = torch.arange(50) < lengths[:, None]
    packed, bounds = x[mask][None], torch.tensor([0, *lengths.cumsum(0).tolist()])
    table = {t: t.table.clone() for t in thresholds_of(model)}

    def run(*args, **options):
        for threshold, before in table.items():  # every call in training mode moves it
            threshold._pending.clear()
            threshold.table.copy_(before)
        return model(*args, **options)

    with usage_per_sequence(model, usages):
        dense, flat, padded = run(x), run(packed, cu_seqlens=bounds), run(x, padding_mask=mask)
    assert torch.equal(flat.hidden[0], padded.hidden[mask])
    for i, usage in enumerate(usages.tolist()):
        set_kv_usage(model, usage)
        alone = run(x[i : i + 1])
        torch.testing.assert_close(dense.hidden[i], alone.hidden[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(padded.hidden[i, : lengths[i]], alone.hidden[0, : lengths[i]], rtol=1e-9, atol=1e-9)
    assert not dense.routing[0].stored[0].any() and dense.routing[0].stored[3].all()


def test_it_ends_with_the_context_and_does_not_touch_evaluation():
    model, x = make(), tokens(3, 20)
    threshold = next(thresholds_of(model))
    with usage_per_sequence(model, torch.zeros(3)):
        assert threshold.usages is not None
        assert model.eval()(x).routing[0].stored.any()  # evaluation is at the model's own usage
    assert threshold.usages is None
    with pytest.raises(KeyError), usage_per_sequence(model, torch.zeros(3)):
        raise KeyError
    assert threshold.usages is None


def test_a_users_own_threshold_stays():
    model = make(threshold={"name": "fixed", "tau": 0.1}).train()
    with usage_per_sequence(model, torch.zeros(2)):
        assert model(tokens(2, 20)).routing[0].stored.any()
