"""What a data module says of the training on it, as a recipe that `fit` and `compare` share."""

from typing import Any

from lit_modules.data import DATA, MODELS
from mixers.registry import MIXERS, Registry, SpecError, parse_pattern, unknown

DATA_MODULES = Registry(
    kind="data", base="lightning.pytorch:LightningDataModule", group="lightning_mixers.data", builtin=DATA
)
DEFAULTS = ("model", "mixer", "steps", "validate_every")


def recipe_of(data: str) -> dict[str, Any]:
    """What its attributes say, as a recipe; what they leave open is left to the base recipe.

    Args:
        data: name or class path of a data module.

    Raises:
        SpecError: no such data, or attributes that are not those of :mod:`lit_modules.data`.
    """
    cls, given = DATA_MODULES.get(data), defaults_of(data)
    model = getattr(cls, "model", None)
    recipe: dict[str, Any] = {"model": {"init_args": given["model"]} if "model" in given else {}}
    if isinstance(model, str):
        if model not in MODELS:
            raise unknown("model", model, MODELS, of=f" of data {data!r}")
        recipe["model"]["class_path"] = MODELS[model].replace(":", ".")
    recipe["data"] = {"class_path": f"{cls.__module__}.{cls.__qualname__}"}
    recipe["trainer"] = {"max_steps": given["steps"]} if "steps" in given else {}
    if "validate_every" in given:
        recipe["trainer"] |= {"val_check_interval": given["validate_every"], "check_val_every_n_epoch": None}
    return recipe


def defaults_of(data: str) -> dict[str, Any]:
    """The attribute `defaults`; empty if there is none. Raises SpecError if it is no such mapping."""
    given = getattr(DATA_MODULES.get(data), "defaults", {})
    if not isinstance(given, dict):
        raise SpecError(f"`defaults` of data {data!r} must be a dict with any of {', '.join(DEFAULTS)}, got {given!r}")
    for key in given:
        if key not in DEFAULTS:
            raise unknown("key", key, DEFAULTS, of=f" in `defaults` of data {data!r}")
        is_size = isinstance(given[key], int) and given[key] > 0
        if not (is_size if key in ("steps", "validate_every") else isinstance(given[key], dict)):
            wanted = "a dict" if key in ("model", "mixer") else "a number of at least 1"
            raise SpecError(f"{key!r} in `defaults` of data {data!r} must be {wanted}, got {given[key]!r}")
    return given


def sized(mixer: Any, data: str) -> Any:
    """A pattern whose mixers have the options that the data's `defaults` give to mixers; see :func:`completed`.

    Args:
        mixer: spec or pattern.
        data: name or class path of a data module.
    """
    return completed(mixer, defaults_of(data).get("mixer", {}))


def completed(mixer: Any, defaults: dict[str, Any]) -> Any:
    """A pattern whose mixers have these options.

    Args:
        mixer: spec or pattern. What it says stays; a mixer without such an option goes without.
        defaults: the options.

    Returns:
        The pattern as it was if nothing was to be added.
    """
    pattern, changed = parse_pattern(mixer), False
    for spec in pattern:
        known = MIXERS.options(spec["name"])
        lacking = {k: v for k, v in defaults.items() if k in known and k not in spec and known[k].default != v}
        spec |= lacking
        changed |= bool(lacking)
    return (pattern if len(pattern) > 1 else pattern[0]) if changed else mixer
