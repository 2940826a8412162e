"""HAM, the Hybrid Associative Memory (arXiv 2603.22325): a recurrent memory of everything and attention over surprises.

Per head, with q_t, k_t, v_t = SiLU(conv(W x_t)), k_t and q_t normalised, log-decay g_t, alpha_t = exp(g_t), and write
strength beta_t (`mixers.memory`):

    p_t = alpha_t S_{t-1} k_t                       1  prediction: what the memory answers before the token is written
    u_t = beta_t (v_t - p_t)                        2  what is written
    S_t = alpha_t S_{t-1} + u_t k_t^T               3  the memory: the gated delta rule (arXiv 2412.06464)
    r_t = S_t q_t                                   4  its read-out
    m_t = [e_t > tau],  e_t = router(p_t, v_t, u_t, ...)          5  stored or not: how badly is the token predicted?
    a_t = sum_{j<=t, m_j} softmax_j(exp(s) q_t.k_j) v_j           6  attention to what is stored; 0 if nothing is
                                                                     (and, if asked for, to a window and sinks)
    y_t = W_o[(g_RNN RMSNorm(r_t) + g_KV a_t) * SiLU(W_g x_t)]    7  the output

with combine = "gates", g_RNN and g_KV = sigmoid(W x_t) per head; with combine = "sum" both are 1. The two memories
share q, k and v; attention has no positions of its own. Where nothing is stored, the layer is its recurrent rule's.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels import decoding
from kernels.output_norm.torch_gram import gram
from kernels.read_out import read_out
from kernels.routed_attention import BACKENDS
from kernels.sequences import Layout
from mixers.always_seen import are_sinks, check_always_seen, counted, stored_behind
from mixers.base import MixerOutput, Routing
from mixers.caches.bounded import BoundedCache
from mixers.caches.paged import KVCache, attend_new
from mixers.gated_delta_net import GatedDeltaNet, RecurrentState
from mixers.in_place import InPlaceState, version
from mixers.layers import cast_once
from mixers.memory import MemoryRead
from mixers.registry import ROUTERS, THRESHOLDS, SpecError, parse_spec, unknown
from mixers.routers.base import RouterInputs, RouterState
from mixers.routers.contract import examine, name_of, score
from mixers.routers.residual import Residual

GATE_TEMPERATURE = 0.1  # of the straight-through gate that trains a learned router or threshold, in units of its score


@dataclass
class HAMState(RecurrentState):
    """The recurrent memory, the keys and values that are stored, and what a router with a memory remembers."""

    kv: KVCache | BoundedCache
    router: RouterState | None = None


class HAM(GatedDeltaNet):
    """Recurrent memory plus attention over the tokens that it predicts badly.

    Args:
        dim: width D.
        router: spec of the router.
        kv_usage: stored tokens / tokens over the threshold's scope, in [0, 1].
        threshold: spec of the threshold.
        scope: of the threshold: `model`, `layer` or `head`.
        combine: `sum` or `gates`, how the two read-outs become one.
        window: the last `window` tokens, the query's own among them, are seen, stored or not; of this and the router's
            own window the larger counts.
        sinks: the first `sinks` tokens of every sequence are stored. Both count in the KV usage, see
            `mixers.always_seen`.
        max_tokens: stored tokens that a head keeps of a sequence, the best by score, beside window and sinks; 0 keeps
            all. It bounds memory, not time: attention then looks at every pair of a block.
        attention_backend: of `kernels.routed_attention`.
        options: of `gated_delta_net`; `rule` picks the recurrence.
    """

    routes = True

    def __init__(
        self,
        dim: int,
        *,
        router: str | dict = "residual",
        kv_usage: float = 0.25,
        threshold: str | dict = "calibrated",
        scope: str = "model",
        combine: str = "gates",
        window: int = 0,
        sinks: int = 0,
        max_tokens: int = 0,
        attention_backend: str = "auto",
        **options,
    ) -> None:
        super().__init__(dim, **options)
        if self.memory.backend == "fla":
            raise SpecError("mixer 'ham' needs the memory's prediction, which backend 'fla' does not give")
        if combine not in ("sum", "gates"):
            raise unknown("combine", combine, ("sum", "gates"), of=" for mixer 'ham'")
        check_always_seen(window, sinks)
        if max_tokens < 0:
            raise SpecError(f"max_tokens must be 0 (no limit) or a number of tokens, got {max_tokens}")
        if attention_backend != "auto" and attention_backend not in BACKENDS:
            raise unknown("attention_backend", attention_backend, ["auto", *BACKENDS], of=" for mixer 'ham'")
        self.combine, self.attention_backend = combine, attention_backend
        self.window, self.sinks, self.max_tokens = window, sinks, max_tokens
        for option in ("kv_usage", "scope"):
            if option in parse_spec(threshold):
                raise SpecError(f"{option!r} is an option of mixer 'ham', not of its threshold")
        heads, reads = self.memory.num_states, self.memory.num_reads
        self.router = ROUTERS.build(router, dim, heads)
        self.threshold = THRESHOLDS.build(threshold, heads, kv_usage=kv_usage, scope=scope)
        self.threshold.router = name_of(self.router) if self.router.tells_tokens_apart else ""
        self._examined = False  # the router, once
        self.register_buffer("head_bias", torch.zeros(heads))  # of the scores; `mixers.allocate` sets it
        self.log_scale = nn.Parameter(torch.full((reads,), math.log(2 * math.sqrt(self.memory.head_dim))))  # s
        self.log_scale._no_weight_decay = True
        if combine == "gates":
            self.read_gates = nn.Linear(dim, 2 * reads)

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
    ) -> HAMState:
        memory = super().init_state(batch_size, device, dtype)
        router = self.router.init_state(batch_size, memory.recurrent.device, memory.recurrent.dtype)
        cache = self._cache(batch_size, memory.conv.dtype, memory.conv.device)
        return HAMState(**vars(memory), kv=cache, router=router)

    def window_size(self) -> int:
        return max(self.window, self.router.window(self.kv_usage))

    def _cache(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> KVCache | BoundedCache:
        sizes = batch_size, self.num_heads, self.memory.head_dim, self.memory.value_dim
        if self.max_tokens:
            return BoundedCache.empty(*sizes, limit=self.max_tokens + self.sinks, dtype=dtype, device=device)
        return KVCache.empty(*sizes, dtype=dtype, device=device)

    def mix(self, x: Tensor, state: HAMState | None, layout: Layout) -> MixerOutput:
        # 1 to 4: q (B, T, R, K), k (B, T, H, K); r (B, T, R, V), v, p (B, T, H, V); g, beta (B, T, H); S (N, H, K, V)
        # R = H, or R / H queries, a group, share the key, the value, the state and what is stored of one of the H heads
        given, x = x, cast_once(x)
        m = self._remember(x, state, layout)
        q = m.q * self.log_scale.exp().to(m.q.dtype)[:, None]

        # 5: e, stored (B, T, H); tau (H,), or of every token's sequence (N or 1, 1 or T, H)
        inputs = self._router_inputs(given, q, m, state, layout)
        ranked, remembered = self._score(inputs)
        scores, window = ranked + self.head_bias.float(), self.window_size()
        learning = self.training and self.threshold.learns(state)
        if learning:
            always = counted(scores, layout, inputs.positions, window, self.sinks)
            self.threshold.observe(self.layer_index, always)
        tau = of_token = self.threshold.tau(learning).expand(self.num_heads)
        if learning and self.threshold.usages is not None:
            of_token = self.threshold.tau_per_sequence(layout)
        stored = scores > of_token
        ranks = scores  # of what is stored
        if self.sinks:
            sinks = are_sinks(inputs.positions, self.sinks)
            stored, ranks = stored | sinks, scores.masked_fill(sinks, torch.inf)
        v, aux_loss = m.v, None
        if learning and len(x):  # a mean of no sequence is none
            aux_loss = _sum(self.router.loss(inputs, ranked), self.threshold.loss(always))
            if self.router.trained_by_gate or self.threshold.trained_by_gate:
                v = v * _straight_through(ranks, of_token).to(v.dtype)[..., None]

        # 6: a (B, T, R, V)
        a, cache = self._attend(q, m.k, v, stored, ranks, window, state, layout)

        # 7: (B, T, D)
        gates = self.read_gates(x) if self.combine == "gates" else None
        hidden = self.out(read_out(m.read, *self.read_norm(), self.gate(x), a, gates))

        limit = self.max_tokens and self.max_tokens + self.sinks
        behind = stored_behind(stored, layout, window) if window or limit else None
        routing = Routing(scores, stored, tau, m.g, layout.lengths, window, limit, behind)
        if state is not None:
            state = HAMState(state.length + layout.lengths, m.recurrent, m.conv, cache, remembered)
        return MixerOutput(hidden, state, routing, aux_loss)

    def reserve(self, state: HAMState | InPlaceState, tokens: int, kv_usage: float = 1.0) -> InPlaceState:
        self.threshold.tau(training=False)  # what it asks the device, it asks once
        made = super().reserve(state, tokens, kv_usage)
        with torch.inference_mode(False), torch.no_grad():
            N = len(made.length)
            made.constants = {"one": made.length.new_ones(N), "none": made.length.new_zeros(N, self.num_heads)}
            if type(self.router) is Residual and self.router.space == "output":  # `RouterInputs.gram`
                weight = self.output_weight().to(made.held.recurrent.dtype)
                made.constants |= {"gram": gram(weight).contiguous(), "of": version(self.out.weight), "out": self.out}
        return made

    def step(self, x: Tensor, state: InPlaceState, layout: Layout) -> MixerOutput:
        backends = self.memory.backend, self.attention_backend
        ours = type(self) is HAM and not self.training
        if not (ours and decoding.runs(x.device.type, *backends)):
            return super().step(x, state, layout)
        from mixers import fused_step  # needs Triton

        hidden, routing = fused_step.routed(self, x, state, layout)
        return MixerOutput(hidden, state, routing)

    def _remember(self, x: Tensor, state: HAMState | None, layout: Layout) -> MemoryRead:
        """Equations 1 to 4. A subclass may give the router other predictions, or write other tokens."""
        recurrent, conv = (None, None) if state is None else (state.recurrent, state.conv)
        return self.memory(x, recurrent, conv, layout, predict=self.router.predict)

    def _router_inputs(self, x: Tensor, q: Tensor, m: MemoryRead, state, layout: Layout) -> RouterInputs:
        # scores choose tokens, and a choice has no gradient: what they are made of is detached
        parts = (q, m.k, m.v, m.prediction, m.g, m.beta)
        q, k, v, prediction, g, beta = (None if part is None else part.detach() for part in parts)
        if state is None:
            positions, remembered = layout.positions, self.router.init_state(len(layout), g.device, g.dtype)
        else:
            positions, remembered = layout.positions_after(state.length), state.router
        options = dict(layer=self.layer_index, output_weight=self.output_weight(), layout=layout)
        answer = self.router.asked_for(prediction)
        return RouterInputs(x, q, k, v, g=g, beta=beta, positions=positions, state=remembered, **answer, **options)

    def output_weight(self) -> Tensor:
        """The output projection (R / H D, H, V), head by head, without its gradient."""
        weight = self.out.weight.detach().unflatten(1, (self.num_heads, -1, self.memory.value_dim))  # (D, H, R / H, V)
        return weight.transpose(1, 2).flatten(0, 1)

    def _score(self, inputs: RouterInputs) -> tuple[Tensor, RouterState | None]:
        """Scores (B, T, H) in float32 and what the router remembers; the first ones are examined."""
        x = inputs.x.detach()
        first = not (self._examined or torch.compiler.is_compiling() or x.is_meta) and len(x) and x.shape[1] > 1
        if first and x.isfinite().all():  # else the router is not to blame
            examine(self.router, inputs)
            self._examined = True
        scores, remembered = score(self.router, inputs)
        return scores.float(), remembered

    def _attend(
        self, q, k, v, stored, scores, window: int, state, layout
    ) -> tuple[Tensor, KVCache | BoundedCache | None]:
        """The read-out (B, T, R, V), and the cache that the next call goes on from."""
        if self.max_tokens:
            cache = self._cache(len(layout), k.dtype, k.device) if state is None else state.kv
            return cache.attend(q, k, v, stored, scores, layout, scale=1.0, window=window)
        options = dict(scale=1.0, window=window, backend=self.attention_backend)
        if state is None:
            return attend_new(q, k, v, stored, layout, **options), None
        return state.kv.attend(q, k, v, stored, scores, layout, **options)


def _straight_through(scores: Tensor, tau: Tensor) -> Tensor:
    """A gate that is 1 in value and passes the gradient of sigmoid((score - tau) / temperature)."""
    soft = ((scores - tau) / GATE_TEMPERATURE).nan_to_num().sigmoid()  # nan: an infinite score at usage 0 or 1
    return 1 + (soft - soft.detach())


def _sum(*losses: Tensor | None) -> Tensor | None:
    present = [loss for loss in losses if loss is not None]
    return torch.stack(present).sum() if present else None
