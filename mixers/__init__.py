"""Interchangeable sequence mixers for PyTorch.

The names below are imported when they are first used, so that `from mixers import list_mixers` loads no torch.
"""

import importlib
from typing import Any

from mixers.registry import SpecError, build_mixer, list_mixers, list_routers, register_mixer, register_router

_LAZY = {
    "Mixer": "mixers.base",
    "MixerOutput": "mixers.base",
    "MixerState": "mixers.base",
    "Routing": "mixers.base",
    "kv_cache_bytes": "mixers.base",
    "Router": "mixers.routers.base",
    "RouterInputs": "mixers.routers.base",
    "set_kv_usage": "mixers.threshold",
    "share_threshold": "mixers.threshold",
    "Decoder": "mixers.backbone",
}

__all__ = ["SpecError", "build_mixer", "list_mixers", "list_routers", "register_mixer", "register_router", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
