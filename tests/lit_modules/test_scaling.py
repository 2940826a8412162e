"""Compiling, recomputing and sharding: the same weights, or a refusal."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lit_modules.callbacks import CalibrateThresholds
from mixers import Decoder, SpecError
from mixers.ham import HAM


def fitted(make_trainer, make_model, make_mqar, **options):
    model = make_model(**options)
    torch.manual_seed(1)
    trainer = make_trainer(max_steps=3, callbacks=[CalibrateThresholds(batches=2)], limit_val_batches=1)
    trainer.fit(model, make_mqar(curriculum=None))
    return model.state_dict()


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        torch.testing.assert_close(x, theirs[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("router", "budget"),
    [
        ("residual", {"name": "any", "allocate": False}),
        ("demand", "fixed"),
        ({"name": "learned", "dither": 0.1}, "fixed"),
    ],
    ids=str,
)
def test_recomputing_changes_no_weight(make_trainer, make_model, make_mqar, monkeypatch, budget, router):
    calls, mix = [], HAM.mix

    def counted(self, *args):
        calls.append(self.layer_index)
        return mix(self, *args)

    monkeypatch.setattr(HAM, "mix", counted)
    weights, counts = [], []
    for again in (False, True):
        calls.clear()
        options = {"activation_checkpointing": again, "budget": budget, "router": router}
        weights.append(fitted(make_trainer, make_model, make_mqar, **options))
        counts.append(len(calls))
    assert counts[1] == counts[0] + 3 * 2  # steps, layers
    assert_equal(*weights)


@pytest.mark.parametrize("again", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiling_changes_no_weight(make_trainer, make_model, make_mqar, monkeypatch, again):
    torch._dynamo.reset()
    compiled = []

    def compile(self):
        compiled.append(self)
        nn.Module.compile(self, backend="eager")  # the graph as it was traced: inductor takes a minute

    monkeypatch.setattr(Decoder, "compile", compile)
    ham = {"name": "ham", "num_heads": 2, "head_dim": 8, "backend": "naive", "attention_backend": "naive"}
    options = {"mixer": ham, "activation_checkpointing": again}
    short = partial(make_mqar, num_pairs=2)
    plain = fitted(make_trainer, make_model, short, **options)
    assert not compiled
    assert_equal(fitted(make_trainer, make_model, short, compile=True, **options), plain)
    assert len(compiled) == 1


def test_blocks_are_compiled_one_by_one(make_trainer, make_model, make_mqar, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    fitted(make_trainer, make_model, make_mqar, compile="blocks")
    assert compiled == ["Block", "Block"]


def test_what_does_not_go_together_is_refused(make_model):
    with pytest.raises(SpecError, match="compile, activation_checkpointing and budget 'any'"):
        make_model(compile=True, activation_checkpointing=True, budget="any")


@pytest.mark.parametrize(
    ("tensors", "threshold", "message"),
    [(2, "calibrated", "no mixer is split over devices"), (1, "learned", "'learned'.*cannot be sharded")],
)
def test_what_cannot_be_sharded_is_refused(make_model, tensors, threshold, message):
    model = make_model(mixer={"name": "ham", "num_heads": 2, "threshold": threshold})
    sizes = {"data_parallel": 2, "tensor_parallel": tensors}
    model._device_mesh = {name: SimpleNamespace(size=lambda size=size: size) for name, size in sizes.items()}
    with pytest.raises(SpecError, match=message):
        model.configure_model()
