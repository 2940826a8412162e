import json
import os
import re
import socket
import sysconfig
from pathlib import Path

import pytest

from lit_modules.data.files import find_files, read_texts, split_texts
from mixers import SpecError


def test_the_default_is_the_standard_library_without_tests_and_installed_packages():
    files = find_files(None)
    assert len(files) > 100
    assert all(file.suffix == ".py" for file in files)
    root = sysconfig.get_path("stdlib")
    parts = {part for file in files for part in file.relative_to(root).parts}
    assert not parts & {"test", "tests", "site-packages"}


def test_files_and_folders_are_read_without_hidden_binary_and_repeated_ones(tmp_path):
    contents = {"a.txt": b"first", "deep/b.md": b"second", "deep/copy.md": b"second", "c.bin": b"\0\1", ".d": b"hidden"}
    for name, content in contents.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    assert sorted(read_texts(find_files([str(tmp_path)]), max_bytes=1000)) == [b"first", b"second"]
    assert read_texts(find_files([str(tmp_path / "a.txt")] * 2), max_bytes=3) == [b"fir"]
    assert find_files(str(tmp_path / "deep")) == find_files([str(tmp_path / "deep")])


@pytest.mark.parametrize("kind", ["missing", "empty.txt", "empty_folder", "folder_of_empty", "binary.bin"])
def test_a_path_without_text_is_one_clear_line(tmp_path, kind):
    path = tmp_path / kind
    if kind == "empty.txt":
        path.touch()
    elif kind == "binary.bin":
        path.write_bytes(b"\0" * 10)
    elif kind != "missing":
        path.mkdir()
        if kind == "folder_of_empty":
            (path / "a.txt").touch()
    with pytest.raises(SpecError, match=re.escape(str(path))) as error:
        read_texts(find_files([str(path)]), max_bytes=1000)
    assert "\n" not in str(error.value)


def strange(folder: Path, kind: str) -> Path:
    """Something in a folder that is no text, and might end a run or hang it."""
    path = folder / kind
    if kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "up":
        path.symlink_to(".")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    elif kind == "unreadable":
        path.write_text("secret")
    else:
        path.write_bytes(b"a,b\n1,2\n" if kind == "table.csv" else b"\x7fELF\0\0")
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("dangling", "does not exist"),
        ("loop", "symbolic links"),
        ("up", "a link to a folder"),
        ("pipe", "no regular file"),
        ("socket", "no regular file"),
        ("unreadable", "no permission"),
        ("table.csv", ".csv"),
        ("program", "binary"),
    ],
)
def test_what_cannot_be_read_is_skipped_with_a_line_and_refused_by_name(tmp_path, monkeypatch, capsys, kind, reason):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "unreadable")  # root may read everything
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    folder = Path("folder")
    folder.mkdir()
    (folder / "a.txt").write_text("text")
    path = strange(folder, kind)
    assert read_texts(find_files([str(tmp_path / folder)]), max_bytes=100) == [b"text"]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and str(path) in said[0] and reason in said[0]
    if kind != "up":  # which is the folder itself
        with pytest.raises(SpecError, match=f"'{path}'.*{reason}"):
            find_files([str(path)])


def test_a_file_that_fails_while_it_is_read_is_skipped_with_a_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_text("more")
    files = find_files([str(tmp_path)])
    (tmp_path / "b.txt").unlink()
    assert read_texts(files, max_bytes=100) == [b"text"]
    assert "b.txt: No such file" in capsys.readouterr().err


def test_many_skipped_files_are_counted(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text")
    for i in range(25):
        (tmp_path / f"{i}.png").write_bytes(b"\0")
    read_texts(find_files([str(tmp_path)]), max_bytes=100)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 21 and said[-1] == "skipped 5 more such files"


def jsonl(path: Path, *records) -> list[Path]:
    path.write_text("\n".join(record if isinstance(record, str) else json.dumps(record) for record in records))
    return find_files([str(path)])


def test_a_line_of_jsonl_is_a_document(tmp_path):
    files = jsonl(tmp_path / "a.jsonl", {"text": "one\ntwo"}, "", {"text": "dr\u00e9i", "id": 7}, {"text": "\ud800!"})
    assert sorted(read_texts(files, max_bytes=100)) == [b"?!", "dr\u00e9i".encode(), b"one\ntwo"]
    assert read_texts(files, max_bytes=3) == [b"one"]
    other = jsonl(tmp_path / "b.ndjson", {"body": "here", "text": "there"})
    assert read_texts(other, max_bytes=100, text_field="body") == [b"here"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"body": "x", "id": 1}, "unknown text_field 'text' in .*a.jsonl:2; known: body, id"),
        ({"text": ["x"]}, "a.jsonl:2: the field 'text' holds no text, but list"),
        (["text"], "a.jsonl:2: expected a JSON object .* got list"),
        ("{text", "a.jsonl:2: no JSON"),
    ],
)
def test_a_line_without_the_field_is_named(tmp_path, line, message):
    with pytest.raises(SpecError, match=message):
        read_texts(jsonl(tmp_path / "a.jsonl", {"text": "fine"}, line), max_bytes=100)


def test_a_file_is_in_one_split_wherever_it_lies():
    texts = [f"text {i} {'x' * (i % 7)}".encode() for i in range(400)]
    splits = split_texts(texts, held_out=0.1)
    assert sorted(text for split in splits.values() for text in split) == sorted(texts)
    assert all(20 <= len(splits[name]) <= 60 for name in ("validation", "test"))
    assert {k: set(v) for k, v in split_texts(texts[::-1], held_out=0.1).items()} == {
        k: set(v) for k, v in splits.items()
    }


def test_few_files_are_cut_in_order():
    text = bytes(range(100))
    splits = split_texts([text], held_out=0.1)
    assert splits["train"] + splits["validation"] + splits["test"] == [text[:80], text[80:90], text[90:]]
