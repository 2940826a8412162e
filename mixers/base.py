"""What a mixer is: a causal map (B, T, D) -> (B, T, D) that may carry a state from call to call."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kernels.sequences import Layout
from mixers.in_place import InPlaceState
from mixers.routers.base import Router
from mixers.state import MixerState
from mixers.threshold import Threshold


@dataclass
class Routing:
    """What a router and its threshold decided; H is the number of heads with a memory of their own.

    Attributes:
        scores: (B, T, H) float32.
        stored: (B, T, H) bool.
        tau: (H,) float32, the threshold.
        g: (B, T, H) float32, or float64 in a float64 model, log-decay of the memory, <= 0.
        lengths: (N,) int64, tokens of every sequence.
        window: the last so many tokens are kept, stored or not.
        limit: of the stored tokens of a head that the window has left behind at most so many are kept; 0 keeps all.
        behind: (N, H) int64, how many such there are of each sequence, from `mixers.always_seen.stored_behind`; needed
            with a limit. None takes all that are stored for such, which is right without a window.
    """

    scores: Tensor
    stored: Tensor
    tau: Tensor
    g: Tensor
    lengths: Tensor
    window: int = 0
    limit: int = 0
    behind: Tensor | None = None

    @property
    def kept(self) -> Tensor:
        """Tokens (H,) float that the cache holds when every sequence has been read."""
        behind = self.stored.sum(1) if self.behind is None else self.behind
        behind = behind.clamp(max=self.limit) if self.limit else behind
        return (behind.sum(0) + self.lengths.clamp(max=self.window).sum()).float()

    @property
    def usage(self) -> Tensor:
        """KV usage (H,): kept tokens / tokens."""
        return self.kept / self.lengths.sum().clamp(min=1)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Routing":
        """`function` applied to what is said of every token."""
        return replace(self, **{name: function(getattr(self, name)) for name in ("scores", "stored", "g")})


@dataclass
class MixerOutput:
    """What a mixer made of its input.

    Attributes:
        hidden: (B, T, D) in the dtype of x.
        state: the new one, if one was given.
        routing: of a mixer with a router.
        aux_loss: scalar to add to the loss in training, if the mixer has one.
    """

    hidden: Tensor
    state: MixerState | InPlaceState | None = None
    routing: Routing | None = None
    aux_loss: Tensor | None = None


class Mixer(nn.Module):
    """Base of all mixers. A subclass writes `mix` and `init_state`; packing and padding are dealt with here."""

    dim: int | None = None
    """Width D; where it is set, inputs of another width are refused."""
    layer_index = 0
    """Place of the mixer in its model, set by `mixers.share_threshold`."""
    routes = False
    """True of a mixer that stores tokens by their score: it has the three below, shows its threshold the scores of
    every training step, and stores what lies above. Thresholds are shared, calibrated and allocated by these."""
    router: Router
    threshold: Threshold
    head_bias: Tensor  # (H,) float32 buffer, added to the scores; `mixers.allocate` sets it
    _kind: dict | None = None  # of its states, once one was given
    _takes_layout = True

    def __init_subclass__(cls, **options) -> None:
        super().__init_subclass__(**options)
        cls._takes_layout = "layout" in inspect.signature(cls.mix).parameters

    def mix(self, x: Tensor, state: MixerState | None, layout: Layout) -> MixerOutput:
        """Mix tokens; what a subclass writes.

        Args:
            x: (B, T, D), T >= 1: a sequence in each row or, packed, N sequences in one.
            state: of those N sequences; it is not changed, and the output carries a new one. None: none is wanted.
            layout: their bounds, lengths and positions. (A `mix` without an argument of this name is given `cu_seqlens`
                instead: the bounds (N + 1,) int32 alone, None of a sequence in each row.)
        """
        raise NotImplementedError

    def init_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MixerState:
        """The state of `batch_size` sequences that have not begun; device and dtype are by default the weights'.

        A mixer may do without: it can then be trained and evaluated, but nothing can be written with it.
        """
        raise NotImplementedError(f"mixer {type(self).__module__}.{type(self).__qualname__} has no init_state")

    def reserve(self, state: MixerState | InPlaceState, tokens: int, kv_usage: float = 1.0) -> InPlaceState:
        """A copy of a state with places for more tokens, whose tensors stay where they are.

        It is for calls of one token, as in decoding: they write it in place and never wait for the device, so that a
        step can be one CUDA graph.

        Args:
            state: what was read so far.
            tokens: more of every sequence; a head may store all of them.
            kv_usage: share of them that all heads of a routing mixer together may store, in [0, 1].

        Raises:
            ValueError: a state of another mixer, or of one with `max_tokens`; numbers out of their ranges.
        """
        self._check(state)
        if isinstance(state, InPlaceState):
            state = state.select(torch.arange(len(state.length), device=state.length.device))
        window = self.window_size()
        share = kv_usage if self.routes else float(not window)  # what a window alone sees is in no page
        return InPlaceState.of(state, tokens, share, window)

    def step(self, x: Tensor, state: InPlaceState, layout: Layout) -> MixerOutput:
        """Mix one token of every sequence (N, 1, D); `state` is written. A mixer may do better than this."""
        out = self.mix(x, state.held, layout if self._takes_layout else layout.cu_seqlens)
        state.take(out.state)
        return replace(out, state=state)

    def projections(self) -> dict[str, Tensor]:
        """The weights (out, in) of the projections, views, so that they can be written.

        `q`, `k` and `v` of x to queries, keys and values, and `o` of what is read to the output, where the mixer has
        such.
        """
        return {}

    def biases(self) -> dict[str, Tensor]:
        """The biases (out,) of the same, views; empty where they have none."""
        return {}

    def window_size(self) -> int:
        """How many of the last tokens are attended to; 0: there is no such bound.

        A mixer that stores tokens attends to these beside them.
        """
        return 0

    def forward(
        self,
        x: Tensor,
        state: MixerState | InPlaceState | None = None,
        cu_seqlens: Tensor | Layout | None = None,
        padding_mask: Tensor | None = None,
    ) -> MixerOutput:
        """Mix tokens.

        Args:
            x: (B, T, D).
            state: from `init_state` or the last call's output; any split of T gives the same hidden as one call. One of
                fixed capacity, from `reserve`, takes one token a call and is written.
            cu_seqlens: (N + 1,) bounds of the sequences packed in one row; B is then 1 and states are of N sequences.
                A model of many layers makes a `kernels.sequences.Layout` of them once.
            padding_mask: (B, T) bool, True where x holds a real token. The hidden of padding is zero.

        Raises:
            ValueError: shapes that do not fit.
        """
        if x.ndim != 3 or x.shape[-1] != (self.dim or x.shape[-1]):
            raise ValueError(f"x must be (B, T, {self.dim or 'D'}), got {tuple(x.shape)}")
        layout = Layout.of(cu_seqlens, x)
        if state is not None:
            if not torch.compiler.is_compiling():
                self._check(state)
            if len(state.length) != len(layout):
                raise ValueError(f"the state is of {len(state.length)} sequences, the input of {len(layout)}")
        if x.shape[1] == 0:
            return MixerOutput(x, state)
        if isinstance(state, InPlaceState):
            if x.shape[1] != 1 or layout.packed or padding_mask is not None:
                how = "packed" if layout.packed else "padded" if padding_mask is not None else f"of {x.shape[1]} tokens"
                raise ValueError(f"a state of fixed capacity takes one token of every sequence, not an input {how}")
            state.begin()
            return self.step(x, state, layout)
        if padding_mask is None:
            return self.mix(x, state, layout if self._takes_layout else layout.cu_seqlens)
        packed, layout, restore = without_padding(x, layout, padding_mask)
        out = self.forward(packed, state, layout)
        routing = None if out.routing is None else out.routing.map(restore)
        return replace(out, hidden=restore(out.hidden), routing=routing)

    def _check(self, state: MixerState) -> None:
        if self._kind is None:
            self._kind = self.init_state(1).kind
        ours, theirs = self._kind, state.kind
        for name in ours | theirs:
            if ours.get(name) != theirs.get(name):
                raise ValueError(
                    f"the state is of another mixer: its {name} is {theirs.get(name)}, not {ours.get(name)}"
                )


def without_padding(x: Tensor, layout: Layout, mask: Tensor) -> tuple[Tensor, Layout, Callable[[Tensor], Tensor]]:
    """The real tokens of x (B, T, ...) packed into one row, their layout, and what puts such a row back into (B, T).

    Padding so never reaches a mixer.

    Raises:
        ValueError: `mask` is not (B, T) bool.
    """
    if mask.shape != x.shape[:2] or mask.dtype != torch.bool:
        raise ValueError(f"padding_mask must be bool {tuple(x.shape[:2])} (B, T), got {mask.dtype} {(*mask.shape,)}")
    real = nn.functional.pad(mask.flatten().cumsum(0), (1, 0))  # real tokens before every place
    bounds = real[layout.cu_seqlens.long()] if layout.packed else real[:: mask.shape[1]]
    packed = x[mask][None]

    def restore(row: Tensor) -> Tensor:
        padded = row.new_zeros(*mask.shape, *row.shape[2:])
        padded[mask] = row[0]
        return padded

    return packed, Layout.of(bounds.to(torch.int32), packed), restore
