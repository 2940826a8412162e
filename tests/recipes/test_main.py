import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recipes.__main__ import COMMANDS

HEAVY = {"torch", "lightning", "jsonargparse", "numpy", "yaml"}


@pytest.mark.parametrize(
    ("args", "limit"), [(["--help"], 0.2), (["ls"], 0.5), (["ls", "routers"], 0.5), (["fit", "--help"], 0.5)]
)
def test_answers_at_once(args, limit):
    code = f"import sys, json; from recipes.__main__ import main; main({args}); print(json.dumps(list(sys.modules)))"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0, result.stderr
    assert not HEAVY & {*json.loads(result.stdout.splitlines()[-1])}
    # processor time, for the machine may be busy with other tests
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < limit


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

    def function(*, mixers: list[str], steps: int = 10) -> None:
        seen.update(mixers=mixers, steps=steps)

    monkeypatch.setitem(COMMANDS, "compare", ("recipes.messages:function", ""))
    monkeypatch.setattr("recipes.messages.function", function, raising=False)
    assert run("compare --mixers [ham,gdn] --steps 3").code == 0
    assert seen == {"mixers": ["ham", "gdn"], "steps": 3}
    assert "steps" in run("compare --mixers [ham] --steps x").error
    assert "--stepz" in run("compare --mixers [ham] --stepz 3").error


def test_exit_codes_of_the_process(trained, tmp_path):
    """In processes of their own, as a user has it: a mistake, and SIGTERM in the middle of training."""
    checkpoint = trained / "runs/ham-text-1/checkpoints/last.ckpt"
    wrong = start("fti --mixer ham", tmp_path)
    endless = start(f"fit --ckpt_path {checkpoint} --steps 1000000", tmp_path)
    out, err = wrong.communicate(timeout=60)
    assert (wrong.returncode, out) == (2, "")
    assert err.startswith("error: unknown command 'fti'") and err.count("\n") == 1

    deadline = time.monotonic() + 60
    while not (saved := [*tmp_path.glob("runs/ham-text-1/checkpoints/last.ckpt")]) and time.monotonic() < deadline:
        time.sleep(0.1)
    endless.send_signal(signal.SIGTERM)
    out, err = endless.communicate(timeout=60)
    assert saved and endless.returncode == 143, err
    assert "go on with\n  python -m recipes fit --ckpt_path runs/ham-text-1/checkpoints/" in out


def start(line: str, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "recipes", *line.split()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)
