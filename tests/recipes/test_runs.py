"""What a run leaves behind, and what can be done with it."""

import csv
import os
import shutil
import signal

import pytest
import torch
import yaml
from lightning.pytorch import Trainer

from lit_modules.language_model import LanguageModel
from recipes.callbacks import ValidateAtEnd

RUN = "runs/ham-text-1"


@pytest.fixture
def run_folder(trained, here):
    """A copy of the trained run, in the working directory."""
    shutil.copytree(trained / "runs", here / "runs", symlinks=True)
    return here / RUN


def metrics_in(result) -> dict[str, float]:
    """Those in the table that Lightning prints."""
    assert result.code == 0, result.err
    cells = [line.replace("│", " ").split() for line in result.out.splitlines() if "test/" in line]
    return {name: float(value) for name, value in cells}


def test_what_a_run_leaves_behind(run_folder):
    names = {path.name.split(".")[0] for path in run_folder.iterdir()}
    assert names == {"checkpoints", "config", "events", "hparams", "metrics", "sample", "val_routing"}
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    assert config["model"]["init_args"]["mixer"]["name"] == "ham"
    assert config["trainer"]["max_steps"] == 6
    rows = list(csv.DictReader((run_folder / "metrics.csv").open()))
    validated = [int(row["step"]) for row in rows if row["val/bits_per_byte"]]
    assert validated == [3, 5]  # when it was due, and after the last step


def test_checkpoint_loads_without_a_recipe(run_folder):
    model = LanguageModel.load_from_checkpoint(run_folder / "checkpoints/last.ckpt", weights_only=True)
    assert model.hparams.mixer["name"] == "ham"
    assert "num_classes" not in model.hparams


def test_config_runs_again(run, run_folder):
    result = run(f"fit --config {RUN}/config.yaml")
    assert result.code == 0, result.err
    weights = [torch.load(f"runs/ham-text-{i}/checkpoints/last.ckpt", weights_only=True)["state_dict"] for i in (1, 2)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize("step", [3, 4])
def test_resumes_exactly(run, run_folder, step):
    """Before and after a validation."""
    result = run(f"fit --ckpt_path {RUN}/checkpoints/all-step={step}.ckpt")
    assert result.code == 0 and "resumes with" not in result.out, result.err
    one, other = (torch.load(f"runs/ham-text-{i}/checkpoints/last.ckpt", weights_only=True) for i in (1, 2))
    assert one["global_step"] == other["global_step"] == 6
    assert all(torch.equal(one["state_dict"][key], other["state_dict"][key]) for key in one["state_dict"])
    exp_avg = [saved["optimizer_states"][0]["state"][0]["exp_avg"] for saved in (one, other)]
    assert torch.equal(*exp_avg)


def test_what_changes_on_resuming_is_said(run, run_folder):
    path = run_folder / "checkpoints/all-step=3.ckpt"
    saved = torch.load(path, weights_only=True)
    torch.save(saved | {"processes": 2}, path)
    flags = "--data.batch_tokens 128 --data.seed 3 --seed 5 --steps 7 --kv_usage 0.5"
    flags += " --trainer.gradient_clip_val 0.5 --trainer.accumulate_grad_batches 2"
    result = run(f"fit --ckpt_path {path} {flags}")
    assert result.code == 0, result.err
    said = {line.removeprefix("resumes with ") for line in result.out.splitlines() if line.startswith("resumes with")}
    assert said == {
        "batch_tokens 128 (was 64)",
        "seed 3 (was 0)",
        "seed_everything 5 (was 0)",
        "max_steps 7 (was 6)",
        "kv_usage 0.5 (was unset)",
        "gradient_clip_val 0.5 (was 1.0)",
        "accumulate_grad_batches 2 (was 1)",
        "1 processes (was 2)",
    }
    assert "resumes with" not in run(f"test --ckpt_path {path} --data.batch_tokens 128").out


def test_resume_that_has_nothing_to_do(run, run_folder):
    assert "give more --steps" in run("fit --ckpt_path last").error


def usages_at(run, *asked) -> list[float]:
    return [metrics_in(run(f"test --ckpt_path last --kv_usage {usage}"))["test/kv_usage"] for usage in asked]


def test_a_run_that_ended_by_epochs_is_not_gone_on_with_in_vain(run, here, tiny):
    """By epochs here; by time the same."""
    assert run(f"fit {tiny} --steps -1 --trainer.max_epochs 1 --trainer.limit_train_batches 2").code == 0
    again = run("fit --ckpt_path last")
    assert again.code == 2 and "nothing was trained" in again.err and "is at its max_epochs (1)" in again.err
    assert sorted(path.name for path in (here / "runs").iterdir()) == ["ham-text-1"]
    assert run("fit --ckpt_path last --trainer.max_epochs 2").code == 0


def test_evaluates_at_any_usage(run, run_folder):
    trained = metrics_in(run("test --ckpt_path last"))["test/kv_usage"]
    nothing, little, same, most, everything = usages_at(run, 0, 0.1, 0.25, 0.6, 1)
    assert nothing < little < trained == same < most < everything == 1
    assert sorted(p.name for p in (run_folder / "..").resolve().iterdir()) == ["ham-text-1"]


def test_usage_when_tau_is_in_the_checkpoint(run, here, tiny):
    """`controlled` saves tau itself, which loading the weights brings back."""
    assert run(f"fit {tiny} --model.mixer.threshold controlled --kv_usage 0.9").code == 0
    little, most, everything = usages_at(run, 0.1, 0.8, 1)
    assert little < most < everything == 1


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("test --mixer gdn", ["mixer ham", "gated_delta_net"]),
        ("fit --mixer ham*2", ["mixer ham"]),
        ("validate --model.dim 32", ["dim 16", "32"]),
        ("test --router cosine", ["mixer.router", "residual", "cosine"]),
        ("fit --model.mixer.scope head", ["mixer.scope 'model'", "'head'"]),
        ("fit --model.learning_rate 1", ["learning_rate"]),
        ("test --data mqar", ["vocab_size 256", "129"]),
        ("fit --data classification", ["vocab_size 256", "21"]),
        ("test --model lit_modules.sequence_classifier.SequenceClassifier", ["LanguageModel", "SequenceClassifier"]),
        ("predict --kv_usage 3", ["kv_usage"]),
    ],
)
def test_flags_that_contradict_the_checkpoint(run, run_folder, line, parts):
    error = run(f"{line} --ckpt_path {RUN}/checkpoints/all-step=3.ckpt").error
    assert [part for part in parts if part not in error] == []
    assert not (run_folder / "../ham-text-2").exists()


@pytest.mark.parametrize("flags", ["--mixer ham", "--router residual", "--mixer ham --data text --model.dim 16"])
def test_flags_that_agree_with_the_checkpoint(run, run_folder, flags):
    assert metrics_in(run(f"test --ckpt_path last {flags}"))


def test_options_of_the_data_of_the_checkpoint(run, here):
    """Also where the data are not those that a recipe would take by default."""
    sizes = "--data.num_pairs 2 --data.num_keys 4 --data.num_values 4 --data.num_validation 4 --data.num_test 100"
    quiet = "--trainer.enable_progress_bar false --model.dim 16"
    assert run(f"fit --data mqar --mixer gdn {sizes} --steps 2 {quiet}").code == 0
    assert metrics_in(run("test --ckpt_path last --data.num_test 4"))
    assert "Did you mean --data.num_test?" in run("test --ckpt_path last --data.num_tests 4").error


def test_last_is_the_newest_of_the_mixer_and_data(run, run_folder):
    assert "gdn-*" in run("test --mixer gdn --ckpt_path last").error
    assert "-mqar-" in run("test --data mqar --ckpt_path last").error


def test_checkpoint_of_a_python_program(run, here, tiny):
    """It holds the model's hyper-parameters and nothing else."""
    model = LanguageModel(vocab_size=256, dim=16, depth=2, mixer="gdn")
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint("mine.ckpt")
    size = tiny.partition("--data")[2]
    assert metrics_in(run(f"test --ckpt_path mine.ckpt --data{size}"))
    assert "gated_delta_net, not ham" in run("test --ckpt_path mine.ckpt --mixer ham").error


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1], ids=lambda signum: signum.name)
def test_a_signal_saves_and_stops(run, here, tiny, monkeypatch, signum):
    handler = signal.getsignal(signum)

    def interrupt(self, trainer, *args):
        if trainer.global_step == 2:
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(ValidateAtEnd, "on_train_batch_end", interrupt)
    result = run(f"fit {tiny}")
    assert result.code == 128 + signum and signal.getsignal(signum) is handler
    assert "go on with\n  python -m recipes fit --ckpt_path runs/ham-text-1/checkpoints/" in result.out
    saved = torch.load("runs/ham-text-1/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 2


def test_plugin_and_user_classes(run, here, tiny, monkeypatch):
    (here / "my_parts.py").write_text(
        "from mixers import Router, register_router\n\n"
        '@register_router("by_norm")\n'
        "class ByNorm(Router):\n"
        "    def forward(self, inputs):\n"
        "        return inputs.v.norm(dim=-1)\n"
    )
    monkeypatch.syspath_prepend(here)
    for flags in ("--router my_parts.ByNorm", "--plugin my_parts --router by_norm"):
        result = run(f"fit {tiny} {flags} --trainer.fast_dev_run true")
        assert result.code == 0, result.err


def test_without_a_logger(run, here, tiny):
    for _ in range(2):  # a second run finds nothing of the first
        result = run(f"fit {tiny} --trainer.logger false --trainer.enable_checkpointing false")
        assert result.code == 0, result.err
    assert not [path for path in here.rglob("*") if path.is_file()]
