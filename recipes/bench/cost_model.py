"""What each kernel must compute and move, and the least time that takes on a named GPU. Imports no torch.

Operations count a multiply and an add as two. Bytes are what every launch of ours reads and writes, each tensor once. A
kernel that recomputes, reads a tensor again or spills is slower than its floor, and the gap says by how much.
"""

import inspect
from dataclasses import dataclass
from itertools import product

from kernels.operations import CHUNK, MACHINES, Machine, attention_flops, delta_rule_flops, pairs

OF_KERNELS = ("lengths", "kv_usages", "gpus", "batch", "heads", "head_dim", "bytes_per_number")
OF_RECIPES = ("mixer", "kv_usage", "devices", "strategy", "precision", "seq_len", "batch_tokens", "vocab_size")
OF_RECIPES += ("match", "match_to")
STATE_BYTES = 4  # of a number of the recurrent state, of g, of beta and of a score: float32

LAUNCHES = {
    "forward": {
        "prepare": dict(K=2, V=2, scalars=3),
        "scan": dict(K=2, V=2, S=1, scalars=1),
        "read": dict(K=2, V=2, S=1, scalars=1),
    },
    "backward": {
        "prepare": dict(K=2, V=2, C=1, scalars=3),
        "scan": dict(K=2, V=2, S=1, scalars=2),
        "prepare_back": dict(K=3, V=2, C=1, scalars=1),
        "scan_back": dict(K=3, V=3, S=1, scalars=2),
        "gradients_v": dict(V=4, C=2, scalars=3),
        "gradients_k": dict(K=4, V=3, S=2, C=2, scalars=3),
    },
}
"""What the Triton kernels of the delta rule read and write per token and head, predictions apart: rows of K and of V
numbers, of a chunk's matrices (C), its share of a state per chunk (S = K V / C), and float32 scalars. The backward pass
makes again what the forward one does not keep."""


@dataclass(frozen=True)
class Cost:
    """Operations and bytes of a piece of work.

    Attributes:
        flops: floating-point operations of matrix products.
        bytes: to and from the device's memory.
    """

    flops: float
    bytes: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> "Cost":
        return Cost(self.flops * times, self.bytes * times)

    def floor(self, machine: Machine) -> float:
        """Least seconds: the slower of computing and moving, as if each hid behind the other."""
        return max(self.flops / (machine.tflops * 1e12), self.bytes / (machine.terabytes * 1e12))

    def bound(self, machine: Machine) -> str:
        """`compute` or `memory`: which of the two sets the floor."""
        return "compute" if self.flops / machine.tflops >= self.bytes / machine.terabytes else "memory"


def attention(
    B: int, T: int, H: int, K: int, V: int,
    *, kv_usage: float = 1.0, window: int = 0, train=False, apart=False, size: int = 2,
) -> Cost:  # fmt: skip
    """Softmax attention over stored tokens; at usage 1 over all. `size` is of a number in bytes.

    Forward: q.k and the sum of values. Backward: FlashAttention (arXiv 2307.08691) counts five products, q.k, dP, dV,
    dQ, dK. Our routed attention makes q.k and dP twice, as it has dQ and dK, dV from kernels `apart`, and no atomics.
    """
    seen = min(1.0, kv_usage + window / T) if T else 0.0
    rows = B * H * T * size
    products = B * H * attention_flops(T, K, V, kv_usage=kv_usage, window=window)
    forward = Cost(products, rows * (K + V + seen * (K + V)))
    if not train:
        return forward
    # reads q, o, do and the stored k and v; writes dq and, for the stored alone, dk and dv
    n = B * H * pairs(T, kv_usage, window)
    backward = Cost(2 * n * (3 * K + 2 * V), rows * (2 * K + 2 * V + 2 * seen * (K + V)))
    again = Cost(2 * n * (K + V), rows * (K + 2 * V + seen * (K + V)))  # reads q, k, v once more, and do twice
    return forward + backward + again if apart else forward + backward


def delta_rule(
    B: int, T: int, H: int, K: int, V: int, *, predict: str = "none", train=False, size: int = 2, chunk: int = CHUNK
) -> Cost:
    """The chunkwise gated delta rule (arXiv 2412.06464); `predict` as in `kernels.delta_rule`.

    Backward: twice the products of the forward pass, and that once more. Bytes are those of `LAUNCHES`, the last state
    and the gradient of the first.
    """
    C = min(chunk, T)
    numbers = dict(K=K, V=V, C=C, S=K * V / C)
    moved = 0.0
    for phase in ("forward", "backward") if train else ("forward",):
        for parts in LAUNCHES[phase].values():
            moved += sum(count * size * numbers.get(part, STATE_BYTES / size) for part, count in parts.items())
    moved += (2 if train else 1) * K * V * STATE_BYTES / max(T, 1)
    if predict == "values":
        moved += V * STATE_BYTES
    elif predict == "statistics":  # reads v
        moved += V * size + 2 * STATE_BYTES
    flops = B * H * delta_rule_flops(T, K, V, chunk=chunk) * (4 if train else 1)
    return Cost(flops, moved * B * T * H)


def output_norm(B: int, T: int, H: int, V: int, *, size: int = 2) -> Cost:
    """The score of router `residual`: of every write u its norm in the output, by G_h = W_h^T W_h of its head.

    Reads the writes, which the delta rule has left in memory, and writes a number each; W (H V, H, V) is float32.
    """
    rows, grams = B * T * H, H * V * V
    return Cost(2 * rows * V * V + 2 * H * V * grams, rows * (V * size + STATE_BYTES) + (H + 2) * grams * STATE_BYTES)


def linear(tokens: int, parameters: int, *, train=False, size: int = 2) -> Cost:
    """Matrices applied to tokens; their inputs and outputs are counted with what they belong to."""
    return Cost(2 * tokens * parameters * (3 if train else 1), parameters * size * (3 if train else 1))


def decode_step(B: int, H: int, K: int, V: int, *, size: int = 2) -> Cost:
    """A token: state, prediction, score, read-out. The state is read and written once."""
    return Cost(2 * B * H * 3 * K * V, B * H * (2 * K * V * STATE_BYTES + (2 * K + 2 * V) * size))


def decode_attention(B: int, T: int, H: int, K: int, V: int, *, kv_usage: float = 1.0, size: int = 2) -> Cost:
    """A query over the stored of T tokens."""
    n = B * H * T * kv_usage
    return Cost(2 * n * (K + V), (n * (K + V) + B * H * (K + 2 * V)) * size)


def kernels(B: int, T: int, H: int, K: int, V: int, kv_usages: list[float], size: int) -> dict[str, list[Cost]]:
    """Every kernel by name, and HAM, which runs three of them one after the other, beside full attention."""
    sizes, held = (B, T, H, K, V), (B, H, K, V)
    table: dict[str, list[Cost]] = {}
    for phase, train in (("forward", False), ("train", True)):
        rules = {p: delta_rule(*sizes, predict=p, train=train, size=size) for p in ("none", "statistics", "values")}
        score = output_norm(B, T, H, V, size=size)  # without a gradient
        table[f"{phase}: attention, all keys"] = [attention(*sizes, train=train, size=size)]
        table[f"{phase}: delta rule"] = [rules["none"]]
        table[f"{phase}: delta rule, and the sums of the cosine score"] = [rules["statistics"]]
        table[f"{phase}: delta rule, and the prediction"] = [rules["values"]]
        table[f"{phase}: score of the residual"] = [score]
        for usage in kv_usages:
            routed = attention(*sizes, kv_usage=usage, train=train, apart=True, size=size)
            table[f"{phase}: routed attention {usage:g}"] = [routed]
            table[f"{phase}: HAM {usage:g}"] = [rules["none"], score, routed]
    step = decode_step(*held, size=size)
    table["decode: attention, all keys"] = [decode_attention(*sizes, size=size)]
    table["decode: step of the memory"] = [step]
    for usage in kv_usages:
        table[f"decode: HAM {usage:g}"] = [step, decode_attention(*sizes, kv_usage=usage, size=size)]
    return table


def floor(work: list[Cost], machine: Machine) -> float:
    """Least seconds of kernels that run one after the other."""
    return sum(part.floor(machine) for part in work)


def cost(
    lengths: list[int] | None = None,
    kv_usages: list[float] | None = None,
    gpus: list[str] | None = None,
    batch: int = 4,
    heads: int = 16,
    head_dim: int = 128,
    bytes_per_number: int = 2,
    recipe: str | None = None,
    mixer: str = "ham",
    kv_usage: float | None = None,
    devices: int = 1,
    strategy: str | None = None,
    precision: str | None = None,
    seq_len: int | None = None,
    batch_tokens: int | None = None,
    vocab_size: int = 50_304,
    match: str | None = None,
    match_to: str = "ham",
) -> None:
    """Prints what every kernel must compute and move, and the least time of it on named GPUs; or a recipe's plan.

    A floor, not a forecast: kernels reach half to nine tenths of it. HAM here is the delta rule, the score of its
    router `residual` and routed attention; projections are the same for all mixers and left out.

    With `recipe`: what each device holds in training a model of that size, and its operations; of all that is above
    nothing.

    Args:
        lengths: tokens of a sequence, T. Default: 8192, 32768 and 131072.
        kv_usages: stored tokens / tokens, 0..1. Default: 0.125, 0.25, 0.5.
        gpus: of a100, h100, h200, b200. Default: h200.
        batch: sequences, B.
        heads: H.
        head_dim: K = V.
        bytes_per_number: of q, k and v: 2 or 4.
        recipe: a size, as `fit --recipe` takes it.
        mixer: of the recipe: a mixer, or a pattern, as `fit --mixer` takes it.
        kv_usage: of the recipe: stored tokens / tokens, 0..1; default: the mixer's.
        devices: of the recipe: processes.
        strategy: of the recipe: single, ddp or fsdp2; default: ddp for several devices.
        precision: of the recipe: 32-true, bf16-mixed or bf16-true; default: its own.
        seq_len: of the recipe: tokens of a sequence; default: its own.
        batch_tokens: of the recipe: tokens of a device in a forward pass; default: its own.
        vocab_size: of the recipe: of the tokenizer.
        match: of the recipe: parameters or flops: MLPs as wide as it takes to have as many as with `match_to`.
        match_to: of the recipe: the mixer that is matched, at the usage that it has by default.
    """
    from mixers.registry import SpecError, unknown
    from recipes.results import markdown_table

    given, defaults = locals(), inspect.signature(cost).parameters
    for name in OF_RECIPES if recipe is None else OF_KERNELS:
        if given[name] != defaults[name].default:
            where = "needs a --recipe" if recipe is None else "is of kernels, which a --recipe's plan does not show"
            raise SpecError(f"--{name} {given[name]} {where}")
    if recipe is not None:
        from recipes.bench.model_cost import plan

        data = {"seq_len": seq_len, "batch_tokens": batch_tokens, "vocab_size": vocab_size}
        data |= {"match": match, "match_to": match_to}
        print(plan(recipe, mixer, kv_usage, devices, strategy, precision, **data))
        return
    lengths, gpus = lengths or [8192, 32768, 131072], gpus or ["h200"]
    for name in gpus:
        if name not in MACHINES:
            raise unknown("gpu", name, MACHINES)
    if min([batch, heads, head_dim, bytes_per_number, *lengths]) < 1:
        raise SpecError("lengths, batch, heads, head_dim and bytes_per_number must be at least 1")
    usages = kv_usages or [0.125, 0.25, 0.5]
    if any(not 0 <= usage <= 1 for usage in usages):
        raise SpecError(f"kv_usages must be from 0 to 1, got {usages}")
    for T, gpu in product(lengths, gpus):
        table = kernels(batch, T, heads, head_dim, head_dim, usages, bytes_per_number)
        print(f"\n**{gpu}**, B {batch}, T {T}, H {heads}, K = V {head_dim}\n")
        print(markdown_table(["kernel", "GFLOP", "MB", "floor ms", "bound by", "x attention"], _lines(table, gpu)))


def _lines(table: dict[str, list[Cost]], gpu: str) -> list[list[str]]:
    machine, lines = MACHINES[gpu], []
    for name, work in table.items():
        whole = floor(table[f"{name.partition(':')[0]}: attention, all keys"], machine)
        total = sum(work, Cost(0, 0))
        bound = " + ".join(dict.fromkeys(part.bound(machine) for part in work))
        numbers = [f"{total.flops / 1e9:,.1f}", f"{total.bytes / 1e6:,.1f}", f"{1e3 * floor(work, machine):.4f}"]
        lines.append([name, *numbers, bound, f"{floor(work, machine) / whole:.3f}"])
    return lines
