"""Names for mixers, routers and thresholds, and the plain data that describes them.

Everywhere (YAML, flags, hyper-parameters, JSON) a part is described by a *spec*: its name, or a mapping with its name
and its options. Specs stay plain data until the part is built, so that a run's hyper-parameters can be saved as they
were given, a checkpoint loads with `weights_only=True`, and every layer builds parts of its own. A command line that
parsed class instances, or factories of them, would need a custom parser and would save neither.

    "ham"
    {"name": "ham", "router": {"name": "learned"}, "kv_usage": 0.25}

A name is a built-in one, an alias, one registered with the decorators below, one that an installed package declares
as an entry point, or the full path of a class, `package.module.Class`. A *pattern* is a list of specs that is cycled
over the depth of a model; `"gdn*3,attention"` is short for one.

This file imports no torch: built-in names are strings, and a class is imported when it is asked for.
"""

import difflib
import importlib
import inspect
import math
import operator
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any


class SpecError(ValueError):
    """A mistake in what the user asked for. Its text is one line that names the thing, the value and the choices."""


def unknown(what: str, value: str, known: Iterable[str], *, of: str = "", hints: Iterable[str] = ()) -> SpecError:
    """The error for a value that is none of the `known` ones; `hints` are further values worth suggesting."""
    known = list(known)
    lowered = {choice.lower(): choice for choice in [*hints, *known]}
    close = difflib.get_close_matches(value.lower(), lowered, n=1)
    suggestion = f" Did you mean {lowered[close[0]]!r}?" if close else ""
    return SpecError(f"unknown {what} {value!r}{of}; known: {', '.join(known) or 'none'}.{suggestion}")


def check_positive(**sizes: int) -> None:
    """SpecError unless every size is a whole number of at least 1."""
    for name, value in sizes.items():
        if isinstance(value, float):
            raise SpecError(f"{name} must be a whole number, got {value}")
        if value < 1:
            raise SpecError(f"{name} must be at least 1, got {value}")


def check_range(low: float, high: float = math.inf, /, **values: float) -> None:
    """SpecError unless every value is a number with low <= value < high; nan and inf are none."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < high:
            below = "" if high == math.inf else f" and below {high:g}"
            raise SpecError(f"{name} must be a number of at least {low:g}{below}, got {value}")


class Registry:
    """The names of one kind of part.

    Args:
        kind: what a part is called in messages, such as "mixer".
        base: "module:Class" that every part subclasses.
        group: the entry-point group through which other packages add names.
        builtin: name -> "module:Class".
        aliases: other name -> name.
    """

    def __init__(
        self, *, kind: str, base: str, group: str, builtin: Mapping[str, str], aliases: Mapping[str, str] | None = None
    ):
        self.kind, self.base, self.group = kind, base, group
        self._builtin = dict(builtin)
        self._aliases = dict(aliases or {})
        self._registered: dict[str, type] = {}

    def names(self) -> list[str]:
        """All names, sorted, without aliases. Imports none of the classes."""
        return sorted({*self._builtin, *self._registered, *self._plugins()})

    def aliases(self) -> dict[str, str]:
        """Other name -> name."""
        return dict(self._aliases)

    def origin(self, name: str) -> str:
        """Where a name's class is, as "module:Class". Imports nothing. Raises SpecError for an unknown name."""
        name = self._aliases.get(name, name)
        if name in self._registered:
            return _origin(self._registered[name])
        if name in self._builtin:
            return self._builtin[name]
        origins = self._plugins().get(name, [])
        if len(origins) > 1:
            raise SpecError(f"{self.kind} {name!r} is declared more than once: {', '.join(origins)}; use a class path")
        if origins:
            return origins[0]
        if origin := _split_path(name):
            return origin
        raise unknown(self.kind, name, self.names(), hints=self._aliases)

    def portable(self, name: str) -> str:
        """A name that another process can resolve: as it is, or the path of the class if only this process knows it."""
        known = name in self._builtin or name in self._aliases or name in self._plugins()
        return name if known or name not in self._registered else _origin(self._registered[name]).replace(":", ".")

    def packages(self) -> set[str]:
        """Top-level packages of all parts that are built in, registered, or declared by installed packages."""
        origins = [
            *self._builtin.values(),
            *map(_origin, self._registered.values()),
            *sum(self._plugins().values(), []),
        ]
        return {origin.partition(":")[0].partition(".")[0] for origin in origins}

    def get(self, name: str) -> type:
        """The class of a name. Raises SpecError if there is none, or it cannot be imported or is no such part."""
        name = self._aliases.get(name, name)
        return self._registered[name] if name in self._registered else self._checked(self._load(name))

    def register(self, name: str) -> Callable[[type], type]:
        """Class decorator that adds a name. A class defined again (a reloaded module) takes its own place.

        Raises:
            SpecError: a name that another class holds, or a class that does not subclass the base.
        """
        if not name.isidentifier():
            raise SpecError(f"{self.kind} name {name!r} is not an identifier")

        def decorate(cls: type) -> type:
            if holder := self._other_holder(name, _origin(cls)):
                raise SpecError(f"{self.kind} {name!r} is already {holder}; {_origin(cls)} needs another name")
            self._registered[name] = self._checked(cls)
            return cls

        return decorate

    def options(self, name: str) -> dict[str, inspect.Parameter]:
        """The options that a part's constructor takes by name, with those of its bases if it passes `**` on to them."""
        found: dict[str, inspect.Parameter] = {}
        for cls in self.get(name).__mro__:
            if "__init__" not in vars(cls):
                continue
            parameters = list(inspect.signature(vars(cls)["__init__"]).parameters.values())[1:]
            for parameter in parameters:
                if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                    found.setdefault(parameter.name, parameter)
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
                break
        return found

    def build(self, spec: str | Mapping[str, Any], /, *args: Any, **options: Any) -> Any:
        """Builds the part that a spec describes.

        Args:
            spec: name, or a mapping with a "name" and options.
            args: of its constructor, by place.
            options: override those in the spec.

        Raises:
            SpecError: an unknown name or option, a missing one, or a value of another type than the option's.
        """
        given = parse_spec(spec)
        name = given.pop("name")
        given |= options
        known = self.options(name)
        check_options(given, known, of=f"{self.kind} {name!r}")
        cls = self.get(name)
        try:
            inspect.signature(cls).bind(*args, **given)
        except TypeError as error:
            raise SpecError(f"{self.kind} {name!r}: {error}") from None
        return cls(*args, **given)

    def _plugins(self) -> dict[str, list[str]]:
        """Name -> the classes that installed packages declare for it."""
        from importlib.metadata import entry_points  # slow to import and rarely needed

        found: dict[str, list[str]] = {}
        for point in entry_points(group=self.group):
            origin = f"{point.module}:{point.attr}"
            holder = self._builtin.get(point.name) or self._aliases.get(point.name)
            if holder:
                warnings.warn(f"{self.kind} {point.name!r} of {origin} is ignored: it is {holder}", stacklevel=3)
            elif origin not in found.setdefault(point.name, []):
                found[point.name].append(origin)
        return found

    def _other_holder(self, name: str, origin: str) -> str | None:
        """What holds a name, if it is not the class at `origin`."""
        if name in self._registered:
            held = [_origin(self._registered[name])]
        elif name in self._builtin or name in self._aliases:
            held = [self._builtin.get(name) or self._aliases[name]]
        else:  # a package may declare its class through a shorter path than where it is defined
            held = [holder for holder in self._plugins().get(name, []) if not _same_package_and_name(holder, origin)]
        return next((holder for holder in held if holder != origin), None)

    def _load(self, name: str) -> Any:
        module_name, _, attribute = self.origin(name).partition(":")
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise SpecError(f"{self.kind} {name!r}: cannot import {module_name!r}: {error}") from error
        try:
            return operator.attrgetter(attribute)(module)
        except AttributeError:
            classes = [key for key, value in vars(module).items() if inspect.isclass(value)]
            raise unknown("class", attribute, classes, of=f" in module {module_name!r}") from None

    def _checked(self, part: Any) -> type:
        module, _, attribute = self.base.partition(":")
        base = getattr(importlib.import_module(module), attribute)
        if not (inspect.isclass(part) and issubclass(part, base)):
            described = _origin(part) if inspect.isclass(part) else repr(part)
            raise SpecError(f"{described} is no {self.kind}: it does not subclass {module}.{attribute}")
        return part


def check_options(given: Mapping[str, Any], known: Mapping[str, inspect.Parameter], *, of: str) -> None:
    """SpecError unless all options are known, and of the type that their annotation names."""
    for option, value in given.items():
        if option not in known:
            raise unknown("option", option, known, of=f" for {of}")
        if not _fits(value, known[option].annotation):
            expected = getattr(known[option].annotation, "__name__", known[option].annotation)
            raise SpecError(f"{option!r} of {of} must be {expected}, got {value!r}")


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value has the type that an option's annotation names, as far as it names plain classes."""
    kinds = annotation.__args__ if isinstance(annotation, types.UnionType) else (annotation,)
    if annotation is inspect.Parameter.empty or not all(isinstance(kind, type) for kind in kinds):
        return True
    if isinstance(value, bool):
        return bool in kinds
    wider = (isinstance(value, int) and float in kinds) or (isinstance(value, Mapping) and dict in kinds)
    return isinstance(value, kinds) or wider


def _origin(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _same_package_and_name(one: str, other: str) -> bool:
    (module, _, name), (other_module, _, other_name) = one.partition(":"), other.partition(":")
    return name == other_name and module.split(".")[0] == other_module.split(".")[0]


def _split_path(path: str) -> str | None:
    """The path "a.b.C" or "a.b:C" as "a.b:C"; None for anything else."""
    module, mark, name = path.partition(":") if ":" in path else path.rpartition(".")
    parts = [*module.split("."), *name.split(".")]
    return f"{module}:{name}" if mark and all(part.isidentifier() for part in parts) else None


def parse_spec(spec: str | Mapping[str, Any]) -> dict[str, Any]:
    """A spec as a new dict with its "name" and its options.

    Args:
        spec: a name, or a mapping with a "name" and options.

    Raises:
        SpecError: it is none of these.
    """
    parsed = {"name": spec.strip()} if isinstance(spec, str) else dict(spec) if isinstance(spec, Mapping) else {}
    if not (isinstance(parsed.get("name"), str) and parsed["name"] and all(isinstance(key, str) for key in parsed)):
        raise SpecError(f"expected a name, or a mapping with a 'name' and options; got {spec!r}")
    return parsed


def parse_pattern(pattern: str | Mapping[str, Any] | Iterable[str | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A pattern as a list of specs.

    Args:
        pattern: "gdn*3,attention", one spec, or a list of such names and specs.

    Raises:
        SpecError: it is empty or none of these.
    """
    entries = pattern.split(",") if isinstance(pattern, str) else [pattern] if isinstance(pattern, Mapping) else pattern
    if not isinstance(entries, list | tuple) or not entries:
        raise SpecError(f"expected a pattern such as 'gdn*3,attention', or a list of specs; got {pattern!r}")
    return [spec for entry in entries for spec in (_repeated(entry) if isinstance(entry, str) else [parse_spec(entry)])]


def _repeated(entry: str) -> list[dict[str, Any]]:
    name, times, count = (part.strip() for part in entry.partition("*"))
    if not name or (times and not (count.isdecimal() and int(count) > 0)):
        raise SpecError(f"expected a name such as 'gdn', or 'gdn*3' to repeat it, in a pattern; got {entry!r}")
    return [parse_spec(name) for _ in range(int(count) if times else 1)]


MIXERS = Registry(
    kind="mixer",
    base="mixers.base:Mixer",
    group="lightning_mixers.mixers",
    builtin={
        "attention": "mixers.attention:Attention",
        "linear_attention": "mixers.gated_delta_net:LinearAttention",
        "delta_net": "mixers.gated_delta_net:DeltaNet",
        "gated_delta_net": "mixers.gated_delta_net:GatedDeltaNet",
        "ham": "mixers.ham:HAM",
    },
    aliases={"gdn": "gated_delta_net"},
)

ROUTERS = Registry(
    kind="router",
    base="mixers.routers.base:Router",
    group="lightning_mixers.routers",
    builtin={
        "cosine": "mixers.routers.cosine:Cosine",
        "residual": "mixers.routers.residual:Residual",
        "learned": "mixers.routers.learned:Learned",
        "demand": "mixers.routers.demand:Demand",
        "key_norm": "mixers.routers.key_norm:KeyNorm",
        "recency": "mixers.routers.controls:Recency",
        "random": "mixers.routers.controls:Random",
        "static": "mixers.routers.controls:Static",
        "all": "mixers.routers.controls:All",
        "none": "mixers.routers.controls:Nothing",
    },
)

THRESHOLDS = Registry(
    kind="threshold",
    base="mixers.threshold:Threshold",
    group="lightning_mixers.thresholds",
    builtin={
        "calibrated": "mixers.threshold_kinds:Calibrated",
        "controlled": "mixers.threshold_kinds:Controlled",
        "fixed": "mixers.threshold_kinds:Fixed",
        "learned": "mixers.threshold_kinds:Learned",
    },
)

list_mixers = MIXERS.names
list_routers = ROUTERS.names
register_mixer = MIXERS.register
register_router = ROUTERS.register


def build_mixer(spec: str | Mapping[str, Any], /, *, dim: int, **options: Any) -> Any:
    """Builds the mixer that a spec describes.

    Args:
        spec: name, or a mapping with a "name" and options.
        dim: model width D.
        options: override those in the spec.

    Returns:
        A `mixers.Mixer`.

    Raises:
        SpecError: an unknown name or option, a missing one, or a value of another type than the option's.
    """
    return MIXERS.build(spec, dim=dim, **options)


def with_usage(spec: dict[str, Any], kv_usage: float) -> dict[str, Any]:
    """The spec of a mixer with another KV usage, if it is one that has such."""
    return spec | {"kv_usage": kv_usage} if "kv_usage" in MIXERS.options(spec["name"]) else spec


class DescribesMixers:
    """A module that is saved with a description of the mixers in it, which has to follow when their usage is set."""

    def describe_usage(self, kv_usage: float) -> None:
        """Change the description."""
