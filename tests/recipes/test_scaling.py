"""More processes change how a model is trained, not what it learns."""

from pathlib import Path

import pytest
import torch

from tests.recipes import processes

ROOT = Path(__file__).parents[2]
DATA = f"--plugin {Path(__file__).with_name('total_batch.py')} --data total_batch.TotalBatch --mixer ham --kv_usage 0.5"
RUN = "--trainer.enable_progress_bar false --logger csv"
ALLOCATED = '--budget {"name":"any","zero":0,"one":1}'  # draws no random numbers: those of one process are others
RECORD = "--trainer.callbacks+=total_batch.Record --trainer.callbacks.name"


def elsewhere(line, count=1):
    """The command in processes of its own."""
    codes, said = processes.run(line, Path.cwd(), processes=count, within=1800)
    assert codes == [0] * count, said
    return "".join(said)


def records(name, processes=1):
    return [torch.load(f"{name}-{rank}.pt") for rank in range(processes)]


def assert_same(found, expected):
    for name in ("losses", "usage", "validation"):
        assert found[name] == pytest.approx(expected[name], rel=0, abs=1e-5), name
    for name in ("tables", "head_bias"):
        for x, y in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("strategy", "steps", "budget"),
    [
        ("fsdp2", 3, ""),
        pytest.param("ddp", 3, "", marks=pytest.mark.slow),
        pytest.param("ddp", 20, "", marks=pytest.mark.slow),
        pytest.param("fsdp2", 20, "", marks=pytest.mark.slow),
        pytest.param("ddp", 3, ALLOCATED, marks=pytest.mark.slow),
        pytest.param("fsdp2", 3, ALLOCATED, marks=pytest.mark.slow),
    ],
)
def test_two_processes_do_as_one(strategy, steps, budget, run, here):
    """In losses, thresholds, allocation, usage and validation; and either goes on from the other's checkpoint."""
    precision = {"ddp": "64-true", "fsdp2": "32-true"}[strategy]  # Lightning's FSDP2 has no float64
    fit = f"fit {DATA} {RUN} --precision {precision} --steps {steps} {budget}"
    assert run(f"{fit} {RECORD}=one").code == 0
    out = elsewhere(f"{fit} {RECORD}=two --strategy {strategy}", 2)
    assert out.count(f"validation after {steps} steps") == 1
    (one,), two = records("one"), records("two", 2)
    assert one["allocated"] == bool(budget) and len(one["losses"]) == steps
    for found in two:
        assert_same(found, one)
        assert found["losses"] == two[0]["losses"] and found["usage"] == two[0]["usage"]
        assert all(map(torch.equal, found["tables"], two[0]["tables"]))

    first, second = (f"runs/ham-totalbatch-{number}/checkpoints/last.ckpt" for number in (1, 2))
    more = f"--plugin {ROOT}/tests/recipes/total_batch.py --steps {steps + 2} --trainer.callbacks+=total_batch.Record"
    for name, path in (("first", first), ("second", second)):
        result = run(f"fit {more} --trainer.callbacks.name={name} --strategy auto --devices 1 --ckpt_path {path}")
        assert result.code == 0, result.err
    alone = f"--trainer.accelerator cpu --devices 1 --strategy {strategy} --ckpt_path {first}"
    elsewhere(f"fit {more} --trainer.callbacks.name=third {alone}")
    (expected,) = records("first")
    assert len(expected["losses"]) == 2
    for name in ("second", "third"):
        assert_same(records(name)[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_accumulate_what_one_sees_at_once(strategy, run, here):
    precision = {"ddp": "64-true", "fsdp2": "32-true"}[strategy]
    fit = f"fit {DATA} {RUN} --precision {precision} --steps 6"
    assert run(f"{fit} {RECORD}=one").code == 0
    elsewhere(f"{fit} {RECORD}=two --strategy {strategy} --accumulate 2 --data.parts 2", 2)
    (one,), two = records("one"), records("two", 2)
    assert one["learned"][0].any()
    for found in two:
        assert len(found["losses"]) == 6 and found["losses"] == pytest.approx(one["losses"], rel=0, abs=1e-5)
        for x, y in zip(found["learned"], one["learned"], strict=True):  # before they are calibrated on fewer sequences
            torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
