"""Where a Triton kernel is launched, and on what kind of GPU that is."""

import contextlib
import functools
from collections.abc import Iterator

import torch

NOWHERE = 90
"""Compute capability that is assumed where there is no GPU: in Triton's interpreter, and of tensors without storage."""

_pretended: list[int] = []


@contextlib.contextmanager
def as_if(capability: int) -> Iterator[None]:
    """Inside, every tensor is taken to be on a GPU of that compute capability."""
    _pretended.append(capability)
    try:
        yield
    finally:
        _pretended.pop()


def capability(device: torch.device) -> int:
    """Compute capability of a device: 90 for Hopper."""
    if _pretended:
        return _pretended[-1]
    return _of_gpu(device.index) if device.type == "cuda" and torch.cuda.is_available() else NOWHERE


def warpgroups(device: torch.device) -> bool:
    """Whether it is of Hopper's kind (sm_90, sm_100): 227 KiB of shared memory, which matrix instructions read.

    The others hold their operands in registers, and some have 99 KiB.
    """
    return capability(device) // 10 in (9, 10)


@functools.cache
def _of_gpu(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def on(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Inside, kernels are launched where x is: Triton launches on the current GPU, whatever it is given."""
    return torch.cuda.device_of(x)
