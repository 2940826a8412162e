"""What is on the disk: folders of runs, the last checkpoint, damaged files, and disks that take no more."""

import errno
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from recipes.__main__ import main
from recipes.callbacks import LinkedCheckpoint
from recipes.run_folder import RunFolder


@pytest.fixture
def run_folder(trained, here):
    """A copy of the trained run, in the working directory."""
    shutil.copytree(trained / "runs", here / "runs", symlinks=True)
    return here / "runs/ham-text-1"


def test_runs_that_start_together_have_a_folder_each(tmp_path):
    folders = [RunFolder() for _ in range(32)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda folder: folder.make(tmp_path / "runs", "ham-text"), folders))
    assert len({folder.path for folder in folders}) == 32
    assert sorted(tmp_path.glob("runs/*")) == sorted(folder.path for folder in folders)


def test_a_folder_goes_with_a_run_that_left_nothing(tmp_path):
    first, second = RunFolder(), RunFolder()
    first.make(tmp_path / "runs", "a")
    second.make(tmp_path / "runs", "a")
    (second.path / "checkpoints").mkdir()
    first.drop_if_unused()
    assert [path.name for path in tmp_path.glob("runs/*")] == ["a-2"]
    (second.path / "checkpoints/last.ckpt").touch()
    second.drop_if_unused()
    assert second.path.exists()


def test_the_last_checkpoint_is_linked_before_the_old_one_goes(run, here, tiny, monkeypatch):
    seen = []

    def remove(self, trainer, filepath):
        last = Path(filepath).with_name("last.ckpt")
        seen.append((Path(filepath).name, os.readlink(last), last.exists()))
        Path(filepath).unlink()

    monkeypatch.setattr(LinkedCheckpoint, "_remove_checkpoint", remove)
    assert run(f"fit {tiny}").code == 0
    assert seen == [("step=4.ckpt", "step=6.ckpt", True)]


def test_last_is_never_an_older_run_because_a_link_broke(run, run_folder):
    """As a kill between Lightning's removal of the old checkpoint and its new link leaves it."""
    shutil.copytree(run_folder, run_folder.with_name("ham-text-2"), symlinks=True)
    folder = run_folder.with_name("ham-text-2") / "checkpoints"
    (folder / "last.ckpt").unlink()
    (folder / "last.ckpt").symlink_to("step=3.ckpt")
    for file in folder.glob("step=*"):
        file.unlink()
    (folder / "all-step=6.ckpt").write_bytes(b"PK cut while it was written")
    os.utime(folder / "all-step=4.ckpt", (2e9, 2e9))  # what is whole, next to the one that is cut
    os.utime(folder / "all-step=6.ckpt", (3e9, 3e9))
    result = run("fit --ckpt_path last")
    assert result.code == 0, result.err
    assert "resumes runs/ham-text-2/checkpoints/all-step=4.ckpt, of step 4" in result.out
    error = run("test --ckpt_path runs/ham-text-2/checkpoints/last.ckpt").error
    assert "a link into nowhere" in error and "all-step=4.ckpt" in error


@pytest.mark.parametrize("command", ["test", "generate --prompt a --max_new_tokens 1"])
def test_what_is_taken_for_the_last_is_said(run, run_folder, command):
    result = run(f"{command} --ckpt_path last")
    assert "runs/ham-text-1/checkpoints/last.ckpt" in result.out.partition("writes to")[0] + result.err


def test_a_run_that_goes_on_keeps_its_name(run, run_folder):
    """So that `last` of that mixer finds it."""
    run_folder.rename(run_folder.with_name("ham_paper-text-1"))
    result = run("fit --ckpt_path last --steps 7")
    assert result.code == 0 and "writes to runs/ham_paper-text-2" in result.out, result.err
    assert "resumes runs/ham_paper-text-1/checkpoints/last.ckpt" in result.out.partition("writes to")[0]
    assert "runs/ham_paper-text-2/checkpoints/last.ckpt" in run("test --ckpt_path last --mixer ham_paper").out
    assert "no run runs/ham-*" in run("test --ckpt_path last --mixer ham").error


def test_a_checkpoint_is_of_the_mixer_that_is_named_with_its_options(run, run_folder):
    for command in ("test", "fit --steps 7"):
        line = f"{command} --ckpt_path {run_folder}/checkpoints/last.ckpt --mixer"
        error = run(f'{line} {{"name":"ham","router":"cosine"}}').error
        assert "was trained with" in error and "router" in error and "cosine" in error
    known = '{"name":"ham","router":{"name":"residual","space":"output"}}'
    assert run(f"test --ckpt_path {run_folder}/checkpoints/last.ckpt --mixer {known}").code == 0


def test_runs_without_loggers_have_folders_of_their_own(run, here, tiny):
    for mixer in ("gdn", "attention"):
        result = run(f"fit --mixer {mixer} {tiny} --trainer.logger false")
        assert result.code == 0, result.err
    assert sorted(path.parts[1] for path in Path("runs").rglob("last.ckpt")) == ["attention-text-1", "gdn-text-1"]
    assert "tests runs/attention-text-1/checkpoints/last.ckpt" in run("test --ckpt_path last").out


def test_what_was_calibrated_is_not_the_last(run, run_folder):
    """It has another usage, which training would go on with; nor does it make an older run the newest."""
    last = run_folder / "checkpoints/last.ckpt"
    shutil.copytree(run_folder, run_folder.with_name("ham-text-2"), symlinks=True)
    shutil.copy(last, last.with_name("last-calibrated.ckpt"))
    os.utime(last.with_name("last-calibrated.ckpt"), (2e9, 2e9))
    for file in (run_folder.with_name("ham-text-2") / "checkpoints").iterdir():
        os.utime(file, (1.9e9, 1.9e9))
    assert "tests runs/ham-text-2/checkpoints/last.ckpt" in run("test --ckpt_path last").out


def test_commands_to_go_on_with_can_be_pasted(run, here, tiny, capsys):
    assert main([*f"fit {tiny}".split(), "--trainer.default_root_dir", "my runs"]) == 0
    told = capsys.readouterr().out.partition("next:")[2]
    assert "--ckpt_path 'my runs/ham-text-1/checkpoints/" in told and "tensorboard --logdir 'my runs'\n" in told


DAMAGES = {
    "zeros": lambda data: data[: len(data) // 2] + bytes(4096) + data[len(data) // 2 + 4096 :],
    "a bit": lambda data: data[:30_000] + bytes([data[30_000] ^ 1]) + data[30_001:],
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "text": lambda data: b"some text",
}  # fmt: skip
COMMANDS = [
    "fit --steps 9 --ckpt_path",
    "test --ckpt_path",
    "generate --prompt a --ckpt_path",
    "calibrate --ckpt_path",
    "export --out new --ckpt_path",
    "sweep --out new --ckpt_paths",
    "figures --out new.png --ckpt_path",
    "lm_eval --tasks none --ckpt_path",
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused(run, checkpoint, here, damage):
    (here / "bad.ckpt").write_bytes(DAMAGES[damage](checkpoint.read_bytes()))
    for command in COMMANDS if damage == "zeros" else COMMANDS[2:3]:
        path = "[bad.ckpt]" if "paths" in command else "bad.ckpt"
        error = run(f"{command} {path}").error
        assert "bad.ckpt" in error and "damaged" in error, command
    assert [path.name for path in here.iterdir()] == ["bad.ckpt"]


def full(*args, **kwargs):
    """A disk with room for a few bytes."""
    for path in args:
        if isinstance(path, Path):
            path.write_bytes(b"some")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_nothing_half_written(run, checkpoint, here, texts, monkeypatch):
    (here / "old.ckpt").write_bytes(checkpoint.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        line = f"calibrate --ckpt_path {checkpoint} --text [{texts}] --batches 1 --out old.ckpt"
        assert "old.ckpt cannot be written: No space left on device" in run(line).error
        error = run(f"predict --ckpt_path {checkpoint} --out new.pt --trainer.limit_predict_batches 1").error
        assert "new.pt cannot be written: No space left on device" in error
    from mixers import hf

    with monkeypatch.context() as patch:
        patch.setattr(hf.MixerForCausalLM, "save_pretrained", lambda self, to: (to.mkdir(), full(to / "config.json")))
        assert "new cannot be written: No space left" in run(f"export --ckpt_path {checkpoint} --out new").error
    assert (here / "old.ckpt").read_bytes() == checkpoint.read_bytes()
    assert [path.name for path in here.iterdir()] == ["old.ckpt"]
    assert run(f"export --ckpt_path {checkpoint} --out new").code == 0
    assert not [*here.glob("*.part")]


@pytest.mark.parametrize(
    "line",
    [
        "export --out file/new",
        "calibrate --text [TEXTS] --batches 1 --out file/new.ckpt",
        "predict --trainer.limit_predict_batches 1 --out file/new.pt",
        "figures --tokens 8 --out file/new.png",
        "fit --steps 9 --trainer.default_root_dir file",
    ],
)
def test_a_folder_that_is_a_file(run, checkpoint, here, texts, line):
    (here / "file").touch()
    error = run(f"{line} --ckpt_path {checkpoint}".replace("TEXTS", str(texts))).error
    assert "file" in error and ("Not a directory" in error or "File exists" in error)
    assert [path.name for path in here.iterdir()] == ["file"]


def test_predictions_are_written_and_found(run, run_folder):
    line = "predict --ckpt_path last --trainer.limit_predict_batches 2"
    result = run(line)
    assert result.code == 0 and "runs/ham-text-1/predictions.pt" in result.out
    batches = torch.load(run_folder / "predictions.pt", weights_only=True)
    assert len(batches) == 2 and all(batch.dtype == torch.int64 for batch in batches)
    assert run(f"{line} --out deep/mine.pt").code == 0
    assert torch.equal(torch.load("deep/mine.pt", weights_only=True)[0], batches[0])
    assert "takes no --out" in run("test --ckpt_path last --out x").error
