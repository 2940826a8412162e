import gzip
import json
import random
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.recipes.conftest import sentences

TINY = "--dim 16 --depth 1 --num_heads 2 --head_dim 8 --seq_len 32 --batch_tokens 64 --data.batches_per_epoch 4"


@pytest.fixture
def corpus(here):
    """A .jsonl of 120 texts, and a tokenizer trained on them, in the working directory."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    lines = sentences("tokens").split(". ")
    texts = [" ".join(random.Random(i).sample(lines, 3)) for i in range(120)]
    lines = [json.dumps({"text": text}) for text in (*texts, None)]
    (here / "texts.jsonl").write_text("\n".join(lines))
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel()
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"]))
    trained.save(str(here / "tokenizer.json"))


EVERY_STEP = (
    "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint --trainer.callbacks.save_top_k=-1"
    " --trainer.callbacks.every_n_train_steps=1 --trainer.callbacks.filename=all-{step}"
)


def test_tokens_are_written_trained_on_and_gone_on_with(run, here, corpus):
    how = "tokenize --tokenizer tokenizer.json --eos_token <end> --paths [texts.jsonl] --out tokens"
    result = run(f"{how} --seconds 0.1")
    assert result.code == 0, result.err
    assert "121 documents" in result.out and "the loader alone" in result.out and "tokens/s" in result.err
    assert "tokens exists" in run(how).error
    (here / "tokens/tokenizer/merges.txt").write_text("of other tokenizers")
    told = result.out.strip().splitlines()[-1].removeprefix("  python -m recipes ")
    result = run(f"{told} {TINY} --data.held_out 0.1 --data.validation_tokens 64 --steps 6 {EVERY_STEP}")
    assert result.code == 0, result.err
    middle = "runs/ham-tokens-1/checkpoints/all-step=3.ckpt"
    assert "cannot go on with 1 of 1" in run(f"fit --ckpt_path {middle} --data.num_workers 1").error
    prompted = "--trainer.callbacks+ lit_modules.callbacks.SampleText --trainer.callbacks.prompt stores"
    again = run(f"fit --ckpt_path {middle} {prompted}")
    assert again.code == 0 and "stores|" in again.out, again.err
    runs = (here / f"runs/ham-tokens-{number}/checkpoints/last.ckpt" for number in (1, 2))
    whole, resumed = (torch.load(path, weights_only=True)["state_dict"] for path in runs)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    written = run(f"generate --prompt stores --max_new_tokens 4 --ckpt_path {middle} --kv_usage 0.5")
    assert written.code == 0 and written.out.startswith("stores")
    assert " tokens in " in written.err and "of keys and values" in written.err
    again = run(f"calibrate --ckpt_path {middle} --kv_usage 0.5 --batches 2 --out again.ckpt")
    assert again.code == 0 and "on 2 batches" in again.out, again.err
    assert "without --text" in run(f"calibrate --ckpt_path {middle} --text [texts.jsonl]").error
    assert run(f"export --ckpt_path {middle} --out exported").code == 0
    exported = AutoTokenizer.from_pretrained("exported")
    assert exported.eos_token == "<end>" and "stores" in exported.decode(exported("stores")["input_ids"])
    ends = AutoModelForCausalLM.from_pretrained("exported").generation_config
    assert ends.eos_token_id == ends.pad_token_id == exported.eos_token_id
    assert run(f"sweep --ckpt_paths [{middle}] --kv_usages [0.5] --out sweep").code == 0
    assert "perplexity when tested at" in (here / "sweep/table.md").read_text()


def test_what_loads_tokens_is_missed_before_they_are_written(run, here, corpus, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdata.stateful_dataloader", None)
    how = "--tokenizer tokenizer.json --eos_token <end> --paths texts.jsonl"
    assert "loads with torchdata: pip install" in run(f"tokenize {how} --out tokens").error
    assert not (here / "tokens").exists()


def cut(data):
    return data[:-100]


def flipped(data):
    return data[:10] + b"\xff" + data[11:]


@pytest.mark.parametrize(
    ("command", "damage"),
    [
        (f"fit --data tokens {TINY} --steps 40 --data.validation_tokens 64 --data.num_workers 0", flipped),
        (f"fit --data tokens {TINY} --steps 40 --data.validation_tokens 64 --data.num_workers 2", cut),
        ("tokenize --out tokens --streaming", cut),
    ],
)
def test_a_damaged_shard_is_one_line(run, here, corpus, command, damage):
    lines = (here / "texts.jsonl").read_text().splitlines(keepends=True)
    (here / "shards").mkdir()
    (here / "shards/0.jsonl").write_text("".join(lines[:60]))
    (here / "shards/1.jsonl.gz").write_bytes(damage(gzip.compress("".join(lines[60:]).encode())))
    prefix = "--data." if command.startswith("fit") else "--"
    words = ["paths shards", "tokenizer tokenizer.json", "eos_token <end>"]
    words += ["streaming true"] if prefix == "--data." else []
    result = run(f"{command} " + " ".join(prefix + word for word in words))
    assert result.code == 2 and "Traceback" not in result.err
    last = result.err.strip().splitlines()[-1]  # after the bar
    assert last.startswith("error: data '") and "shards/1.jsonl.gz' cannot be read: " in last
    assert {path.name for path in here.iterdir()} == {"texts.jsonl", "tokenizer.json", "shards"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "names no end of a text: give --data.eos_token"),
        ("--eos_token <end> --seconds -1", "seconds must be a number of at least 0, got -1"),
        ("--eos_token <end> --field txt", "unknown data.field 'txt'"),
        ("--eos_token <end> --paths nowhere.jsonl", "does not exist"),
        ("--eos_token <end> --paths empty.txt", "there is no text in the 1 documents of empty.txt"),
    ],
)
def test_mistakes_leave_nothing_behind(run, here, corpus, words, message):
    (here / "empty.txt").touch()
    result = run(f"tokenize --tokenizer tokenizer.json --paths [texts.jsonl] --out tokens {words}")
    assert result.code == 2 and message in result.err.strip().splitlines()[-1]  # after the bar of what was read
    assert not (here / "tokens").exists()
