"""What is stored is not written: the memory is left to the tokens that attention will not see.

    p_t = alpha_t S_{t-1} k_t        u_t = beta_t (v_t - p_t)        m_t = [||W_o^h u_t|| > tau]
    S_t = alpha_t S_{t-1} + (1 - m_t) u_t k_t^T

Why it could help: a state of K x V numbers holds about K associations before they disturb each other. A token that is
stored exactly in the cache need not be there as well, and the tokens stored are those whose writes are largest and
disturb most. What could go wrong: the memory never learns what it does not know, so a stored key that comes again is
predicted as badly as before and is stored again; and of a key whose new value is stored, the memory keeps the old one.

Each score depends on what was stored before, so scores are found token by token, without a gradient; the read-out is
then one ordinary pass with beta_t (1 - m_t). There is one state, no larger than HAM's, and decoding is exact. In
training tau is read before the step's scores are noted, so that it may be a step behind that of attention.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kernels.delta_rule import gated_delta_rule
from kernels.output_norm.torch_gram import gram
from kernels.sequences import Layout
from mixers import SpecError, register_mixer
from mixers.always_seen import are_sinks
from mixers.ham import HAM, HAMState
from mixers.memory import MemoryRead
from mixers.routers.residual import Residual


@register_mixer("unwritten")
class Unwritten(HAM):
    """HAM whose memory is not written what attention stores; the router is `residual` in output space.

    Args:
        options: of `ham`, but for `max_tokens`: what leaves such a cache would be in neither memory.
    """

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, **options)
        if type(self.router) is not Residual or self.router.space != "output" or not self.memory.delta:
            raise SpecError("mixer 'unwritten' needs router 'residual' in output space, and a delta rule")
        if self.max_tokens:
            raise SpecError(f"mixer 'unwritten' keeps what it stores: max_tokens must be 0, got {self.max_tokens}")

    def _remember(self, x: Tensor, state: HAMState | None, layout: Layout) -> MemoryRead:
        m = super()._remember(x, state, layout)  # for its q, k, v, g and beta
        before = None if state is None else state.recurrent
        tau = self.threshold.tau(self.training)
        if self.training and self.threshold.usages is not None:
            tau = self.threshold.tau_per_sequence(layout)
        sinks = are_sinks(layout.positions_after(None if state is None else state.length), self.sinks)
        tau = (tau - self.head_bias).expand_as(m.beta).masked_fill(sinks, -torch.inf)
        written, stored = _scan(m, self.output_weight(), tau, before, layout)
        options = dict(scale=1.0, cu_seqlens=layout, backend=self.memory.backend, predict="none")
        read, _, recurrent = gated_delta_rule(m.q, m.k, m.v, m.g, m.beta * ~stored, initial_state=before, **options)
        return replace(m, read=read, prediction=written, recurrent=recurrent)


@torch.no_grad()
def _scan(m: MemoryRead, weight: Tensor, tau: Tensor, state: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor]:
    """What each token would write (B, T, H, V), and whether its size is above tau (B, T, H), so that it is not."""
    k, v, g, beta, tau = (layout.pad(part.to(m.beta.dtype)) for part in (m.k, m.v, m.g, m.beta, tau))
    alpha = g.exp()[..., None, None]
    S = k.new_zeros(len(k), *k.shape[2:], v.shape[3]) if state is None else state
    writes, stored = [], []
    with torch.autocast(k.device.type, enabled=False):
        G = gram(weight.to(beta.dtype))
        for t in range(k.shape[1]):
            S = alpha[:, t] * S
            u = beta[:, t, :, None] * (v[:, t] - (k[:, t, :, None] @ S)[..., 0, :])  # (N, H, V)
            size = ((u[..., None, :] @ G)[..., 0, :] * u).sum(-1).clamp(min=0).sqrt()
            writes.append(u)
            stored.append(size > tau[:, t])
            S = S + k[:, t, :, :, None] * (u * ~stored[t][..., None])[:, :, None]
    return layout.unpad(torch.stack(writes, 1)), layout.unpad(torch.stack(stored, 1))
