"""What a checkpoint says about the run that wrote it.

LightningCLI 2.6 takes a checkpoint's hyper-parameters after the flags, so that a flag that contradicts them is ignored
without a word, and with `--ckpt_path last` and nothing to resume it starts anew. Here the hyper-parameters come before
the flags; then KV usage may be changed, and any other difference is an error, for the weights were learned with it.
"""

import json
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from lit_modules.base import SequenceModule, with_options
from lit_modules.finite import not_finite
from mixers.registry import MIXERS, ROUTERS, THRESHOLDS, Registry, SpecError, parse_spec
from recipes.messages import one_line
from recipes.trust import check_options, trusted

RECIPE = "recipe"  # the key of a checkpoint that holds the run's whole configuration
PROCESSES = "processes"  # that of how many wrote it together
LINKED = ("vocab_size", "num_classes")  # of the data; compared when the data is there
FREE = ("kv_usage", "compile", "activation_checkpointing", *LINKED)
OF_TRAINING = (
    "max_steps",
    "max_epochs",
    "precision",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "accumulate_grad_batches",
    "limit_train_batches",
    "strategy",
)
INSTANTIATORS = (None, "lightning.pytorch.cli.instantiate_module", "pytorch_lightning.cli.instantiate_module")


def find(path: str, *, root: Path, name: str) -> Path:
    """The file or folder of `--ckpt_path`.

    Args:
        path: as given; "last" is the newest last.ckpt of the runs whose name matches.
        root: folder of runs.
        name: pattern of the names of runs, such as "ham-*-*".

    Raises:
        SpecError: there is none.
    """
    if path == "last":
        folders = [folder for folder in root.glob(f"{name}/checkpoints") if any(folder.glob("*.ckpt"))]
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
    return max(file.lstat().st_mtime for file in folder.glob("*.ckpt"))


def _last(folder: Path) -> Path | None:
    """The last checkpoint of a run. One that was cut while it saved may have left a link into nowhere: then the newest
    file that is whole."""
    links = [file for file in folder.glob("last*.ckpt") if file.exists()]
    if links:
        return max(links, key=lambda file: file.stat().st_mtime)
    files = [file for file in folder.glob("*.ckpt") if file.exists()]
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        with suppress(SpecError):
            _check_archive(_plain_file(file))
            return file
    return None


def _plain_file(path: Path) -> Path:
    """The file of a checkpoint with its plain data: of a sharded one, its meta file."""
    return path / "meta.pt" if path.is_dir() else path


@dataclass
class Saved:
    """The plain data in a checkpoint: hyper-parameters of the model, and the recipe if the command line wrote it."""

    path: Path
    model_class: str | None
    hparams: dict[str, Any]
    recipe: dict[str, Any]
    step: int
    finished: bool
    """Whether nothing was left to do after `step`, if that was to be the last one."""
    processes: int | None

    @property
    def folder(self) -> Path:
        """Of the run, or of the file where it lies alone."""
        parent = self.path.parent
        return parent.parent if parent.name == "checkpoints" else parent

    @property
    def data(self) -> str | None:
        """Class path of the data module, where it is known."""
        return self.recipe.get("data", {}).get("class_path")

    def data_options(self) -> dict[str, Any]:
        """Of the data module. Raises SpecError if its class or one that an option names is not trusted."""
        part = self.recipe["data"]
        cls = trusted(part["class_path"], LightningDataModule, file=self.path)
        options = part.get("init_args") or {}
        check_options(options, cls, file=self.path)
        check_options(part.get("dict_kwargs") or {}, cls, file=self.path)
        return options

    def build_data(self) -> LightningDataModule:
        """The data module that the run was trained on. Raises SpecError as `data_options` does, or for bad options."""
        if not self.data:
            raise SpecError(f"{self.path} does not say what it was trained on; `fit` writes checkpoints that do")
        options = self.data_options()
        return trusted(self.data, LightningDataModule, file=self.path)(**options)

    def load(self, cls: type[LightningModule] = LightningModule) -> LightningModule:
        """The model, on the CPU. Raises SpecError if it is no `cls`, or does not fit the weights.

        Args:
            cls: what is expected; it is also what is built if the checkpoint names no class.
        """
        found = trusted(self.model_class, cls, file=self.path) if self.model_class else cls
        try:
            return found.load_from_checkpoint(self.path, map_location="cpu", weights_only=True)
        except SpecError as error:
            raise SpecError(f"{self.path}: {error}") from error
        except Exception as error:  # a constructor, or torch, with whatever is in the file
            what = f"{type(error).__name__}: {one_line(str(error))}"
            raise SpecError(f"{self.path} cannot be loaded as a {found.__name__}: {what}") from error

    def config(self, command: str, *, with_data: bool) -> dict[str, Any]:
        """What to parse before the flags. Only training goes on with the same trainer. Raises SpecError for a class
        that is not trusted."""
        keys = ["seed_everything"] + ["data"] * with_data + ["trainer"] * (command == "fit")
        if "data" in keys and self.data:
            self.data_options()
        if "trainer" in keys:
            options = self.recipe.get("trainer", {})
            check_options(options, Trainer, file=self.path)
            callbacks = options.get("callbacks") or []
            for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
                if isinstance(callback, dict):
                    trusted(callback.get("class_path"), Callback, file=self.path)
        hparams = {key: value for key, value in self.hparams.items() if key not in LINKED}
        model = {"class_path": self.model_class} if self.model_class else {}
        return {key: self.recipe[key] for key in keys if key in self.recipe} | {"model": model | {"init_args": hparams}}

    def changes(self, config: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
        """What a run that goes on with this configuration does otherwise: option, value now, value before."""
        data, saved = config.get("data") or {}, self.recipe.get("data", {})
        parts = [
            (config, {"seed_everything": self.recipe.get("seed_everything")}),
            (config["trainer"], {key: self.recipe.get("trainer", {}).get(key) for key in OF_TRAINING}),
            (config["model"]["init_args"], {key: self.hparams.get(key) for key in FREE if key not in LINKED}),
        ]
        if self.data == data.get("class_path"):
            parts.append((data.get("init_args") or {}, saved.get("init_args") or {}))
        elif self.data:
            yield "data", data.get("class_path"), self.data
        for now, before in parts if self.recipe else []:
            for key in before:
                if key in now and json.dumps(now[key], default=str) != json.dumps(before[key], default=str):
                    yield key, *("unset" if value is None else value for value in (now[key], before[key]))

    def check(self, model: dict[str, Any]) -> None:
        """Raises SpecError where a parsed model (class_path, init_args) is not the one that was saved."""
        if self.model_class and model["class_path"] != self.model_class:
            raise SpecError(f"{self.path} holds a {self.model_class}, not a {model['class_path']}")
        saved = _comparable(self.hparams)
        asked = _comparable({key: model["init_args"].get(key, value) for key, value in self.hparams.items()})
        if different := _difference(saved, asked):
            key, was, given = different
            raise SpecError(f"{self.path} was trained with {key} {was!r}, not {given!r}; only --kv_usage can change")


def _comparable(hparams: dict[str, Any]) -> dict[str, Any]:
    """The hyper-parameters that weights depend on, written out in full, so that equal ones compare equal."""
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in hparams.items() if k not in FREE}
    if "mixer" in plain:
        layers = [_complete(MIXERS, spec) for spec in with_options(plain["mixer"], router=plain.pop("router", None))]
        for layer in layers:
            for key, registry in (("router", ROUTERS), ("threshold", THRESHOLDS)):
                if key in layer:
                    layer[key] = _complete(registry, layer[key])
        plain["mixer"] = layers[0] if len(layers) == 1 else dict(enumerate(layers))
    return plain


def _complete(registry: Registry, spec: str | dict[str, Any]) -> dict[str, Any]:
    """A spec with its name resolved and its defaults filled in."""
    given = parse_spec(spec)
    name = registry.aliases().get(given["name"], given["name"])
    options = registry.options(name).items()
    return (
        {key: option.default for key, option in options if option.default is not option.empty} | given | {"name": name}
    )


def _difference(one: Any, other: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """The first place where two values differ: its dotted path, and what either has there."""
    if not (isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys()):
        return None if one == other else (path, one, other)
    found = (_difference(one[key], other[key], f"{path}.{key}".lstrip(".")) for key in one)
    return next((difference for difference in found if difference), None)


def read(path: Path) -> Saved:
    """Reads a checkpoint's plain data; of a sharded one, from its meta file. Nothing that it names is imported but what
    :mod:`recipes.trust` lets pass.

    Raises:
        SpecError: it is none, is damaged, or names a class of the model that is not trusted.
    """
    file = _plain_file(path)
    _check_archive(file)
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        hparams = dict(checkpoint["hyper_parameters"])
        recipe, step = dict(checkpoint.get(RECIPE, {})), int(checkpoint.get("global_step", 0))
        well_formed = all(isinstance(recipe.get(key, {}), dict) for key in ("data", "trainer"))
    except Exception as error:  # torch.load and pickle raise whatever the bytes make them
        raise SpecError(f"{path} is no checkpoint with plain hyper-parameters ({type(error).__name__})") from error
    if not well_formed or {"hparams", "module_arguments"} & {*checkpoint}:
        raise SpecError(f"{path} holds no recipe or hyper-parameters of a known kind: they are malformed")
    if (instantiator := hparams.pop("_instantiator", None)) not in INSTANTIATORS:
        raise SpecError(f"{path} asks for {instantiator!r} to build it, which is not Lightning's")
    model_class = hparams.pop("_class_path", None)
    cls = trusted(model_class, LightningModule, file=path) if model_class else SequenceModule
    check_options(hparams, cls, file=path)
    check_finite(checkpoint.get("state_dict", {}), path)
    finished = checkpoint.get("callbacks", {}).get("ValidateAtEnd", {}).get("done", True)
    return Saved(
        path=path,
        model_class=model_class,
        hparams=hparams,
        recipe=recipe,
        step=step,
        finished=finished,
        processes=checkpoint.get(PROCESSES),
    )


def check_finite(state_dict: dict[str, torch.Tensor], path: Path) -> None:
    """Raises SpecError for weights that are NaN or inf."""
    if bad := not_finite(state_dict.items()):
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
