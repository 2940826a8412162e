"""Which bytes are of names that come back, against a definition byte by byte."""

import keyword

import pytest
import torch

from lit_modules.data.names import KNOWN, REST, UNKNOWN, kinds_of, names_in, with_names
from lit_modules.data.text import TextData
from mixers import SpecError

PARTS = set(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_") | set(range(128, 256))


def by_hand(text: bytes, known: set[bytes], distance: int) -> list[int]:
    def word_at(i):
        begin, end = i, i
        while begin and text[begin - 1] in PARTS:
            begin -= 1
        while end < len(text) and text[end] in PARTS:
            end += 1
        return begin, end, text[begin:end]

    def kind(i):
        begin, end, word = word_at(i)
        if i == begin or i >= end or end == len(text):
            return REST
        if len(word) < 4 or word.decode("latin-1")[0] in "0123456789" or word.decode("latin-1") in keyword.kwlist:
            return REST
        before = [j for j in range(begin) if word_at(j) == (j, j + len(word), word)]
        if not before or begin - before[-1] < distance:
            return REST
        return KNOWN if word in known else UNKNOWN

    return [kind(i) for i in range(len(text))]


@pytest.mark.parametrize("distance", [1, 12, 40])
def test_kinds_are_those_of_the_definition(distance):
    words = [b"name", b"na\xc3\xafve", b"_under", b"return", b"abc", b"0x1fff", b"name2", b"rename", b"None", b"x9__"]
    draws = torch.Generator().manual_seed(0)
    text = b"".join(
        words[i] + b" .\n("[j : j + 1]
        for i, j in zip(
            torch.randint(len(words), (60,), generator=draws), torch.randint(4, (60,), generator=draws), strict=True
        )
    )
    for cut in (text, text[3:-3]):  # words that are cut at both ends
        kinds = kinds_of(cut, {b"name", b"x9__"}, distance=distance).tolist()
        assert kinds == by_hand(cut, {b"name", b"x9__"}, distance)
        assert {*kinds} == {REST, KNOWN, UNKNOWN}


def test_what_a_name_is():
    assert names_in(b"def parse(self, x2): return _x_1 + 0xffff + None # na\xc3\xafve") == {
        b"parse", b"self", b"_x_1", b"na\xc3\xafve",
    }  # fmt: skip


def test_a_target_is_marked_where_its_byte_is_and_no_document_recalls_from_another():
    texts = [b"name = 1; name", b"; name = name; ", b"name"]
    row = b"".join(text[:-1] for text in texts)
    targets = b"".join(text[1:] for text in texts)
    batch = {
        "tokens": torch.tensor([list(row)]),
        "targets": torch.tensor([list(targets)]),
        "cu_seqlens": torch.tensor([0, 13, 27, 30], dtype=torch.int32),
    }
    marked = with_names(batch, set(), distance=1)
    names = marked.pop("names")
    assert names.shape == (1, 30) and names.dtype == torch.int64 and marked.keys() == batch.keys()
    where = names[0].nonzero().flatten().tolist()
    assert bytes(targets[i] for i in where) == b"ame" and where == [22, 23, 24]  # in the second; elsewhere the end cuts


@pytest.fixture
def folder(tmp_path):
    for i in range(60):
        (tmp_path / f"{i}.py").write_text(f"def common(only_{i}):\n    return common(only_{i}, '{'.' * 30}')\n" * 4)
    return str(tmp_path)


def test_evaluations_are_marked_and_training_is_not(folder):
    data = TextData(paths=folder, seq_len=256, batch_tokens=512, held_out=0.2, name_distance=40)
    data.setup("fit")
    assert "names" not in next(iter(data.train_dataloader())) and "known_names" not in vars(data)
    for loader in (data.val_dataloader(), data.test_dataloader()):
        for batch in loader:
            kinds, targets = batch["names"][0], batch["targets"][0]
            assert set(bytes(targets[kinds == KNOWN].tolist())) == set(b"ommon")
            unknown = set(bytes(targets[kinds == UNKNOWN].tolist()))
            assert set(b"nly_") < unknown <= set(b"nly_0123456789")
    with pytest.raises(SpecError, match="name_distance 0"):
        TextData(paths=folder, name_distance=0)
