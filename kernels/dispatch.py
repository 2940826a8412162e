"""Which implementation an operation runs: one small table per operation, chosen by name or by device.

A table maps a backend's name to "module:function", so that a backend is imported when it first runs: Triton and fla are
slow to import, and not everywhere.
"""

import functools
import importlib
import importlib.util
import logging
import os
import re
from collections.abc import Callable, Mapping

import torch

log = logging.getLogger(__name__)
CHOSEN: dict[str, str] = {}
"""operation -> backend that ran last; stamped into results."""


class UnavailableBackend(ValueError):
    """A backend that was asked for by name, and is unknown or cannot run here."""


PREFERENCE = {"cuda": ("triton", "torch"), "cpu": ("torch",)}
NEEDS = {"triton": "triton", "triton_recurrent": "triton", "fla": "fla"}
"""backend -> the package that it needs, and a GPU with it"""

TRITON_ON_HOPPER = (3, 7, 1)
"""Compiled for sm_90 by triton 3.2 and 3.4 to 3.7.0, products of a transposed operand, as in our kernels, may be wrong
(triton issues 6124 and 11781, fla issues 640 and 1262)."""
ANY_TRITON = "LIGHTNING_MIXERS_ANY_TRITON"
"""Environment variable: 1 runs the Triton backends though their compiler is known to go wrong, with a warning."""


def choose(operation: str, backend: str, table: Mapping[str, str], device: torch.device) -> tuple[str, Callable]:
    """Name and function of `backend`, `auto` being the first of the device's preferences that is available.

    Raises:
        UnavailableBackend: the operation has no backend of that name, or it cannot run here, and why.
    """
    name = _resolve(operation, backend, tuple(table.items()), device.type)
    return name, _LOADED[operation, name]


_LOADED: dict[tuple[str, str], Callable] = {}


@torch.compiler.assume_constant_result
def _resolve(operation: str, backend: str, items: tuple[tuple[str, str], ...], device: str) -> str:
    """The backend's name, its function being loaded. torch.compile runs this once, and takes the answer as given."""
    table, asked = dict(items), backend
    if backend == "auto":
        backend = automatic(table, device)
    elif backend not in table:
        raise UnavailableBackend(f"unknown backend {backend!r} for {operation}; known: auto, {', '.join(table)}")
    elif reason := unavailable(backend, device):
        raise UnavailableBackend(f"backend {backend!r} of {operation} is not available: {reason}")
    if CHOSEN.get(operation) != backend:
        CHOSEN[operation] = backend
        if (NEEDS.get(backend) == "triton" or asked == "auto") and (reason := distrusted(device)):
            log.warning("%s runs on the %s backend: %s", operation, backend, reason)
        log.info("%s runs on the %s backend", operation, backend)
    module, _, name = table[backend].partition(":")
    _LOADED[operation, backend] = getattr(importlib.import_module(module), name)
    return backend


def automatic(table: Mapping[str, str], device: str) -> str:
    """The backend that `auto` stands for on a type of device."""
    wanted = PREFERENCE.get(device, ("torch",))
    return next(name for name in wanted if name in table and not unavailable(name, device))


def unavailable(backend: str, device: str) -> str:
    """Why a backend cannot run on a type of device; empty if it can. Triton's interpreter runs on any."""
    package = NEEDS.get(backend)
    if package is None:
        return ""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if device != "cuda" and not (package == "triton" and interpreted()):
        return f"it needs a CUDA device, and the tensors are on {device}"
    if package == "triton" and os.environ.get(ANY_TRITON) != "1":
        return distrusted(device)
    return ""


def distrusted(device: str) -> str:
    """Why Triton's results on a type of device are not to be trusted; empty if they are."""
    if device != "cuda" or interpreted() or not _on_hopper():
        return ""
    here = importlib.import_module("triton").__version__
    if tuple(int(part) for part in re.findall(r"\d+", here)[:3]) >= TRITON_ON_HOPPER:
        return ""
    wanted = ".".join(map(str, TRITON_ON_HOPPER))
    return (
        f"triton {here} may compute wrong products on sm_90, {wanted} is needed ({ANY_TRITON}=1 runs it all the same)"
    )


@functools.cache
def _on_hopper() -> bool:
    return any(torch.cuda.get_device_capability(i)[0] == 9 for i in range(torch.cuda.device_count()))


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors: a debugging aid, very slow."""
    return os.environ.get("TRITON_INTERPRET") == "1"
