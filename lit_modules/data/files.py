"""Finding and reading the text that a user names, and splitting it without a leak.

A file is one document; of a ``.jsonl`` file every line is one, a JSON object that holds it in a field. Nothing is left
out unsaid: what a folder holds that cannot be read gets a line each on stderr, what was named itself is an error.
"""

import hashlib
import json
import os
import stat
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from mixers.registry import SpecError, unknown

SKIPPED = {"__pycache__", "site-packages", "dist-packages", "node_modules"}
TESTS = {"test", "tests", "idle_test"}  # of the standard library: generated tables and odd encodings
FEW_FILES = 50
LINES = {".jsonl", ".ndjson"}
STRUCTURED = {".json", ".csv", ".tsv", ".parquet", ".arrow"}  # text and layout in one: not read as if all were text
BINARY = "binary: it has a NUL byte"
SHOWN = 20


def find_files(paths: list[str] | str | None) -> list[Path]:
    """The files that ``paths`` name: files as they are, folders with all they hold but hidden and installed ones.

    None means the Python sources of the standard library, without its tests. Links to files are followed, links to
    folders are not.

    Raises:
        SpecError: a path that cannot be read as text, an empty file, a folder without files.
    """
    if paths is None:
        root = Path(sysconfig.get_path("stdlib"))
        return [path for path in _walk(root, skipped=SKIPPED | TESTS, problems={}) if path.suffix == ".py"]
    found: list[Path] = []
    problems: dict[Path, str] = {}
    for path in [Path(paths)] if isinstance(paths, str) else map(Path, paths):
        if os.path.isdir(path):
            files = _walk(path, skipped=SKIPPED, problems=problems)
        elif problem := _problem(path) or (BINARY if _is_binary(path) else None):
            raise SpecError(f"data path '{path}' cannot be read as text: {problem}")
        else:
            files = [path]
        if not files:
            _report_skipped(problems)
            raise SpecError(f"data path '{path}' has no files in it that could be read as text")
        if not sum(file.stat().st_size for file in files):
            raise SpecError(f"data path '{path}' is empty: there is no text to train on")
        found += files
    _report_skipped(problems)
    return list(dict.fromkeys(found))


def _walk(root: Path, *, skipped: set[str], problems: dict[Path, str]) -> list[Path]:
    """The files below a folder that can be read; why others cannot goes to ``problems``."""

    def unreadable(error: OSError) -> None:
        problems[Path(error.filename)] = error.strerror

    found = []
    for folder, folders, files in os.walk(root, onerror=unreadable):
        folders[:] = sorted(name for name in folders if name not in skipped and not name.startswith("."))
        links = [Path(folder, name) for name in folders if Path(folder, name).is_symlink()]
        problems |= dict.fromkeys(links, "a link to a folder, which is not followed; give it as a path of its own")
        for file in (Path(folder, name) for name in sorted(files) if not name.startswith(".")):
            if problem := _problem(file):
                problems[file] = problem
            else:
                found.append(file)
    return found


def _problem(path: Path) -> str | None:
    """Why a file cannot be read as text, as far as can be told without opening it: a FIFO would never answer."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "a link to a file that does not exist" if path.is_symlink() else "it does not exist"
    except OSError as error:  # such as a link to itself
        return error.strerror
    if not stat.S_ISREG(mode):
        return "no regular file, but a socket, pipe or device"
    if not os.access(path, os.R_OK):
        return "no permission to read it"
    if path.suffix.lower() in STRUCTURED:
        return f"{path.suffix} is no format for text here, which is plain or .jsonl; data 'tokens' reads .parquet"
    return None


def _is_binary(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" in file.read(2**16)


def read_texts(files: list[Path], *, max_bytes: int, text_field: str = "text") -> list[bytes]:
    """The documents in ``files``, without binary ones (a NUL byte) and repeated ones, up to ``max_bytes`` in all.

    Files are taken in an order that scatters them, so that a cap takes a sample of all folders, and texts are in the
    order of a hash: neither depends on where the files lie. A progress bar appears if reading takes more than two
    seconds.

    Args:
        files: of text, or ``.jsonl``.
        max_bytes: to read at most.
        text_field: what holds the document in a line of a ``.jsonl`` file.

    Raises:
        SpecError: there is no text in the files, or a line of a ``.jsonl`` file has none in that field.
    """
    texts: dict[bytes, bytes] = {}
    problems: dict[Path, str] = {}
    size, total = 0, min(max_bytes, sum(file.stat().st_size for file in files if file.exists()))
    with tqdm(total=total, desc="reading text", unit="B", unit_scale=True, delay=2, leave=False) as progress:
        for file in sorted(files, key=lambda file: _digest("/".join(file.parts[-2:]).encode())):
            try:
                for text in _documents(file, text_field, max_bytes=max_bytes - size, problems=problems):
                    text = text[: max_bytes - size]
                    key = _digest(text)
                    if len(text) > 1 and key not in texts:  # a token and its target
                        texts[key] = text
                        size += len(text)
                        progress.update(len(text))
                    if size >= max_bytes:
                        break
            except OSError as error:
                problems[file] = error.strerror or str(error)
            if size >= max_bytes:
                break
    _report_skipped(problems)
    if not texts:
        raise SpecError(f"no text in {len(files)} files, such as '{files[0]}': each is empty or binary")
    return [texts[key] for key in sorted(texts)]


def read_documents(files: list[Path], *, text_field: str = "text") -> list[str]:
    """All documents in ``files``, in their order, but binary ones, which get a line each on stderr.

    Args:
        files: of text, or ``.jsonl``.
        text_field: what holds the document in a line of a ``.jsonl`` file.

    Raises:
        SpecError: a file that cannot be read, or a line of a ``.jsonl`` file without text in that field.
    """
    problems: dict[Path, str] = {}
    found: list[str] = []
    for file in files:
        try:
            texts = _documents(file, text_field, max_bytes=file.stat().st_size, problems=problems)
            found += [text.decode(errors="replace").replace("\r\n", "\n") for text in texts]
        except OSError as error:
            raise SpecError(f"data path '{file}' cannot be read as text: {error.strerror or error}") from error
    _report_skipped(problems)
    return found


def _documents(file: Path, text_field: str, *, max_bytes: int, problems: dict[Path, str]) -> Iterator[bytes]:
    with file.open("rb") as content:
        if file.suffix.lower() in LINES:
            for number, line in enumerate(content, 1):
                if line.strip():
                    yield _field(line, text_field, f"{file}:{number}")
        elif b"\0" in (text := content.read(max_bytes)):
            problems[file] = BINARY
        else:
            yield text


def _field(line: bytes, text_field: str, place: str) -> bytes:
    try:
        record = json.loads(line)
    except ValueError as error:  # JSON, or UTF-8
        raise SpecError(f"{place}: no JSON: {error}") from error
    if not isinstance(record, dict):
        raise SpecError(f"{place}: expected a JSON object with a field {text_field!r}, got {type(record).__name__}")
    if text_field not in record:
        raise unknown("text_field", text_field, record, of=f" in {place}")
    text = record[text_field]
    if not isinstance(text, str):
        raise SpecError(f"{place}: the field {text_field!r} holds no text, but {type(text).__name__}")
    return text.encode("utf-8", errors="replace")  # JSON can spell what UTF-8 cannot: half a surrogate pair


@rank_zero_only
def _report_skipped(problems: dict[Path, str]) -> None:
    for path, problem in list(problems.items())[:SHOWN]:
        _print_once(f"skipped {path}: {problem}")
    if len(problems) > SHOWN:
        _print_once(f"skipped {len(problems) - SHOWN} more such files")


@cache  # several modules may read the same text
def _print_once(line: str) -> None:
    print(line, file=sys.stderr)


def split_texts(texts: list[bytes], *, held_out: float) -> dict[str, list[bytes]]:
    """Splits into train, validation and test.

    Whole files go to one split, by a hash of their content, so that neither a copy nor another order of files moves
    text from one split to another. Fewer than 50 files are too few for that: each is cut instead, its beginning for
    training, then validation, then test.

    Args:
        texts: one for each document.
        held_out: share of the text in each of the last two, in (0, 0.5).

    Returns:
        The texts of each split, of two bytes at least, by its name.
    """
    splits: dict[str, list[bytes]] = {"train": [], "validation": [], "test": []}
    for text in texts:
        if len(texts) < FEW_FILES:
            first, second = int(len(text) * (1 - 2 * held_out)), int(len(text) * (1 - held_out))
            parts = {"train": text[:first], "validation": text[first:second], "test": text[second:]}
        else:
            draw = int.from_bytes(_digest(text), "big") / 2**128
            parts = {"test" if draw < held_out else "validation" if draw < 2 * held_out else "train": text}
        for split, part in parts.items():
            if len(part) > 1:  # a token and its target
                splits[split].append(part)
    return splits


def digest_of(parts: Iterable[bytes]) -> str:
    """Of all of them, in their order: that of a checkpoint tells whether its data have changed."""
    return _digest(b"".join(map(_digest, parts))).hex()


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
