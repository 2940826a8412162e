"""Kernels compiled for many GPUs, dtypes and head sizes: cells of a matrix, side by side, kept on disk as they come.

What is kept has a digest of what decides it, so that a run that was stopped goes on, and one after a change compiles
what the change is about and nothing else.
"""

import ast
import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from multiprocessing import connection, get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

import kernels
from kernels.ahead_of_time import SHARED_MEMORY
from mixers.registry import SpecError
from recipes.bench import ahead_of_time
from recipes.results import markdown_table, written_whole

DTYPES = ("bfloat16", "float16", "float32")
MANY = 256  # bytes spilled by a thread: more is told of
HEADER = ["kernel", "warps", "stages", "registers", "bytes spilled", "shared KiB", "matrix", "hazards"]

Row = dict[str, Any]
Kept = dict["Cell", dict[str, dict[str, Any]]]
"""cell -> operation -> its digest, what compiled it (`by`), and its kernels"""


class Cell(NamedTuple):
    """What kernels are compiled for: the GPU's compute capability, the inputs' dtype, and K = V."""

    capability: int
    dtype: str
    K: int

    def __str__(self) -> str:
        return f"sm_{self.capability}, {self.dtype}, K = V = {self.K}"

    @property
    def place(self) -> tuple[int, int, int]:
        """In the table."""
        return DTYPES.index(self.dtype), self.capability, self.K


def cells_of(capabilities: list[int], dtypes: list[str], head_dims: list[int]) -> list[Cell]:
    """Every combination, dtype by dtype and GPU by GPU. Raises SpecError for a GPU or a dtype that is not known."""
    for what, given, known in (
        ("compute capability", capabilities, tuple(SHARED_MEMORY)),
        ("dtype", dtypes, DTYPES),
    ):
        for value in given:
            if value not in known:
                raise SpecError(f"unknown {what} {value}; known: {', '.join(map(str, known))}")
    return [Cell(c, d, K) for d in dtypes for c in capabilities for K in head_dims]


def compile_all(cells: list[Cell], folder: Path | None, jobs: int = 1) -> list[Row]:
    """Compile every kernel for cells.

    Args:
        cells: what for, in the order in which to begin.
        folder: where cells.json, which keeps what is compiled, and aot.md, the table of all that is kept, are; None
            prints the table.
        jobs: cells side by side, each in a process of its own.

    Returns:
        A row for every kernel, `ok`: its shared memory fits, and nothing touches its products while they run. One
        that is not ok, with the cell alone, for a cell whose process died.

    Raises:
        SpecError: the folder holds something else, or cannot be written.
    """
    from tqdm import tqdm

    operations, kept = ahead_of_time.operations(), _read(folder)
    wanted = {cell: [o for o in operations if not _fits(kept, cell, o)] for cell in cells}
    wanted = {cell: missing for cell, missing in wanted.items() if missing}
    bar = tqdm(total=len(cells), initial=len(cells) - len(wanted), unit="cell")
    with bar, contextlib.closing(_in_processes(wanted, jobs)) as answers:
        for cell, answer in answers:
            if answer:
                operation, found = answer
                parts = {"digest": digest(operation, cell.capability), "by": _compilers(cell.capability)}
                kept.setdefault(cell, {})[operation] = parts | {"kernels": found}
                bar.set_postfix_str(f"{cell}: {operation}")
            else:
                bar.update()
            if folder:
                _write(folder, kept, operations, table=not answer)
    if folder:
        _write(folder, kept, operations)
    print("\nkernels compiled ahead of time:\n\n" + (_summary if folder else _page)(kept, operations))
    died = [cell for cell in cells if not all(_fits(kept, cell, operation) for operation in operations)]
    for cell in died:
        print(f"FAIL  {cell}: the process that compiled it died")
    rows = [row for cell in cells if cell in kept for row in rows_of(cell, kept[cell], operations)]
    return rows + [cell._asdict() | {"ok": False} for cell in died]


def _in_processes(wanted: dict[Cell, list[str]], jobs: int) -> Iterator[tuple[Cell, tuple[str, list[Row]] | None]]:
    """Compiles operations, every cell in a process of its own: what breaks one breaks no other, nor its memory.

    Yields:
        A cell, and an operation with its kernels as they come; at the cell's end, or its process's death, None.
    """
    context, waiting = get_context("spawn"), list(wanted.items())
    running: dict[Any, tuple[Cell, Any]] = {}
    with TemporaryDirectory(ignore_cleanup_errors=True) as caches:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    cell, operations = waiting.pop(0)
                    answers, end = context.Pipe(duplex=False)
                    # daemon: it ends with this process
                    process = context.Process(target=_compile, args=(cell, operations, caches, end), daemon=True)
                    process.start()
                    end.close()
                    running[answers] = cell, process
                for answers in connection.wait(list(running)):
                    cell, process = running[answers]
                    try:
                        answer = answers.recv()
                    except EOFError:
                        answer = None
                        process.join()
                        del running[answers]
                    yield cell, answer
        finally:
            for _, process in running.values():
                process.terminate()
                process.join()


def _compile(cell: Cell, operations: list[str], caches: str, answers: connection.Connection) -> None:
    os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is first imported
    os.environ["TRITON_CACHE_DIR"] = str(Path(caches) / "-".join(map(str, cell)))
    torch.set_num_threads(1)
    for answer in ahead_of_time.compile_for(cell.capability, cell.K, getattr(torch, cell.dtype), operations):
        answers.send(answer)


def _fits(kept: Kept, cell: Cell, operation: str) -> bool:
    return kept.get(cell, {}).get(operation, {}).get("digest") == digest(operation, cell.capability)


@functools.cache
def digest(operation: str, capability: int) -> str:
    """Of what decides what an operation compiles to.

    That is the code of its package, of what all packages share and of the launches, and the compilers' versions;
    decoding is of all packages. Comments and docstrings are no code.
    """
    root = Path(kernels.__file__).parent
    package = root / operation.split()[0]
    files = {*root.glob("*.py"), *(package if package.is_dir() else root).rglob("*.py"), Path(ahead_of_time.__file__)}
    found = hashlib.sha256(_compilers(capability).encode())
    for path in sorted(files):
        found.update(_code(path).encode())
    return found.hexdigest()[:16]


@functools.cache
def _code(path: Path) -> str:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        first = node.body[0] if isinstance(getattr(node, "body", None), list) and node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            del node.body[0]
    return ast.dump(tree)


@functools.cache
def _compilers(capability: int) -> str:
    import triton
    from triton import knobs

    name = "ptxas_blackwell" if capability >= 100 else "ptxas"
    return f"triton {triton.__version__} and {name} {getattr(knobs.nvidia, name).version}"


def rows_of(cell: Cell, record: dict[str, dict[str, Any]], operations: list[str]) -> list[Row]:
    """The kernels of a cell; what several operations compile to alike is one row, of the first of them."""
    found: dict[str, Row] = {}
    for operation in (name for name in operations if name in record):
        for kernel in record[operation]["kernels"]:
            ok = kernel["shared"] <= SHARED_MEMORY[cell.capability] * 1024 and not kernel["hazards"]
            found.setdefault(str(kernel), {"operation": operation, **cell._asdict(), **kernel, "ok": ok})
    return list(found.values())


def _read(folder: Path | None) -> Kept:
    path = folder and folder / "cells.json"
    if not path or not path.exists():
        return {}
    try:
        kept = {tuple(key.split()): record for key, record in json.loads(path.read_text()).items()}
        return {Cell(int(capability), dtype, int(K)): record for (capability, dtype, K), record in kept.items()}
    except (ValueError, AttributeError) as error:
        raise SpecError(f"{path} holds no compiled kernels: {type(error).__name__}: {error}") from error


def _write(folder: Path, kept: Kept, operations: list[str], table: bool = True) -> None:
    """Whole or not at all; a line a cell, in the order of the table."""
    kept = dict(sorted(kept.items(), key=lambda item: item[0].place))
    lines = [f'"{" ".join(map(str, cell))}": {json.dumps(record)}' for cell, record in kept.items()]
    with written_whole(folder / "cells.json") as part:
        part.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    if table:
        with written_whole(folder / "aot.md") as part:
            part.write_text(_page(kept, operations) + "\n")


def _page(kept: Kept, operations: list[str]) -> str:
    parts = [_summary(kept, operations)]
    for cell, record in kept.items():
        lines = [
            [f"{row['operation']} {row['name']}"]
            + [str(row[key]) for key in ("warps", "stages", "registers", "spilled")]
            + [f"{row['shared'] / 1024:.0f}", row["matrix"] or "none", str(row["hazards"])]
            for row in rows_of(cell, record, operations)
        ]
        of = f"of {SHARED_MEMORY[cell.capability]} KiB"
        parts.append(f"**{cell}**, {of} of shared memory\n\n{markdown_table(HEADER, lines)}")
    return "\n\n".join(parts)


def _summary(kept: Kept, operations: list[str]) -> str:
    """How much is there, and what of it a reader should know."""
    rows = [row for cell, record in kept.items() for row in rows_of(cell, record, operations)]
    whole = [cell for cell, record in kept.items() if {*operations} <= {*record}]
    old = [cell for cell in kept if not all(_fits(kept, cell, name) for name in operations if name in kept[cell])]
    by = " / ".join(sorted({part["by"] for record in kept.values() for part in record.values()}))
    lines = [f"{len(rows)} kernels of {len(whole)} cells (dtype, GPU, K = V), compiled by {by or 'nothing'}."]
    for what, cells in (
        ("In parts only", [cell for cell in kept if cell not in whole]),
        ("In parts of other code than is here now", old),
    ):
        lines += [f"{what}: {'; '.join(map(str, cells))}."] if cells else []
    for what, some in (
        ("Over the GPU's shared memory", [r for r in rows if r["shared"] > SHARED_MEMORY[r["capability"]] * 1024]),
        ("Hazards", [row for row in rows if row["hazards"]]),
        (f"More than {MANY} bytes spilled", [row for row in rows if row["spilled"] > MANY]),
    ):
        lines.append(f"{what}: {_worst(some) if some else 'none.'}")
    return "\n\n".join(lines)


def _worst(rows: list[Row]) -> str:
    """A line for every kernel, dtype and K: the GPUs, and the worst figures."""
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((f"{row['operation']} {row['name']}", row["dtype"], row["K"]), []).append(row)
    lines = [
        [name, dtype, str(K), ", ".join(dict.fromkeys(str(row["capability"]) for row in some))]
        + [str(max(row[key] for row in some)) for key in ("spilled", "shared", "hazards")]
        for (name, dtype, K), some in groups.items()
    ]
    header = ["kernel", "dtype", "K = V", "sm", "most bytes spilled", "most bytes shared", "most hazards"]
    return f"{len(rows)}.\n\n" + markdown_table(header, lines)
