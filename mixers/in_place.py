"""States of fixed capacity that a step writes where they lie, so that it can be one CUDA graph."""

import sys
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from mixers.caches.bounded import BoundedCache
from mixers.caches.fixed import FixedCache
from mixers.caches.paged import KVCache
from mixers.registry import check_positive
from mixers.state import MixerState
from mixers.threshold import check_usage


@dataclass(eq=False)
class InPlaceState:
    """The state of N sequences that calls of one token change; `Mixer.reserve` makes one.

    Attributes:
        held: what is remembered; its tensors stay where they are.
        room: tokens that surely fit, as far as the host knows.
        constants: what the mixer's step computed beforehand.
    """

    held: MixerState
    room: int = 0
    constants: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, state: MixerState, tokens: int, kv_usage: float, window: int) -> "InPlaceState":
        """As for `Mixer.reserve`; `window` is the mixer's."""
        check_positive(tokens=tokens)
        check_usage(kv_usage)

        def fixed(x: Any) -> Any:
            if isinstance(x, BoundedCache):
                raise ValueError("a cache with max_tokens has no form of fixed capacity")
            if isinstance(x, KVCache):
                return FixedCache.of(x, tokens, kv_usage, window)
            return x.detach().clone(memory_format=torch.contiguous_format)

        with torch.inference_mode(False), torch.no_grad():
            made = cls(state._each(fixed))
        made.check()
        return made

    def begin(self) -> None:
        """A step begins.

        Raises:
            ValueError: autograd is on, or the cache is full. In a CUDA graph, and under torch.compile, the host does
                not know: what finds no place is not kept, and `check` says so.
        """
        if torch.is_grad_enabled():
            raise ValueError("a state of fixed capacity is written in place, without a gradient: use torch.no_grad()")
        if torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return
        if self.room < 1 and self.check() < 1:
            raise ValueError("the cache of fixed capacity is full; `reserve` with more tokens makes a larger one")
        self.room -= 1

    def check(self) -> int:
        """Tokens of every sequence that surely fit. Waits for the device.

        Raises:
            RuntimeError: keys and values were not kept, as there was no place for them.
            ValueError: the weights that the state was reserved for have changed.
        """
        self.check_weights()
        caches = self.held.caches
        if lost := sum(int(cache.pages.lost) for cache in caches):
            raise RuntimeError(f"the cache of fixed capacity was full: {lost} keys and values were not kept")
        self.room = min((cache.pages.room() for cache in caches), default=sys.maxsize)
        return self.room

    def check_weights(self) -> None:
        """Under torch.compile and in a CUDA graph a step cannot ask this itself.

        Raises:
            ValueError: the weights that the state was reserved for have changed.
        """
        if "out" in self.constants and self.constants["of"] != version(self.constants["out"].weight):
            raise ValueError("the output projection has changed since the state was reserved; reserve it anew")

    def take(self, state: MixerState) -> None:
        """What a step made of `held`, into it.

        Raises:
            ValueError: it has another shape.
        """
        for part in fields(state):
            write(getattr(self.held, part.name), getattr(state, part.name), part.name)

    def select(self, index: Tensor) -> MixerState:
        """A copy of the state of some sequences (n,) int64 that may grow, for calls of any length."""
        return self.held.select(index)

    @property
    def length(self) -> Tensor:
        """(N,) int64, tokens seen."""
        return self.held.length

    @property
    def kind(self) -> dict[str, Any]:
        return self.held.kind

    @property
    def bytes(self) -> int:
        """As of `MixerState`."""
        return self.held.bytes

    @property
    def kv_bytes(self) -> int:
        """As of `MixerState`: free places and all."""
        return self.held.kv_bytes

    @property
    def stored_kv_bytes(self) -> int:
        """As of `MixerState`."""
        return self.held.stored_kv_bytes

    @property
    def full_kv_bytes(self) -> int:
        """As of `MixerState`."""
        return self.held.full_kv_bytes


def version(weight: Tensor) -> tuple[int, int]:
    """Changes when the weight does, but for a tensor of inference mode, which does not say."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


def write(old: Any, new: Any, name: str) -> None:
    """Tensors, or dicts of such, into others of the same shapes; what holds them is called `name`."""
    if old is new:
        return
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        for key in old:
            write(old[key], new[key], f"{name}[{key!r}]")
    elif isinstance(old, Tensor) and isinstance(new, Tensor) and old.shape == new.shape:
        old.copy_(new)
    else:
        raise ValueError(f"{name} of a state of fixed capacity cannot become {getattr(new, 'shape', new)}")
