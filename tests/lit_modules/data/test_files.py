import re
import sysconfig

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
