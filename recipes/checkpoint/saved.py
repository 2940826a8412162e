"""What a checkpoint says about the run that wrote it.

LightningCLI 2.6 takes a checkpoint's hyper-parameters after the flags, so that a flag that contradicts them is ignored
without a word, and with `--ckpt_path last` and nothing to resume it starts anew. Here the hyper-parameters come before
the flags; then KV usage may be changed, and any other difference is an error, for the weights were learned with it.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from lit_modules.base import with_options
from lit_modules.data import DATA
from lit_modules.language_model import BYTES, LanguageModel
from lit_modules.sharded import load_whole
from mixers.registry import MIXERS, ROUTERS, THRESHOLDS, Registry, SpecError, parse_pattern, parse_spec
from mixers.threshold import set_kv_usage
from recipes.messages import one_line
from recipes.trust import check_options, trusted

RECIPE = "recipe"  # the key of a checkpoint that holds the run's whole configuration
PROCESSES = "processes"  # that of how many wrote it together
WANDB = "wandb"  # that of the id of the run at W&B, if there is one
LINKED = ("vocab_size", "num_classes")  # of the data; compared when the data is there
FREE = ("kv_usage", "compile", "activation_checkpointing", "on_nonfinite", *LINKED)
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
    wandb: str | None

    @property
    def folder(self) -> Path:
        """Of the run, or of the file where it lies alone."""
        parent = self.path.absolute().parent
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

    def token_data(self) -> LightningDataModule | None:
        """The data module, if it is that of `--data tokens`: it has a tokenizer. Raises SpecError as `build_data`."""
        return self.build_data() if self.data == DATA["tokens"].replace(":", ".") else None

    def load(self, cls: type[LightningModule] = LightningModule) -> LightningModule:
        """The model, on the CPU. Raises SpecError if it is no `cls`, or does not fit the weights.

        Args:
            cls: what is expected; it is also what is built if the checkpoint names no class.
        """
        found = trusted(self.model_class, cls, file=self.path) if self.model_class else cls
        try:
            return found.load_from_checkpoint(self._file(), map_location="cpu", weights_only=True)
        except SpecError as error:
            raise SpecError(f"{self.path}: {error}") from error
        except Exception as error:  # a constructor, or torch, with whatever is in the file
            what = f"{type(error).__name__}: {one_line(str(error))}"
            raise SpecError(f"{self.path} cannot be loaded as a {found.__name__}: {what}") from error

    def _file(self) -> Path | io.BytesIO:
        """What Lightning loads a model from: the checkpoint, or the weights of a sharded one as a file in memory."""
        if self.path.is_file():
            return self.path
        file = io.BytesIO()
        torch.save(load_whole(self.path, optimizers=False), file)
        file.seek(0)
        return file

    def language_model(self, *, of_bytes: bool = False, kv_usage: float | None = None) -> LanguageModel:
        """The model for evaluation, on the CPU.

        Args:
            of_bytes: whether it must read bytes.
            kv_usage: stored tokens / tokens, 0..1; default: as trained.

        Raises:
            SpecError: it is no such language model, does not fit the weights, or has no such usage.
        """
        vocabulary = self.hparams.get("vocab_size")
        if vocabulary is None or "num_classes" in self.hparams or of_bytes and vocabulary != BYTES:
            raise SpecError(f"{self.path} is no language model{' of bytes' * of_bytes}")
        model = self.load(LanguageModel).eval()
        if kv_usage is not None:
            set_kv_usage(model, kv_usage)
        return model

    def config(self, command: str, *, with_data: bool) -> dict[str, Any]:
        """What to parse before the flags; only training goes on with the same trainer.

        Args:
            command: fit, validate, test or predict.
            with_data: whether the data stay those of the checkpoint.

        Raises:
            SpecError: a class that is not trusted.
        """
        keys = ["seed_everything"] + ["data"] * with_data + ["trainer", "logger"] * (command == "fit")
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
            (config, {key: self.recipe.get(key) for key in ("seed_everything", "logger")}),
            (config["trainer"], {key: self.recipe.get("trainer", {}).get(key) for key in OF_TRAINING}),
            (
                config["model"]["init_args"],
                {key: self.hparams[key] for key in FREE if key in self.hparams and key not in LINKED},
            ),
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

    def check_mixer(self, pattern: list[dict[str, Any]]) -> None:
        """Raises SpecError where the options that these specs give are not those of the mixers that were saved."""
        saved = parse_pattern(self.hparams["mixer"])
        pairs = zip(saved, pattern, strict=True)
        asked = [one | given | {"name": one["name"]} for one, given in pairs]
        router = {"router": None} if any("router" in spec for spec in pattern) else {}
        self.check({"class_path": self.model_class, "init_args": self.hparams | router | {"mixer": asked}})


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
