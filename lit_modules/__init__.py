"""LightningModules, DataModules, metrics and callbacks.

Importing this package imports nothing heavy: its classes are imported when they are asked for.
"""

import importlib

from lit_modules.data import DATA, MODELS

_PLACES = {place.partition(":")[2]: place.partition(":")[0] for place in [*DATA.values(), *MODELS.values()]}
__all__ = sorted(_PLACES)


def __getattr__(name: str):
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return __all__
