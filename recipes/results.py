"""What makes a figure believable: where, when and with what it was measured, written beside it."""

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lit_modules.disk import disk_error
from mixers.registry import SpecError
from recipes.messages import one_line

SCHEMA_VERSION = 1
PACKAGES = (
    "lightning-mixers",
    "torch",
    "triton",
    "lightning",
    "jsonargparse",
    "flash-linear-attention",
    "transformers",
    "torchmetrics",
)


def stamp() -> dict[str, Any]:
    """Versions, device, commit, and the backend that each operation took in this process."""
    import torch

    from kernels.dispatch import CHOSEN

    return {
        "schema_version": SCHEMA_VERSION,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")) if _tracked() else None,
        "backends": dict(CHOSEN),
    }


def commit() -> str | None:
    """Of the code that runs. Where no repository holds it, as in site-packages, the version that is installed."""
    if _tracked():
        return _git("rev-parse", "HEAD")
    installed = _version(PACKAGES[0])
    return installed and f"{PACKAGES[0]} {installed}"


def device_name() -> str:
    """The accelerator if there is one, else the processor's model."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor() or platform.machine()}, {len(models) or '?'} cores"


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A place beside `path` to write a file or a folder to, which then becomes `path`, or is removed if writing fails.

    Raises:
        SpecError: a full disk, a folder that is a file or may not be written, or whatever else keeps it from the disk.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        if part.is_dir() and path.is_dir():
            path.rmdir()  # empty, or this fails
        part.replace(path)
    except SpecError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # torch and safetensors have errors of their own for these
        said = disk_error(error)
        raise SpecError(f"{path} cannot be written: {said.strerror if said else one_line(str(error))}") from error
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            with suppress(OSError):
                part.unlink()


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Written whole or not at all. Raises SpecError if it cannot be."""
    with written_whole(path) as part:
        part.write_text(json.dumps(data, indent=1) + "\n")


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table that reads well both as text and as Markdown."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in [header, *rows]
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _tracked() -> bool:
    """Whether the repository around this file is its own: an environment may lie within that of somebody else."""
    return _git("ls-files", "--error-unmatch", Path(__file__).name) is not None


def _git(*args: str) -> str | None:
    here = Path(__file__).resolve().parent
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}  # a hook names a repository
    try:
        return subprocess.run(
            ["git", *args], cwd=here, env=env, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
