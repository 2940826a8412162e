"""A process of which nothing is heard any more ends the others; one that is at something long does not."""

import signal
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest
from torch.distributed import PrefixStore, TCPStore

import recipes.watchdog
from lit_modules.run_stats import RunStats
from recipes.callbacks import WholeFiles
from recipes.watchdog import Watchdog
from tests.recipes.processes import arm, run

TRAINER = SimpleNamespace(
    global_rank=1,
    world_size=3,
    strategy=SimpleNamespace(reduce_boolean_decision=bool, barrier=lambda: None),
)


@pytest.fixture
def impatient(monkeypatch):
    """A watchdog of process 1 of 3, whose limit is short, and the codes that it ends its process with."""
    codes = []
    monkeypatch.setattr(recipes.watchdog, "LIMIT", 1.0)
    monkeypatch.setattr(recipes.watchdog, "EVERY", 0.05)
    monkeypatch.setattr(recipes.watchdog.os, "_exit", codes.append)
    dog = Watchdog(lambda: "go on")
    yield dog, codes
    dog.on_exception()


@pytest.fixture
def store(monkeypatch):
    """What the processes found each other through."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    return PrefixStore("watchdog", server)


def wait_until(condition, within=20):
    end = time.monotonic() + within
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def test_the_process_that_falls_silent_is_named(impatient, store, capsys, monkeypatch):
    dog, codes = impatient
    alive, over = {0, 2}, threading.Event()

    def others():
        beats = 0
        while not over.wait(0.05):
            beats += 1
            for rank in [*alive]:
                store.set(str(rank), str(beats))

    for rank in alive:
        store.set(str(rank), "0")
    threading.Thread(target=others, daemon=True).start()
    dog.setup(TRAINER, None, "fit")
    time.sleep(2)
    assert codes == [] and int(store.get("1")) > 0
    alive.clear()  # all are stopped, this process, too, and the clock goes on
    monkeypatch.setattr(recipes.watchdog, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + 1000))
    time.sleep(0.15)
    alive.update({0, 2})
    time.sleep(0.5)
    assert codes == []
    alive.remove(2)
    assert wait_until(lambda: codes == [2])
    over.set()
    said = capsys.readouterr().err
    assert said.startswith("error: process 1 has heard nothing of process 2 for 1 s: ") and said.endswith("; go on\n")


@pytest.mark.parametrize("how", ["silent", "closed"])
def test_a_store_that_does_not_answer_is_the_silence_of_its_process(impatient, monkeypatch, capsys, how):
    """torch's own limit of time is not kept by a store whose process is stopped."""
    dog, codes = impatient
    blocked = threading.Event()

    def answer(names):
        if how == "closed":
            raise RuntimeError("Connection reset by peer")
        blocked.wait()
        return [b""] * len(names)

    store = SimpleNamespace(set=lambda *_: None, multi_get=answer)
    monkeypatch.setattr(recipes.watchdog, "_store", lambda: store)
    dog.setup(TRAINER, None, "fit")
    assert wait_until(lambda: codes == [2])
    assert "has heard nothing of process 0 for 1 s" in capsys.readouterr().err
    dog.on_exception()
    blocked.set()


def test_after_the_end_nothing_is_waited_for(impatient, store):
    dog, codes = impatient
    for rank in (0, 2):
        store.set(str(rank), "0")
    for one, end in ((dog, "teardown"), (Watchdog(lambda: "go on"), "on_exception")):
        one.setup(TRAINER, None, "fit")
        getattr(one, end)(TRAINER, None, "fit")
    time.sleep(1.5)
    assert codes == []


def test_without_a_store_the_run_goes_on(impatient, monkeypatch):
    dog, codes = impatient
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.warns(UserWarning, match="do not watch each other"):
        dog.setup(TRAINER, None, "fit")
    dog.teardown(TRAINER, None, "fit")
    assert codes == [] and dog.over is None


def short(limit):
    recipes.watchdog.LIMIT, recipes.watchdog.EVERY = limit, 0.5


def stop(rank, *, to):
    short(3)
    arm(rank, to=to, place="training", step=3, signum=signal.SIGSTOP, after=1000)


def long_work(rank):
    """The second process takes long for its first validation, and the first to write what comes of it."""
    short(3)
    owner, name = [(WholeFiles, "save_checkpoint"), (RunStats, "on_validation_start")][rank]
    before = getattr(owner, name)

    def slow(*args, **kwargs):
        setattr(owner, name, before)
        time.sleep(7)
        return before(*args, **kwargs)

    setattr(owner, name, slow)


@pytest.mark.slow
@pytest.mark.parametrize("to", [0, 1])
def test_a_process_that_is_stopped_ends_the_other(here, tiny, to):
    line = f"fit {tiny} --model.depth 1 --trainer.val_check_interval 2"
    codes, said = run(line, here, processes=2, change=partial(stop, to=to), rest=2)
    assert codes[1 - to] == 2 and codes[to] == -signal.SIGKILL, said
    last = said[1 - to].splitlines()[-1]
    assert last.startswith(f"error: process {1 - to} has heard nothing of process {to} for 3 s")
    assert last.endswith("fit --ckpt_path runs/ham-text-1/checkpoints/last.ckpt"), said
    codes, said = run("fit --ckpt_path last", here, processes=2)
    assert codes == [0, 0] and "validation after 6 steps" in said[0], said


@pytest.mark.slow
def test_what_takes_long_is_waited_for(here, tiny):
    line = f"fit {tiny} --model.depth 1 --trainer.val_check_interval 2"
    codes, said = run(line, here, processes=2, change=long_work)
    assert codes == [0, 0] and "heard nothing" not in "".join(said), said
