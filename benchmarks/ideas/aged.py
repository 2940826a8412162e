"""The cache forgets as the memory does: stored tokens count less by what the memory has decayed since.

    a_t = sum_{j<=t, m_j} softmax_j(exp(s) (q_t.k_j + w (G_t - G_j))) v_j        G_t = g_1 + ... + g_t,  w > 0 learned

Why it could help: as in `rotated`, attention sees a set of stored tokens without an order, and of a key that was stored
with two values reads a mix of both, where the latest is asked for. The memory's own log-decay g_t says how fast the
past stops to matter, and is learned; attention with such a decay needs no other positions (arXiv 2503.02130). Unlike a
rotation it makes keys of the same content look no less alike, only older.

G_t is the same for all j, so it cancels in the softmax: what is left is a number -w G_j of each key. It is kept as one
more component of keys, which meets a 1 in queries: K + 1 numbers in the cache. In half precision it loses its digits as
G grows: train in float32, or under autocast at a few hundred tokens.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.sequences import Layout
from mixers import MixerOutput, SpecError, register_mixer
from mixers.caches.paged import KVCache
from mixers.ham import HAM, HAMState
from mixers.memory import MemoryRead
from mixers.routers.controls import Random
from mixers.routers.residual import Residual


@dataclass
class AgedState(HAMState):
    """HAM's, and the sum (N, H) of the log-decays so far, float32."""

    decayed: Tensor | None = None


@register_mixer("aged")
class Aged(HAM):
    """HAM whose attention prefers what was stored of late.

    Args:
        start: of w.
        options: of `ham`, but for `max_tokens`; the router is one that looks at no key, `residual` or `random`.
    """

    def __init__(self, dim: int, *, start: float = 0.1, **options: Any) -> None:
        super().__init__(dim, **options)
        if not isinstance(self.router, Residual | Random):
            raise SpecError("mixer 'aged' lengthens keys: its router is 'residual' or 'random'")
        if self.max_tokens:
            raise SpecError(f"mixer 'aged' has no bounded cache: max_tokens must be 0, got {self.max_tokens}")
        if start <= 0:
            raise SpecError(f"start of mixer 'aged' must be above 0, got {start}")
        inverse = start + math.log(-math.expm1(-start))  # of softplus
        self.forgetting = nn.Parameter(torch.full((self.num_heads,), inverse))
        self.forgetting._no_weight_decay = True

    def init_state(self, batch_size: int, *args: Any, **options: Any) -> AgedState:
        state = super().init_state(batch_size, *args, **options)
        return AgedState(**vars(state), decayed=state.recurrent.new_zeros(batch_size, self.num_heads))

    def _cache(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> KVCache:
        sizes = batch_size, self.num_heads, self.memory.head_dim + 1, self.memory.value_dim
        return KVCache.empty(*sizes, dtype=dtype, device=device)

    def _remember(self, x: Tensor, state: AgedState | None, layout: Layout) -> MemoryRead:
        m = super()._remember(x, state, layout)
        G = layout.unpad(layout.pad(m.g.clamp(min=-20)).cumsum(1))  # -20: a reset leaves nothing, and stays finite
        if state is not None:
            G = G + layout.per_token(state.decayed)
        age = -F.softplus(self.forgetting) * G
        one = torch.ones_like(m.q[..., :1])
        return replace(m, q=torch.cat([m.q, one], -1), k=torch.cat([m.k, age[..., None].to(m.k)], -1))

    def mix(self, x: Tensor, state: AgedState | None, layout: Layout) -> MixerOutput:
        output = super().mix(x, state, layout)
        if state is None:
            return output
        decayed = state.decayed + layout.pad(output.routing.g.clamp(min=-20)).sum(1)
        return replace(output, state=AgedState(**vars(output.state), decayed=decayed))
