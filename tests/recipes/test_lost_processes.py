"""A process that is signalled or killed ends the others; one whose gradient is NaN makes all skip the step."""

import csv
import signal
from functools import partial

import pytest
import torch

from lit_modules.language_model import LanguageModel
from tests.recipes.processes import arm, run

slow = pytest.mark.slow


def saved(folder):
    return torch.load(folder / "runs/ham-text-1/checkpoints/last.ckpt", weights_only=True)


@pytest.mark.parametrize(
    ("signum", "to"),
    [
        (signal.SIGKILL, 0),
        pytest.param(signal.SIGTERM, 1, marks=slow),
        pytest.param(signal.SIGTERM, 0, marks=slow),
        pytest.param(signal.SIGUSR1, 0, marks=slow),
        pytest.param(signal.SIGUSR1, 1, marks=slow),
        pytest.param(signal.SIGKILL, 1, marks=slow),
    ],
)
def test_one_process_ends_the_other(here, tiny, signum, to):
    line = f"fit {tiny} --model.depth 1 --trainer.val_check_interval 2"
    blow = partial(arm, to=to, place="training", step=3, signum=signum, after=1000)
    codes, said = run(line, here, processes=2, change=blow)
    if signum == signal.SIGKILL:
        assert codes == [2 - 11 * (rank == to) for rank in (0, 1)], said
        assert len(said[1 - to].splitlines()) == 1 + to and "has lost another" in said[1 - to]
        assert saved(here)["global_step"] == 2
    else:
        assert codes == [128 + (signum if rank == to else signal.SIGTERM) for rank in (0, 1)], said
        assert "stopped; go on with" in said[0] and said[1] == ""
        assert saved(here)["global_step"] == 4
    codes, said = run("fit --ckpt_path last", here, processes=2)
    assert codes == [0, 0] and "validation after 6 steps" in said[0], said


def poison(rank):
    """NaN in the loss of the second process, in the third step."""
    if rank != 1:
        return
    step = LanguageModel.training_step

    def poisoned(self, *args):
        out = step(self, *args)
        return out | {"loss": out["loss"] * (torch.nan if self.trainer.global_step == 2 else 1)}

    LanguageModel.training_step = poisoned


@pytest.mark.parametrize(
    "strategy", ["fsdp2 --trainer.strategy.save_distributed_checkpoint false", pytest.param("ddp", marks=slow)]
)
def test_all_skip_the_step_that_one_cannot_make(here, tiny, strategy):
    line = f"fit {tiny} --model.depth 1 --steps 4 --on_nonfinite skip --trainer.log_every_n_steps 1"
    codes, said = run(f"{line} --strategy {strategy}", here, processes=2, change=poison)
    assert codes == [0, 0], said
    assert "step 3 is skipped: its gradient is not finite (1 skipped so far)" in said[0]
    found = saved(here)
    assert found["global_step"] == 4 and found["callbacks"]["OnNonFinite"] == {"skipped": 1, "in_a_row": 0}
    assert {int(moments["step"]) for moments in found["optimizer_states"][0]["state"].values()} == {3}
    rows = list(csv.DictReader((here / "runs/ham-text-1/metrics.csv").open()))
    assert [float(row["trainer/skipped_steps"]) for row in rows if row["trainer/skipped_steps"]] == [0, 0, 1, 1]
