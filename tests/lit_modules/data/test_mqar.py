from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lit_modules.data.mqar import MQARData, mqar_batch
from mixers import SpecError


def draw(**options):
    return mqar_batch(np.random.default_rng(0), **{"batch_size": 64, "num_pairs": 8} | options)


@pytest.mark.parametrize("seq_len", [32, 50])
def test_every_key_is_asked_for_once_and_the_target_is_its_value(seq_len):
    batch = draw(seq_len=seq_len)
    assert batch["tokens"].shape == batch["targets"].shape == (64, seq_len)
    for tokens, targets in zip(batch["tokens"].tolist(), batch["targets"].tolist(), strict=True):
        value_of = dict(zip(tokens[0:16:2], tokens[1:16:2], strict=True))
        assert len(value_of) == 8
        assert all(1 <= key <= 64 < value <= 128 for key, value in value_of.items())
        asked = [i for i, target in enumerate(targets) if target != -100]
        assert min(asked) >= 16
        assert sorted(tokens[i] for i in asked) == sorted(value_of)
        assert all(targets[i] == value_of[tokens[i]] for i in asked)
        assert all(tokens[i] == 0 for i in range(16, seq_len) if i not in asked)


def test_queries_fall_soon_after_the_pairs_as_the_power_law_says():
    asked = draw(batch_size=4000, num_pairs=1, seq_len=34)["targets"] != -100
    share = asked[:, 2::2].float().mean(0).numpy()
    density = np.arange(1, 17.0) ** (0.01 - 1)
    np.testing.assert_allclose(share, density / density.sum(), atol=0.03)


def test_a_batch_depends_on_seed_split_number_level_and_rank_alone():
    data = MQARData(num_pairs=8)
    first = data.batch(0, 3, batch_size=4, level=8)["tokens"]
    data.batch(0, 4, batch_size=4, level=4)
    assert torch.equal(first, data.batch(0, 3, batch_size=4, level=8)["tokens"])
    assert torch.equal(first, MQARData(num_pairs=8).batch(0, 3, batch_size=4, level=8)["tokens"])
    others = [
        MQARData(num_pairs=8, seed=1).batch(0, 3, batch_size=4, level=8),
        data.batch(1, 3, batch_size=4, level=8),
        data.batch(0, 4, batch_size=4, level=8),
        data.batch(0, 3, batch_size=4, level=8, rank=1),
    ]
    assert not any(torch.equal(first, other["tokens"]) for other in others)


def test_stages_shrink_the_sequence_and_the_stage_takes_effect_on_the_next_batch(make_mqar):
    data = make_mqar()
    batches = iter(data.train_dataloader())
    assert next(batches)["tokens"].shape == (4, 8)
    data.curriculum.begun.append(7)
    assert next(batches)["tokens"].shape == (4, 16)


def test_evaluation_is_fixed_at_the_full_task_and_shared_out_among_ranks(make_mqar):
    data = make_mqar()
    whole = list(data.val_dataloader())
    assert [batch["tokens"].shape for batch in whole] == [(4, 16), (2, 16)]
    assert torch.equal(whole[0]["tokens"], next(iter(make_mqar().val_dataloader()))["tokens"])
    assert not torch.equal(whole[0]["tokens"], next(iter(data.test_dataloader()))["tokens"])
    for rank in range(2):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        (share,) = data.val_dataloader()
        assert torch.equal(share["tokens"], whole[rank]["tokens"])


@pytest.mark.parametrize(
    ("pairs", "stages"), [(2, [2]), (8, [4, 8]), (48, [4, 8, 16, 24, 32, 48]), (64, [4, 8, 16, 24, 32, 48, 64])]
)
def test_auto_curriculum(pairs, stages):
    assert MQARData(num_pairs=pairs).curriculum.stages == stages
    assert MQARData(num_pairs=pairs, curriculum=None).curriculum.stages == [pairs]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_pairs": 65}, "num_pairs 65"),
        ({"num_pairs": 8, "seq_len": 30}, "seq_len 30"),
        ({"num_pairs": 8, "curriculum": [4]}, r"curriculum \[4\]"),
        ({"curriculum": "fast"}, "curriculum 'fast'"),
        ({"batch_size": 0}, "batch_size 0"),
    ],
)
def test_sizes_that_contradict_each_other(options, named):
    with pytest.raises(SpecError, match=named):
        MQARData(**options)
