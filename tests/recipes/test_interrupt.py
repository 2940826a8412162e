"""However a run is stopped, what is resumed ends bit for bit like a run that was not."""

import signal

import pytest
import torch

import lit_modules.callbacks
from lit_modules.callbacks import RNGState
from mixers.allocation import allocatable_mixers

slow = pytest.mark.slow


def interrupt(*_, **__):
    raise KeyboardInterrupt


def press(*_, **__):
    signal.raise_signal(signal.SIGINT)


def last_of(folder):
    saved = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    return saved, saved["state_dict"]


def stop(monkeypatch, hook, step, how):
    """Calls `how` once, in a callback's hook, when `step` steps are done."""
    before, calls = getattr(RNGState, hook), []

    def stopping(self, trainer, *args):
        if trainer.global_step == step and not calls:
            calls.append(step)
            how()
        return before(self, trainer, *args)

    monkeypatch.setattr(RNGState, hook, stopping)
    return calls


@pytest.mark.parametrize(
    ("hook", "step", "how", "saved"),
    [
        ("on_train_batch_start", 5, interrupt, 4),
        pytest.param("on_after_backward", 5, interrupt, 4, marks=slow),
        pytest.param("on_train_batch_end", 5, interrupt, 4, marks=slow),
        pytest.param("on_validation_batch_end", 4, interrupt, 4, marks=slow),
        pytest.param("on_validation_batch_start", 6, interrupt, 6, marks=slow),  # the last one
        pytest.param("on_train_batch_start", 2, press, 3, marks=slow),
        ("on_before_zero_grad", 4, press, 5),
        pytest.param("on_validation_batch_start", 6, press, 6, marks=slow),
    ],
)
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    run, here, tiny, trained, monkeypatch, hook, step, how, saved
):
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        calls = stop(patch, hook, step, how)
        result = run(f"fit {tiny}")
    assert calls == [step] and result.code == 130, result.err
    assert signal.getsignal(signal.SIGINT) is handler
    assert "go on with\n  python -m recipes fit --ckpt_path runs/ham-text-1/checkpoints/last.ckpt" in result.out
    assert last_of(here / "runs/ham-text-1")[0]["global_step"] == saved
    result = run("fit --ckpt_path last")
    assert result.code == 0, result.err
    ours, theirs = last_of(here / "runs/ham-text-2"), last_of(trained / "runs/ham-text-1")
    assert ours[0]["global_step"] == 6 and ours[0]["callbacks"]["ValidateAtEnd"]["done"]
    assert all(torch.equal(x, theirs[1][name]) for name, x in ours[1].items())
    assert "give more --steps" in run("fit --ckpt_path last").error


@pytest.mark.parametrize("end", [pytest.param("calibrate", marks=slow), "allocate"])
def test_a_stop_while_the_budget_is_fitted_is_made_good(run, here, tiny, monkeypatch, end):
    def allocate(model, batches, loss, **options):
        for mixer in allocatable_mixers(model):
            mixer.head_bias += 0.1  # so that to do it twice is not to do it once

    monkeypatch.setattr(lit_modules.callbacks, "allocate", allocate)
    assert run(f"fit {tiny} --budget any").code == 0
    with monkeypatch.context() as patch:
        patch.setattr(lit_modules.callbacks, end, interrupt)
        assert run(f"fit {tiny} --budget any").code == 130
    assert last_of(here / "runs/ham-text-2")[0]["global_step"] == 6
    result = run("fit --ckpt_path last")
    assert result.code == 0, result.err
    assert "validation after 6 steps" in result.out
    whole, resumed = (last_of(here / f"runs/ham-text-{number}")[1] for number in (1, 3))
    assert all(torch.equal(x, resumed[name]) for name, x in whole.items())
