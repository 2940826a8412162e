"""Code of the user's: `--plugin MODULE`, which every command takes, and whose names a checkpoint may bear.

A module, or a file such as ./my_router.py, is imported before anything else, so that it can register mixers and
routers. A name that it registers is saved as the path of its class: `--plugin` opens the checkpoint again.
"""

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

from mixers.registry import MIXERS, ROUTERS, THRESHOLDS, Registry, SpecError, parse_pattern, parse_spec
from recipes.messages import program

OURS = {"kernels", "mixers", "lit_modules", "recipes"}
CLASS = re.compile(r"((?:[^\W\d]\w*)(?:\.[^\W\d]\w*)*)[.:][^\W\d]\w*")
NAMED: dict[str, str] = {}  # of this command: --plugin as given -> the module's name


def take(args: list[str]) -> list[str]:
    """Imports every `--plugin` of a command line; returns the other flags. Forgets those of the command before."""
    NAMED.clear()
    rest, words = [], iter(args)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag != "--plugin":
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        if not value or value.startswith("--"):
            raise SpecError("--plugin needs a value: a module, or a file such as ./my_router.py")
        NAMED[value] = _import(value)
    return rest


def as_run(command: str) -> str:
    """A command of ours, to be printed, as it was started here: with the same program and plug-ins."""
    head = "python -m recipes "
    return f"{program()} {command.removeprefix(head)}{flags()}" if command.startswith(head) else command


def packages() -> set[str]:
    """Top-level packages, or modules, that the user named."""
    return {module.partition(".")[0] for module in NAMED.values()}


def note(config: Any) -> None:
    """Counts as named, as with --plugin, the modules of all classes in a run's configuration.

    They are mixers, routers or data that were given as class paths, or in a file of the user's.
    """
    if isinstance(config, dict):
        for key, value in config.items():
            if key in ("name", "class_path") and isinstance(value, str) and (match := CLASS.fullmatch(value)):
                if match[1].partition(".")[0] not in {*OURS, "lightning", *packages()}:
                    NAMED[match[1]] = match[1]
            else:
                note(value)
    elif isinstance(config, list):
        for part in config:
            note(part)


def flags() -> str:
    """The --plugin flags of this command, for the commands that it prints."""
    return "".join(f" --plugin {given}" for given in NAMED)


def _import(given: str) -> str:
    """The name of the module that was imported."""
    try:
        if given.endswith(".py"):
            return _import_file(Path(given))
        importlib.import_module(given)
    except SpecError:
        raise
    except (Exception, SystemExit) as error:  # whatever a module of the user's may raise
        raise SpecError(f"--plugin {given} cannot be imported: {type(error).__name__}: {error}") from error
    return given


def _import_file(path: Path) -> str:
    if not path.is_file():
        raise SpecError(f"--plugin {path}: no such file")
    name, path = path.stem, path.resolve()
    if not name.isidentifier():
        raise SpecError(f"--plugin {path}: {name!r} cannot be the name of a module")
    if held := sys.modules.get(name):
        if Path(getattr(held, "__file__", None) or "").resolve() != path:
            raise SpecError(f"--plugin {path}: there is another module {name!r}; give the file another name")
        return name
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return name


def written_out(mixer: Any) -> Any:
    """A pattern in which the names that were registered in this process alone are the paths of their classes.

    One without any comes back as it was.
    """
    pattern = [_written_out(MIXERS, spec) for spec in parse_pattern(mixer)]
    for spec in pattern:
        for key, registry in (("router", ROUTERS), ("threshold", THRESHOLDS)):
            if key in spec:
                spec[key] = written_out_spec(registry, spec[key])
    if pattern == parse_pattern(mixer):
        return mixer
    return pattern if len(pattern) > 1 or isinstance(mixer, list) else pattern[0]


def written_out_spec(registry: Registry, spec: Any) -> Any:
    """The same of one spec."""
    written = _written_out(registry, spec)
    return spec if written == parse_spec(spec) else written


def _written_out(registry: Registry, spec: Any) -> dict[str, Any]:
    parsed = parse_spec(spec)
    return parsed | {"name": registry.portable(parsed["name"])}
