"""A model that people already have keeps its function, then gives up its cache: HAM around its own attention.

The names below are imported when they are first used: transformers takes seconds to import.
"""

import importlib
from typing import Any

_LAZY = {
    "attach": "mixers.retrofit.attaching",
    "parts_of": "mixers.retrofit.parts",
    "HostedHAM": "mixers.retrofit.hosted",
    "HostSizes": "mixers.retrofit.hosted",
}

__all__ = [*_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
