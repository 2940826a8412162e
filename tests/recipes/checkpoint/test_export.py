"""What becomes of a checkpoint: exported to Hugging Face, calibrated on other text."""

import re

import torch
from transformers import AutoModelForCausalLM

import mixers.allocation
from lit_modules.language_model import LanguageModel
from mixers.hf import MixerForCausalLM
from mixers.threshold import thresholds_of


def test_export_is_loaded_by_hugging_face_and_is_the_same_model(run, checkpoint, tmp_path):
    out = tmp_path / "model"
    result = run(f"export --ckpt_path {checkpoint} --out {out} --kv_usage 0.5")
    assert result.code == 0 and "parameters written to" in result.out and "from_pretrained" in result.out
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    original = LanguageModel.load_from_checkpoint(checkpoint, weights_only=True).eval()
    next(thresholds_of(original)).set_usage(0.5)
    tokens = torch.tensor([list(b"import os\n" * 4)])
    assert isinstance(model, MixerForCausalLM)
    assert torch.equal(model(tokens).logits, original(tokens))


def test_calibrate_holds_the_usage_on_other_text(run, checkpoint, tmp_path):
    text = tmp_path / "other.txt"
    text.write_text("".join(chr(97 + i * i % 26) + " 0123456789"[i % 11] for i in range(20_000)))
    out = tmp_path / "new.ckpt"
    result = run(f"calibrate --ckpt_path {checkpoint} --text [{text}] --kv_usage 0.3 --batches 2 --out {out}")
    assert result.code == 0
    before, after = map(float, re.search(r"batches: ([\d.]+), now ([\d.]+) for 0.3", result.out).groups())
    assert abs(after - 0.3) < 0.02 < abs(before - 0.3)
    old, new = (torch.load(path, weights_only=True) for path in (checkpoint, out))
    assert new["hyper_parameters"]["kv_usage"] == 0.3
    changed = {name for name, x in new["state_dict"].items() if not torch.equal(x, old["state_dict"][name])}
    assert changed and all("threshold" in name for name in changed)
    assert run(f"generate --ckpt_path {out} --prompt a --max_new_tokens 2").code == 0


def test_calibrate_may_allocate_the_budget_too(run, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(mixers.allocation, "DOUBLINGS", 1)  # how well it allocates is tested elsewhere
    (tmp_path / "some.txt").write_text("from one import many, few\n" * 40)
    out = tmp_path / "new.ckpt"
    result = run(
        f"calibrate --ckpt_path {checkpoint} --text [{tmp_path / 'some.txt'}] --batches 1 --allocate --out {out}"
    )
    first, best = map(float, re.search(r"1/4: ([\d.]+), allocated ([\d.]+)", result.out).groups())
    assert result.code == 0 and best <= first
    old, new = (torch.load(path, weights_only=True)["state_dict"] for path in (checkpoint, out))
    assert all("threshold" in name or "head_bias" in name or torch.equal(x, old[name]) for name, x in new.items())


def test_mistakes(run, checkpoint, here):
    (here / "full").mkdir()
    (here / "full" / "file").touch()
    assert "give --out" in run(f"export --ckpt_path {checkpoint}").error
    assert "not an empty folder" in run(f"export --ckpt_path {checkpoint} --out full").error
    assert "no such checkpoint" in run("export --ckpt_path nowhere.ckpt --out new").error
    assert (
        "kv_usage must be a number from 0 to 1" in run(f"export --ckpt_path {checkpoint} --out new --kv_usage 3").error
    )
    assert "batches must be at least 1" in run(f"calibrate --ckpt_path {checkpoint} --batches 0").error
    assert "nowhere" in run(f"calibrate --ckpt_path {checkpoint} --text [nowhere]").error
    assert sorted(p.name for p in here.iterdir()) == ["full"]
