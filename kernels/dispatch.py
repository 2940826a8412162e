"""Which implementation an operation runs: one small table per operation, chosen by name or by device."""

import logging
from collections.abc import Callable, Mapping

import torch

log = logging.getLogger(__name__)
CHOSEN: dict[str, str] = {}
"""operation -> backend that ran last; stamped into results."""

PREFERENCE = {"cuda": ("triton", "torch"), "cpu": ("torch",)}


def choose(operation: str, backend: str, table: Mapping[str, Callable], device: torch.device) -> Callable:
    """The function of `backend`, `auto` being the first of the device's preferences that the operation has.

    Raises:
        ValueError: the operation has no backend of that name.
    """
    if backend == "auto":
        backend = next(name for name in PREFERENCE.get(device.type, ("torch",)) if name in table)
    elif backend not in table:
        raise ValueError(f"unknown backend {backend!r} for {operation}; known: auto, {', '.join(table)}")
    if CHOSEN.get(operation) != backend:
        CHOSEN[operation] = backend
        log.info("%s runs on the %s backend", operation, backend)
    return table[backend]
