"""What a checkpoint says about the run that wrote it.

LightningCLI 2.6 takes a checkpoint's hyper-parameters after the flags, so that a flag that contradicts them is ignored
without a word, and with `--ckpt_path last` and nothing to resume it starts anew. Here the hyper-parameters come before
the flags; then KV usage may be changed, and any other difference is an error, for the weights were learned with it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lit_modules.base import with_options
from mixers.registry import MIXERS, ROUTERS, THRESHOLDS, Registry, SpecError, parse_spec

RECIPE = "recipe"  # the key of a checkpoint that holds the run's whole configuration
LINKED = ("vocab_size", "num_classes")  # of the data; compared when the data is there
FREE = ("kv_usage", *LINKED)


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
        found = [p for p in root.glob(f"{name}/checkpoints/last*.ckpt") if p.exists()]
        if not found:
            raise SpecError(f"--ckpt_path last: no run {root / name} has a last checkpoint")
        return max(found, key=lambda p: p.stat().st_mtime)
    if not Path(path).exists():
        raise SpecError(f"--ckpt_path {path}: no such checkpoint")
    return Path(path)


@dataclass
class Saved:
    """The plain data in a checkpoint: hyper-parameters of the model, and the recipe if the command line wrote it."""

    path: Path
    model_class: str | None
    hparams: dict[str, Any]
    recipe: dict[str, Any]
    step: int

    @property
    def data(self) -> str | None:
        """Class path of the data module, where it is known."""
        return self.recipe.get("data", {}).get("class_path")

    def config(self, command: str, *, with_data: bool) -> dict[str, Any]:
        """What to parse before the flags. Only training goes on with the same trainer."""
        keys = ["seed_everything"] + ["data"] * with_data + ["trainer"] * (command == "fit")
        hparams = {key: value for key, value in self.hparams.items() if key not in LINKED}
        model = {"class_path": self.model_class} if self.model_class else {}
        return {key: self.recipe[key] for key in keys if key in self.recipe} | {"model": model | {"init_args": hparams}}

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
    """Reads a checkpoint's plain data; of a sharded one, from its meta file. Raises SpecError if it is none."""
    try:
        file = path / "meta.pt" if path.is_dir() else path
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        hparams = dict(checkpoint["hyper_parameters"])
    except Exception as error:  # torch.load and pickle raise whatever the bytes make them
        raise SpecError(f"{path} is no checkpoint with plain hyper-parameters ({type(error).__name__})") from error
    hparams.pop("_instantiator", None)
    return Saved(
        path=path,
        model_class=hparams.pop("_class_path", None),
        hparams=hparams,
        recipe=checkpoint.get(RECIPE, {}),
        step=checkpoint.get("global_step", 0),
    )
