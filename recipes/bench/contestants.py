"""Who is timed: for each group a list of contestants, the first of which is what the others are compared with.

A contestant is a name and a function of the case that returns the step to time. Adding a rival is adding one here.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels import delta_rule, routed_attention
from kernels.dispatch import unavailable
from kernels.sequences import Layout
from mixers.gated_delta_net import GatedDeltaNet
from mixers.ham import HAM
from mixers.registry import build_mixer, parse_pattern
from mixers.routers.base import RouterInputs
from mixers.routers.residual import Residual
from mixers.sharing import share_threshold
from mixers.state import MixerState, kv_cache_bytes, state_bytes
from recipes.bench import cost_model
from recipes.bench.cost_model import Cost
from recipes.bench.measure import Runner

PHASES = ("forward", "train", "prefill", "decode")
GROUPS = {
    "delta_rule": ("forward", "train"),
    "routed_attention": ("forward", "train"),
    "mixers": PHASES,
}
"""group -> the phases that it knows"""
CALIBRATED = 256  # tokens that the thresholds see before decoding is timed
REPLAYS = 4096  # tokens that a graph has room for; later ones take as long and are not kept
DEPTH = 4  # mixers on top of each other, so that a pattern of layers is compared at equal depth


@dataclass(frozen=True)
class Case:
    """What is the same for all contestants of a comparison."""

    group: str
    phase: str
    dtype: str
    batch: int
    length: int
    heads: int
    head_dim: int
    device: str
    seed: int

    @property
    def size(self) -> int:
        """Bytes of a number."""
        return getattr(torch, self.dtype).itemsize

    def randn(self, *shape: int) -> Tensor:
        """Normal draws on the device that take a gradient in training."""
        x = torch.randn(*shape, device=self.device).to(getattr(torch, self.dtype))
        return x.requires_grad_(self.phase == "train")


Build = Callable[[Case], Runner | Callable[[], object]]


def contestants(case: Case, kv_usages: list[float], skews: list[str]) -> Iterator[tuple[str, Build]]:
    """What is measured of a case, the reference first.

    Args:
        case: group, phase, sizes, dtype and device.
        kv_usages: stored tokens / tokens, 0..1, one contestant each.
        skews: how stored tokens spread over the heads: even, one_head.

    Yields:
        A name, and the function that builds its runner from the case.
    """
    if case.group == "delta_rule":
        yield "sdpa", _sdpa
        for backend in _backends(delta_rule.BACKENDS, case.device):
            if backend == "fla":
                yield "fla", _fla
            elif (backend, case.phase) != ("triton_recurrent", "train"):  # it gives no gradient
                for predict, more in (("none", ""), ("writes", " and writes"), ("values", " and prediction")):
                    yield f"ours ({backend}){more}", lambda case, b=backend, p=predict: _delta_rule(case, b, p)
        if case.device == "cuda":
            yield "FlashQLA", _flash_qla
        yield "transformers (chunked)", _transformers
    elif case.group == "routed_attention":
        yield "sdpa", _sdpa
        for usage in kv_usages:
            for skew in skews:
                for backend in _backends(routed_attention.BACKENDS, case.device):
                    owner = {"flex": "flex (mask)", "flex_ranked": "flex (ranked)"}.get(backend, f"ours ({backend})")
                    name = f"{owner} {usage:g}" + (f" {skew}" if skew != "even" else "")
                    yield name, lambda case, b=backend, u=usage, s=skew: _routed(case, b, u, s)
    else:
        graphs = [False, True] if (case.phase, case.device) == ("decode", "cuda") else [False]
        for name, *which in _stacks(kv_usages, skews):
            for graph in graphs:
                name += " (graph)" if graph else ""
                yield name, lambda case, w=which, g=graph: _mixers(case, *w, graph=g)


def _stacks(kv_usages: list[float], skews: list[str]) -> Iterator[tuple]:
    """Name, pattern, KV usage and skew."""
    yield "attention", "attention"
    yield "gdn", "gdn"
    for usage in kv_usages:
        for skew in skews:
            yield f"ham {usage:g}" + (f" {skew}" if skew != "even" else ""), "ham", usage, skew
        if usage in (0.5, 0.25):
            pattern = "gdn,attention" if usage == 0.5 else "gdn*3,attention"
            yield f"hybrid {pattern}", pattern


def _backends(table, device: str) -> list[str]:
    """The fast ones that the device is for; on CUDA all of them, so that one that cannot run is a row that says why.

    On a CPU, the time of interpreted Triton or of FlexAttention, which runs uncompiled there, says nothing.
    """
    if device == "cuda":
        return [name for name in table if name != "naive"]
    return [name for name in table if name.startswith("torch") and not unavailable(name, device)]


def _steps(case: Case, function: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], object]:
    """The forward pass alone, or with the gradients of `leaves`."""
    if case.phase == "train":
        gradient = torch.randn_like(function())
        return lambda: torch.autograd.grad(function(), leaves, gradient)
    return torch.no_grad()(function)


def _facts(case: Case, *work: Cost) -> dict[str, float]:
    total = sum(work, Cost(0, 0))
    return {"flops": total.flops, "moved_bytes": total.bytes}


def _attention_cost(case: Case, kv_usage: float | None = None) -> Cost:
    """Of all keys, or of routed attention; that of CPUs, which gathers, has torch's backward pass."""
    sizes = case.batch, case.length, case.heads, case.head_dim, case.head_dim
    options = {} if kv_usage is None else {"kv_usage": kv_usage, "apart": case.device == "cuda"}
    return cost_model.attention(*sizes, **options, train=case.phase == "train", size=case.size)


def _delta_cost(case: Case, predict: str) -> Cost:
    sizes = case.batch, case.length, case.heads, case.head_dim, case.head_dim
    chunk = 16 if case.device == "cpu" else cost_model.CHUNK
    return cost_model.delta_rule(*sizes, predict=predict, train=case.phase == "train", size=case.size, chunk=chunk)


def _sdpa(case: Case) -> Runner:
    """Causal softmax attention over all keys; FlashAttention where torch has it."""
    q, k, v = (case.randn(case.batch, case.heads, case.length, case.head_dim) for _ in range(3))
    step = _steps(case, lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), [q, k, v])
    return Runner(step, _facts(case, _attention_cost(case)))


def _delta_inputs(case: Case) -> list[Tensor]:
    """q, k normalised, v, g with memories of 2 to 1000 tokens, beta."""
    shape = case.batch, case.length, case.heads
    q, k, v = (case.randn(*shape, case.head_dim) for _ in range(3))
    with torch.no_grad():
        q, k = (F.normalize(x.float(), dim=-1).to(v.dtype).requires_grad_(v.requires_grad) for x in (q, k))
        g = -torch.empty(shape, device=case.device).uniform_(-7, -1).exp()
        beta = torch.rand(shape, device=case.device)
    return [q, k, v, *(x.requires_grad_(v.requires_grad) for x in (g, beta))]


def _delta_rule(case: Case, backend: str, predict: str) -> Runner:
    q, k, v, g, beta = inputs = _delta_inputs(case)

    def rule() -> Tensor:
        return delta_rule.gated_delta_rule(q, k, v, g, beta, backend=backend, predict=predict)[0]

    return Runner(_steps(case, rule, inputs), _facts(case, _delta_cost(case, predict)))


def _fla(case: Case) -> Runner:
    """fla's own kernels: at every call it asks the environment whether to hand over to FlashQLA, if that is there."""
    os.environ["FLA_FLASH_QLA"] = "0"
    return _delta_rule(case, "fla", "none")


def _flash_qla(case: Case) -> Runner:
    """Qwen's kernels of TileLang; K = V = 128, in 16 bits."""
    from flash_qla import chunk_gated_delta_rule as rule

    q, k, v, g, beta = inputs = _delta_inputs(case)
    step = _steps(case, lambda: rule(q, k, v, g, beta.to(v.dtype), output_final_state=True)[0], inputs)
    return Runner(step, _facts(case, _delta_cost(case, "none")))


def _transformers(case: Case) -> Runner:
    """What transformers runs for Gated DeltaNet where no kernel library is installed."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule as rule

    rule = getattr(rule, "__wrapped__", rule)  # with fla installed, the plain function is underneath
    q, k, v, g, beta = inputs = _delta_inputs(case)
    step = _steps(case, lambda: rule(q, k, v, g=g, beta=beta)[0], inputs)
    return Runner(step, _facts(case, _delta_cost(case, "none")))


def stored_tokens(case: Case, usage: float, skew: str) -> Tensor:
    """(B, T, H) bool: a random share of every head's tokens, or whole heads while the budget lasts."""
    draw = torch.rand(case.batch, case.length, case.heads, device=case.device)
    if skew == "one_head":
        share = (usage * case.heads - torch.arange(case.heads, device=case.device)).clamp(0, 1)
        return draw < share
    return draw < usage


def _routed(case: Case, backend: str, usage: float, skew: str) -> Runner:
    q, k, v = (case.randn(case.batch, case.length, case.heads, case.head_dim) for _ in range(3))
    stored = stored_tokens(case, usage, skew)

    def attend() -> Tensor:
        return routed_attention.routed_attention(q, k, v, stored, backend=backend)

    usage = float(stored.float().mean())
    return Runner(_steps(case, attend, [q, k, v]), {"kv_usage": usage} | _facts(case, _attention_cost(case, usage)))


class _Stack(nn.Module):
    """Mixers of a pattern, each added to the stream."""

    def __init__(self, pattern, dim: int) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(build_mixer(pattern[i % len(pattern)], dim=dim) for i in range(DEPTH))
        share_threshold(self)

    def forward(self, x: Tensor, states: list | None = None) -> tuple[Tensor, list]:
        new = []
        for mixer, state in zip(self.mixers, states or [None] * DEPTH, strict=True):
            out = mixer(x, state=state)
            x, new = x + out.hidden, [*new, out.state]
        return x, new


class OneHead(Residual):
    """The score of `residual`, its cost included, and a choice that fills one head after the other."""

    def forward(self, inputs: RouterInputs) -> Tensor:
        score = super().forward(inputs)
        return torch.arange(self.num_heads, device=score.device) + score / (1 + score)


ROUTER = {
    "even": {"router": "residual", "scope": "head"},
    "one_head": {"router": f"{__name__}:OneHead", "scope": "layer"},
}


def _stack_cost(case: Case, stack: _Stack, usage: float | None) -> dict[str, float]:
    """Of the matrices and the two memories; element-wise work is not counted."""
    size = case.batch, case.heads, case.head_dim, case.head_dim
    decode, work = case.phase == "decode", []
    for mixer in stack.mixers:
        ham, recurrent = isinstance(mixer, HAM), isinstance(mixer, GatedDeltaNet)
        matrices = sum(p.numel() for p in mixer.parameters() if p.ndim == 2)
        tokens = case.batch * (1 if decode else case.length)
        work.append(cost_model.linear(tokens, matrices, train=case.phase == "train", size=case.size))
        if recurrent:
            work.append(cost_model.decode_step(*size, size=case.size) if decode else _delta_cost(case, "none"))
        if ham or not recurrent:
            if ham and not decode:  # their router is the residual
                work.append(cost_model.output_norm(case.batch, case.length, *size[1:3], size=case.size))
            if decode:
                options = {"kv_usage": usage if ham else 1.0, "size": case.size}
                work.append(cost_model.decode_attention(case.batch, case.length, *size[1:], **options))
            else:
                work.append(_attention_cost(case, usage if ham else None))
    return _facts(case, *work)


def _filled(state: MixerState, case: Case, usage: float | None, skew: str) -> MixerState:
    """A state after `length` tokens, its cache filled with noise: reading them would take longer than all the rest."""
    if state.caches:
        cache, N, T = state.kv, case.batch, case.length
        k, v = (torch.randn(N, T, cache.heads, x.shape[-1], device=case.device) for x in (cache.pages.k, cache.pages.v))
        stored = stored_tokens(case, usage, skew) if usage is not None else torch.ones_like(k[..., 0]) > 0
        state.kv = cache.append(k, v, stored, Layout.of(None, stored))
    state.length += case.length
    return state


def _mixers(case: Case, pattern: str, usage: float | None = None, skew: str = "even", graph: bool = False) -> Runner:
    """A stack of mixers; the usage of a HAM is held in each head, or in each layer by as few heads as can hold it.

    With `graph`, decoding writes states of fixed capacity, and on CUDA replays one graph.
    """
    options = {"num_heads": case.heads, "head_dim": case.head_dim}
    if usage is not None:
        options |= {"kv_usage": usage} | ROUTER[skew]
    dim = case.heads * case.head_dim
    specs = [spec | options for spec in parse_pattern(pattern)]
    stack = _Stack(specs, dim).to(case.device).train()
    x = case.randn(case.batch, min(case.length, CALIBRATED) if case.phase == "decode" else case.length, dim)
    amp = torch.autocast(case.device, getattr(torch, case.dtype), enabled=case.dtype in ("bfloat16", "float16"))
    if case.dtype == "float64":
        stack.double()
    with torch.no_grad(), amp:
        stack(x)  # a step of training fills the threshold's table
    if case.phase != "train":
        stack.eval()

    def run(tokens: Tensor, states: list | None = None) -> tuple[Tensor, list]:
        with amp:
            return stack(tokens, states)

    def empty() -> list:
        return [mixer.init_state(case.batch, device=case.device, dtype=x.dtype) for mixer in stack.mixers]

    facts = {"parameters": sum(p.numel() for p in stack.parameters())} | _stack_cost(case, stack, usage)
    after = None
    with torch.no_grad():
        if case.phase == "prefill":
            after = run(x, empty())[1]
        elif case.phase == "decode":
            after = [_filled(state, case, usage, skew) for state in empty()]
    if after is not None:
        facts |= {"kv_bytes": kv_cache_bytes(after), "state_bytes": state_bytes(after)}
    if case.phase == "train":
        leaves = [x, *(p for p in stack.parameters() if p.requires_grad)]
        gradient = torch.randn_like(x)

        def train() -> object:
            return torch.autograd.grad(run(x)[0], leaves, gradient.to(x.dtype), allow_unused=True)

        return Runner(train, facts)

    if graph:
        after = [mixer.reserve(state, REPLAYS, usage or 1.0) for mixer, state in zip(stack.mixers, after, strict=True)]
    if graph and case.device == "cuda":
        return Runner(_captured(stack, lambda states: run(x[:, -1:], states), after), facts)

    def decode() -> None:
        nonlocal after  # on and on: going on from one state again and again would copy its pages
        after = run(x[:, -1:], after)[1]

    steps = {
        "forward": lambda: run(x),
        "prefill": lambda: run(x, empty()),
        "decode": decode,
    }
    return Runner(torch.no_grad()(steps[case.phase]), facts)


@torch.no_grad()
def _captured(stack: _Stack, step: Callable[[list], object], states: list) -> Callable[[], None]:
    """What replays a step as one CUDA graph; kernels are compiled by a step on copies of the states."""
    step([mixer.reserve(state, 1) for mixer, state in zip(stack.mixers, states, strict=True)])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(states)
    return graph.replay
