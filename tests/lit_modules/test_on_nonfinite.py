"""A step whose gradient is not finite stops a run, or changes nothing that is learned."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, WeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lit_modules.on_nonfinite import MOST_SKIPPED, OnNonFinite
from mixers import SpecError


class Poison(Callback):
    """Adds NaN to a gradient after the backward passes of these numbers, counted from 0."""

    def __init__(self, *passes):
        self.passes, self.count = passes, 0

    def on_after_backward(self, trainer, model):
        if self.count in self.passes:
            model.decoder.norm.weight.grad[0] = torch.nan
        self.count += 1


class Watch(Callback):
    """What was learned after each step: weights, buffers, moments, the average."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, model, *_):
        averages = [c._average_model.state_dict() for c in trainer.callbacks if isinstance(c, WeightAveraging)]
        states = model.state_dict(), trainer.optimizers[0].state_dict()["state"], averages
        self.seen.append(copy.deepcopy(states))


def equal(one, other):
    one, other = (torch.utils._pytree.tree_flatten(tree) for tree in (one, other))
    return one[1] == other[1] and all(
        torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(one[0], other[0], strict=True)
    )


PRECISIONS = ["32-true", "bf16-mixed", "bf16-true", "16-mixed"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_skipped_step_changes_nothing(make_trainer, make_model, make_mqar, precision, accumulate):
    model, watch = make_model(on_nonfinite="skip", mixer={"name": "ham", "threshold": "controlled"}), Watch()
    plugin = {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1.0))}
    how = plugin if precision == "16-mixed" else {"precision": precision}
    average = [] if precision == "bf16-true" else [WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.5))]
    trainer = make_trainer(
        max_steps=4,
        accumulate_grad_batches=accumulate,
        callbacks=[*average, Poison(0, 2 * accumulate), watch],
        gradient_clip_val=1.0,
        limit_val_batches=0,
        **how,
    )
    with pytest.warns(UserWarning, match="step 3 is skipped: its gradient is not finite"):
        trainer.fit(model, make_mqar(batches_per_epoch=8))
    assert trainer.global_step == 4 and trainer.logged_metrics["trainer/skipped_steps"] == 2
    steps = watch.seen[accumulate - 1 :: accumulate]
    assert not steps[0][1] and equal(steps[1], steps[2])
    assert not equal(steps[0], steps[1]) and not equal(steps[2], steps[3])
    assert all(x.isfinite().all() for x in model.state_dict().values())
    moments = steps[3][1][0]
    assert moments["step"] == 2 and steps[3][0]["decoder.blocks.0.mixer.threshold.steps"] == 2


def test_a_resumed_run_goes_on_counting(make_trainer, make_model, make_mqar, tmp_path):
    found = []
    for resumed in (False, True):
        model, data = make_model(on_nonfinite="skip"), make_mqar()
        save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        watch = OnNonFinite(skips=True)
        model.configure_callbacks = lambda watch=watch: [watch]
        poison = Poison(1, 2, 3)
        poison.count = 3 if resumed else 0
        trainer = make_trainer(max_steps=6, callbacks=[poison, save], enable_checkpointing=True)
        trainer.fit(model, data, ckpt_path=tmp_path / "step=3.ckpt" if resumed else None, weights_only=True)
        found.append((model.state_dict(), watch.state_dict()))
        if not resumed:
            saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
            assert saved["callbacks"]["OnNonFinite"] == {"skipped": 2, "in_a_row": 2}
    assert found[0][1] == {"skipped": 3, "in_a_row": 0}
    assert equal(*found)


@pytest.mark.parametrize(("choice", "step"), [("stop", 3), ("skip", 3 + MOST_SKIPPED)])
def test_it_stops_in_one_line(make_trainer, make_model, make_mqar, choice, step):
    model = make_model(on_nonfinite=choice)
    trainer = make_trainer(max_steps=20, callbacks=[Poison(0, *range(2, 20)) if choice == "skip" else Poison(2)])
    message = f"diverged in step {step}.*the gradient of decoder.norm.weight is not finite; no checkpoint"
    with pytest.raises(SpecError, match=message):
        trainer.fit(model, make_mqar())
    assert trainer.global_step == step - 1


def test_what_cannot_skip_is_refused(make_trainer, make_model, make_mqar):
    with pytest.raises(SpecError, match="unknown on_nonfinite 'skpi'; known: skip, stop"):
        make_model(on_nonfinite="skpi")
    model = make_model()
    trainer = make_trainer(max_steps=1)
    trainer.fit(model, make_mqar())
    trainer.strategy._ddp_comm_hook = print
    OnNonFinite(skips=False).on_fit_start(trainer, model)
    with pytest.raises(SpecError, match="with one device, ddp and fsdp2, not with SingleDeviceStrategy with a comm"):
        OnNonFinite(skips=True).on_fit_start(trainer, model)
