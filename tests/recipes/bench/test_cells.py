"""The matrix of compiled kernels: nothing is compiled twice, nothing that came is lost, and its table is complete."""

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from recipes.bench import cells as module
from recipes.bench.cells import Cell, cells_of, compile_all

CELLS = cells_of([90, 80], ["float16", "bfloat16"], [128, 64])
CELL = [Cell(80, "float16", 64)]
SOME = cells_of([90], ["bfloat16"], [128, 64, 32])
KERNEL = dict(name="scan", capability=0, warps=4, stages=2, registers=255, spilled=0, shared=2**10, matrix="mma")


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Compiles nothing: the kernel of an operation spills as many bytes as K. -> the names of what was asked for."""
    log = tmp_path / "log"

    def compile_for(capability, K, dtype, wanted):
        for name in wanted:
            with log.open("a") as file:
                file.write(f"{capability} {dtype} {K} {name}\n")
            if (tmp_path / "die").exists() and (K, name) == (64, "decode"):
                os._exit(9)
            hazards = int(capability == 80 and name == "decode")
            yield name, [KERNEL | dict(capability=capability, name=name[:6], spilled=4 * K, hazards=hazards)]

    def asked():
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return sorted(lines)

    monkeypatch.setattr(module, "get_context", lambda _: multiprocessing.get_context("fork"))
    monkeypatch.setattr(module.ahead_of_time, "compile_for", compile_for)
    monkeypatch.setattr(module.ahead_of_time, "operations", lambda: ["delta_rule", "read_out", "decode"])
    yield asked
    module.digest.cache_clear()


def changed(monkeypatch, ending, text):
    """As if the files of that ending had `text` at their end."""
    read, code = Path.read_text, module._code
    more = {True: text, False: ""}
    monkeypatch.setattr(Path, "read_text", lambda path, *args: read(path, *args) + more[str(path).endswith(ending)])
    monkeypatch.setattr(module, "_code", lambda path: (code.__wrapped__ if str(path).endswith(ending) else code)(path))
    module.digest.cache_clear()


def test_two_jobs_give_what_one_gives(compiled, tmp_path):
    one, two = (compile_all(CELLS, tmp_path / str(jobs), jobs) for jobs in (1, 2))
    assert one == two and len(one) == 8 * 3
    assert len(compiled()) == 2 * 8 * 3
    for name in ("cells.json", "aot.md"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    assert [row["ok"] for row in one] == [row["capability"] == 90 or row["name"] != "decode" for row in one]
    assert compile_all(CELLS, None) == one


def test_what_is_kept_is_not_compiled_again(compiled, tmp_path, monkeypatch):
    rows = compile_all(CELLS, tmp_path)
    files = [(tmp_path / name).read_bytes() for name in ("cells.json", "aot.md")]
    compiled()
    assert compile_all(CELLS, tmp_path) == rows
    assert compiled() == []
    assert [(tmp_path / name).read_bytes() for name in ("cells.json", "aot.md")] == files
    compile_all(SOME[2:], tmp_path)
    assert compiled() == [f"90 torch.bfloat16 32 {name}" for name in ("decode", "delta_rule", "read_out")]


@pytest.mark.parametrize(
    ("ending", "text", "again"),
    [
        ("read_out/triton_rows.py", "# a comment\n", []),
        ("read_out/triton_rows.py", "x = 1\n", ["decode", "read_out"]),
        ("delta_rule/triton_sizes.py", "x = 1\n", ["decode", "delta_rule"]),
        ("kernels/sass.py", "x = 1\n", ["decode", "delta_rule", "read_out"]),
        ("bench/ahead_of_time.py", "x = 1\n", ["decode", "delta_rule", "read_out"]),
    ],
)
def test_a_change_compiles_anew_what_it_is_about(compiled, tmp_path, monkeypatch, ending, text, again):
    compile_all(CELL, tmp_path)
    compiled()
    changed(monkeypatch, ending, text)
    compile_all(CELL, tmp_path)
    assert [line.split()[-1] for line in compiled()] == again


def test_another_compiler_compiles_all_anew(compiled, tmp_path, monkeypatch):
    compile_all([*CELL, Cell(100, "float16", 64)], tmp_path)
    compiled()
    monkeypatch.setattr(module, "_compilers", lambda capability: "ptxas 99" if capability == 100 else "the old one")
    module.digest.cache_clear()
    compile_all([Cell(100, "float16", 64)], tmp_path)
    assert len(compiled()) == 3
    text = (tmp_path / "aot.md").read_text()
    assert "ptxas 99" in text and "of other code than is here now: sm_80, float16, K = V = 64." in text


def test_a_process_that_dies_takes_nothing_with_it(compiled, tmp_path, capsys):
    (tmp_path / "die").touch()
    rows = compile_all(SOME, tmp_path, 2)
    assert [row for row in rows if not row["ok"]] == [{"capability": 90, "dtype": "bfloat16", "K": 64, "ok": False}]
    assert "FAIL  sm_90, bfloat16, K = V = 64" in capsys.readouterr().out
    assert len(rows) == 3 + 2 + 3 + 1
    assert "In parts only: sm_90, bfloat16, K = V = 64." in (tmp_path / "aot.md").read_text()
    (tmp_path / "die").unlink()
    compiled()
    assert len(compile_all(SOME, tmp_path)) == 9
    assert compiled() == ["90 torch.bfloat16 64 decode"]


def test_whoever_stops_loses_nothing_that_came(compiled, tmp_path, monkeypatch):
    write, told = module._write, []

    def stop(*args, **options):
        write(*args, **options)
        told.append(1)
        if len(told) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "_write", stop)
    with pytest.raises(KeyboardInterrupt):
        compile_all(CELLS, tmp_path)
    assert multiprocessing.active_children() == []
    kept = json.loads((tmp_path / "cells.json").read_text())
    compiled()
    monkeypatch.setattr(module, "_write", write)
    compile_all(CELLS, tmp_path)
    assert len(compiled()) == 8 * 3 - sum(len(record) for record in kept.values())


def test_the_table_begins_with_what_a_reader_should_know(compiled, tmp_path):
    compile_all(CELLS, tmp_path)
    text = (tmp_path / "aot.md").read_text()
    assert text.startswith("24 kernels of 8 cells (dtype, GPU, K = V), compiled by triton")
    assert "Over the GPU's shared memory: none." in text and "Hazards: 4." in text
    assert "More than 256 bytes spilled: 12." in text  # K = 128
    assert "| delta_rule delta_ | bfloat16 | 128   | 80, 90 | 512 " in text
    places = [text.index(f"**{Cell(c, d, K)}**") for d in ("bfloat16", "float16") for c in (80, 90) for K in (64, 128)]
    assert places == sorted(places)


def test_a_file_that_is_something_else_is_refused(compiled, tmp_path):
    (tmp_path / "cells.json").write_text("[1]")
    with pytest.raises(module.SpecError, match="holds no compiled kernels"):
        compile_all(CELLS, tmp_path)
