"""Positions on the attention side: rotary queries and keys for attention, none for the memory.

    a_t = sum_{j<=t, m_j} softmax_j(exp(s) R_t q_t . R_j k_j) v_j        R_t rotates by the position (arXiv 2104.09864)

Why it could help: attention in HAM sees a set of stored tokens without an order. Of a key that was stored with two
values it reads their mean, where the latest is asked for; the memory overwrites the older one by itself. A rotation
lets attention tell near from far. What it costs: keys of the same content look less alike the further they are apart,
which is what recall lives from; a larger `rope_base` turns more of the pairs slowly.

The memory's queries and keys, and with them predictions and scores, are as they were. Cached keys are rotated ones.
"""

from typing import Any

from torch import Tensor

from mixers import SpecError, register_mixer
from mixers.ham import HAM
from mixers.layers import rotary
from mixers.registry import check_range


@register_mixer("rotated")
class Rotated(HAM):
    """HAM whose attention has rotary positions.

    Args:
        rope_base: of the rotation's wavelengths, in tokens.
        options: of `ham`; `head_dim` is even.
    """

    def __init__(self, dim: int, *, rope_base: float = 10_000.0, **options: Any) -> None:
        super().__init__(dim, **options)
        check_range(1, rope_base=rope_base)
        if self.memory.head_dim % 2:
            raise SpecError(f"mixer 'rotated' rotates pairs: head_dim must be even, got {self.memory.head_dim}")
        self.rope_base = rope_base

    def _attend(self, q: Tensor, k: Tensor, *args: Any) -> Any:
        state, layout = args[-2:]
        positions = layout.positions_after(None if state is None else state.length)
        return super()._attend(*(rotary(part, positions, self.rope_base) for part in (q, k)), *args)
