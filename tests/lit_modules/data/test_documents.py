"""Data that cannot be read, and data that are not those of the checkpoint."""

import gzip
import json
import lzma
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch

from mixers import SpecError

STREAM = {"streaming": True, "block": 16}


def lines_of(texts):
    return "\n".join(json.dumps({"text": text}) for text in texts).encode()


def flipped(data, at, bit):
    return data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]


SHARDS = {
    "a line is cut": ("1.jsonl", lambda lines: lines[:-20], "JSON"),
    "gzip is cut": ("1.jsonl.gz", lambda lines: gzip.compress(lines)[:-200], "EOFError"),
    "a bit of gzip": ("1.jsonl.gz", lambda lines: flipped(gzip.compress(lines), 10, 2), "invalid"),  # no such block
    "a bit of xz": ("1.jsonl.xz", lambda lines: flipped(lzma.compress(lines), 200, 1), "LZMAError"),
}


@pytest.mark.parametrize(("shard", "num_workers"), [*((shard, 0) for shard in SHARDS), ("gzip is cut", 2)])
def test_a_broken_shard_of_a_stream_is_one_line(tokens, tmp_path, documents, shard, num_workers):
    name, broken, fault = SHARDS[shard]
    (tmp_path / "0.jsonl").write_bytes(lines_of(documents[:100]))
    (tmp_path / name).write_bytes(broken(lines_of(documents[100:])))
    data = tokens(paths=str(tmp_path), num_workers=num_workers, **STREAM)
    with pytest.raises(SpecError, match=f"^data '.*/{name}' cannot be read: .*{fault}") as raised:
        list(islice(data.train_dataloader(), 200))
    assert "\n" not in str(raised.value)


def test_a_column_of_the_name_that_tokenize_gives_its_own_decides_no_split(tokens, tmp_path, documents):
    sizes = {}
    for draw in (None, True, 0.0):
        rows = [{"text": text} | ({} if draw is None else {"draw": draw}) for text in documents]
        folder = tmp_path / str(draw)
        folder.mkdir()
        (folder / "0.jsonl").write_text("\n".join(map(json.dumps, rows)))
        data = tokens(paths=str(folder), field="text")
        sizes[draw] = [len(list(getattr(data, f"{split}_dataloader")())) for split in ("val", "test")]
    assert sizes[True] == sizes[0.0] == sizes[None]


def test_a_broken_shard_is_named(tokens, tmp_path, documents):
    from datasets import Dataset

    for number in range(3):
        Dataset.from_dict({"text": documents[number::3]}).to_parquet(tmp_path / f"{number}.parquet")
    broken = tmp_path / "1.parquet"
    whole = broken.read_bytes()
    for part in (whole[: len(whole) // 2], whole[:200] + bytes(400) + whole[600:]):
        broken.write_bytes(part)
        with pytest.raises(SpecError, match="data '.*1.parquet' cannot be read"):
            tokens(paths=str(tmp_path))


@pytest.mark.parametrize(("how", "counts"), [({}, (133, 200)), (STREAM, (2, 3))], ids=["table", "stream"])
def test_a_shard_that_is_gone_is_missed(tokens, corpus, tmp_path, how, counts):
    state = tokens(**how).train_dataloader().state_dict()
    for name in ("0.jsonl", "2.jsonl"):
        (tmp_path / name).write_bytes((Path(corpus) / name).read_bytes())
    with pytest.raises(SpecError, match="has {} documents.* but had {} when".format(*counts)):
        tokens(paths=str(tmp_path), **how).train_dataloader().load_state_dict(state)


@pytest.mark.parametrize(("how", "changed"), [({}, "X "), (STREAM, "0  ")], ids=["table", "stream"])
def test_a_run_goes_on_over_the_same_documents_alone(tokens, corpus, tmp_path, how, changed):
    """Of a stream, a file of another size is noticed."""
    loader = tokens(**how).train_dataloader()
    batches = iter(loader)
    next(batches)
    state, expected = loader.state_dict(), next(batches)
    moved = shutil.copytree(corpus, tmp_path / "moved", copy_function=shutil.copyfile)  # touched, too
    resumed = tokens(paths=str(moved), **how).train_dataloader()
    resumed.load_state_dict(state)
    assert all(torch.equal(batch, expected[key]) for key, batch in next(iter(resumed)).items())
    text = (moved / "0.jsonl").read_text()
    (moved / "0.jsonl").write_text(text.replace("0 ", changed, 1))
    resumed = tokens(paths=str(moved), **how).train_dataloader()
    with pytest.raises(SpecError, match="the documents of data 'tokens' changed since the checkpoint was written"):
        resumed.load_state_dict(state)
    del state["digests"]  # as it was once
    resumed.load_state_dict(state)


def test_another_tokenizer_of_equal_size_is_missed(tokens, tokenizer, tmp_path):
    state = tokens().train_dataloader().state_dict()
    content = json.loads(Path(tokenizer).read_text())
    ids = content["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    other = tokens(tokenizer=str(tmp_path / "tokenizer.json")).train_dataloader()
    with pytest.raises(SpecError, match="the tokenizer of data 'tokens' changed since .*--data.tokenizer"):
        other.load_state_dict(state)


@pytest.mark.parametrize("how", [{}, STREAM], ids=["table", "stream"])
def test_a_folder_is_read_as_a_data_set_of_the_hub(tokens, corpus, how):
    sources = {}, {"paths": None, "hub": corpus}
    ours, theirs = (next(iter(tokens(**source, **how).train_dataloader())) for source in sources)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
