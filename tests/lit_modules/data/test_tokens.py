import gzip
import io
import json
import multiprocessing
import pickle
import signal
import subprocess
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from lit_modules.data import documents as source
from lit_modules.data.batches import IGNORED, check_batch
from lit_modules.data.packing import split_at_ends
from mixers import SpecError

STREAM = {"streaming": True, "block": 16}


def pieces(batch):
    bounds = batch["cu_seqlens"].tolist()
    for begin, end in zip(bounds, bounds[1:], strict=False):
        yield batch["tokens"][0, begin:end].tolist(), batch["targets"][0, begin:end].tolist()


def texts_of(data, split, epochs=1):
    """The documents of a split, put together from the pieces of its rows; the last ones do not fill a row."""
    rows = data.rows(split, 16, endless=False)
    ids = [id for row in rows for tokens, targets in pieces(row) for id in tokens + targets[-1:] * (targets[-1] == 0)]
    return data.decode(torch.tensor(ids)).split("<|end|>")[:-1]


@pytest.mark.parametrize("how", [{}, STREAM], ids=["table", "stream"])
def test_pieces_are_of_one_document_and_targets_are_what_comes_next(tokens, documents, how):
    data = tokens(**how)
    for batch in islice(data.train_dataloader(), 20):
        check_batch(batch, answers=("targets",), vocab_size=data.vocab_size)
        assert batch["tokens"].shape == (1, 128)
        for ids, targets in pieces(batch):
            assert 1 <= len(ids) <= 32 and ids[1:] == targets[:-1] and data.end not in ids
            whole = ids + targets[-1:] * (targets[-1] != data.end)
            assert any(data.decode(torch.tensor(whole)) in text for text in documents)


@pytest.mark.parametrize("how", [{}, STREAM], ids=["table", "stream"])
def test_a_document_is_in_one_split_and_an_epoch_has_each_once(tokens, documents, how):
    data = tokens(**how)
    found = {split: texts_of(data, split) for split in ("train", "validation", "test")}
    every = sum(found.values(), [])
    assert len(every) == len({*every}) and {*every} <= {*documents}
    assert len(every) >= len(documents) - 6  # what is left of each split is less than a row
    assert all(len(texts) > 5 for texts in found.values())
    assert [len(batch["tokens"][0]) for batch in data.val_dataloader()] == [128, 128]


@pytest.mark.parametrize(
    "how",
    [{}, STREAM, {"documents": "cut"}, {"num_workers": 2}, {"num_workers": 2} | STREAM],
    ids=["table", "stream", "cut", "workers", "stream by workers"],
)
def test_a_loader_goes_on_where_another_stopped(tokens, how):
    data = tokens(**how)
    loader = data.train_dataloader()
    batches = iter(loader)
    for _ in range(61):  # in the second epoch
        next(batches)
    kept = io.BytesIO()
    torch.save(loader.state_dict(), kept)
    kept.seek(0)
    resumed = data.train_dataloader()
    resumed.load_state_dict(torch.load(kept, weights_only=True))
    for ours, theirs in zip(islice(batches, 15), resumed, strict=False):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_workers_that_are_not_forked_get_the_data_and_nothing_else(tokens):
    data = tokens()
    data.trainer = SimpleNamespace(global_rank=0, world_size=1, schedule=lambda step: step)  # cannot be pickled
    rows = data.train_dataloader().loader.dataset
    ours, theirs = (next(iter(some)) for some in (rows, pickle.loads(pickle.dumps(rows))))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_worker_outlives_the_signals_that_stop_a_run(tokens):
    """Slurm, torchrun and a terminal send them to every process."""
    batches = iter(tokens(num_workers=1).train_dataloader())
    next(batches)
    (worker,) = multiprocessing.active_children()
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        subprocess.run(["kill", f"-{signum.name.removeprefix('SIG')}", str(worker.pid)], check=True)
    for _ in range(10):
        next(batches)
    worker.terminate()  # as Python does with one that is left when it exits
    worker.join(30)
    assert worker.exitcode == 0


def test_another_number_of_workers_is_refused(tokens):
    state = tokens().train_dataloader().state_dict()
    with pytest.raises(SpecError, match="1 processes of 0 workers, and cannot go on with 1 of 2"):
        tokens(num_workers=2).train_dataloader().load_state_dict(state)


@pytest.mark.parametrize("how", [{}, STREAM], ids=["table", "stream"])
def test_ranks_read_different_documents(tokens, how):
    data, seen = tokens(**how), []
    for rank in range(2):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        batches = islice(data.train_dataloader(), 15)  # less than half an epoch
        seen.append({tuple(ids) for batch in batches for ids, _ in pieces(batch) if len(ids) > 8})
    assert seen[0] and seen[1] and not seen[0] & seen[1]


def test_order_is_of_the_seed_and_the_epoch(tokens):
    def first(**options):
        return next(iter(tokens(**options).train_dataloader()))["tokens"]

    assert torch.equal(first(), first()) and not torch.equal(first(), first(seed=1))
    data = tokens()
    data_set, order = data.opened, {"seed": 0, "share": 0, "shares": 1, "block": 16}
    seen = [document["number"] for _, document in islice(source.in_order(data_set, {}, **order), 400)]
    assert sorted(seen[:200]) == sorted(seen[200:]) == list(range(200)) and seen[:200] != seen[200:]


def test_cut_rows_hold_one_document_after_the_other(tokens):
    data = tokens(documents="cut")
    batch = next(iter(data.train_dataloader()))
    assert batch["tokens"].shape == (4, 32) and "cu_seqlens" not in batch
    ids, targets = batch["tokens"].flatten(), batch["targets"].flatten()
    ends = ids == data.end
    assert ends.any() and (targets[ends] == IGNORED).all()
    assert torch.equal(targets[:-1][~ends[:-1]], ids[1:][~ends[:-1]])


def test_rows_of_joined_documents_are_split_at_their_ends():
    row = torch.tensor([[5, 6, 0, 7, 8, 9], [0, 3, 4, 5, 0, 6]])
    batch = split_at_ends(row, 0)
    assert batch["tokens"].tolist() == [[5, 6, 0, 7, 8, 0, 3, 4, 5, 0]]
    assert batch["targets"].tolist() == [[6, 0, IGNORED, 8, 9, IGNORED, 4, 5, 0, IGNORED]]
    assert batch["cu_seqlens"].tolist() == [0, 3, 5, 6, 10]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paths": "nowhere.parquet"}, "'nowhere.parquet' does not exist"),
        ({"paths": None}, "give one"),
        ({"hub": "someone/something"}, "give one"),
        ({"tokenizer": None}, "needs a --data.tokenizer"),
        ({"tokenizer": "nowhere.json"}, "'nowhere.json' cannot be loaded"),
        ({"eos_token": None}, r"give --data.eos_token; its special tokens: '<\|end\|>'"),
        ({"eos_token": "</s>"}, "'</s>' is no token"),
        ({"field": "txt"}, "unknown data.field 'txt'.*Did you mean 'text'"),
        ({"documents": "cut", "batch_tokens": 100}, "multiple of seq_len"),
        ({"held_out": 0.5}, "held_out"),
        ({"seq_len": 0}, "seq_len"),
    ],
    ids=str,
)
def test_mistakes_are_named(tokens, options, message):
    with pytest.raises(SpecError, match=message):
        tokens(**options)


def test_too_few_documents_and_broken_ones(tokens, tmp_path):
    (tmp_path / "one.txt").write_text("one document alone")
    with pytest.raises(SpecError, match="too few documents to hold out"):
        tokens(paths=str(tmp_path)).val_dataloader()
    (tmp_path / "two.jsonl").write_text(json.dumps({"text": "two"}))
    with pytest.raises(SpecError, match="several formats: json, text"):
        tokens(paths=str(tmp_path))
    (tmp_path / "three.parquet").write_text("no parquet")
    with pytest.raises(SpecError, match="cannot be opened|cannot be read"):
        tokens(paths=str(tmp_path / "three.parquet"), streaming=True)


@pytest.mark.parametrize("how", [{}, pytest.param(STREAM, marks=pytest.mark.slow)], ids=["table", "stream"])
def test_other_formats_hold_the_same_documents(tokens, documents, tmp_path, how):
    from datasets import Dataset

    (tmp_path / "texts").mkdir()
    for i, text in enumerate(documents):
        (tmp_path / f"texts/{i:03}.txt").write_text(text)
    Dataset.from_dict({"content": documents}).to_parquet(tmp_path / "all.parquet")
    with gzip.open(tmp_path / "all.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in documents)
    expected = {*texts_of(tokens(), "validation")}
    for options in ({"paths": "texts"}, {"paths": "all.jsonl.gz"}, {"paths": "all.parquet", "field": "content"}):
        found = {*texts_of(tokens(**how | options | {"paths": str(tmp_path / options["paths"])}), "validation")}
        assert len(found ^ expected) <= 2  # what is left is less than a row


@pytest.mark.parametrize("package", ["datasets", "torchdata.stateful_dataloader", "transformers"])
def test_a_missing_package_is_one_line(tokens, monkeypatch, package):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(SpecError, match=r"pip install 'lightning-mixers\[tokens\]'"):
        tokens().train_dataloader()


@pytest.mark.parametrize("how", [{}, STREAM], ids=["table", "stream"])
def test_documents_without_text_are_refused_and_not_read_forever(tokens, tmp_path, how):
    path = tmp_path / "empty.jsonl"
    path.write_text('{"text": ""}\n{"text": null}\n{"text": ""}')
    data = tokens(paths=[str(path)], **how)
    with pytest.raises(SpecError, match="one has no text in the train split"):
        next(iter(data.train_dataloader()))
