"""What arrives at Weights & Biases, without its servers: the file that a run leaves to be sent when it is offline."""

import struct
import time

import pytest

wandb = pytest.importorskip("wandb", reason="not among the test extra: it is large, and needs an account")

BLOCK = 2**15
EVERY_STEP = "--trainer.log_every_n_steps 1 --trainer.val_check_interval 2 --logger wandb"


def messages(raw):
    """The contents of a log in LevelDB's format, which offline files are in, as far as it is written."""
    at, whole = 7, b""
    while at + 7 <= len(raw):
        if BLOCK - at % BLOCK < 7:  # no room for a header: the rest of the block is empty
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", raw, at)
        at += 7 + length
        if at > len(raw):
            return
        whole += raw[at - length : at]
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def records(folder, within=60):
    """What an offline run has written, up to its end, which comes some time after `wandb.finish`."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    for _ in range(10 * within):
        found = [Record.FromString(message) for message in messages(file.read_bytes())]
        if any(record.HasField("exit") for record in found):
            return found
        time.sleep(0.1)
    raise AssertionError(f"{file} has no end")


def sent(folder):
    """Of an offline run: its id at W&B, the keys that were logged, and those of its configuration."""
    ids, logged, config = set(), set(), set()
    for record in records(folder):
        ids |= {record.run.run_id} - {""}
        logged |= {item.key or item.nested_key[0] for item in record.history.item}
        config |= {item.key or item.nested_key[0] for item in record.config.update}
    (run_id,) = ids
    return run_id, logged, config


@pytest.mark.slow
def test_a_run_that_goes_on_is_one_run_there(run, here, tiny, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    found = []
    for line in (f"fit {tiny} {EVERY_STEP} --steps 4", "fit --ckpt_path last --steps 6"):
        assert run(line).code == 0
        wandb.finish()  # as a process does that ends
        found.append(sent(here / f"runs/ham-text-{len(found) + 1}"))
    (first, logged, config), (second, more, _) = found
    assert first == second and logged == more
    numbers = ("train/loss", "train/kv_usage", "val/loss", "val/kv_usage/layer1", "trainer/tokens", "trainer/teraflops")
    routing = ("kv_usage", "layer1/head0/kv_usage", "layer0/score_middle", "sequence")
    assert {*numbers, *(f"val_routing/{name}" for name in routing), "sample", "trainer/global_step"} <= logged
    assert {"mixer", "dim", "learning_rate"} <= config
