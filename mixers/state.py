"""What a mixer remembers of its sequences from call to call, and what any such memory answers."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from kernels.paged_attention.cache import PagedCache
from mixers.caches.bounded import BoundedCache
from mixers.caches.paged import KVCache, Recent

CACHES = (KVCache, BoundedCache)
"""What holds keys and values; all else in a state is of fixed size."""


@dataclass
class MixerState:
    """Base of all states, of N sequences.

    A mixer that remembers more than their length subclasses it as a dataclass whose fields are tensors (N, ...), dicts
    of such, caches, or None; what is asked of a state is then answered here.

    Attributes:
        length: (N,) int64, tokens seen.
    """

    length: Tensor

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        _can_be_loaded(cls)

    def map(self, function: Callable[[Tensor], Tensor]) -> "MixerState":
        """A new state, `function` applied to every tensor."""
        return self._each(lambda x: x.map(function) if isinstance(x, CACHES) else function(x))

    def select(self, index: Tensor) -> "MixerState":
        """The state of some sequences (n,) int64, in that order; one may be taken twice, as beam search does."""
        return self._each(lambda x: x.select(index) if isinstance(x, CACHES) else x[index])

    def detach(self) -> "MixerState":
        """The same without a gradient."""
        return self.map(lambda x: x.detach())

    def to(self, *args: Any, **kwargs: Any) -> "MixerState":
        """Move to a device; dtypes are the mixer's business: a recurrent memory stays in float32."""
        return self.map(lambda x: x.to(*args, **kwargs))

    @property
    def kind(self) -> dict[str, Any]:
        """What does not depend on the sequences, by field: by this a state of another mixer is told."""
        kind = self._each(lambda x: x.kind if isinstance(x, CACHES) else tuple(x.shape[1:]))
        return {field.name: getattr(kind, field.name) for field in fields(kind)}

    @property
    def bytes(self) -> int:
        """Bytes of what does not grow: all but keys and values, and the lengths."""
        found: list[int] = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "length" and not isinstance(value, CACHES):
                _each(value, lambda x: found.append(x.numel() * x.element_size()))
        return sum(found)

    @property
    def caches(self) -> list[KVCache | BoundedCache]:
        """The caches in it."""
        return [x for x in vars(self).values() if isinstance(x, CACHES)]

    @property
    def kv_bytes(self) -> int:
        """Bytes that keys and values hold, free places in pages and all."""
        return sum(cache.bytes for cache in self.caches)

    @property
    def stored_kv_bytes(self) -> int:
        """Bytes of the keys and values that are kept, and of nothing else."""
        return sum(int(cache.counts.sum()) * cache.bytes_per_token for cache in self.caches)

    @property
    def full_kv_bytes(self) -> int:
        """Bytes that the keys and values of all tokens would take."""
        return sum(int(self.length.sum()) * cache.heads * cache.bytes_per_token for cache in self.caches)

    def _each(self, function: Callable[[Any], Any]) -> "MixerState":
        return replace(self, **{field.name: _each(getattr(self, field.name), function) for field in fields(self)})


def _each(value: Any, function: Callable[[Any], Any]) -> Any:
    if value is None:
        return None
    if isinstance(value, dict):
        return {name: _each(x, function) for name, x in value.items()}
    return function(value)


def _can_be_loaded(*classes: type) -> None:
    """`torch.load` reads states that `torch.save` wrote, under its default of weights_only=True."""
    torch.serialization.add_safe_globals(list(classes))


_can_be_loaded(MixerState, KVCache, Recent, BoundedCache, PagedCache)


def kv_cache_bytes(state: Any) -> int:
    """Bytes that keys and values of `state` (of a mixer, or a list of such) hold, free places in pages and all."""
    return _sum(state, "kv_bytes")


def kv_stored_bytes(state: Any) -> int:
    """Bytes of the keys and values in `state` (of a mixer, or a list of such): kept tokens x bytes of one."""
    return _sum(state, "stored_kv_bytes")


def full_kv_bytes(state: Any) -> int:
    """Bytes that the keys and values of all tokens read would take in the heads of `state` that keep any."""
    return _sum(state, "full_kv_bytes")


def state_bytes(state: Any) -> int:
    """Bytes of the parts of `state` that do not grow: recurrent memory, convolution tail, what a router remembers."""
    return _sum(state, "bytes")


def _sum(state: Any, name: str) -> int:
    if isinstance(state, list | tuple):
        return sum(_sum(x, name) for x in state)
    return 0 if state is None else getattr(state, name)
