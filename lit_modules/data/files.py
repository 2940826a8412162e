"""Finding and reading the text files that a user names, and splitting them without a leak."""

import hashlib
import os
import sysconfig
from pathlib import Path

from tqdm import tqdm

from mixers.registry import SpecError

SKIPPED = {"__pycache__", "site-packages", "dist-packages", "node_modules"}
TESTS = {"test", "tests", "idle_test"}  # of the standard library: generated tables and odd encodings
FEW_FILES = 50


def find_files(paths: list[str] | None) -> list[Path]:
    """The files that ``paths`` name: files as they are, folders with all they hold but hidden and installed ones.

    None means the Python sources of the standard library, without its tests.

    Raises:
        SpecError: a path that does not exist, an empty file, a folder without files.
    """
    if paths is None:
        root = Path(sysconfig.get_path("stdlib"))
        return [path for path in _walk(root, skipped=SKIPPED | TESTS) if path.suffix == ".py"]
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise SpecError(f"data path '{path}' does not exist")
        files = [path] if path.is_file() else _walk(path, skipped=SKIPPED)
        if not files:
            raise SpecError(f"data path '{path}' has no files in it")
        if not sum(file.stat().st_size for file in files):
            raise SpecError(f"data path '{path}' is empty: there is no text to train on")
        found += files
    return list(dict.fromkeys(found))


def _walk(root: Path, *, skipped: set[str]) -> list[Path]:
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in skipped and not name.startswith("."))
        found += [Path(folder, name) for name in sorted(files) if not name.startswith(".")]
    return found


def read_texts(files: list[Path], *, max_bytes: int) -> list[bytes]:
    """The contents of ``files``, without binary ones (a NUL byte) and repeated ones, up to ``max_bytes`` in all.

    Files are taken in an order that scatters them, so that a cap takes a sample of all folders, and texts are in the
    order of a hash: neither depends on where the files lie. A progress bar appears if reading takes more than two
    seconds.

    Raises:
        SpecError: there is no text in the files.
    """
    texts: dict[bytes, bytes] = {}
    size = 0
    with tqdm(total=len(files), desc="reading text", unit="file", delay=2, leave=False) as progress:
        for file in sorted(files, key=lambda file: _digest("/".join(file.parts[-2:]).encode())):
            text = file.read_bytes()[: max_bytes - size]
            progress.update()
            if len(text) < 2 or b"\0" in text:
                continue
            key = _digest(text)
            size += len(text) if key not in texts else 0
            texts[key] = text
            if size >= max_bytes:
                break
    if not texts:
        raise SpecError(f"no text in {len(files)} files, such as '{files[0]}': each is empty or binary")
    return [texts[key] for key in sorted(texts)]


def split_texts(texts: list[bytes], *, held_out: float) -> dict[str, list[bytes]]:
    """Splits into train, validation and test; a share ``held_out`` goes to each of the last two.

    Whole files go to one split, by a hash of their content, so that neither a copy nor another order of files moves
    text from one split to another. Fewer than 50 files are too few for that: each is cut instead, its beginning for
    training, then validation, then test.
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


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
