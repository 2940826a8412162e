"""Hugging Face's `kernels` package and ours in one environment, shown with a stand-in for theirs."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

THEIRS = {
    "kernels/__init__.py": """
        from importlib.metadata import version
        from pathlib import Path
        __version__ = version("kernels")
        from kernels.utils import get_kernel
        from .layer import Layer
        HERE = Path(__file__).parent
        __all__ = ["get_kernel", "Layer"]
    """,
    "kernels/utils.py": """
        def get_kernel(name):
            return f"kernel {name}"
    """,
    "kernels/layer.py": """
        class Layer:
            def load(self):
                from kernels import get_kernel
                return get_kernel("layer")
    """,
    "kernels-0.99.dist-info/METADATA": "Metadata-Version: 2.1\nName: kernels\nVersion: 0.99\n",
}

# Parts of programs. Finding an operation is enough in most of them: importing it imports torch, which takes seconds.
OURS = "from importlib.util import find_spec; assert find_spec('kernels.delta_rule')"
OURS_IN_USE = "from kernels.delta_rule import gated_delta_rule; assert callable(gated_delta_rule)"
THEIRS_IN_USE = """
from kernels import Layer, get_kernel
import kernels, kernels.utils, kernels.layer
assert get_kernel is kernels.utils.get_kernel and get_kernel("a") == "kernel a"
assert Layer is kernels.layer.Layer and Layer().load() == "kernel layer"
assert kernels.__version__ == "0.99" and (kernels.HERE / "utils.py").exists()
namespace = {}
exec("from kernels import *", namespace)
assert namespace["get_kernel"] is get_kernel
"""
NOTHING_ELSE = """
import kernels
try:
    kernels.nonsense
except AttributeError as error:
    assert "module 'kernels' has no attribute 'nonsense'" in str(error), error
else:
    raise AssertionError("kernels.nonsense exists")
"""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("theirs")
    for name, text in THEIRS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("\n".join(line.removeprefix(" " * 8) for line in text.strip().splitlines()) + "\n")
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Our wheel, built from a copy because building leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns(".*", "__pycache__", "tests", "runs", "build", "*.egg-info")
    shutil.copytree(ROOT, folder / "source", ignore=ignore)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "-w", folder, folder / "source"], check=True)
    return next(folder.glob("*.whl"))


def run(*programs: str, path: list[Path], cwd: Path) -> None:
    """Runs programs one after the other in one fresh interpreter, with `path` in front of its sys.path."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    code = "\n".join(programs)
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("where", ["repository", "elsewhere"])
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_both_packages_work(theirs, tmp_path, first, where):
    path = [ROOT, theirs] if first == "ours" else [theirs, ROOT]
    cwd = ROOT if where == "repository" else tmp_path
    for programs in (["import mixers", OURS, THEIRS_IN_USE], [THEIRS_IN_USE, "import mixers", OURS]):
        run(*programs, NOTHING_ELSE, path=path, cwd=cwd)


@pytest.mark.parametrize("first", ["ours", pytest.param("theirs", marks=pytest.mark.slow)])
def test_an_operation_can_be_imported_beside_their_package(theirs, tmp_path, first):
    """Where ours is found first, theirs is not imported until it is asked for."""
    path = [ROOT, theirs] if first == "ours" else [theirs, ROOT]
    untouched = "import sys; assert 'kernels.utils' not in sys.modules" if first == "ours" else ""
    run("import mixers", OURS_IN_USE, untouched, THEIRS_IN_USE, path=path, cwd=tmp_path)


def test_where_ours_is_first_an_operation_needs_no_other_import(theirs, tmp_path):
    run(OURS, THEIRS_IN_USE, path=[ROOT, theirs], cwd=tmp_path)
    run(OURS, THEIRS_IN_USE, path=[theirs], cwd=ROOT)


def test_ours_alone_has_no_other_names(tmp_path):
    run(OURS, NOTHING_ELSE, path=[ROOT], cwd=tmp_path)


def test_a_second_checkout_of_ours_does_not_count_as_theirs(theirs, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "kernels", copy / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    run(OURS, NOTHING_ELSE, path=[ROOT, copy], cwd=tmp_path)
    run("import mixers", OURS, THEIRS_IN_USE, NOTHING_ELSE, path=[ROOT, copy, theirs], cwd=tmp_path)


def test_an_error_in_their_package_is_shown_each_time(tmp_path):
    broken = tmp_path / "broken" / "kernels" / "__init__.py"
    broken.parent.mkdir(parents=True)
    broken.write_text("import no_such_module\n")
    attempt = """
try:
    from kernels import get_kernel
except ModuleNotFoundError as error:
    assert error.name == "no_such_module"
else:
    raise AssertionError("no error")
"""
    run(attempt, attempt, OURS, path=[ROOT, tmp_path / "broken"], cwd=tmp_path)


@pytest.mark.parametrize("last", ["ours", "theirs"])
def test_both_packages_installed_in_one_folder(theirs, wheel, tmp_path, last):
    site = tmp_path / "site"
    for package in ("theirs", "ours") if last == "ours" else ("ours", "theirs"):
        if package == "theirs":
            shutil.copytree(theirs, site, dirs_exist_ok=True)
        else:
            zipfile.ZipFile(wheel).extractall(site)
    run(OURS, THEIRS_IN_USE, "import mixers", OURS, path=[site], cwd=tmp_path)


@pytest.mark.slow
def test_our_wheel_alone(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    run(OURS_IN_USE, NOTHING_ELSE, path=[tmp_path / "site"], cwd=tmp_path)


def test_transformers_does_not_take_ours_for_theirs(tmp_path):
    ours_only = "from transformers.utils import is_kernels_available; assert not is_kernels_available()"
    run(ours_only, path=[ROOT], cwd=tmp_path)
