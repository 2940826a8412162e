"""A score that subtracts what the cache already answers: the error of memory and cache together.

    p_t   what the memory answers for k_t, before the token is written
    c_t = sum_{j<t, m_j} softmax_j(exp(s) k_t.k_j) v_j        what attention to stored tokens answers; p_t if none is
    P_t = (1 - l) p_t + l c_t,  l in [0, 1]                   the best that a mix of the two could have answered
    score_t = ||W_o^h beta_t (v_t - P_t)||                    l is what makes it smallest

Why it could help: the residual asks the memory alone. A fact that was stored and comes again is still a large write if
the memory forgot it, and takes a second place in the cache that tells attention nothing new. Here it scores 0. A key
with a new value is answered wrongly by both and scores as before, as does whatever comes before anything is stored.
(The score is never above the residual: a cache that answers nonsense is left out, by l = 0.)

Each score depends on what was stored before, so scores are found token by token, without a gradient. What was stored in
earlier calls is read from the cache itself: decoding is the same recurrence, and nothing more is remembered. It costs a
dense product of keys. In training tau is read before the step's scores are noted, so it may be a step behind.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kernels.output_norm.torch_gram import gram
from kernels.sequences import Layout
from mixers import SpecError, register_mixer
from mixers.always_seen import are_sinks
from mixers.ham import HAM, HAMState
from mixers.memory import MemoryRead
from mixers.routers.residual import Residual


@register_mixer("unanswered")
class Unanswered(HAM):
    """HAM whose router `residual`, in output space, is shown the error of memory and cache together.

    Args:
        options: of `ham`, but for `window` and `max_tokens`.
    """

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, **options)
        if type(self.router) is not Residual or self.router.space != "output":
            raise SpecError("mixer 'unanswered' needs router 'residual' in output space")
        if self.window or self.max_tokens:
            raise SpecError("mixer 'unanswered' looks into a cache without window and max_tokens: both must be 0")
        self.router.predict = "values"

    def _remember(self, x: Tensor, state: HAMState | None, layout: Layout) -> MemoryRead:
        m = super()._remember(x, state, layout)
        tau = self.threshold.tau(self.training)
        if self.training and self.threshold.usages is not None:
            tau = self.threshold.tau_per_sequence(layout)
        sinks = are_sinks(layout.positions_after(None if state is None else state.length), self.sinks)
        tau = (tau - self.head_bias).expand_as(m.beta).masked_fill(sinks, -torch.inf)
        scale = self.log_scale.detach().exp().unflatten(0, (self.num_heads, -1)).mean(1)  # of a group of queries
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            answer = _scan(m, gram(self.output_weight().to(m.beta)), tau, scale, _held(state, m), layout)
        return replace(m, prediction=answer)


def _held(state: HAMState | None, m: MemoryRead) -> list[Tensor]:
    """Keys and values (N, H, M, .) in the cache, and which of the places hold any, (N, H, M)."""
    if state is None:
        return []
    pages, heads = state.kv.pages, state.kv.heads
    rows = pages.rows(torch.arange(len(pages.length), device=m.k.device))
    return [part.unflatten(0, (-1, heads)) for part in rows]


def _scan(m: MemoryRead, gram: Tensor, tau: Tensor, scale: Tensor, held: list[Tensor], layout: Layout) -> Tensor:
    """The best mix of both answers (B, T, H, V), of which the router takes the error."""
    parts = (m.k, m.v, m.prediction, m.beta, tau)
    k, v, p, beta, tau = (layout.pad(part.to(m.beta.dtype)).transpose(1, 2) for part in parts)  # (N, H, T, ...)
    keys, values, seen = k, v, torch.zeros_like(beta, dtype=torch.bool)
    if held:
        keys, values = (torch.cat([old.to(new.dtype), new], 2) for old, new in zip(held, (k, v), strict=False))
        seen = torch.cat([held[2], seen], 2)
    logits = scale.to(k.dtype)[:, None, None] * k @ keys.mT  # (N, H, T, M + T)
    answers, M = [], keys.shape[2] - k.shape[2]
    for t in range(k.shape[2]):
        now = slice(0, M + t)
        weight = logits[:, :, t, now].masked_fill(~seen[:, :, now], -torch.inf).softmax(-1).nan_to_num(0)
        c = (weight[:, :, None] @ values[:, :, now])[:, :, 0]
        there = seen[:, :, now].any(-1, keepdim=True)
        error, step = v[:, :, t] - p[:, :, t], torch.where(there, c - p[:, :, t], 0)
        turned = (step[:, :, None] @ gram)[:, :, 0]
        share = (turned * error).sum(-1) / (turned * step).sum(-1).clamp(min=1e-12)
        mixed = share.clamp(0, 1)[..., None] * step
        u = beta[:, :, t, None] * (error - mixed)
        size = ((u[:, :, None] @ gram)[:, :, 0] * u).sum(-1).clamp(min=0).sqrt()
        seen[:, :, M + t] = size > tau[:, :, t]
        answers.append(p[:, :, t] + mixed)
    return layout.unpad(torch.stack(answers, 1))
