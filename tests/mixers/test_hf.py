"""Saving, finding and loading the Hugging Face way; LoRA around a mixer."""

import subprocess
import sys
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mixers import calibrate, set_kv_usage, swap_mixers
from mixers.hf import MixerConfig, MixerForCausalLM, byte_tokenizer, save_adapter, swapped
from mixers.threshold import thresholds_of

LLAMA = LlamaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                    intermediate_size=48)  # fmt: skip
PATTERNS = {
    "ham": {"name": "ham", "num_heads": 2, "head_dim": 8, "router": {"name": "residual", "space": "value"}},
    "gdn": {"name": "gdn", "num_heads": 2},
    "hybrid": [{"name": "gdn", "num_heads": 2}, {"name": "attention", "num_heads": 4, "num_kv_heads": 2}],
}


def tokens(*shape):
    return torch.randint(1, 50, shape, generator=torch.Generator().manual_seed(0))


def ours(pattern="ham", **options):
    torch.manual_seed(0)
    model = MixerForCausalLM(MixerConfig(vocab_size=50, dim=32, depth=2, mixer=PATTERNS[pattern], **options)).eval()
    model.generation_config.pad_token_id = 0
    if pattern == "ham":
        calibrate(model, [tokens(4, 40)])
    return model


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("tie", [True, False])
def test_a_decoder_of_ours_is_saved_found_and_loaded(tmp_path, pattern, tie):
    model, x = ours(pattern, tie_embeddings=tie), tokens(2, 9)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is MixerForCausalLM and again.config.mixer == model.config.mixer
    assert torch.equal(again(x).logits, model(x).logits)
    assert (again.decoder.head.weight is again.decoder.embedding.weight) == tie
    names = load_file(tmp_path / "model.safetensors").keys()
    assert len([name for name in names if name.endswith("threshold.table")]) == (pattern == "ham")
    assert len(list(thresholds_of(again))) == (pattern == "ham")


def test_it_is_found_from_its_folder_alone(tmp_path):
    """In a process that has not imported our module, as transformers loads models with code of their own."""
    model = ours()
    model.save_pretrained(tmp_path)
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A;"
        f"m = A.from_pretrained({str(tmp_path)!r}, trust_remote_code=True).eval();"
        "print(m(torch.tensor([[1, 2, 3]])).logits.sum().item(), type(m).__name__)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=None)
    assert out.returncode == 0, out.stderr
    value, name = out.stdout.split()[-2:]
    assert name == "MixerForCausalLM"
    assert float(value) == pytest.approx(model(torch.tensor([[1, 2, 3]])).logits.sum().item(), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("beams", [1, 3])
def test_it_generates_with_a_cache_as_without(pattern, beams):
    model, x = ours(pattern).double(), tokens(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    options = dict(attention_mask=mask, max_new_tokens=7, num_beams=beams, do_sample=False)
    assert torch.equal(model.generate(x, **options), model.generate(x, **options, use_cache=False))


def test_its_loss_is_that_of_shifted_labels():
    model, x = ours(), tokens(2, 9)
    out = model(x, labels=x)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    assert_close(out.loss, expected)
    assert model(x, logits_to_keep=1).logits.shape == (2, 1, 50)


@pytest.mark.parametrize("layers", [None, [0, 2]])
def test_a_swapped_model_is_saved_and_built_again(tmp_path, layers):
    torch.manual_seed(0)
    model, x = LlamaForCausalLM(LLAMA), tokens(2, 30)
    swap_mixers(model, "ham", where="*.self_attn", layers=layers, kv_usage=0.5)
    if layers:
        swap_mixers(model, "gdn", where="*.self_attn", layers=[1])
    calibrate(model.eval(), [x])
    model.save_pretrained(tmp_path)
    again = swapped(LlamaForCausalLM).from_pretrained(tmp_path).eval()
    assert isinstance(again, LlamaForCausalLM) and again.config.architectures == ["LlamaForCausalLM"]
    assert again.config.mixer_swaps == model.config.mixer_swaps and len(again.config.mixer_swaps) == 1 + bool(layers)
    twin = swapped(LlamaForCausalLM)(model.config)
    assert twin.config.mixer_swaps == model.config.mixer_swaps, "the config that was given keeps its note"
    assert torch.equal(again(x).logits, model(x).logits)
    assert len(list(thresholds_of(again))) == 1
    set_kv_usage(again, 0)
    assert not torch.equal(again(x).logits, model(x).logits)


def test_lora_around_a_mixer(tmp_path):
    torch.manual_seed(0)
    model, x = LlamaForCausalLM(LLAMA), tokens(2, 12)
    swap_mixers(model, "ham", where="*.self_attn")
    before = model.eval()(x).logits
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["qkv", "out"], init_lora_weights=True))
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name and "mixer" in name for name in trained)
    assert_close(adapted.eval()(x).logits, before)
    adapted.train()(x, labels=x).loss.backward()
    assert all(p.grad.isfinite().all() for p in adapted.parameters() if p.requires_grad)
    assert adapted.eval().generate(input_ids=x, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 15)


@pytest.mark.parametrize("threshold", ["calibrated", "controlled", "learned"])
def test_an_adapter_is_whole(tmp_path, threshold):
    """Thresholds and head biases that moved after the base was kept come back with it, or a warning says not."""
    torch.manual_seed(0)
    model, x = LlamaForCausalLM(LLAMA), tokens(2, 30)
    swap_mixers(model, {"name": "ham", "threshold": threshold}, where="*.self_attn", kv_usage=0.5)
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["qkv", "out"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    adapted.train()(x)
    model.model.layers[1].self_attn.mixer.head_bias += 0.1
    expected = adapted.eval()(x).logits

    def loaded(folder):
        base = swapped(LlamaForCausalLM).from_pretrained(tmp_path / "base")
        return PeftModel.from_pretrained(base, folder).eval()

    save_adapter(adapted, tmp_path / "whole")
    again = loaded(tmp_path / "whole")
    assert torch.equal(again(x).logits, expected)
    assert len(list(thresholds_of(again))) == 1
    adapted.save_pretrained(tmp_path / "bare")
    with pytest.warns(UserWarning, match="saved without KV thresholds.* save it by mixers.hf.save_adapter"):
        again = loaded(tmp_path / "bare")
    assert not torch.equal(again(x).logits, expected)


def test_adapters_by_name_and_of_our_decoders(tmp_path):
    x = tokens(2, 30)
    adapted = get_peft_model(ours(), LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False), "first")
    adapted.add_adapter("second", LoraConfig(r=4, target_modules=["out"], init_lora_weights=False))
    calibrate(adapted, [x[:, ::3]])
    save_adapter(adapted, tmp_path)
    for name in ("first", "second"):
        adapted.set_adapter(name)
        expected = adapted.eval()(x).logits
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "this adapter")
            again = PeftModel.from_pretrained(ours(), tmp_path / name).eval()
        assert torch.equal(again(x).logits, expected)


def test_a_token_is_a_byte(tmp_path):
    """Also in texts with letters that the byte-level alphabet has names from."""
    byte_tokenizer().save_pretrained(tmp_path)
    text = "h\u00e9llo \u0100\u010a\n\tx , y <0x00>\0z \u4f60"
    for tokenizer in (byte_tokenizer(), AutoTokenizer.from_pretrained(tmp_path)):
        assert len(tokenizer) == 256
        assert tokenizer(text)["input_ids"] == list(text.encode())
        assert tokenizer.decode(list(text.encode())) == text
        assert tokenizer(["a", "abc"], padding=True)["attention_mask"][0].count(0) == 2


def test_a_usage_that_was_set_is_saved(tmp_path):
    """In the config, from which a swapped model and a decoder of ours are built again."""
    tokens = torch.arange(24)[None] % 16
    config = LlamaConfig(vocab_size=16, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    one = LlamaForCausalLM(config)
    swap_mixers(one, "ham", where="*.self_attn", kv_usage=0.5)
    other = MixerForCausalLM(MixerConfig(vocab_size=16, dim=16, depth=2, mixer={"name": "ham", "num_heads": 2}))
    for number, (model, cls) in enumerate(((one, swapped(LlamaForCausalLM)), (other, MixerForCausalLM))):
        calibrate(model, [tokens])
        set_kv_usage(model.eval(), 0.1)
        model.save_pretrained(tmp_path / str(number))
        again = cls.from_pretrained(tmp_path / str(number)).eval()
        assert {threshold.kv_usage for threshold in thresholds_of(again)} == {0.1}
        assert_close(again(tokens).logits, model(tokens).logits, rtol=0, atol=1e-6)
