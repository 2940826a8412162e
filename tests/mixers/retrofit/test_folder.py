"""A model with HAM around its attention is kept as a folder, found and opened in the class of its host."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from mixers import SpecError, calibrate, set_kv_usage
from mixers.hf import RetrofitConfig, save_adapter
from mixers.retrofit import parts_of
from mixers.threshold import thresholds_of
from tests.mixers.retrofit.hosts import HOSTS, attached, host, tokens

X = tokens(2, 40)
ROUTED = dict(router={"name": "demand", "error": False, "hidden": 4}, window=4, sinks=2, kv_usage=0.5)


def fitted(name="llama", **options):
    model = attached(host(name), **ROUTED | options)
    with torch.no_grad():
        calibrate(model, [X])
    for part in parts_of(model).values():
        part.head_bias += torch.randn(part.head_bias.shape) / 10
    return model


@torch.no_grad()
def answers(model):
    return model(X).logits


@pytest.mark.parametrize(
    ("name", "shards"),
    [
        *((name, "5GB") for name in HOSTS),
        *(pytest.param(name, "60KB", marks=[pytest.mark.slow] * (name != "llama")) for name in HOSTS),
    ],
)
def test_it_is_saved_found_and_opened(tmp_path, name, shards):
    model = fitted(name)
    set_kv_usage(model, 0.25)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or shards == "60KB"
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, HOSTS[name][0]) and isinstance(again.config, HOSTS[name][1])
    assert again.config.model_type == HOSTS[name][1].model_type, "tools look here for what a model is"
    assert {threshold.kv_usage for threshold in thresholds_of(again)} == {0.25}
    assert len(list(thresholds_of(again))) == 1, "they share it"
    assert parts_of(again).keys() == parts_of(model).keys()
    assert torch.equal(answers(again), answers(model))
    set_kv_usage(again, 0.75)
    again.save_pretrained(tmp_path / "again")
    once_more = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(answers(once_more), answers(again)) and not torch.equal(answers(again), answers(model))


def test_the_file_holds_the_hosts_weights_by_their_names(tmp_path):
    plain, model = host(), fitted()
    plain.save_pretrained(tmp_path / "host")
    model.save_pretrained(tmp_path / "ours")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("host", "ours"))
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert all(".self_attn.ham." in name for name in after.keys() - before.keys())
    alone = LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(answers(alone), answers(plain)), "the host's own class leaves our parts away"


def test_it_is_found_from_its_folder_alone(tmp_path):
    """In a process that has not imported our module, as transformers loads models with code of their own."""
    model = fitted()
    model.save_pretrained(tmp_path)
    code = (
        "import torch; from transformers import AutoModelForCausalLM as A;"
        f"m = A.from_pretrained({str(tmp_path)!r}, trust_remote_code=True);"
        f"torch.save(m(torch.tensor({X.tolist()})).logits, {str(tmp_path / 'logits')!r})"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert_close(torch.load(tmp_path / "logits"), answers(model), rtol=1e-4, atol=1e-4)  # as many threads as it likes


def test_what_from_pretrained_offers(tmp_path):
    model = fitted()
    model.save_pretrained(tmp_path)
    options = dict(local_files_only=True, device_map="cpu", low_cpu_mem_usage=True, use_cache=False)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert torch.equal(answers(again), answers(model)) and again.config.use_cache is False
    by_class = type(again).from_pretrained(tmp_path)
    assert type(by_class) is type(model) and torch.equal(answers(by_class), answers(model))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is type(model.config) and config.mixer_retrofit == model.config.mixer_retrofit
    built = AutoModelForCausalLM.from_config(config)
    set_kv_usage(built, 0.125)
    assert len(parts_of(built)) == 2 and config.mixer_retrofit == model.config.mixer_retrofit, (
        "it has a note of its own"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_scores_are_compared_with_stays_in_float32(tmp_path, dtype):
    model = fitted()
    model.save_pretrained(tmp_path)
    for again in (AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype), copy.deepcopy(model).to(dtype)):
        for name, part in parts_of(again).items():
            assert torch.equal(part.head_bias, parts_of(model)[name].head_bias)
            assert torch.equal(part.threshold.table, parts_of(model)[name].threshold.table)
            assert all(parameter.dtype == dtype for parameter in part.parameters())
        assert answers(again).isfinite().all()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_it_is_copied(way):
    model = fitted()
    model(X).logits.sum().backward()  # what is noted of a call must not keep its graph
    expected = answers(model)
    twin = way(model)
    assert type(twin) is type(model) and type(twin.config) is type(model.config)
    set_kv_usage(model, 0)
    assert torch.equal(answers(twin), expected) and not torch.equal(answers(model), expected)
    assert twin.config.mixer_retrofit["options"]["kv_usage"] == 0.5
    set_kv_usage(twin, 0.125)
    assert twin.config.mixer_retrofit["options"]["kv_usage"] == 0.125
    assert all(module is twin.get_submodule(name) for name, part in parts_of(twin).items() for module in part.host)


def test_another_attention_is_refused(tmp_path):
    model = fitted()
    model.save_pretrained(tmp_path)
    for way in (
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa"),
        lambda: model.set_attn_implementation("eager"),
    ):
        with pytest.raises(SpecError, match="attends through HAM") as refused:
            way()
        assert "\n" not in str(refused.value)
    assert answers(model).isfinite().all() and model.config._attn_implementation == "lightning_mixers"


def test_what_cannot_be_kept_or_opened(tmp_path):
    class Mine(LlamaForCausalLM):
        pass

    plain = host()
    plain.__class__ = Mine
    with pytest.raises(SpecError, match="HAM around a Mine cannot be kept"):
        attached(plain).save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
    with pytest.raises(SpecError, match="built by mixers.retrofit.attach"):
        type(attached(host()))(host().config)
    fitted().save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    assert told["model_type"] == RetrofitConfig.model_type and told["host_model_type"] == "llama"
    for name in ("Unheard", "pipeline", None):
        (tmp_path / "config.json").write_text(json.dumps(told | {"architectures": [name]}))
        with pytest.raises(SpecError, match=f"HAM around a {name}"):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def test_an_adapter_is_whole(tmp_path):
    """LoRA on the host's projections; thresholds and biases that moved since come back with it."""
    model = fitted()
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    adapted.train()(X, labels=X).loss.backward()
    assert all(p.grad.isfinite().all() for p in adapted.parameters() if p.requires_grad)
    for part in parts_of(adapted).values():
        part.head_bias += 0.1
    expected = answers(adapted.eval())
    save_adapter(adapted, tmp_path / "whole")
    adapted.save_pretrained(tmp_path / "bare")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "whole")
    assert torch.equal(answers(again.eval()), expected)
    with pytest.warns(UserWarning, match="saved without KV thresholds"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "bare")
