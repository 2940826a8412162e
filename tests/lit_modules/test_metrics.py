import math
from types import SimpleNamespace

import pytest
import torch

from lit_modules.metrics import BitsPerByte, KVUsage, Loss, MeanAccuracy, NameBits, Perplexity


def test_bits_per_byte_and_perplexity_weigh_batches_by_their_tokens():
    for metric, expected in ((BitsPerByte(), 1.75), (Perplexity(), 2**1.75)):
        metric.update(math.log(2), 1)
        metric.update(2 * math.log(2), 3)
        assert metric.compute().item() == pytest.approx(expected)


def test_a_loss_that_is_not_finite_is_not_left_out_unless_another_rank_counts_it():
    metric = Loss()
    metric.update(2.0, 3)
    metric.update(math.nan, 0)
    metric.update(torch.tensor(4.0), 1)
    assert metric.compute().item() == 2.5
    metric.update(torch.tensor(math.nan), 1)
    assert metric.compute().isnan()


def test_bits_of_names_are_pooled_by_bytes_and_absent_where_there_are_none():
    metric = NameBits()
    metric.update(None)
    assert metric.compute() == {}
    metric.update(torch.tensor([[5.0, 0.0, 0.0], [10, 0, 0]]))
    assert metric.compute() == {}
    metric.update(torch.tensor([[1.0, 6.0, 0.0], [2, 3, 0]]))
    found = {name: value.item() for name, value in metric.compute().items()}
    bits = {"name_bits_per_byte": 2 / math.log(2), "rest_bits_per_byte": 0.5 / math.log(2)}
    assert found == pytest.approx(bits | {"name_bytes": 3, "rest_bytes": 12})
    metric.update(torch.tensor([[0.0, 0.0, 1.0], [0, 0, 2]]))
    found = {name: value.item() for name, value in metric.compute().items()}
    assert found["name_bits_per_byte"] == pytest.approx(7 / 5 / math.log(2)) and found["name_bytes"] == 5
    assert found["unknown_name_bits_per_byte"] == pytest.approx(0.5 / math.log(2)) and found["unknown_name_bytes"] == 2


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


def test_accuracy_by_part_and_its_mean():
    metric, names = MeanAccuracy(), ("a", "b", "c")
    target = torch.tensor([[1, 2, -100, 4], [5, -100, -100, 8]])
    metric.update(target, target, ("a", names), None)
    metric.update(torch.tensor([[1, 0, 9, 4], [0, 9, 9, 0]]), target, ("a", names), None)
    metric.update(torch.zeros(2, 4).long(), target, ("b", names), None)
    values = {name: value.item() for name, value in metric.compute().items() if not value.isnan()}
    assert values == pytest.approx({"accuracy/a": 7 / 10, "accuracy/b": 0.0, "mean_accuracy": 0.35})
    metric.reset()
    metric.update(target, target, None, None)
    assert metric.compute()["mean_accuracy"].isnan()
    assert MeanAccuracy().compute() == {}


def test_an_answer_of_several_tokens_is_right_if_all_are():
    metric = MeanAccuracy()
    target = torch.tensor([[-100, 1, 1, 2, 2, 2], [3, 3, -100, 4, -100, 5]])
    answer = torch.tensor([[7, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 2]])
    preds = torch.tensor([[9, 1, 1, 2, 9, 2], [3, 3, 9, 4, 9, 9]])
    metric.update(preds, target, ("a", ("a",)), answer)  # 11 and 33 and 4 are right, 222 and 5 are not
    assert metric.compute()["mean_accuracy"].item() == pytest.approx(3 / 5)
