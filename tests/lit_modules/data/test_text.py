import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lit_modules.data.text import PackedRows, TextData
from mixers import SpecError

TEXTS = [bytes([i]) + bytes(range(100, 100 + n)) for i, n in enumerate([3, 50, 1, 27, 64, 9])]


def rows(**options):
    return PackedRows(TEXTS, **{"seq_len": 16, "row_tokens": 40, "seed": 0} | options)


def pieces(row):
    bounds = row["cu_seqlens"].tolist()
    for begin, end in zip(bounds, bounds[1:], strict=False):
        yield bytes(row["tokens"][0, begin:end].tolist()), bytes(row["targets"][0, begin:end].tolist())


def test_targets_are_the_next_byte_of_the_same_text():
    packed = rows()
    for number in range(packed.num_rows):
        row = packed.row(0, number)
        assert row["tokens"].shape == row["targets"].shape == (1, 40)
        assert row["cu_seqlens"][0] == 0 and row["cu_seqlens"][-1] == 40
        for tokens, targets in pieces(row):
            assert 1 <= len(tokens) <= 16
            assert tokens[1:] == targets[:-1]
            assert any(tokens + targets[-1:] in text for text in TEXTS)


def test_an_epoch_holds_every_byte_once():
    packed = rows(row_tokens=11)
    total = sum(len(text) - 1 for text in TEXTS)
    assert packed.num_tokens == total and packed.num_rows == total // 11
    seen = sorted(b for i in range(packed.num_rows) for _, targets in pieces(packed.row(0, i)) for b in targets)
    missing = sorted(b for text in TEXTS for b in text[1:])
    for byte in seen:
        missing.remove(byte)
    assert len(missing) == total % 11


def test_order_depends_on_seed_and_epoch_alone():
    first = rows().row(0, 1)["tokens"]
    assert torch.equal(first, rows().row(0, 1)["tokens"])
    assert not torch.equal(first, rows().row(1, 1)["tokens"])
    assert not torch.equal(first, rows(seed=1).row(0, 1)["tokens"])


def test_less_text_than_a_row_makes_a_shorter_row():
    packed = PackedRows([b"abc"], seq_len=16, row_tokens=40, seed=0)
    assert packed.num_rows == 1
    assert packed.row(0, 0)["tokens"].tolist() == [list(b"ab")]


@pytest.fixture
def folder(tmp_path):
    for i in range(120):
        (tmp_path / f"{i}.txt").write_text(f"file {i:03} " * 30)
    return str(tmp_path)


def data(folder, **options):
    sizes = {"seq_len": 32, "batch_tokens": 128, "held_out": 0.2, "validation_tokens": 256, "test_tokens": 256}
    made = TextData(paths=[folder], **sizes | options)
    made.setup("fit")
    return made


def test_no_text_is_in_two_splits(folder):
    made = data(folder)
    names = {}
    for split, packed in made.rows.items():
        text = packed.bytes.tobytes().decode()
        names[split] = {text[i : i + 9] for i in range(0, len(text), 9)}
    assert sum(map(len, names.values())) == len(set.union(*names.values())) == 120
    assert len(made.val_dataloader()) == 2


def test_it_does_not_matter_where_the_files_lie(folder, tmp_path_factory):
    moved = shutil.copytree(folder, tmp_path_factory.mktemp("elsewhere") / Path(folder).name)
    here, there = data(folder), data(str(moved), max_bytes=100_000)
    assert all(here.rows[split].bytes.tobytes() == there.rows[split].bytes.tobytes() for split in here.rows)


def test_a_run_goes_on_over_the_same_text_alone(folder, tmp_path_factory):
    loader = data(folder).train_dataloader()
    batches = iter(loader)
    next(batches)
    state, expected = loader.state_dict(), next(batches)
    moved = tmp_path_factory.mktemp("elsewhere") / "moved"
    shutil.copytree(folder, moved, copy_function=shutil.copyfile)  # touched, too
    resumed = data(str(moved)).train_dataloader()
    resumed.load_state_dict(state)
    assert all(torch.equal(batch, expected[key]) for key, batch in next(iter(resumed)).items())
    data(str(moved), held_out=0.1, batch_tokens=64, seed=1).train_dataloader().load_state_dict(state)
    (moved / "7.txt").write_text((moved / "7.txt").read_text().replace("e", "E", 1))
    with pytest.raises(SpecError, match="the text in .*moved changed since"):
        data(str(moved)).train_dataloader().load_state_dict(state)


def test_ranks_share_an_epoch_and_the_next_epoch_is_in_another_order(folder):
    made = data(folder)
    whole = [batch["tokens"] for batch in made.train_dataloader()]
    shares = []
    for rank in range(2):
        made.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        shares.append([batch["tokens"] for batch in made.train_dataloader()])
    assert len(shares[0]) == len(shares[1]) == len(whole) // 2
    assert all(torch.equal(shares[i % 2][i // 2], whole[i]) for i in range(2 * len(shares[0])))
    made.trainer = None
    loader = made.train_dataloader()
    first, second = ([batch["tokens"] for batch in loader] for _ in range(2))
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("ranks", "tokens"), [(2, 128), (1, 64), (1, 256), (2, 64)])
def test_a_run_goes_on_from_the_same_place_with_other_batches(folder, ranks, tokens):
    loader = data(folder).train_dataloader()
    whole = torch.cat([batch["tokens"] for batch in loader], 1)
    loader = data(folder).train_dataloader()
    batches = iter(loader)
    for _ in range(4):
        next(batches)
    others = []
    for rank in range(ranks):
        made = data(folder, batch_tokens=tokens)
        made.trainer = SimpleNamespace(global_rank=rank, world_size=ranks)
        other = made.train_dataloader()
        other.load_state_dict(loader.state_dict())
        others.append(next(iter(other))["tokens"])
    read = torch.cat(others, 1)
    assert torch.equal(read, whole[:, 4 * 128 : 4 * 128 + read.shape[1]])


def test_decode_is_the_inverse_of_reading(folder):
    made = data(folder)
    assert made.decode(next(iter(made.val_dataloader()))["tokens"][0, :4]).strip("0123456789 ") in "file"
    assert made.decode(torch.tensor([104, 105, 255])) == "hi\ufffd"


@pytest.mark.parametrize("options", [{"seq_len": 0}, {"held_out": 0.5}, {"batch_tokens": -1}])
def test_sizes_out_of_range(folder, options):
    with pytest.raises(SpecError, match=next(iter(options))):
        data(folder, **options)


def test_too_little_text_for_three_splits(tmp_path):
    (tmp_path / "a.txt").write_text("tiny")
    with pytest.raises(SpecError, match="too little text"):
        data(str(tmp_path))
