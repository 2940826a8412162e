"""Killed at any moment, without a last word, a run is gone on with and ends with the same weights to the bit."""

import random
import signal
from functools import partial

import pytest
import torch

from lit_modules.sharded import load_whole
from tests.recipes.processes import PLACES, arm, run

CASES = [(task, processes, "") for task in ("mqar", "text", "tokens", "workers") for processes in (1, 2)]
SHARDED = [(task, 2, "--strategy fsdp2 --keep 2") for task in ("text", "tokens")]
RANDOM = [*zip(range(24), CASES * 3, strict=True), *zip(range(24, 30), SHARDED * 3, strict=True)]


@pytest.fixture(scope="module")
def whole(line_of, tmp_path_factory):
    """(task, processes, flags) -> what a run ends with that nothing happens to."""
    found = {}

    def make(*case):
        if case not in found:
            task, processes, flags = case
            folder = tmp_path_factory.mktemp("whole")
            codes, said = run(f"{line_of(task)} {flags}", folder, processes=processes)
            assert codes == [0] * processes, said
            found[case] = end_of(folder)
        return found[case]

    return make


def end_of(folder):
    """Weights, moments and schedule of the newest run."""
    newest = max((folder / "runs").iterdir(), key=lambda run: int(run.name.rpartition("-")[2]))
    saved = load_whole(newest / "checkpoints/last.ckpt")
    assert saved["global_step"] == 6 and saved["callbacks"]["ValidateAtEnd"]["done"]
    return torch.utils._pytree.tree_leaves([saved[key] for key in ("state_dict", "optimizer_states", "lr_schedulers")])


def kill_and_go_on(folder, line, expected, processes, **blow):
    codes, said = run(line, folder, processes=processes, change=partial(arm, signum=signal.SIGKILL, **blow))
    assert codes[blow["to"]] == -signal.SIGKILL and {*codes} <= {2, -signal.SIGKILL}, (codes, said)
    codes, said = run("fit --ckpt_path last", folder, processes=processes)
    if "has a last checkpoint" in said[0]:  # it was killed before there was one
        codes, said = run(line, folder, processes=processes)
    assert codes == [0] * processes, said
    found = end_of(folder)
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


@pytest.mark.parametrize(
    ("case", "to", "after"),
    [
        (("text", 1, ""), 0, 3000),
        *[
            pytest.param(SHARDED[0], to, after, marks=pytest.mark.slow)
            for to, after in [(0, 600_000), (0, 700_000), (0, 733_600), (1, 600_000), (1, 700_000)]
        ],  # what a process writes itself comes after 570,000 calls; to put it in place, from 733,500 on
    ],
)
def test_a_kill_while_a_checkpoint_is_written(here, line_of, whole, case, to, after):
    task, processes, flags = case
    blow = {"to": to, "place": "checkpointing", "step": 4, "after": after}
    kill_and_go_on(here, f"{line_of(task)} {flags}", whole(*case), processes, **blow)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "case"), RANDOM)
def test_a_kill_at_a_random_moment(here, line_of, whole, seed, case):
    task, processes, flags = case
    rng = random.Random(seed)
    blow = {"place": rng.choice([*PLACES]), "step": rng.randrange(6), "after": int(10 ** rng.uniform(0, 4))}
    blow["to"] = rng.randrange(processes)
    print(*case, blow)
    kill_and_go_on(here, f"{line_of(task)} {flags}", whole(*case), processes, **blow)
