"""One token through a mixer by the kernels of a step, in place of the operations of its `mix`."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.decoding import triton_heads, triton_memory, triton_rotary
from kernels.sequences import Layout
from mixers.base import Routing
from mixers.in_place import InPlaceState, write
from mixers.layers import cast_once
from mixers.memory import Memory, MemoryRead
from mixers.routers.base import Router
from mixers.routers.cosine import Cosine
from mixers.routers.residual import Residual

if TYPE_CHECKING:
    from mixers.attention import Attention, AttentionState
    from mixers.gated_delta_net import GatedDeltaNet, RecurrentState
    from mixers.ham import HAM, HAMState

PLACES = ("cache_k", "cache_v", "table", "length", "ring_k", "ring_v", "ring_seen", "at")
"""What the kernels call the tensors of a `FixedCache`."""


def recurrent(mixer: "GatedDeltaNet", x: Tensor, held: "RecurrentState") -> Tensor:
    """A recurrent mixer's hidden (N, 1, D); `held` is written."""
    x = cast_once(x)
    _, _, read, *_ = _remember(mixer.memory, x[:, 0], held, None, "none")
    return _answer(mixer, x, read, held, held.recurrent.dtype)


def routed(mixer: "HAM", x: Tensor, state: InPlaceState, layout: Layout) -> tuple[Tensor, Routing]:
    """A HAM's hidden (N, 1, D) and what was stored; `state` is written."""
    held, memory, window = state.held, mixer.memory, mixer.window_size()
    held.kv.check_window(window)
    if not torch.compiler.is_compiling():
        state.check_weights()
    given, x = x, cast_once(x)
    qkv, scaled, read, p, g, beta = _remember(memory, x[:, 0], held, mixer.log_scale, mixer.router.predict)
    kind, scores = _score_of(mixer.router), None
    gram = state.constants["gram"] if kind == "output" else None
    if kind == "given":
        scores = _scores(mixer, given, held, layout, (qkv, scaled, read, p, g, beta))
    tau = mixer.threshold.tau(training=False).expand(mixer.num_heads)
    heads = dict(q_heads=memory.num_heads, k_heads=memory.widths[1] // memory.head_dim, sinks=mixer.sinks)
    scores, stored = _store(held, qkv, p, kind, gram, scores, mixer.head_bias, tau, **heads)
    gates = mixer.read_gates(x[:, 0]) if mixer.combine == "gates" else None
    hidden = _answer(mixer, x, read, held, g.dtype, gates, scaled)
    routing = Routing(scores[:, None], stored[:, None], tau, g[:, None], state.constants["one"], window)
    if window:
        routing.behind = state.constants["none"]
    return hidden, routing


def attention(mixer: "Attention", x: Tensor, state: InPlaceState) -> Tensor:
    """Attention's hidden (N, 1, D) without a convolution; `state` is written."""
    held, H, known = state.held, mixer.num_kv_heads, state.constants
    held.kv.check_window(mixer.window)
    qkv, heads = mixer.qkv(x[:, 0]), (mixer.num_heads, H)
    q = triton_rotary.rotate(qkv, known.get("frequency"), held.length, *heads, mixer.head_dim)
    given = known["score"], "given", None, known["score"], known["bias"], known["tau"]
    _store(held, qkv, *given, q_heads=heads[0], k_heads=heads[1], sinks=0)
    scale, exact = mixer.head_dim**-0.5, known["exact"]
    mixed = triton_heads.read(None, None, 0.0, None, None, held.length, q, scale, **_places(held), exact=exact)
    return mixer.out(mixed)[:, None]


def _remember(memory: Memory, x: Tensor, held: "RecurrentState", log_scale: Tensor | None, predict: str):
    """What `triton_memory.memory` makes of x (N, D)."""
    decays = (memory.decay(x), memory.A_log, memory.dt_bias) if memory.decays else (None,) * 3
    strength = memory.beta(x) if memory.delta else None
    heads = memory.num_heads, memory.widths[1] // memory.head_dim
    wanted = triton_memory.PREDICT[predict]
    return triton_memory.memory(
        memory.qkv(x), held.conv, memory.conv.weight, held.recurrent, *decays, strength, log_scale, *heads, wanted
    )


def _answer(mixer: "GatedDeltaNet", x, read, held, exact: torch.dtype, gates=None, q=None) -> Tensor:
    norm = mixer.read_norm()
    places = _places(held) if q is not None else dict.fromkeys(PLACES)
    mixed = triton_heads.read(read, *norm, gates, mixer.gate(x[:, 0]), held.length, q, 1.0, **places, exact=exact)
    return mixer.out(mixed)[:, None]


def _places(held: "HAMState | AttentionState") -> dict[str, Tensor | None]:
    pages, ring = held.kv.pages, held.kv.recent
    near = (None,) * 4 if ring is None else (ring.k, ring.v, ring.seen, ring.at)
    return dict(zip(PLACES, (pages.k, pages.v, pages.table, pages.length, *near), strict=True))


def _store(held: "HAMState | AttentionState", qkv, answer, kind: str, *scored, **options) -> tuple[Tensor, Tensor]:
    pages = held.kv.pages
    free = dict(free=pages.free, used=pages.used, lost=pages.lost)
    made = qkv, answer, triton_heads.SCORES[kind], *scored, held.length
    return triton_heads.store(*made, **_places(held), **free, **options)


def _score_of(router: Router) -> str:
    """Which of the scores that have a kernel a router's is."""
    if type(router) is Residual:
        return {"output": "output", "value": "write"}[router.space]
    return "cosine" if type(router) is Cosine else "given"


def _scores(mixer: "HAM", x: Tensor, held, layout: Layout, made: tuple[Tensor, ...]) -> Tensor:
    """Scores (N, H) of a router that has no kernel here; what it remembers is written."""
    memory = mixer.memory
    qkv, scaled, read, p, g, beta = (part[:, None] for part in made)
    _, k, v = (part.unflatten(-1, (-1, dim)) for part, dim in zip(
        qkv.split(memory.widths, -1), (memory.head_dim, memory.head_dim, memory.value_dim), strict=True))  # fmt: skip
    k = k.repeat_interleave(memory.num_states // k.shape[2], 2) if memory.num_states > k.shape[2] else k
    if mixer.router.predict == "statistics":
        p = torch.stack([(p * v).sum(-1), (p * p).sum(-1)], -1)
    elif mixer.router.predict == "none":
        p = None
    m = MemoryRead(scaled, k, v, g, beta, read, p, held.recurrent, held.conv)
    scores, remembered = mixer._score(mixer._router_inputs(x, scaled, m, held, layout))
    write(held.router, remembered, "router")
    return scores[:, 0].contiguous()
