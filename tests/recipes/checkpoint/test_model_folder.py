"""Commands that take checkpoints take folders of Hugging Face models, such as `recipes retrofit` writes."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mixers import calibrate, set_kv_usage, swap_mixers
from mixers.hf import byte_tokenizer
from mixers.retrofit import attach
from recipes.checkpoint.harness import LightningMixersLM
from recipes.checkpoint.model_folder import open_folder
from recipes.retrofit.scoring import perplexity
from tests.recipes.checkpoint.test_harness import request

LLAMA = dict(vocab_size=256, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
LLAMA |= dict(intermediate_size=24, max_position_embeddings=512, bos_token_id=0, eos_token_id=0, pad_token_id=0)
A_TOKEN = 2 * 2 * 2 * 4 * 4  # bytes: layers, key heads, k and v, head_dim, float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "retrofitted"
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()
    attach(model, router="key_norm", window=4, sinks=2)
    with torch.no_grad():
        calibrate(model, [torch.randint(1, 256, (2, 300))])
    set_kv_usage(model, 0.5)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def copied(folder, tmp_path):
    """A folder to spoil."""
    return shutil.copytree(folder, tmp_path / "copied")


def test_generate(run, folder):
    prompt = "words " * 20
    file = folder.parent / "prompt.txt"
    file.write_text(prompt)
    line = f"generate --ckpt_path {folder} --prompt_file {file} --max_new_tokens 8 --temperature 0 --prefill 50"
    full, half = run(f"{line} --kv_usage 1"), run(line)
    assert full.code == half.code == 0
    assert f"{folder}:" in full.err and "read 120 tokens" in full.err and "wrote 8" in full.err
    assert f"holds {A_TOKEN * 127:,} bytes of keys and values (100.0% of all of them)" in full.err
    share = float(half.err.split("values (")[1].split("%")[0])
    assert 30 < share < 70
    model = AutoModelForCausalLM.from_pretrained(folder)
    set_kv_usage(model, 1.0)
    ids = torch.tensor([[*prompt.encode()]])
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)[0, 120:]
    assert full.out == byte_tokenizer().decode(expected) + "\n"


def test_it_stops_where_the_text_ends(run, copied):
    file = copied / "model.safetensors"
    weights = load_file(file)
    for name in ("lm_head.weight", "model.norm.weight"):
        weights[name] = torch.zeros_like(weights[name])  # every logit 0: the likeliest is token 0, the end
    save_file(weights, file, metadata={"format": "pt"})
    result = run(f"generate --ckpt_path {copied} --prompt some --max_new_tokens 8 --temperature 0")
    assert result.code == 0 and "wrote 0" in result.err and result.out == "some\n"


def test_calibrate(run, folder, texts, tmp_path):
    out = tmp_path / "out"
    result = run(f"calibrate --ckpt_path {folder} --text [{texts}] --batches 2 --kv_usage 0.25 --out {out}")
    assert result.code == 0, result.err
    assert f"for 0.25; written to {out}/" in result.out
    assert float(result.out.split("now ")[1].split()[0]) == pytest.approx(0.25, abs=0.03)
    before, after = (load_file(one / "model.safetensors") for one in (folder, out))
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved and all("threshold" in name for name in moved) and before.keys() == after.keys()
    opened = open_folder(str(out))
    assert opened.model.config.mixer_retrofit["options"]["kv_usage"] == 0.25 and opened.tokenizer("a").input_ids == [97]


def test_sweep(run, folder, texts, tmp_path):
    line = f"sweep --ckpt_paths [{folder}] --text [{texts}] --kv_usages [0,0.5,1] --long 300 --out {tmp_path / 'out'}"
    result = run(line)
    assert result.code == 0 and "perplexity when tested at" in result.out and "cache after 300 tokens" in result.out
    (row,) = json.loads((tmp_path / "out/results.json").read_text())["runs"]
    assert [point["asked"] for point in row["curve"]] == [0, 0.5, 1]
    usages = [point["kv_usage"] for point in row["curve"]]
    assert usages[0] == pytest.approx(6 / 512) and 0.2 < usages[1] < 0.8 and usages[2] == 1
    assert row["curve"][0]["of_attention"] < row["curve"][1]["of_attention"] < row["curve"][2]["of_attention"]
    opened = open_folder(str(folder), kv_usage=1.0)
    text = opened.windows([str(texts)], 512, count=32)
    assert row["windows"] == [*text.shape]
    expected = perplexity(opened.model, text, progress=False).perplexity
    assert row["curve"][2]["perplexity"] == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_lm_eval(run, folder, brackets):
    theirs = LightningMixersLM(str(folder), kv_usage=0.25, device="cpu")
    assert {threshold.kv_usage for threshold in map(lambda m: m.threshold, _parts(theirs.model))} == {0.25}
    [(value, _)] = theirs.loglikelihood([request("loglikelihood", "import", " os")])
    model = open_folder(str(folder), kv_usage=0.25).model
    ids = torch.tensor([list(b"import os")])
    log_p = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[5:].sum()
    assert value == pytest.approx(float(log_p), rel=1e-4)
    result = run(f"lm_eval --ckpt_path {folder} --tasks brackets --include_path {brackets} --device cpu")
    assert result.code == 0 and "brackets" in result.out and "0.5" in result.out


def _parts(model):
    from mixers.retrofit import parts_of

    return parts_of(model).values()


COMMANDS = {
    "generate": "generate --prompt a --ckpt_path",
    "calibrate": "calibrate --text [TEXT] --ckpt_path",
    "sweep": "sweep --text [TEXT] --ckpt_paths",
    "lm_eval": "lm_eval --tasks none --ckpt_path",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_is_no_model(run, copied, texts, here, command):
    def refused():
        path = f"[{copied}]" if command == "sweep" else copied
        return run(f"{COMMANDS[command].replace('TEXT', str(texts))} {path}").error

    told = json.loads((copied / "config.json").read_text())
    options = {"options": told["mixer_retrofit"]["options"] | {"router": "antigravity.Thing"}}
    (copied / "config.json").write_text(json.dumps(told | {"mixer_retrofit": told["mixer_retrofit"] | options}))
    assert "antigravity.Thing, which is neither ours nor an installed plug-in's" in refused()
    assert "antigravity" not in sys.modules
    (copied / "config.json").write_text("[1]")
    assert "is no config of a model, but list" in refused()
    (copied / "config.json").write_text("{")
    assert "is no JSON" in refused()
    (copied / "config.json").unlink()
    assert "is a folder without config.json: neither a checkpoint nor a Hugging Face model" in refused()
    assert not (here / "runs").exists()


def last_line(result):
    """Of a refusal that comes after transformers' own bar."""
    assert result.code == 2 and "Traceback" not in result.err
    return result.err.strip().splitlines()[-1]


def test_mistakes(run, folder, copied, checkpoint, texts, tmp_path):
    error = last_line(run(f"generate --ckpt_path {folder} --prompt a --max_new_tokens 512"))
    assert "reads at most 512 tokens: the prompt has 1, --max_new_tokens is 512" in error
    assert "more than max_kv_bytes 9" in last_line(run(f"generate --ckpt_path {folder} --prompt a --max_kv_bytes 9"))
    assert "kv_usage must be a number" in last_line(run(f"generate --ckpt_path {folder} --prompt a --kv_usage 2"))
    assert "give --text" in last_line(run(f"calibrate --ckpt_path {folder}"))
    line = f"calibrate --ckpt_path {folder} --text [{texts}] --out {folder.parent}"
    assert "exists and is not an empty folder" in run(line).error
    short = tmp_path / "short.txt"
    short.write_text("too short")
    assert "no text is as long as a window of 512" in last_line(run(f"calibrate --ckpt_path {folder} --text [{short}]"))
    assert "--text goes with folders" in last_line(run(f"sweep --ckpt_paths [{folder}]"))
    assert "--text goes with folders" in last_line(run(f"sweep --ckpt_paths [{checkpoint}] --text [{texts}]"))
    assert "others are checkpoints" in last_line(run(f"sweep --ckpt_paths [{folder},{checkpoint}] --text [{texts}]"))
    assert "less than --long 600" in last_line(run(f"sweep --ckpt_paths [{folder}] --text [{texts}] --long 600"))


def test_a_folder_of_swapped_mixers_is_not_taken_for_the_hosts(run, tmp_path, texts):
    """Opened as the host's class its attention would be drawn at random."""
    swapped = LlamaForCausalLM(LlamaConfig(**LLAMA))
    swap_mixers(swapped, "ham", where="*.self_attn")
    swapped.save_pretrained(tmp_path / "swapped")
    byte_tokenizer().save_pretrained(tmp_path / "swapped")
    for line in ("generate --prompt a", "lm_eval --tasks no_such_task"):
        assert "opened by mixers.hf.swapped" in last_line(run(f"{line} --ckpt_path {tmp_path / 'swapped'}"))
    line = f"retrofit --model {tmp_path / 'swapped'} --text {texts} --out {tmp_path / 'new'}"
    assert "of its model's weights" in last_line(run(line))
    assert not (tmp_path / "new").exists()


def test_models_of_one_name_are_told_apart_by_their_paths(run, folder, tmp_path, texts):
    paths = [shutil.copytree(folder, tmp_path / part / "ham") for part in "ab"]
    few = tmp_path / "few.txt"
    few.write_text((texts / "one.txt").read_text()[:1200])
    line = f"sweep --ckpt_paths [{paths[0]},{paths[1]}] --text {few} --kv_usages [1]"
    assert run(f"{line} --out {tmp_path / 'out'}").code == 0
    table = (tmp_path / "out/table.md").read_text()
    assert all(str(path) in table for path in paths)


def test_a_folder_that_is_not_whole(run, copied, texts):
    plain = LlamaForCausalLM(LlamaConfig(**LLAMA))
    host = copied.parent / "host"
    plain.save_pretrained(host)
    byte_tokenizer().save_pretrained(host)
    assert run(f"generate --ckpt_path {host} --prompt a --max_new_tokens 2").code == 0
    assert "the model has no KV threshold" in last_line(run(f"calibrate --ckpt_path {host} --text [{texts}]"))
    file = copied / "model.safetensors"
    weights = load_file(file)
    missing = "model.layers.1.self_attn.ham.memory.out_map"
    kept = {name: weight for name, weight in weights.items() if name != missing}
    save_file(kept, file, metadata={"format": "pt"})
    end = last_line(run(f"generate --ckpt_path {copied} --prompt a"))
    assert end == f"error: {copied} lacks 1 of its model's weights, such as {missing}"
    save_file(weights | {missing: weights[missing] * torch.nan}, file, metadata={"format": "pt"})
    assert "is not finite" in last_line(run(f"generate --ckpt_path {copied} --prompt a"))
    file.unlink()
    assert "cannot be opened" in last_line(run(f"generate --ckpt_path {copied} --prompt a"))
    (copied / "tokenizer.json").unlink()
    (copied / "tokenizer_config.json").unlink()
    assert "with a tokenizer" in last_line(run(f"generate --ckpt_path {copied} --prompt a"))
