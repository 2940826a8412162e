"""Numbers and files that nothing can be made of: one line that names the thing, exit code 2, nothing on the disk."""

import pytest

HUGE = 10**30
FIT = [  # flags, and what the line names
    ("--seed -1", "seed_everything"),
    ("--lr -1", "learning_rate"),
    ("--model.betas [2,0.5]", "betas"),
    ("--model.mlp_ratio nan", "mlp_ratio"),
    ("--dim 1000000000000", "memory"),
    ("--head_dim 0", "head_dim"),
    ("--mixer attention --model.mixer.num_kv_heads 0", "num_kv_heads"),
    ("--model.vocab_size 10", "vocab_size 10"),
    ("--model.mixer.backend foo", "'foo'"),
    ("--model.mixer.threshold {name:calibrated,momentum:5}", "momentum"),
    ("--model.mixer.threshold {name:learned,temperature:0.0}", "temperature"),
    ("--model.mixer.threshold fixed --kv_usage 0.5", "calibrated"),
    ("--model.mixer.threshold fixed --model.mixer.kv_usage 0.5", "no KV usage to set, got 0.5; leave kv_usage out"),
    ("--trainer.accelerator cpu --devices 99999", "devices 99999 on a CPU of"),
    ("--mixer gdn --budget any", "budget 'any'"),
    ("--steps 0", "max_steps"),
    ("--config null.yaml", "trainer is null"),
    ("--precision foo", "foo"),
    ("--trainer.accumulate_grad_batches 0", "accumulate_grad_batches"),
    ("--trainer.gradient_clip_val -1", "gradient_clip_val"),
    ("--batch_tokens 0", "batch_tokens"),
    ("--data mqar --data.advance_at nan", "advance_at"),
    ("--config binary.yaml", "binary.yaml"),
    ("--config number.yaml", "contestants"),
    ("--plugin raises", "ZeroDivisionError"),
    ("--plugin ./exits.py", "SystemExit"),
    ("--plugin ./none.py", "no such file"),
    ("--plugin ./json.py", "another module 'json'"),
]
FIT_ALIKE = [  # as others of FIT, of other options
    (f"--seed {HUGE}", "seed_everything"),
    ("--data.seed -1", "seed"),
    ("--model.weight_decay -1", "weight_decay"),
    ("--model.final_learning_rate -1", "final_learning_rate"),
    ("--dim 0", "dim"),
    ("--model.mixer.value_dim 0", "value_dim"),
    ("--model.mixer.threshold {name:controlled,freeze_after:-1}", "freeze_after"),
    ("--model.mixer.threshold {name:fixed,tau:.nan}", "tau"),
    ("--router {name:learned,hidden:0}", "hidden"),
    ("--trainer.max_epochs 0", "max_epochs"),
    ("--devices 0", "devices"),
    ("--trainer.log_every_n_steps 0", "log_every_n_steps"),
    ("--seq_len 0", "seq_len"),
    ("--data mqar --data.num_values 0", "num_values"),
    ("--data classification --data.num_classes 0", "num_classes"),
    ("--plugin ./raises.py", "ZeroDivisionError"),
]
OTHERS = [
    ("generate --prompt a --ckpt_path CKPT --temperature nan", "temperature"),
    ("generate --prompt a --ckpt_path CKPT --prefill 0", "prefill"),
    ("generate --prompt a --ckpt_path CKPT --max_kv_bytes -1", "max_kv_bytes"),
    (f"generate --prompt a --ckpt_path CKPT --seed {HUGE}", "seed"),
    ("figures --ckpt_path CKPT --tokens 0 --out new.png", "tokens"),
    ("figures --ckpt_path CKPT --kv_usages [nan] --out new.png", "kv_usage"),
    ("figures --ckpt_path foreign.ckpt --out new.png", "foreign.ckpt"),
    ("generate --prompt a --ckpt_path foreign.ckpt", "foreign.ckpt"),
    ("sweep --ckpt_paths [CKPT] --kv_usages [nan] --out new", "kv_usage"),
    ("doctor --lengths [0]", "lengths"),
    ("compare --seeds 0", "seeds"),
    ("compare --contestants binary.yaml", "binary.yaml"),
    ("compare --contestants 5", "5"),
]
OTHERS_ALIKE = [
    ("generate --prompt a --ckpt_path CKPT --top_p nan", "top_p"),
    ("figures --ckpt_path binary.yaml --out new.png", "binary.yaml"),
    ("compare --jobs -1", "jobs"),
]


@pytest.fixture
def bad_files(here, monkeypatch, checkpoint):
    import torch

    monkeypatch.syspath_prepend(here)
    (here / "binary.yaml").write_bytes(bytes(range(128, 256)))
    (here / "number.yaml").write_text("contestants: 5")
    (here / "null.yaml").write_text("trainer: null")
    (here / "raises.py").write_text("1 / 0")
    (here / "exits.py").write_text("raise SystemExit(3)")
    (here / "json.py").touch()
    saved = torch.load(checkpoint, weights_only=True)
    del saved["state_dict"]["decoder.norm.weight"]
    torch.save(saved, here / "foreign.ckpt")
    return {path.name for path in here.iterdir()}


CASES = [pytest.param(*case, id=case[0]) for case in FIT + OTHERS]
CASES += [pytest.param(*case, id=case[0], marks=pytest.mark.slow) for case in FIT_ALIKE + OTHERS_ALIKE]


@pytest.mark.parametrize(("line", "named"), CASES)
def test_one_line_and_nothing_left(run, here, tiny, checkpoint, bad_files, line, named):
    if (line, named) in FIT + FIT_ALIKE:
        small = tiny if "--data" not in line else "--trainer.enable_progress_bar false"
        line = f"fit {small} {line}"
    error = run(line.replace("CKPT", str(checkpoint))).error
    assert named in error
    assert {path.name for path in here.iterdir()} - {"__pycache__"} == bad_files


def test_a_backend_that_cannot_run_here(run, here, tiny, monkeypatch):
    monkeypatch.setattr(
        "kernels.dispatch.unavailable", lambda backend, device: "it needs a moon" * (backend == "naive")
    )
    error = run(f"fit {tiny} --model.mixer.backend naive").error
    assert "'naive' of delta_rule is not available: it needs a moon" in error
    assert not list(here.iterdir())
