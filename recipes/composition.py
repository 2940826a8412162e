"""Recipes and the user's own YAML, put together: an option that a file sets goes with the class that the file names.

jsonargparse keeps an option when a later file names another class, if that class has an option of the same name. A data
module of one's own, named in --config, would be read at the default recipe's seq_len, and a model of one's own built at
its width, without a word.
"""

import importlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PARTS = ("model", "data")


def compose(recipes: Iterable[dict[str, Any]], classes: dict[str, str] | None = None) -> dict[str, Any]:
    """Recipes, later ones over earlier ones, as one.

    Args:
        recipes: what their files hold.
        classes: class paths that the user names in place of a recipe's, by part; what recipes say of these parts is
            left out.
    """
    whole: dict[str, Any] = {}
    for recipe in recipes:
        _merge(whole, recipe)
    for part, path in (classes or {}).items():
        if not _same(path, whole.get(part, {}).get("class_path", "")):
            whole[part] = {"class_path": path}
    return whole


def configs(words: list[str]) -> list[tuple[int, dict[str, Any]]]:
    """The files, or inline mappings, of --config: the place of each one's last word, and what it holds.

    Those that cannot be read are left to the parser, which says why.
    """
    import yaml  # not needed by ls and --help

    found = []
    for flag, value, place in _flags(words):
        if flag in ("--config", "-c"):
            try:
                content = yaml.safe_load(Path(value).read_text() if value[:1] not in "{[" else value)
            except (OSError, UnicodeDecodeError, yaml.YAMLError):
                continue
            if isinstance(content, dict):
                found.append((place, content))
    return found


def setting(words: list[str], key: str) -> Any:
    """What the user's flags and files say of a key such as "trainer.default_root_dir", the last one, or None."""
    contents = dict(configs(words))
    found = None
    for flag, value, place in _flags(words):
        if flag == f"--{key}":
            found = value
        elif place in contents:
            content = contents[place]
            for name in key.split("."):
                content = content.get(name) if isinstance(content, dict) else None
            found = found if content is None else content
    return found


def all_settings(words: list[str], key: str) -> list[str]:
    """Every value of a flag."""
    return [value for flag, value, _ in _flags(words) if flag == f"--{key}"]


def named_classes(words: list[str]) -> dict[str, str]:
    """The class paths of the model and of the data that the user's flags and files name, the last of each."""
    contents = dict(configs(words))
    found = {}
    for flag, value, place in _flags(words):
        for part in PARTS:
            given = contents[place].get(part) if place in contents else None
            if flag in (f"--{part}", f"--{part}.class_path"):
                given = value
            if path := class_path(given):
                found[part] = _canonical(path)
    return found


def without_replaced(words: list[str], classes: dict[str, str]) -> list[str]:
    """The words, with every --config that names another class for a part than `classes` replaced by the rest of it."""
    words = list(words)
    for place, content in configs(words):
        stale = [p for p in PARTS if (path := class_path(content.get(p))) and _canonical(path) != classes.get(p)]
        if stale:
            flag, equals, _ = words[place].partition("=")
            rest = json.dumps({key: value for key, value in content.items() if key not in stale}, default=str)
            words[place] = f"{flag}={rest}" if equals and flag.startswith("-") else rest
    return words


def class_path(given: Any) -> str | None:
    """The class path in what stands for a model or for data: a mapping with one, or the path itself."""
    path = given.get("class_path") if isinstance(given, dict) else given
    is_path = isinstance(path, str) and all(part.isidentifier() for part in path.replace(":", ".").split("."))
    return path.replace(":", ".") if is_path else None


def _merge(whole: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(whole.get(key), dict) and key != "mixer":
            _merge(whole[key], value)
        else:
            whole[key] = value


def _flags(words: list[str]) -> Iterable[tuple[str, str, int]]:
    """Flag, value, and the place of the word that holds the value."""
    for place, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if equals and flag.startswith("-"):
            yield flag, value, place
        elif word.startswith("-") and place + 1 < len(words):
            yield word, words[place + 1], place + 1


def _canonical(path: str) -> str:
    """Where the class is defined, which a shorter path may stand for; what cannot be imported is left to the parser."""
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
        return f"{cls.__module__}.{cls.__qualname__}"
    except Exception:
        return path


def _same(path: str, other: str) -> bool:
    """Whether two paths are of one class; a bare name is one that was imported already."""
    return path == other or ("." not in path and other.endswith(f".{path}"))
