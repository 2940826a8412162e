"""A mixer's state as a layer of Hugging Face's `Cache`, so that `generate` carries, reorders and repeats it."""

import weakref
from typing import Any

import torch
from torch import Tensor

from mixers.base import Mixer
from mixers.state import MixerState, kv_cache_bytes, state_bytes


def layer_of(cache: Any, index: int | None, owner: Any) -> Any:
    """The layer of a cache that belongs to a swapped mixer, made when it is first asked for.

    Args:
        cache: Hugging Face's `Cache`.
        index: of the layer in its model.
        owner: the module that asks; no other may ask for the same layer.

    Raises:
        ValueError: the cache was filled by another model, is of a fixed length or quantized, or there is no index.
    """
    if index is None:
        raise ValueError("a cache was given to a layer without layer_idx")
    while len(cache.layers) <= index:
        cache.layers.append(_layer_class()())
    layer = cache.layers[index]
    if not isinstance(layer, _layer_class()):
        if layer.get_seq_length():
            raise ValueError(f"the cache is of another model: its layer {index} holds the keys of an attention layer")
        if "Quantized" in type(layer).__name__:
            raise ValueError("a quantized cache was asked for: a mixer keeps its state in the model's own precision")
        if "Static" in type(layer).__name__:  # layers beside ours would be given masks of another length
            raise ValueError("a static cache was asked for: what a mixer stores grows; leave cache_implementation out")
        layer = cache.layers[index] = _layer_class()()
    if layer.owner is None and not layer.read:  # of a model that is gone, what was read is still not ours
        layer.owner = owner
    if layer.owner is not owner:
        raise ValueError(f"the cache is of another model: its layer {index} was filled by another mixer")
    return layer


def tokens_in(cache: Any, index: int | None) -> int:
    """Tokens, padding included, that a layer of a cache has read; 0 where it is not made yet, or of other caches."""
    layers = getattr(cache, "layers", ())
    return 0 if index is None or index >= len(layers) else int(layers[index].get_seq_length())


def leave_empty(cache: Any, index: int | None) -> None:
    """Notes that a model in training left its layer of a cache empty, as models make one even to be trained.

    Raises:
        ValueError: it has been left empty before, and now comes back to be gone on with.
    """
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:  # the latter: a layer computed again
        return
    left = cache.__dict__.setdefault("left_empty", set())
    if index in left:
        raise ValueError(
            "a model in training keeps no cache of what it read, and this one is empty: "
            "read what goes before in eval(), or under no_grad"
        )
    left.add(index)


_made: type | None = None


def _layer_class() -> type:
    """Made when it is needed: transformers takes seconds to import, and this package works without it."""
    global _made
    if _made is not None:
        return _made
    from transformers.cache_utils import CacheLayerMixin

    class MixerCacheLayer(CacheLayerMixin):
        """State of a mixer, and the tokens read, padding included, by which models number positions and size masks."""

        is_sliding = False

        def __init__(self, **_: Any) -> None:
            super().__init__()
            self.state: MixerState | None = None
            self._owner: Any = None
            self.read = 0

        @property
        def owner(self) -> Any:
            """The module whose state this is; held weakly, so that a copy of the cache is of the same module."""
            return None if self._owner is None else self._owner()

        @owner.setter
        def owner(self, module: Any) -> None:
            self._owner = weakref.ref(module)

        def state_for(self, mixer: Mixer, x: Tensor, cu_seqlens: Tensor | None = None) -> MixerState:
            """The state to read x (B, T, D) with: of its rows or, where documents are packed in them, of these."""
            if cu_seqlens is not None and self.read:
                raise ValueError("documents begin after a sequence that is in the cache: pack without a cache")
            sequences = len(x) if cu_seqlens is None else len(cu_seqlens) - 1
            if self.state is None:
                dtype = x.dtype if not torch.is_autocast_enabled(x.device.type) else None
                self.state = mixer.init_state(sequences, device=x.device, dtype=dtype)
            if len(self.state.length) != sequences:
                raise ValueError(f"the cache is of {len(self.state.length)} sequences, the input of {sequences}")
            return self.state

        def keep(self, state: MixerState, tokens: int) -> None:
            self.state, self.read = state, self.read + tokens
            self.is_initialized = True

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            pass

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any):
            if getattr(self.owner, "takes_keys", False):  # its attention function keeps what it will
                return key_states, value_states
            raise ValueError("the cache is of another model: keys were given to a layer that holds a mixer's state")

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.read + query_length, 0

        def get_seq_length(self) -> int:
            return self.read

        def get_max_length(self) -> int:
            return -1

        def reset(self) -> None:
            self.state, self.read, self.is_initialized = None, 0, False

        def reorder_cache(self, beam_idx: Tensor) -> None:
            self.batch_select_indices(beam_idx)

        def batch_select_indices(self, indices: Tensor) -> None:
            if self.state is not None:
                self.state = self.state.select(indices.to(self.state.length.device))

        def batch_repeat_interleave(self, repeats: int) -> None:
            if self.state is not None:
                rows = torch.arange(len(self.state.length), device=self.state.length.device)
                self.state = self.state.select(rows.repeat_interleave(repeats))

        def crop(self, tokens_to_remove: int) -> None:
            if tokens_to_remove:
                raise ValueError("a mixer's state cannot forget its last tokens: assisted generation needs attention")

        def offload(self) -> None:
            self.state = None if self.state is None else self.state.to("cpu")

        def prefetch(self) -> None:
            if self.state is not None and self.owner is not None:
                self.state = self.state.to(next(self.owner.parameters()).device)

        @property
        def bytes(self) -> int:
            """Bytes of keys, values and states that are held."""
            return kv_cache_bytes(self.state) + state_bytes(self.state)

    _made = MixerCacheLayer
    return _made
