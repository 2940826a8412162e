import pytest
import torch
from torch import nn

from lit_modules.base import parameter_groups, schedule_factor, with_options
from mixers import SpecError


def test_options_replace_those_of_the_entries_that_take_them():
    pattern = [{"name": "ham", "router": "cosine", "kv_usage": 0.5}, "attention", "ham"]
    given = with_options(pattern, router={"name": "learned"}, kv_usage=0.25)
    assert given == [
        {"name": "ham", "router": {"name": "learned"}, "kv_usage": 0.25},
        {"name": "attention"},
        {"name": "ham", "router": {"name": "learned"}, "kv_usage": 0.25},
    ]
    assert pattern[0] == {"name": "ham", "router": "cosine", "kv_usage": 0.5}
    assert with_options("ham", router=None, kv_usage=0.0) == [{"name": "ham", "kv_usage": 0.0}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixer": "gdn*3,attention", "kv_usage": 0.5}, "kv_usage 0.5 was given, but gdn, attention takes no kv_usage"),
        ({"mixer": "gdn", "router": "cosine"}, "router 'cosine' was given, but gdn takes no router"),
        ({"mixer": "hamm", "router": "cosine"}, "unknown mixer 'hamm'.*Did you mean 'ham'"),
        ({"router": "cosin"}, "unknown router 'cosin'.*Did you mean 'cosine'"),
        ({"kv_usage": 1.5}, "kv_usage.*0 to 1.*1.5"),
        ({"schedule": "linear"}, "unknown schedule 'linear'"),
        ({"warmup_steps": -1}, "warmup_steps.*-1"),
    ],
)
def test_mistakes_are_one_clear_line(make_model, options, message):
    with pytest.raises(SpecError, match=message) as error:
        make_model(**options)
    assert "\n" not in str(error.value)


def test_decay_groups(make_model):
    model = make_model(tie_embeddings=False, mixer={"name": "ham", "num_heads": 2, "threshold": "learned"})
    model.decoder.norm.weight.requires_grad_(False)
    flagged = nn.Parameter(torch.zeros(2, 2))
    flagged._no_weight_decay = True
    model.flagged = flagged
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, free = ({names[id(p)] for p in group["params"]} for group in parameter_groups(model, 0.1))
    assert decayed | free == set(names.values()) - {"decoder.norm.weight"} and not decayed & free
    assert {"decoder.head.weight", "decoder.blocks.0.mlp.up.weight"} <= decayed
    assert {"flagged", "decoder.embedding.weight", "decoder.blocks.1.mixer_norm.weight"} <= free
    assert {name for name in free if name.endswith("threshold.current")}
    assert all(dict(model.named_parameters())[name].ndim > 1 for name in decayed)


def test_a_tied_head_is_an_embedding(make_model):
    model = make_model()
    decayed, free = (group["params"] for group in parameter_groups(model, 0.1))
    assert any(p is model.decoder.head.weight for p in free)
    assert len(decayed) + len(free) == len(list(model.parameters()))


def test_schedule():
    def factors(steps, **options):
        defaults = {"warmup_steps": 4, "total_steps": 14, "schedule": "cosine", "final": 0.1}
        return [schedule_factor(step, **defaults | options) for step in steps]

    assert factors([0, 1, 3, 4]) == pytest.approx([0.2, 0.4, 0.8, 1.0])
    assert factors([9, 14, 20]) == pytest.approx([0.55, 0.1, 0.1])
    assert factors([4, 9, 20], schedule="constant") == [1, 1, 1]
    assert factors([4, 9, 20], total_steps=float("inf")) == [1, 1, 1]


def test_the_optimizer_follows_the_schedule_over_the_trainers_steps(make_trainer, make_model, make_mqar):
    model = make_model(learning_rate=1.0, warmup_steps=1, final_learning_rate=0.5)
    trainer = make_trainer(max_steps=6, limit_val_batches=0)
    rates = []
    model.on_train_batch_start = lambda *_: rates.append(trainer.optimizers[0].param_groups[0]["lr"])
    trainer.fit(model, make_mqar())
    expected = [schedule_factor(i, warmup_steps=1, total_steps=6, schedule="cosine", final=0.5) for i in range(6)]
    assert rates == pytest.approx(expected)
