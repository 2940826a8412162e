"""Opening a checkpoint: which file is meant, whether it is whole, and what it says."""

import zipfile
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from lightning.pytorch import LightningModule

from lit_modules.base import SequenceModule
from lit_modules.finite import not_finite
from lit_modules.sharded import meta_file, weights_in
from mixers.registry import SpecError
from recipes.checkpoint.saved import PROCESSES, RECIPE, WANDB, Saved
from recipes.messages import one_line
from recipes.trust import check_options, trusted

RUNS = "runs"  # of base.yaml
CALIBRATED = "-calibrated"  # how the names of what `calibrate` writes end
INSTANTIATORS = (None, "lightning.pytorch.cli.instantiate_module", "pytorch_lightning.cli.instantiate_module")


def open_checkpoint(path: str, *, root: str | Path = RUNS, name: str = "*") -> Saved:
    """What `--ckpt_path` leads to: every command opens a checkpoint with this, one file or sharded.

    Its parts have the checksums that were saved, its weights are finite, and nothing that it names is imported but what
    :mod:`recipes.trust` lets pass. No model is built yet: that is `Saved.load`.

    Args:
        path: a file, or the folder of a sharded checkpoint; "last" is the newest last.ckpt of the runs that match.
        root: folder of runs, for "last".
        name: pattern of the names of runs, such as "ham-*-*", for "last".

    Raises:
        SpecError: there is none, it is damaged or no checkpoint, of a run that diverged, or it names a class of the
            model that is not trusted.
    """
    found = _find(path, Path(root), name)
    _check_archive(meta_file(found))
    try:
        checkpoint = torch.load(meta_file(found), map_location="cpu", weights_only=True, mmap=True)
        hparams = dict(checkpoint["hyper_parameters"])
        recipe, step = dict(checkpoint.get(RECIPE, {})), int(checkpoint.get("global_step", 0))
        well_formed = all(isinstance(recipe.get(key, {}), dict) for key in ("data", "trainer"))
    except Exception as error:  # torch.load and pickle raise whatever the bytes make them
        raise SpecError(f"{found} is no checkpoint with plain hyper-parameters ({type(error).__name__})") from error
    if not well_formed or {"hparams", "module_arguments"} & {*checkpoint}:
        raise SpecError(f"{found} holds no recipe or hyper-parameters of a known kind: they are malformed")
    if (instantiator := hparams.pop("_instantiator", None)) not in INSTANTIATORS:
        raise SpecError(f"{found} asks for {instantiator!r} to build it, which is not Lightning's")
    model_class = hparams.pop("_class_path", None)
    cls = trusted(model_class, LightningModule, file=found) if model_class else SequenceModule
    check_options(hparams, cls, file=found)
    check_finite(weights_in(found) if found.is_dir() else checkpoint.get("state_dict", {}).items(), found)
    finished = checkpoint.get("callbacks", {}).get("ValidateAtEnd", {}).get("done", True)
    return Saved(
        path=found,
        model_class=model_class,
        hparams=hparams,
        recipe=recipe,
        step=step,
        finished=finished,
        processes=checkpoint.get(PROCESSES),
        wandb=checkpoint.get(WANDB),
    )


def _find(path: str, root: Path, name: str) -> Path:
    """The file or folder of `--ckpt_path`. Raises SpecError if there is none."""
    if path == "last":
        folders = [folder for folder in root.glob(f"{name}/checkpoints") if _own(folder)]
        for folder in sorted(folders, key=_newest, reverse=True):
            if found := _last(folder):
                return found
        raise SpecError(f"--ckpt_path last: no run {root / name} has a last checkpoint")
    if not Path(path).exists():
        beside = _last(Path(path).parent) if Path(path).is_symlink() else None
        cut = f" but a link into nowhere; beside it is {beside}" if beside else ""
        raise SpecError(f"--ckpt_path {path}: no such checkpoint{cut}")
    return Path(path)


def _newest(folder: Path) -> float:
    """When anything was written into a folder of checkpoints: links count, even if they lead nowhere."""
    return max(file.lstat().st_mtime for file in _own(folder))


def _own(folder: Path) -> list[Path]:
    """What the run itself saved: what `calibrate` wrote beside it has another usage, and is asked for by its name."""
    return [file for file in folder.glob("*.ckpt") if not file.stem.endswith(CALIBRATED)]


def _last(folder: Path) -> Path | None:
    """The last checkpoint of a run.

    One that was cut while it saved may have left a link into nowhere: then the newest file that is whole.
    """
    links = [file for file in _own(folder) if file.name.startswith("last") and file.exists()]
    if links:
        return max(links, key=lambda file: file.stat().st_mtime)
    files = [file for file in _own(folder) if file.exists()]
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        with suppress(SpecError):
            _check_archive(meta_file(file))
            if file.is_dir():
                deque(weights_in(file), maxlen=0)
            return file
    return None


def check_finite(weights: Iterable[tuple[str, torch.Tensor]], path: Path) -> None:
    """Raises SpecError for weights that are NaN or inf."""
    if bad := not_finite(weights):
        raise SpecError(f"{path} is of a run that diverged: {bad} is not finite")


def _check_archive(file: Path) -> None:
    """Raises SpecError unless every part of a torch archive has the checksum that was saved; torch does not look."""
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile raises whatever the bytes make it
        raise SpecError(f"{file} is no checkpoint, or a damaged one ({one_line(str(error))})") from error
    if damaged:
        raise SpecError(f"{file} is damaged: {damaged} does not have the checksum that was saved with it")
