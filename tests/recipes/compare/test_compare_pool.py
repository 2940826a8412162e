"""Workers of a comparison: they end with their parent, and one that fails stops nobody else."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.compare.pool import train_all

FAKE = """
import time
from recipes.compare.pool import count_steps

def train(run, unfinished):
    if run["seed"] == 1:
        raise ValueError("two\\nlines")
    for _ in range(run["steps"]):
        count_steps(1)
    if run["seed"] == 2:
        print("begun", flush=True)
        time.sleep(600)
    return run | {"metric": "accuracy", "accuracy": 0.5}
"""

# A job in the background is started with Ctrl-C ignored, and so is whatever it starts.
HEARD = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A training that needs no torch, in this process and in those that it starts."""
    (tmp_path / "fake_training.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path)
    import fake_training

    monkeypatch.setitem(sys.modules, "recipes.compare.run", fake_training)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield tmp_path
    del sys.modules["fake_training"]


def test_a_run_that_fails_is_one_line_and_the_bar_counts_steps(fake, capfd):
    runs = [{"label": "gdn", "seed": seed, "steps": 3} for seed in (0, 1)]
    rows = list(train_all(runs, jobs=1, unfinished=fake))
    assert [row["seed"] for row in rows] == [0]
    err = capfd.readouterr().err.replace("\r", "\n")
    assert "0/6" in err and "0 of 2 runs" in err and "3/6" in err and "gdn: accuracy 0.500" in err
    assert [line for line in err.splitlines() if "failed" in line] == ["gdn, seed 1, failed: ValueError: two lines"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_when_their_parent_is_ended(fake, number):
    code = (
        "import sys, fake_training; sys.modules['recipes.compare.run'] = fake_training\n"
        "from recipes.compare.pool import train_all\n"
        "if __name__ == '__main__': list(train_all([{'label': 'gdn', 'seed': 2, 'steps': 1}], 1, '.'))"
    )
    paths = os.pathsep.join([str(fake), str(Path(__file__).parents[3])])
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": paths})
    with subprocess.Popen([sys.executable, "-c", HEARD + code], **pipe) as parent:
        assert parent.stdout.readline() == b"begun\n"
        parent.send_signal(number)
        try:  # the worker holds the same pipe, which ends only when it does
            assert parent.communicate(timeout=60)[0] == b""
        finally:
            parent.kill()
