"""HAM around the attention of a pretrained model: the host's own attention over fewer tokens, and a memory beside it.

Per key head, with the host's k_t, v_t, the queries q_t of its group and the input h_t of the attention module:

    k^_t = norm(W_k k_t), q^_t = norm(W_q q_t)            the memory's keys and queries; W start at the identity
    p_t = alpha_t S_{t-1} k^_t                            prediction
    m_t = [e_t > tau] or t < sinks                        stored or not; e_t = router(h_t, k_t, v_t, p_t, ...)
    S_t = alpha_t S_{t-1} + (1 - m_t) beta_t (v_t - p_t) k^_t^T     the gated delta rule (arXiv 2412.06464)
    r_t = S_t q^_t                                        its read-out, for every query of the group
    a_t = sum_{j<=t: m_j or t-j < window} softmax_j(scale q_t.k_j) v_j      the host's attention over what is kept
    y_t = a_t + f_t sigmoid(w.h_t + b) M r_t              M starts at zero; f_t: share of the tokens so far not stored

What is stored is not written: the memory is left what attention will not see. (A router that looks at p_t cannot be
asked before S is known; with such, all tokens are written.) At KV usage 1, where f_t = 0 and every token is stored, y_t
is what the host computes, after any training as well as before. Norms, biases, rotary positions, grouped heads and
scale are the host's: they are in q, k and scale already.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.delta_rule import gated_delta_rule
from kernels.routed_attention import BACKENDS
from kernels.sequences import Layout
from mixers.always_seen import are_sinks, check_always_seen, counted, stored_behind
from mixers.base import Mixer, MixerOutput, Routing
from mixers.caches.paged import KVCache, attend_new
from mixers.layers import normalise
from mixers.registry import ROUTERS, THRESHOLDS, check_range, unknown
from mixers.routers.base import RouterInputs, RouterState
from mixers.routers.contract import name_of, score
from mixers.state import MixerState

FORGETTING = 0.003  # log-decay a token that memories start with
ROUTER = {"name": "demand", "error": False}  # what hosts get if nothing is said
OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo")  # names of output projections in transformers


@dataclass(frozen=True)
class HostSizes:
    """What a host's attention module works with.

    Attributes:
        dim: width D of its input.
        num_heads, num_kv_heads: of queries, and of keys and values.
        head_dim, value_dim: K, of a query or key, and V, of a value.
        scale: factor of q.k.
    """

    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    scale: float

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """Of the input, the queries, the keys and the values of a token, side by side."""
        keys = self.num_kv_heads
        return self.dim, self.num_heads * self.head_dim, keys * self.head_dim, keys * self.value_dim

    @property
    def groups(self) -> int:
        """Query heads of a key head."""
        return self.num_heads // self.num_kv_heads


@dataclass
class HostedState(MixerState):
    """What is kept of N sequences.

    Attributes:
        kv: keys and values of the stored tokens, in pages, and of the window.
        recurrent: (N, H, K, V) the memory, of a key head, in the dtype of the cache; None without one.
        router: what a router with a memory remembers.
    """

    kv: KVCache
    recurrent: Tensor | None = None
    router: RouterState | None = None


class HostMemory(nn.Module):
    """The recurrent memory of one layer and what it adds to the attention's read-out.

    Args:
        sizes: of the host.
    """

    def __init__(self, sizes: HostSizes) -> None:
        super().__init__()
        self.sizes = sizes
        K, V, heads, keys = sizes.head_dim, sizes.value_dim, sizes.num_heads, sizes.num_kv_heads
        self.query_map = nn.Parameter(torch.eye(K).repeat(heads, 1, 1))  # W_q (heads, K, K)
        self.key_map = nn.Parameter(torch.eye(K).repeat(keys, 1, 1))  # W_k
        self.out_map = nn.Parameter(torch.zeros(heads, V, V))  # M
        self.gate = nn.Linear(sizes.dim, heads)
        self.beta = nn.Linear(sizes.dim, keys)
        self.decay = nn.Linear(sizes.dim, keys)
        for layer in (self.gate, self.beta, self.decay):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.decay.bias, math.log(math.expm1(FORGETTING)))

    def forward(self, h, q, k, v, kept: Tensor | None, recurrent: Tensor | None, layout: Layout, predict: str):
        """Read and write tokens.

        Args:
            h: (B, T, D).
            q: (B, T, heads, K).
            k, v: (B, T, H, K or V).
            kept: (B, T, H) bool, what is not written; None writes all.
            recurrent: (N, H, K, V), the state before; None is zeros.
            layout: of the sequences.
            predict: as for `kernels.delta_rule`.

        Returns:
            r (B, T, heads, V), prediction of the key heads or None, new state, g and beta (B, T, H) float32.
        """
        h = h * (h.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt().to(h.dtype)  # hosts differ in scale
        exact = torch.float64 if h.dtype == torch.float64 else torch.float32
        q = normalise(torch.einsum("bthk,hkl->bthl", q, self.query_map.to(q.dtype)))
        k = normalise(torch.einsum("bthk,hkl->bthl", k, self.key_map.to(k.dtype)))
        beta = self.beta(h).to(exact).sigmoid()
        beta = beta if kept is None else beta * ~kept
        g = -F.softplus(self.decay(h).to(exact))
        options = dict(scale=1.0, initial_state=recurrent, cu_seqlens=layout, predict=predict)
        return *gated_delta_rule(q, k, v, g, beta, **options), g, beta

    def added(self, h: Tensor, read: Tensor, missing: Tensor) -> Tensor:
        """f sigmoid(w.h + b) M r (B, T, heads, V); `missing` (B, T, H) is f."""
        h = h * (h.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt().to(h.dtype)
        gate = self.gate(h).sigmoid() * missing.repeat_interleave(self.sizes.groups, 2).to(h.dtype)
        return torch.einsum("bthv,hvw->bthw", read, self.out_map.to(read.dtype)) * gate[..., None]


class HostedHAM(Mixer):
    """What stands in for the attention function of one layer of a host; `mixers.retrofit.attach` makes it.

    Its input is what the host's attention would read, side by side in one row per token: the input of the module, then
    queries, keys and values (B, T, D + heads K + H (K + V)); its hidden is what that attention would answer, (B, T,
    heads V).

    Args:
        sizes: of the host.
        router: spec of the router.
        kv_usage: kept tokens / tokens, window and sinks among them, in [0, 1].
        window: the last tokens, the query's own among them, are seen whether stored or not; at least 1.
        sinks: the first tokens of a sequence are always stored.
        memory: False leaves the memory's read-out away.
        scope: of the threshold: `model`, `layer` or `head`.
        attention_backend: of `kernels.routed_attention`.
    """

    routes = True

    def __init__(
        self,
        sizes: HostSizes,
        *,
        router: str | dict = ROUTER,
        kv_usage: float = 1.0,
        window: int = 32,
        sinks: int = 4,
        memory: bool = True,
        scope: str = "model",
        attention_backend: str = "auto",
    ) -> None:
        super().__init__()
        check_always_seen(window, sinks)
        check_range(1, window=window)
        if attention_backend != "auto" and attention_backend not in BACKENDS:
            raise unknown("attention_backend", attention_backend, ["auto", *BACKENDS], of=" for HAM around a host")
        self.sizes, self.dim = sizes, sum(sizes.widths)
        self.window, self.sinks, self.attention_backend = window, sinks, attention_backend
        heads = sizes.num_kv_heads
        self.router = ROUTERS.build(router, sizes.dim, heads)
        self.threshold = THRESHOLDS.build("calibrated", heads, kv_usage=kv_usage, scope=scope)
        self.threshold.router = name_of(self.router) if self.router.tells_tokens_apart else ""
        self.register_buffer("head_bias", torch.zeros(heads, dtype=torch.float32))
        self.adds_memory = memory
        self.memory = HostMemory(sizes) if memory or self.router.predict != "none" else None
        self.host: tuple[nn.Module, ...] = ()  # in a tuple, so that its weights are not ours

    def _apply(self, fn, recurse=True):
        """Follow the host to its device and dtype, but for what is compared with thresholds."""
        bias = self.head_bias
        super()._apply(fn, recurse)
        self.head_bias = bias.to(self.head_bias.device)
        return self

    @property
    def num_heads(self) -> int:
        """Heads that are scored: those of keys."""
        return self.sizes.num_kv_heads

    @property
    def looks_at_errors(self) -> bool:
        """Whether the router wants the memory's prediction, so that all tokens are written."""
        return self.router.predict != "none"

    def init_state(self, batch_size: int, device=None, dtype=None) -> HostedState:
        device = self.head_bias.device if device is None else device
        dtype = torch.float32 if dtype is None else dtype
        s, heads = self.sizes, self.num_heads
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        recurrent = None
        if self.memory is not None:
            # rounded between calls, computed in `exact`: in bfloat16 400 decoded tokens of SmolLM2 moved by 4e-5 in KL
            recurrent = torch.zeros(batch_size, heads, s.head_dim, s.value_dim, dtype=dtype, device=device)
        cache = KVCache.empty(batch_size, heads, s.head_dim, s.value_dim, dtype=dtype, device=device)
        length = torch.zeros(batch_size, dtype=torch.long, device=device)
        router = self.router.init_state(batch_size, device, exact)
        return HostedState(length, cache, recurrent, router)

    def window_size(self) -> int:
        return max(self.window, self.router.window(self.threshold.kv_usage))

    def mix(self, x: Tensor, state: HostedState | None, layout: Layout) -> MixerOutput:
        s = self.sizes
        h, q, k, v = x.split(s.widths, -1)
        q, k, v = (y.unflatten(-1, (-1, dim)) for y, dim in ((q, s.head_dim), (k, s.head_dim), (v, s.value_dim)))
        positions = layout.positions_after(None if state is None else state.length)

        # a router that looks at predictions is asked after the memory, any other before
        recurrent = None if state is None else state.recurrent
        read = prediction = None
        g = beta = h.new_zeros(*h.shape[:2], self.num_heads, dtype=torch.float32)
        if self.looks_at_errors:
            read, prediction, recurrent, g, beta = self.memory(h, q, k, v, None, recurrent, layout, self.router.predict)
        inputs = self._router_inputs(h, q, k, v, prediction, g, beta, positions, state, layout)
        scores, remembered = score(self.router, inputs)
        scores = scores.float() + self.head_bias.float()
        learning = self.training and self.threshold.learns(state)
        if learning:
            always = counted(scores, layout, positions, self.window_size(), self.sinks)
            self.threshold.observe(self.layer_index, always)
        tau = of_token = self.threshold.tau(learning).to(scores.device).expand(self.num_heads)
        if learning and self.threshold.usages is not None:
            of_token = self.threshold.tau_per_sequence(layout).to(scores.device)
        stored = (scores > of_token) | are_sinks(positions, self.sinks)
        if self.adds_memory and not self.looks_at_errors:
            read, _, recurrent, g, beta = self.memory(h, q, k, v, stored, recurrent, layout, "none")

        window = self.window_size()
        options = dict(scale=s.scale, window=window, backend=self.attention_backend)
        cache = None
        if state is None:
            y = attend_new(q, k, v, stored, layout, **options)
        else:
            y, cache = state.kv.attend(q, k, v, stored, scores, layout, **options)
        if self.adds_memory:
            count = _running(stored, layout)
            if state is not None:  # the pages hold what was stored before
                count = count + layout.per_token(state.kv.pages.length.long().view(-1, self.num_heads))
            missing = 1 - count / (positions + 1)[..., None]
            y = y + self.memory.added(h, read, missing).to(y.dtype)

        behind = stored_behind(stored, layout, window)
        routing = Routing(scores, stored, tau, g, layout.lengths, window, behind=behind)
        if state is not None:
            recurrent = None if recurrent is None else recurrent.to(state.recurrent.dtype)
            state = HostedState(state.length + layout.lengths, cache, recurrent, remembered)
        return MixerOutput(y.flatten(2), state, routing)

    def _router_inputs(self, h, q, k, v, prediction, g, beta, positions, state, layout: Layout) -> RouterInputs:
        remembered = self.router.init_state(len(layout), g.device, g.dtype) if state is None else state.router
        mean = q.unflatten(2, (self.num_heads, -1)).mean(3) * self.sizes.scale
        h, q, k, v, g, beta = (x.detach() for x in (h, mean, k, v, g, beta))
        answer = self.router.asked_for(None if prediction is None else prediction.detach())
        options = dict(layer=self.layer_index, layout=layout, output_weight=self._flat_output_weight())
        return RouterInputs(h, q, k, v, g=g, beta=beta, positions=positions, state=remembered, **answer, **options)

    def output_weight(self) -> Tensor | None:
        """(groups, D, H, V) of the host's output projection, None where that is not known."""
        width = self.sizes.num_heads * self.sizes.value_dim
        found = [getattr(module, name, None) for module in self.host for name in OUTPUTS]
        weights = [x.weight.T if type(x).__name__ == "Conv1D" else x.weight for x in found if hasattr(x, "weight")]
        weight = next((w for w in weights if w.ndim == 2 and w.shape[1] == width), None)
        if weight is None:
            return None
        heads = weight.detach().unflatten(1, (self.num_heads, self.sizes.groups, -1))  # (D, H, groups, V)
        return heads.permute(2, 0, 1, 3)

    def _flat_output_weight(self) -> Tensor | None:
        """(groups D, H, V), for routers: a change of a key head's values changes the output by each of its queries."""
        weight = self.output_weight()
        return None if weight is None else weight.flatten(0, 1)

    def scores(self, h: Tensor, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        """Scores (B, T, H) float32 of whole sequences, from the parts of the input."""
        prediction, g = None, h.new_zeros(*h.shape[:2], self.num_heads, dtype=torch.float32)
        beta = g
        if self.looks_at_errors:
            _, prediction, _, g, beta = self.memory(h, q, k, v, None, None, layout, self.router.predict)
        inputs = self._router_inputs(h, q, k, v, prediction, g, beta, layout.positions, None, layout)
        return score(self.router, inputs)[0].float() + self.head_bias.float()

    def remember(self, h: Tensor, q: Tensor, k: Tensor, v: Tensor, stored: Tensor, layout: Layout) -> Tensor:
        """What the memory adds (B, T, heads, V) to the read-out of whole sequences, given what is stored (B, T, H)."""
        kept = None if self.looks_at_errors else stored
        read, *_ = self.memory(h, q, k, v, kept, None, layout, "none")
        missing = 1 - _running(stored, layout) / (layout.positions + 1)[..., None]
        return self.memory.added(h, read, missing)


def _running(stored: Tensor, layout: Layout) -> Tensor:
    """(B, T, H) how many tokens of the sequence are stored up to each, its own included."""
    count = stored.long().cumsum(1)
    if not layout.packed:
        return count
    starts = (layout.cu_seqlens[:-1].long() - 1).clamp(min=0)
    before = count[0, starts] * (layout.cu_seqlens[:-1] > 0)[:, None]
    return count - layout.per_token(before)
