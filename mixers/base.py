"""What a mixer is: a causal map (B, T, D) -> (B, T, D) that may carry a state from call to call."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from kernels.decode.cache import PagedCache
from kernels.sequences import check_cu_seqlens
from mixers.bounded_cache import BoundedCache
from mixers.kv_cache import KVCache, Recent
from mixers.routers.base import RouterState


@dataclass
class Routing:
    """What a router and its threshold decided; H is the number of heads with a memory of their own.

    scores (B, T, H) float32, `stored` (B, T, H) bool, `tau` (H,) float32, `g` (B, T, H) float32 log-decay of the
    memory, `lengths` (N,) int64 tokens of every sequence; the last `window` tokens are kept, stored or not; of the
    stored tokens of a head at most `limit` are kept, if that is not 0.
    """

    scores: Tensor
    stored: Tensor
    tau: Tensor
    g: Tensor
    lengths: Tensor
    window: int = 0
    limit: int = 0

    @property
    def kept(self) -> Tensor:
        """Tokens (H,) float that the cache holds when every sequence has been read."""
        if self.limit:
            packed = len(self.lengths) != len(self.stored)
            rows = self.stored[0].split(self.lengths.tolist()) if packed else self.stored
            return sum(row.sum(0).clamp(max=self.limit) for row in rows).float()
        stored = self.stored.float().sum((0, 1))
        if self.window:
            # a router with a window stores nothing else, so the two parts do not overlap
            stored = stored + self.lengths.clamp(max=self.window).sum()
        return stored

    @property
    def usage(self) -> Tensor:
        """KV usage (H,): kept tokens / tokens."""
        return self.kept / self.lengths.sum().clamp(min=1)


@dataclass
class MixerState:
    """What a mixer remembers of N sequences: tokens seen, recurrent memory, convolution tail, keys and values, and what
    a router with a memory of its own does."""

    length: Tensor  # (N,) int64
    recurrent: Tensor | None = None  # (N, H, K, V) float32, or float64 in a float64 model
    conv: Tensor | None = None  # (N, taps - 1, channels)
    kv: KVCache | BoundedCache | None = None
    router: RouterState | None = None

    def map(self, function: Any) -> "MixerState":
        """A new state, `function` applied to every tensor."""
        return replace(self, **{f.name: _map(getattr(self, f.name), function) for f in fields(self)})

    def select(self, index: Tensor) -> "MixerState":
        """The state of some sequences (n,) int64, in that order; one may be taken twice, as beam search does."""
        kv = None if self.kv is None else self.kv.select(index)
        return replace(replace(self, kv=None).map(lambda x: x[index]), kv=kv)

    @property
    def layout(self) -> tuple:
        """What does not depend on the sequences: by this a state of another mixer is told."""
        kv = self.kv
        if kv is not None:
            pages = getattr(kv, "pages", kv)
            kv = type(kv).__name__, kv.heads, pages.k.shape[-1], pages.v.shape[-1], getattr(kv, "limit", 0)
        shapes = (_map(x, lambda x: tuple(x.shape[1:])) for x in (self.recurrent, self.conv, self.router))
        return *shapes, kv

    def detach(self) -> "MixerState":
        return self.map(lambda x: x.detach())

    def to(self, *args: Any, **kwargs: Any) -> "MixerState":
        """Move to a device. (dtypes are the mixer's business: the recurrent memory stays in float32.)"""
        return self.map(lambda x: x.to(*args, **kwargs))


# So that `torch.load` reads states that `torch.save` wrote, under its default of weights_only=True.
torch.serialization.add_safe_globals([MixerState, KVCache, Recent, BoundedCache, PagedCache])


def _map(value: Any, function: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, dict):
        return {name: function(x) for name, x in value.items()}
    return value.map(function) if isinstance(value, KVCache | BoundedCache) else function(value)


@dataclass
class MixerOutput:
    """`hidden` (B, T, D); `state` if one was given; `routing` of a mixer with a router; `aux_loss`, a scalar to add to
    the loss in training, if the mixer has one."""

    hidden: Tensor
    state: MixerState | None = None
    routing: Routing | None = None
    aux_loss: Tensor | None = None


class Mixer(nn.Module):
    """Base of all mixers. A subclass writes `mix` and `init_state`; packing and padding are dealt with here."""

    dim: int | None = None
    """Width D; where it is set, inputs of another width are refused."""
    _layout: tuple | None = None  # of the states, once one was given
    layer_index = 0
    """Place of the mixer in its model, set by `mixers.threshold.share_threshold`."""

    def mix(self, x: Tensor, state: MixerState | None, cu_seqlens: Tensor | None) -> MixerOutput:
        """Mix x (B, T, D), T >= 1: B sequences of T tokens or, with `cu_seqlens` (N + 1,), one row of N sequences.

        `state` is of B or N sequences; it is not changed, and the output carries a new one.
        """
        raise NotImplementedError

    def init_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MixerState:
        """The state of `batch_size` sequences that have not begun; device and dtype are by default the weights'.

        A mixer may do without: it can then be trained and evaluated, but nothing can be written with it.
        """
        raise NotImplementedError(f"mixer {type(self).__module__}.{type(self).__qualname__} has no init_state")

    def full_kv_bytes(self) -> int | None:
        """Bytes of keys and values that a token would take if every head kept it, which what is kept is a share of;
        None: the mixer does not say."""
        return None

    def projections(self) -> dict[str, Tensor]:
        """The weights (out, in) of the projections of x to queries `q`, keys `k` and values `v`, and of what is read to
        the output `o`, where the mixer has such; views, so that they can be written."""
        return {}

    def forward(
        self,
        x: Tensor,
        state: MixerState | None = None,
        cu_seqlens: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> MixerOutput:
        """Mix tokens.

        Args:
            x: (B, T, D).
            state: from `init_state` or the last call's output; any split of T gives the same hidden as one call.
            cu_seqlens: (N + 1,) bounds of the sequences packed in one row; B is then 1 and states are of N sequences.
            padding_mask: (B, T) bool, True where x holds a real token. The hidden of padding is zero.

        Raises:
            ValueError: shapes that do not fit.
        """
        if x.ndim != 3 or x.shape[-1] != (self.dim or x.shape[-1]):
            raise ValueError(f"x must be (B, T, {self.dim or 'D'}), got {tuple(x.shape)}")
        if state is not None and not torch.compiler.is_compiling():
            self._check(state)
        if state is not None and len(state.length) != (len(x) if cu_seqlens is None else len(cu_seqlens) - 1):
            raise ValueError(f"the state is of {len(state.length)} sequences, the input is not")
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, *x.shape[:2])
        if x.shape[1] == 0:
            return MixerOutput(x, state)
        if padding_mask is not None:
            return self._without_padding(x, state, cu_seqlens, padding_mask)
        return self.mix(x, state, cu_seqlens)

    def _check(self, state: MixerState) -> None:
        if self._layout is None:
            self._layout = self.init_state(1).layout
        for name, ours, theirs in zip(("recurrent", "conv", "router", "kv"), self._layout, state.layout, strict=True):
            if ours is not None and ours != theirs:
                raise ValueError(f"the state is of another mixer: its {name} is {theirs}, not {ours}")

    def _without_padding(self, x, state, cu_seqlens, mask) -> MixerOutput:
        """Pack the real tokens into one row, mix, and put everything back: padding never reaches a mixer."""
        if mask.shape != x.shape[:2] or mask.dtype != torch.bool:
            raise ValueError(
                f"padding_mask must be bool {tuple(x.shape[:2])} (B, T), got {mask.dtype} {(*mask.shape,)}"
            )
        real = nn.functional.pad(mask.flatten().cumsum(0), (1, 0))  # real tokens before every place
        real = real[:: mask.shape[1]] if cu_seqlens is None else real[cu_seqlens.long()]
        out = self.forward(x[mask][None], state, real.to(torch.int32))

        def back(packed: Tensor) -> Tensor:
            padded = packed.new_zeros(*mask.shape, *packed.shape[2:])
            padded[mask] = packed[0]
            return padded

        routing = out.routing
        if routing is not None:
            routing = replace(routing, scores=back(routing.scores), stored=back(routing.stored), g=back(routing.g))
        return replace(out, hidden=back(out.hidden), routing=routing)


def kv_cache_bytes(state: Any) -> int:
    """Bytes that keys and values of `state` (of a mixer, or a list of such) hold, free places in pages and all."""
    if isinstance(state, (list, tuple)):
        return sum(kv_cache_bytes(s) for s in state)
    return 0 if state is None or state.kv is None else state.kv.bytes


def kv_stored_bytes(state: Any) -> int:
    """Bytes of the keys and values in `state` (of a mixer, or a list of such): kept tokens x bytes of one."""
    if isinstance(state, (list, tuple)):
        return sum(kv_stored_bytes(s) for s in state)
    return 0 if state is None or state.kv is None else state.kv.stored_bytes


def state_bytes(state: Any) -> int:
    """Bytes of the parts of `state` that do not grow: recurrent memory, convolution tail, what the router remembers."""
    if isinstance(state, (list, tuple)):
        return sum(state_bytes(s) for s in state)
    if state is None:
        return 0
    router = state.router if isinstance(state.router, dict) else {"": state.router}
    return sum(x.numel() * x.element_size() for x in (state.recurrent, state.conv, *router.values()) if x is not None)
