"""Interchangeable sequence mixers for PyTorch.

The names below are imported when they are first used, so that `from mixers import list_mixers` loads no torch.
"""

import importlib
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from mixers.registry import SpecError, build_mixer, list_mixers, list_routers, register_mixer, register_router

_LAZY = {
    "Mixer": "mixers.base",
    "MixerOutput": "mixers.base",
    "MixerState": "mixers.state",
    "Routing": "mixers.base",
    "kv_cache_bytes": "mixers.state",
    "Router": "mixers.routers.base",
    "RouterInputs": "mixers.routers.base",
    "allocate": "mixers.allocation",
    "aux_loss": "mixers.swap",
    "swap_mixers": "mixers.swap",
    "calibrate": "mixers.calibration",
    "check_mixer": "mixers.checks",
    "check_router": "mixers.checks",
    "set_kv_usage": "mixers.threshold",
    "share_threshold": "mixers.sharing",
    "Decoder": "mixers.backbone",
}

__all__ = ["SpecError", "build_mixer", "list_mixers", "list_routers", "register_mixer", "register_router", *_LAZY]


class _KernelsBesideUs:
    """Finds `kernels.<operation>` where Hugging Face's `kernels` is first on the path or was imported before ours."""

    folder = str(Path(__file__).parents[1] / "kernels")

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        return PathFinder.find_spec(name, [cls.folder]) if name.rpartition(".")[0] == "kernels" else None


sys.meta_path.append(_KernelsBesideUs)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
