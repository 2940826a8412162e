"""What a run of a comparison depends on beside its settings: texts, tokenizers, and classes that others wrote."""

import hashlib
import inspect
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from mixers.registry import MIXERS, ROUTERS, THRESHOLDS, parse_pattern, parse_spec
from recipes.task import DATA_MODULES

LARGE = 64 << 20  # bytes
OURS = [Path(__file__).parents[2] / package for package in ("kernels", "mixers", "lit_modules", "recipes")]


def written_by_others(cells: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    """Digests by which a run that is in the output folder is known to be another one once its sources have changed.

    Args:
        cells, settings: of the runs.

    Returns:
        {"sources": {class path, or path of a text or tokenizer: digest}}, or nothing: of our own files each row tells
        the commit.
    """
    found = {}
    for cls in {DATA_MODULES.get(settings["data"]), *_classes(cells)}:
        with suppress(TypeError):  # of a class without a file
            file = Path(inspect.getsourcefile(cls))
            if not any(file.is_relative_to(folder) for folder in OURS):
                found[f"{cls.__module__}.{cls.__qualname__}"] = _digest([file])
    for option in ("paths", "tokenizer"):
        paths = settings["data_options"].get(option) or []
        for path in [paths] if isinstance(paths, str) else paths:
            if files := _files(Path(path)):
                found[str(path)] = _digest(files)
    return {"sources": dict(sorted(found.items()))} if found else {}


def _classes(cells: list[dict[str, Any]]) -> Iterator[type]:
    """Those of mixers, routers and thresholds."""
    for cell in cells:
        for spec in parse_pattern(cell["mixer"]):
            yield MIXERS.get(spec["name"])
            for registry, option in ((ROUTERS, "router"), (THRESHOLDS, "threshold")):
                given = cell["options"].get(option, spec.get(option))
                if given is not None:
                    yield registry.get(parse_spec(given)["name"])


def _files(path: Path) -> list[Path]:
    """None of what is no file or folder here, which the data module sees to."""
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def _digest(files: list[Path]) -> str:
    """Of names and contents; of large files, of sizes and times."""
    whole = hashlib.sha256()
    for file in files:
        about = file.stat()
        with suppress(OSError):  # what cannot be read is not read for training either
            large = about.st_size > LARGE
            content = f"{about.st_size} {about.st_mtime_ns}".encode() if large else file.read_bytes()
            whole.update(file.name.encode() + hashlib.sha256(content).digest())
    return whole.hexdigest()[:16]
