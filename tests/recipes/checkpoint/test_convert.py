"""Sharded checkpoints, which are folders, do all that one file does, and are looked at as closely."""

import contextlib
import io
import os
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import metadata

from lit_modules.sharded import _Index, load_whole
from lit_modules.strategies import put_in_place
from mixers.registry import SpecError
from recipes.__main__ import main
from recipes.checkpoint.opening import open_checkpoint

CHECKPOINTS = "runs/ham-text-1/checkpoints"


@pytest.fixture(scope="module")
def sharded(trained, tmp_path_factory):
    """The checkpoint of the third of six steps, as a folder."""
    path = tmp_path_factory.mktemp("sharded") / "parts.ckpt"
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()) as said:
        warnings.simplefilter("ignore", DeprecationWarning)
        assert main(f"convert --ckpt_path {trained / CHECKPOINTS}/all-step=3.ckpt --out {path}".split()) == 0
    assert said.getvalue() == ""
    return path


@pytest.fixture
def converted(sharded, here):
    """A copy of it, in the working directory."""
    return shutil.copytree(sharded, here / "parts.ckpt")


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_a_checkpoint_goes_to_shards_and_back(trained, converted, run):
    result = run(f"convert --ckpt_path {converted} --out whole.ckpt")
    assert result.code == 0 and "sharded, written to whole.ckpt" in result.out
    first = torch.load(trained / CHECKPOINTS / "all-step=3.ckpt", weights_only=True)
    assert same(torch.load("whole.ckpt", weights_only=True), first)
    assert "exists" in run(f"convert --ckpt_path {converted} --out whole.ckpt").error


def test_one_process_goes_on_from_shards_to_the_bit(trained, converted, run):
    assert "of step 3" in run(f"fit --ckpt_path {converted}").out
    ours, theirs = (load_whole(folder / CHECKPOINTS / "last.ckpt") for folder in (Path(), trained))
    assert same(ours["state_dict"], theirs["state_dict"])
    assert same(ours["optimizer_states"], theirs["optimizer_states"])


def test_every_command_reads_shards(trained, converted, run):
    quiet = "--trainer.enable_progress_bar false"
    prompt = "--prompt a --max_new_tokens 4 --temperature 0"
    one = trained / CHECKPOINTS / "all-step=3.ckpt"
    for command in (f"test {quiet}", f"generate {prompt}", "calibrate --batches 1 --out x"):
        file, folder = (run(f"{command} --ckpt_path {path}") for path in (one, converted))
        assert folder.code == 0, folder.err
        assert folder.out.replace(str(converted), "X") == file.out.replace(str(one), "X") != ""


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def shard(folder):
    return next(folder.glob("*.distcp"))


def cut(folder):
    shard(folder).write_bytes(shard(folder).read_bytes()[:-2000])


def flip(folder):
    content = bytearray(shard(folder).read_bytes())
    content[len(content) // 2] ^= 1
    shard(folder).write_bytes(content)


HARM = {
    "a shard is gone": (lambda folder: shard(folder).unlink(), ["__0_0.distcp", "missing"]),
    "a shard was cut": (cut, ["__0_0.distcp", "damaged"]),
    "a bit has turned": (flip, ["__0_0.distcp", "damaged"]),
    "no index": (lambda folder: (folder / ".metadata").unlink(), ["no sharded checkpoint"]),
    "an index of code": (
        lambda folder: (folder / ".metadata").write_bytes(pickle.dumps(Malicious())),
        [f"{os.mkdir.__module__}.mkdir, which is no part of one"],
    ),
}


@pytest.mark.parametrize("name", HARM)
def test_a_harmed_folder_is_refused(name, converted, run):
    harm, parts = HARM[name]
    harm(converted)
    error = run(f"test --ckpt_path {converted}").error
    assert [part for part in (str(converted), *parts) if part not in error] == []
    assert not Path("ran").exists()


class Asks:
    """Pickled as Python 3.11.0 to 3.11.3 do a member of an enumeration: by a call of getattr."""

    def __init__(self, *what):
        self.what = what

    def __reduce__(self):
        return getattr, self.what


def test_a_member_of_an_enumeration_is_read_and_nothing_else_is_asked_for():
    encoding = metadata._MEM_FORMAT_ENCODING
    member = next(iter(encoding))
    assert _Index(io.BytesIO(pickle.dumps(Asks(encoding, member.name)))).load() is member
    for what in ((encoding, "__init__"), (metadata.Metadata, "__init__")):
        with pytest.raises(SpecError, match="its index asks for __init__ of"):
            _Index(io.BytesIO(pickle.dumps(Asks(*what)))).load()


def test_last_is_the_newest_folder_that_is_whole(converted, here):
    place = here / CHECKPOINTS
    place.mkdir(parents=True)
    whole, part = (Path(shutil.copytree(converted, place / f"{name}.ckpt")) for name in ("step=3", "step=4"))
    shard(part).unlink()
    os.utime(whole, (1, 1))
    assert open_checkpoint("last").path.resolve() == whole


def test_a_checkpoint_that_is_written_anew_is_there_at_every_moment(converted, here, monkeypatch):
    place = here / CHECKPOINTS
    place.mkdir(parents=True)
    path = Path(shutil.copytree(converted, place / "step=3.ckpt"))
    (place / "last.ckpt").symlink_to(path.name)
    new = Path(shutil.copytree(converted, place / "step=3.ckpt.part"))
    moved, move = [], Path.replace

    def stop(self, target):
        if moved:
            raise KeyboardInterrupt
        moved.append(self)
        return move(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", stop)
        put_in_place(new, path)
    assert moved == [path] and open_checkpoint("last").step == 3
    put_in_place(new, path)
    assert sorted(file.name for file in place.iterdir()) == ["last.ckpt", "step=3.ckpt"]
    assert open_checkpoint("last").path.name == "last.ckpt"
