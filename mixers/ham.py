"""HAM, the Hybrid Associative Memory (arXiv 2603.22325): a recurrent memory of everything and attention over surprises.

Per head, with q^, k^, v, g, beta, prediction p, write u and read-out r of the recurrent memory (`mixers.memory`):

    e_t = router(p_t, v_t, u_t, ...)                how badly the memory predicts the token
    m_t = [e_t > tau]                               stored or not
    a_t = sum_{j<=t, m_j} softmax_j(exp(s) q^_t.k^_j) v_j        0 where nothing is stored yet
    y_t = W_o[(g_RNN RMSNorm(r_t) + g_KV a_t) * SiLU(W_g x_t + b_g)]      combine = "gates", g = sigmoid(W x_t) per head
    y_t = W_o[(RMSNorm(r_t) + a_t) * SiLU(W_g x_t + b_g)]                 combine = "sum"

Both memories share q^, k^ and v; attention has no positions of its own. Without stored tokens the layer is the mixer of
its recurrent rule.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.routed_attention import BACKENDS, routed_attention
from kernels.sequences import pad_packed, positions_in, real_tokens, unpad
from mixers.base import MixerOutput, MixerState, Routing
from mixers.bounded_cache import BoundedCache
from mixers.gated_delta_net import GatedDeltaNet, new_tokens
from mixers.kv_cache import KVCache
from mixers.memory import MemoryRead
from mixers.registry import ROUTERS, THRESHOLDS, SpecError, parse_spec, unknown
from mixers.routers.base import RouterInputs, RouterState
from mixers.routers.contract import examine, name_of, score

GATE_TEMPERATURE = 0.1  # of the straight-through gate that trains a learned router or threshold, in units of its score


class HAM(GatedDeltaNet):
    """Recurrent memory plus attention over the tokens that it predicts badly.

    Args:
        dim: width D.
        router: spec of the router.
        kv_usage: stored tokens / tokens over the threshold's scope, in [0, 1].
        threshold: spec of the threshold.
        scope: of the threshold: `model`, `layer` or `head`.
        combine: `sum` or `gates`, how the two read-outs become one.
        max_tokens: stored tokens that a head keeps of a sequence, the best by score; 0 keeps all. It bounds memory, not
            time: attention then looks at every pair of a block.
        attention_backend: of `kernels.routed_attention`.
        options: of `gated_delta_net`; `rule` picks the recurrence.
    """

    def __init__(
        self,
        dim: int,
        *,
        router: str | dict = "residual",
        kv_usage: float = 0.25,
        threshold: str | dict = "calibrated",
        scope: str = "model",
        combine: str = "gates",
        max_tokens: int = 0,
        attention_backend: str = "auto",
        **options,
    ) -> None:
        super().__init__(dim, **options)
        if self.memory.backend == "fla":
            raise SpecError("mixer 'ham' needs the memory's prediction, which backend 'fla' does not give")
        if combine not in ("sum", "gates"):
            raise unknown("combine", combine, ("sum", "gates"), of=" for mixer 'ham'")
        if max_tokens < 0:
            raise SpecError(f"max_tokens must be 0 (no limit) or a number of tokens, got {max_tokens}")
        if attention_backend != "auto" and attention_backend not in BACKENDS:
            raise unknown("attention_backend", attention_backend, ["auto", *BACKENDS], of=" for mixer 'ham'")
        self.combine, self.max_tokens, self.attention_backend = combine, max_tokens, attention_backend
        for option in ("kv_usage", "scope"):
            if option in parse_spec(threshold):
                raise SpecError(f"{option!r} is an option of mixer 'ham', not of its threshold")
        heads = self.memory.num_states
        self.router = ROUTERS.build(router, dim, heads)
        self.threshold = THRESHOLDS.build(threshold, heads, kv_usage=kv_usage, scope=scope)
        self.threshold.router = name_of(self.router) if self.router.tells_tokens_apart else ""
        self._examined = False  # the router, once
        self.register_buffer("head_bias", torch.zeros(heads))  # of the scores; `mixers.allocate` sets it
        self.log_scale = nn.Parameter(torch.full((heads,), math.log(2 * math.sqrt(self.memory.head_dim))))  # s
        self.log_scale._no_weight_decay = True
        if combine == "gates":
            self.read_gates = nn.Linear(dim, 2 * heads)

    @property
    def num_heads(self) -> int:
        """Heads that are scored, each with a state."""
        return self.memory.num_states

    @property
    def kv_usage(self) -> float:
        """The usage asked for; `mixers.set_kv_usage` sets it."""
        return self.threshold.kv_usage

    def init_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MixerState:
        state = super().init_state(batch_size, device, dtype)
        state.router = self.router.init_state(batch_size, state.recurrent.device, state.recurrent.dtype)
        sizes = batch_size, self.num_heads, self.memory.head_dim, self.memory.value_dim
        like = dict(dtype=state.conv.dtype, device=state.conv.device)
        if self.max_tokens:
            state.kv = BoundedCache.empty(*sizes, limit=self.max_tokens, **like)
        else:
            state.kv = KVCache.empty(*sizes, **like)
        return state

    def mix(self, x: Tensor, state: MixerState | None, cu_seqlens: Tensor | None) -> MixerOutput:
        recurrent, conv = (None, None) if state is None else (state.recurrent, state.conv)
        m = self.memory(x, recurrent, conv, cu_seqlens, predict=self.router.predict)
        q = m.q * self.log_scale.exp().to(m.q.dtype)[:, None]

        inputs = self._router_inputs(x, q, m, state, cu_seqlens)
        ranked, remembered = self._score(inputs)
        scores = ranked + self.head_bias.float()
        if self.training:
            self.threshold.observe(self.layer_index, scores)
        tau = bar = self.threshold.tau(self.training).expand(self.num_heads)
        if self.training and self.threshold.usages is not None:
            bar = self.threshold.tau_per_sequence(cu_seqlens)
        stored = scores > bar
        v, aux_loss = m.v, None
        if self.training:
            aux_loss = _sum(self.router.loss(inputs, ranked), self.threshold.loss(scores))
            if self.router.trained_by_gate or self.threshold.trained_by_gate:
                v = v * _straight_through(scores, bar).to(v.dtype)[..., None]

        if self.max_tokens:
            a, kv = self._attend_bounded(q, m.k, v, scores.masked_fill(~stored, -math.inf), state, cu_seqlens)
        else:
            a, kv = self._attend(q, m.k, v, stored, state, cu_seqlens)
        hidden = self.out(self._combine(x, self.norm(m.read), a).flatten(2) * F.silu(self.gate(x)))

        new = torch.as_tensor(new_tokens(x, cu_seqlens), device=x.device)
        lengths = new.expand(len(x)) if cu_seqlens is None else new
        window = self.router.window(self.kv_usage)
        routing = Routing(scores, stored, tau, m.g.float(), lengths, window, self.max_tokens)
        if state is not None:
            state = MixerState(state.length + new, m.recurrent, m.conv, kv, remembered)
        return MixerOutput(hidden, state, routing, aux_loss)

    def _router_inputs(self, x: Tensor, q: Tensor, m: MemoryRead, state, cu_seqlens) -> RouterInputs:
        positions = torch.arange(x.shape[1], device=x.device) if cu_seqlens is None else positions_in(cu_seqlens)
        positions = positions.expand(x.shape[:2])
        if state is not None and cu_seqlens is None:
            positions = positions + state.length[:, None]
        elif state is not None:
            positions = positions + state.length.repeat_interleave(cu_seqlens.long().diff())
        # scores choose tokens, and a choice has no gradient: what they are made of is detached
        q, k, v, prediction, g, beta = (part.detach() for part in (q, m.k, m.v, m.prediction, m.g, m.beta))
        weight = self.out.weight.detach().unflatten(1, (self.num_heads, -1))
        if state is not None:
            remembered = state.router
        else:
            sequences = len(x) if cu_seqlens is None else len(cu_seqlens) - 1
            remembered = self.router.init_state(sequences, g.device, g.dtype)
        statistics = None
        if self.router.predict == "statistics":
            prediction, statistics = None, prediction
        return RouterInputs(
            x, q, k, v, prediction, g, beta, positions, self.layer_index, weight, cu_seqlens, statistics, remembered
        )

    def _score(self, inputs: RouterInputs) -> tuple[Tensor, RouterState | None]:
        """Scores (B, T, H) in float32 and what the router remembers; the first ones are examined."""
        x = inputs.x.detach()
        first = not (self._examined or torch.compiler.is_compiling() or x.is_meta) and x.shape[1] > 1
        if first and x.isfinite().all():  # else the router is not to blame
            examine(self.router, inputs)
            self._examined = True
        scores, remembered = score(self.router, inputs)
        return scores.float(), remembered

    def _attend(self, q, k, v, stored, state, cu_seqlens) -> tuple[Tensor, KVCache | None]:
        window, a = self.router.window(self.kv_usage), None
        if state is None or state.kv.fresh:
            options = dict(scale=1.0, cu_seqlens=cu_seqlens, window=window, backend=self.attention_backend)
            a = routed_attention(q, k, v, stored, **options)
            if state is None:
                return a, None
        real = real_tokens(cu_seqlens) if cu_seqlens is not None else torch.ones_like(stored[..., 0])
        if cu_seqlens is not None:
            q, k, v, stored = (pad_packed(part, real) for part in (q, k, v, stored))
        if a is not None:
            return a, state.kv.follow(k, v, stored, real, window)
        a, kv = state.kv.attend(q, k, v, stored, real, 1.0, window)
        return a if cu_seqlens is None else unpad(a, real), kv

    def _attend_bounded(self, q, k, v, scores, state, cu_seqlens) -> tuple[Tensor, BoundedCache]:
        if self.router.window(self.kv_usage):
            raise SpecError("max_tokens and a router with a window do not go together")
        real = None
        if cu_seqlens is not None:
            real = real_tokens(cu_seqlens)
            q, k, v = (pad_packed(part, real) for part in (q, k, v))
            scores = pad_packed(scores, real).masked_fill(~real[..., None], -math.inf)
        if state is None:
            sizes = len(q), self.num_heads, k.shape[-1], v.shape[-1]
            cache = BoundedCache.empty(*sizes, limit=self.max_tokens, dtype=k.dtype, device=k.device)
        else:
            cache = state.kv
        a, cache = cache.attend(q, k, v, scores, 1.0)
        return a if real is None else unpad(a, real), cache

    def _combine(self, x: Tensor, r: Tensor, a: Tensor) -> Tensor:
        if self.combine == "sum":
            return r + a
        rnn, kv = self.read_gates(x).sigmoid().unflatten(-1, (2, -1))[..., None].unbind(2)
        return rnn * r + kv * a


def _straight_through(scores: Tensor, tau: Tensor) -> Tensor:
    """A gate that is 1 in value and passes the gradient of sigmoid((score - tau) / temperature)."""
    soft = ((scores - tau) / GATE_TEMPERATURE).nan_to_num().sigmoid()  # nan: an infinite score at usage 0 or 1
    return 1 + (soft - soft.detach())


def _sum(*losses: Tensor | None) -> Tensor | None:
    present = [loss for loss in losses if loss is not None]
    return torch.stack(present).sum() if present else None
