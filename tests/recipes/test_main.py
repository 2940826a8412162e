import json
import os
import signal
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path

import pytest

from recipes.__main__ import COMMANDS
from tests.recipes import processes

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "lightning", "jsonargparse", "numpy", "yaml"}


@pytest.mark.parametrize("args", [["--help"], ["ls"], ["ls", "routers"], ["fit", "--help"]])
def test_help_and_lists_import_nothing_heavy(args):
    code = f"import sys, json; from recipes.__main__ import main; main({args}); print(json.dumps(list(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not HEAVY & {*json.loads(result.stdout.splitlines()[-1])}


@pytest.mark.parametrize("line", ["", "--help", "-h", "help"])
def test_help_names_every_command(run, line):
    result = run(line)
    assert result.code == 0
    assert all(f"  {command}" in result.out for command in COMMANDS)


def test_unknown_command(run):
    assert run("fti").error.endswith("Did you mean 'fit'?")


def test_function_as_a_command(run, monkeypatch):
    """compare and bench are plain functions, whose typed keywords become flags."""
    seen = {}

    def function(*, mixers: list[str], steps: int = 10, memory: bool = True) -> None:
        seen.update(mixers=mixers, steps=steps, memory=memory)

    monkeypatch.setitem(COMMANDS, "compare", ("recipes.messages:function", ""))
    monkeypatch.setattr("recipes.messages.function", function, raising=False)
    assert run("compare --mixers [ham,gdn] --steps 3").code == 0
    assert seen == {"mixers": ["ham", "gdn"], "steps": 3, "memory": True}
    for words, memory in (("--memory", True), ("--memory false", False), ("--memory=false", False)):
        assert run(f"compare {words} --mixers [ham]").code == 0 and seen["memory"] is memory
    assert "steps" in run("compare --mixers [ham] --steps x").error
    assert "--stepz" in run("compare --mixers [ham] --stepz 3").error


def test_exit_code_of_a_mistake(tmp_path):
    """In a process of its own, as a user has it."""
    wrong = start("fti --mixer ham", tmp_path)
    out, err = wrong.communicate()
    assert (wrong.returncode, out) == (2, "")
    assert err.startswith("error: unknown command 'fti'") and err.count("\n") == 1


def test_exit_code_of_a_run_that_is_ended(trained, tmp_path):
    """By SIGTERM in the middle of training, in a forked process: another interpreter takes ten seconds to start."""
    checkpoint = trained / "runs/ham-text-1/checkpoints/last.ckpt"
    blow = partial(processes.arm, to=0, place="training", step=8, signum=signal.SIGTERM)
    codes, said = processes.run(f"fit --ckpt_path {checkpoint} --steps 20000", tmp_path, change=blow)
    assert codes == [143] and (tmp_path / "runs/ham-text-1/checkpoints/last.ckpt").exists(), said
    assert "go on with\n  python -m recipes fit --ckpt_path runs/ham-text-1/checkpoints/" in said[0]


def start(line: str, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "recipes", *line.split()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def test_the_console_script_is_ours_whosever_recipes_are_installed(tmp_path):
    """torchtune's raises when it is imported."""
    (tmp_path / "theirs/recipes").mkdir(parents=True)
    (tmp_path / "theirs/recipes/__init__.py").write_text("raise ModuleNotFoundError('not a package')")
    (tmp_path / "my_parts.py").write_text("print('imported')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "theirs"), str(ROOT)])}
    for line, first in (("--help", f"lightning-mixers, in {ROOT / 'recipes'}"), ("ls --plugin my_parts", "imported")):
        code = (
            f"from lightning_mixers import main; import sys; sys.argv = ['mixers', *{line.split()}]; sys.exit(main())"
        )
        pipes = {"capture_output": True, "text": True, "cwd": tmp_path, "env": environment}
        result = subprocess.run([sys.executable, "-P", "-c", code], **pipes)
        assert (result.returncode, result.stdout.splitlines()[0]) == (0, first), result.stderr
        assert "mixers <command>" in result.stdout or "gated_delta_net" in result.stdout
    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["mixers"]
    assert script == "lightning_mixers:main"


def test_a_flag_of_a_function_that_is_nearly_right(run):
    assert run("generate --promt a").error.endswith("Did you mean --prompt?")
