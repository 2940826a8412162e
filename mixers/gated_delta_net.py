"""Gated DeltaNet (arXiv 2412.06464) and its ancestors: a mixer that is nothing but a recurrent memory.

y_t = W_o[RMSNorm(r_t) * SiLU(W_g x_t + b_g)]         r_t from `mixers.memory`
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels import decoding
from kernels.read_out import read_out
from kernels.sequences import Layout
from mixers.base import Mixer, MixerOutput
from mixers.in_place import InPlaceState
from mixers.layers import cast_once, parts_of, start_biases_at_zero
from mixers.memory import Memory
from mixers.registry import SpecError, check_positive, check_range
from mixers.state import MixerState


@dataclass
class RecurrentState(MixerState):
    """The state of a recurrent mixer.

    Attributes:
        recurrent: (N, H, K, V) float32, or float64 in a float64 model: the memory.
        conv: (N, taps - 1, channels), the tail of the convolution.
    """

    recurrent: Tensor
    conv: Tensor

    @property
    def full_kv_bytes(self) -> int:
        """Bytes that keys and values of all tokens would take, were they kept."""
        _, H, K, V = self.recurrent.shape
        return int(self.length.sum()) * H * (K + V) * self.conv.element_size()


class GatedDeltaNet(Mixer):
    """Delta rule with decay.

    Args:
        dim: width D.
        num_heads: heads of queries and keys.
        head_dim: K, of a query or key; default dim // num_heads.
        value_dim: V, of a value; default `head_dim`.
        num_value_heads: heads of values, each with a state of its own; a multiple of, and by default, `num_heads`.
        num_kv_heads: heads of keys and values, each with a state of its own that a group of queries reads; a divisor
            of, and by default, `num_heads`.
        conv_size: taps of the short convolution, at least 2.
        norm_eps: of the read-out's RMSNorm.
        rule: another recurrence than the mixer's own, see `mixers.memory`.
        backend: of the recurrence, see `kernels.delta_rule`.
        bias: of the projections to q, k and v and to the output.
    """

    rule = "gated_delta_net"

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        head_dim: int | None = None,
        value_dim: int | None = None,
        num_value_heads: int | None = None,
        num_kv_heads: int | None = None,
        conv_size: int = 4,
        norm_eps: float = 1e-5,
        rule: str | None = None,
        backend: str = "auto",
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.dim = dim
        check_positive(num_heads=num_heads)
        check_range(0, norm_eps=norm_eps)
        self.memory = Memory(
            dim,
            num_heads=num_heads,
            head_dim=dim // num_heads if head_dim is None else head_dim,
            value_dim=value_dim,
            num_value_heads=num_value_heads,
            num_kv_heads=num_kv_heads,
            conv_size=conv_size,
            rule=rule or self.rule,
            backend=backend,
            bias=bias,
        )
        inner = self.memory.num_reads * self.memory.value_dim
        self.norm = nn.RMSNorm(self.memory.value_dim, eps=norm_eps)
        self.gate = nn.Linear(dim, inner)
        nn.init.ones_(self.gate.bias)  # starts open: a gate of random sign hides what the memory answers
        self.out = nn.Linear(inner, dim, bias=bias)
        start_biases_at_zero(self.out)

    @property
    def num_kv_heads(self) -> int:
        """Heads of values, each with a state; of keys as many, or `num_heads` if those are fewer."""
        return self.memory.num_states

    def init_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> RecurrentState:
        recurrent, conv = self.memory.init_state(batch_size, device, dtype)
        return RecurrentState(torch.zeros(batch_size, dtype=torch.long, device=recurrent.device), recurrent, conv)

    def read_norm(self) -> tuple[Tensor, float]:
        """Weight and eps of the read-out's norm, which a kernel computes; SpecError if it is another module."""
        if not isinstance(self.norm, nn.RMSNorm):
            raise SpecError(
                f"the norm of {type(self).__name__}'s read-out is computed as torch's RMSNorm, and cannot be replaced"
                f" by {type(self.norm).__name__}"
            )
        return self.norm.weight, self.norm.eps

    def projections(self) -> dict[str, Tensor]:
        return parts_of(self.memory.qkv, self.memory.widths, self.out, "weight")

    def biases(self) -> dict[str, Tensor]:
        return parts_of(self.memory.qkv, self.memory.widths, self.out, "bias")

    def mix(self, x: Tensor, state: RecurrentState | None, layout: Layout) -> MixerOutput:
        x = cast_once(x)
        recurrent, conv = (None, None) if state is None else (state.recurrent, state.conv)
        m = self.memory(x, recurrent, conv, layout, predict="none")
        hidden = self.out(read_out(m.read, *self.read_norm(), self.gate(x)))
        if state is not None:
            state = RecurrentState(state.length + layout.lengths, m.recurrent, m.conv)
        return MixerOutput(hidden, state)

    def step(self, x: Tensor, state: InPlaceState, layout: Layout) -> MixerOutput:
        if not (type(self).mix is GatedDeltaNet.mix and decoding.runs(x.device.type, self.memory.backend)):
            return super().step(x, state, layout)
        from mixers import fused_step  # needs Triton

        return MixerOutput(fused_step.recurrent(self, x, state.held), state)


class DeltaNet(GatedDeltaNet):
    """Delta rule without decay (arXiv 2102.11174, 2406.06484); options as for `gated_delta_net`."""

    rule = "delta_net"


class LinearAttention(GatedDeltaNet):
    """Additive rule without decay (arXiv 2006.16236); options as for `gated_delta_net`."""

    rule = "linear_attention"
