import math
from types import SimpleNamespace

import pytest
import torch

from lit_modules.metrics import BitsPerByte, KVUsage, Perplexity


def test_bits_per_byte_and_perplexity_weigh_batches_by_their_tokens():
    for metric, expected in ((BitsPerByte(), 1.75), (Perplexity(), 2**1.75)):
        metric.update(math.log(2), 1)
        metric.update(2 * math.log(2), 3)
        assert metric.compute().item() == pytest.approx(expected)


def routed(kept, lengths):
    return SimpleNamespace(kept=torch.tensor(kept), lengths=torch.tensor(lengths))


def test_kv_usage_is_pooled_by_counts_over_heads_and_layers():
    metric = KVUsage()
    metric.update([routed([4.0, 0.0], [6, 2]), None, routed([8.0], [6, 2])])
    metric.update([routed([0.0, 2.0], [2]), None, routed([0.0], [2])])
    usage = {name: value.item() for name, value in metric.compute().items()}
    assert usage == pytest.approx(
        {
            "kv_usage": (4 + 2 + 8) / 30,
            "kv_usage/layer0": 6 / 20,
            "kv_usage/layer0/head0": 4 / 10,
            "kv_usage/layer0/head1": 2 / 10,
            "kv_usage/layer2": 8 / 10,
            "kv_usage/layer2/head0": 8 / 10,
        }
    )
    metric.reset()
    metric.update([routed([1.0, 1.0], [2]), None, routed([0.0], [2])])
    assert metric.compute()["kv_usage"].item() == pytest.approx(2 / 6)


def test_kv_usage_of_a_model_without_routers_is_empty():
    metric = KVUsage()
    metric.update([None, None])
    assert metric.compute() == {}


def test_padding_does_not_count(make_model):
    model = make_model(router="all").eval()
    tokens = torch.randint(0, 33, (2, 6))
    mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    metric = KVUsage()
    with torch.no_grad():
        metric.update(model.decoder(tokens, padding_mask=mask).routing)
    assert metric.tokens == 8
    assert metric.compute()["kv_usage"] == 1
