"""The script for Slurm, as the documentation prints it, and torchrun: stopped by SIGTERM, and gone on with."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = re.search(r"^## Slurm\n\n```sh\n(.*?)```", (ROOT / "docs/scale.md").read_text(), re.M | re.S)[1]
SRUN = f"""#!{sys.executable}
# Stands in for Slurm's: two tasks on one node; SIGTERM goes to them and to all that they started; the highest code.
import os, signal, subprocess, sys
words = [word for word in sys.argv[1:] if word not in ("--kill-on-bad-exit=1", "--cpus-per-task=8")]
slurm = {{"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0"}}
slurm["SLURM_NODELIST"] = "127.0.0.1"
tasks = []
def stop(*_):
    for task in tasks:
        os.killpg(task.pid, signal.SIGTERM)
signal.signal(signal.SIGTERM, stop)
for rank in "01":
    own = {{"SLURM_PROCID": rank, "SLURM_LOCALID": rank}}
    tasks.append(subprocess.Popen(words, env=os.environ | slurm | own, start_new_session=True))
open("launcher", "w").write(str(os.getpid()))
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""


@pytest.fixture
def cluster(here):
    """cluster(srun) -> environment of a job for which this srun, and a scontrol that takes notes, are on the PATH."""

    def make(srun):
        commands = here / "bin"
        commands.mkdir(exist_ok=True)
        for name, text in (("srun", srun), ("scontrol", '#!/bin/sh\necho "$@" >> asked\n')):
            (commands / name).write_text(text)
            (commands / name).chmod(0o755)
        path = f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        return environment() | {"PATH": path, "SLURM_JOB_ID": "4242"}

    return make


def environment():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_PORT": port}


def test_bash_can_read_the_script():
    subprocess.run(["bash", "-n"], input=SCRIPT, text=True, check=True)


@pytest.mark.parametrize(
    ("code", "saves", "again"), [(143, True, True), (143, False, False), (2, True, False), (0, True, False)]
)
def test_a_job_is_queued_again_if_it_was_stopped_and_has_got_further(cluster, here, code, saves, again):
    save = "mkdir -p runs/ham-tokens-$$/checkpoints; touch runs/ham-tokens-$$/checkpoints/last.ckpt\n" * saves
    job = cluster(f'#!/bin/sh\necho "$@" >> started\n{save}exit {code}\n')
    for _ in range(2):
        assert subprocess.run(["bash", "-c", SCRIPT], env=job).returncode == code
    first, second = (here / "started").read_text().splitlines()
    assert "--ckpt_path" not in first
    assert bool(re.search(r"--ckpt_path runs/ham-tokens-\d+/checkpoints/last.ckpt$", second)) == saves
    asked = (here / "asked").read_text().splitlines() if (here / "asked").exists() else []
    assert asked == ["requeue 4242"] * (2 * again)


def small(line):
    """The words of a tiny run on tokens, by two workers of each process, without their `fit`."""
    more = "--num_heads 2 --head_dim 8 --steps 20 --trainer.val_check_interval 8 --trainer.accelerator cpu"
    return shlex.join([*line("workers").split()[1:], *more.split()])


def stopped_and_gone_on_with(here, start):
    """Stops a run by SIGTERM to its launcher once it has saved a checkpoint, and starts it again, to its end."""
    last = here / "runs/ham-tokens-1/checkpoints/last.ckpt"
    process = start(None)
    while process.poll() is None and not last.exists():
        time.sleep(0.02)
    if process.poll() is None:
        launcher = here / "launcher"
        os.kill(int(launcher.read_text()) if launcher.exists() else process.pid, signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert "stopped; go on with" in said, said
    again = start(last)
    ended = again.communicate(timeout=240)[0]
    assert again.returncode == 0 and f"resumes {last.relative_to(here)}" in ended, ended
    assert "validation after 20 steps" in ended
    return process.returncode


@pytest.mark.slow
def test_the_script_goes_on_after_the_end_of_its_time(cluster, here, line_of):
    whole, job = "--nodes 2 --devices 8", cluster(SRUN)
    assert whole in SCRIPT
    script = SCRIPT.replace(whole, f"--nodes 1 --devices 2 {small(line_of)}")

    def start(checkpoint):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(["bash", "-c", script], env=job, **pipes)

    assert stopped_and_gone_on_with(here, start) == 143
    assert (here / "asked").read_text() == "requeue 4242\n"


@pytest.mark.slow
def test_a_run_of_torchrun_is_stopped_and_gone_on_with(here, line_of):
    def start(checkpoint):
        env = environment()
        words = f"-m torch.distributed.run --nproc_per_node 2 --master_port {env['MASTER_PORT']} -m recipes fit"
        words += f" --recipe ham_800m --devices 2 --strategy fsdp2 {small(line_of)}"
        words += f" --ckpt_path {checkpoint.relative_to(here)}" if checkpoint else ""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen([sys.executable, *shlex.split(words)], env=env, **pipes)

    assert stopped_and_gone_on_with(here, start) != 0
