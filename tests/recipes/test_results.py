"""The stamp on a figure names the code that made it, and no other."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import recipes.results


def git(folder, *args):
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", *who, *args], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def load(path):
    spec = importlib.util.spec_from_file_location("stamped", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_commit_is_that_of_the_repository_that_holds_the_code(tmp_path, monkeypatch):
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):
        monkeypatch.delenv(name, raising=False)
    somebody = tmp_path / "project"
    installed = somebody / ".venv/site-packages/recipes"
    installed.mkdir(parents=True)
    git(somebody, "init", "-q")
    (somebody / "theirs.txt").write_text("theirs")
    git(somebody, "add", "theirs.txt")
    git(somebody, "commit", "-qm", "theirs")
    shutil.copy(Path(recipes.results.__file__), installed)
    module = load(installed / "results.py")
    monkeypatch.setattr(module, "_version", lambda package: "1.2.3")
    assert module.commit() == "lightning-mixers 1.2.3" and module.stamp()["dirty"] is None
    monkeypatch.setattr(module, "_version", lambda package: None)
    assert module.commit() is None

    git(somebody, "add", "-f", ".venv")
    git(somebody, "commit", "-qm", "ours")
    assert module.commit() == git(somebody, "rev-parse", "HEAD") and module.stamp()["dirty"] is False
    (somebody / "theirs.txt").write_text("changed")
    assert module.stamp()["dirty"] is True
