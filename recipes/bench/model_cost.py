"""What a whole model takes in training: parameters, optimizer, activations, state, cache and operations.

One block of every kind in the model's pattern is built at its full width and run on this machine's CPU, over a few
tokens. torch's own counters say what it multiplies (`FlopCounterMode`) and what it keeps for the backward pass
(`saved_tensors_hooks`); both grow with the tokens, so that the difference between two lengths gives those of one. Of
the two kernels, which are others on a GPU, what their Triton versions keep is counted, and the cost model's operations.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import mixers.attention
import mixers.ham
import mixers.memory
from kernels.operations import CHUNK
from lit_modules.base import with_options
from lit_modules.flops import kernel_flops
from mixers.backbone import Decoder
from mixers.base import Mixer
from mixers.registry import SpecError, check_positive, parse_pattern, unknown
from recipes import flags
from recipes.matching import matched

STRATEGIES = ("single", "ddp", "fsdp2")
PRECISIONS = {"32-true": (4, 4), "bf16-mixed": (4, 2), "bf16-true": (2, 2)}
"""precision -> bytes of a stored weight, and of a number in a matrix product"""
LOGITS_AT_ONCE = 2**26  # as in lit_modules.language_model
GIB = 2**30


@dataclass(frozen=True)
class BlockCost:
    """Of one block, per token.

    Attributes:
        saved: bytes kept for the backward pass.
        entering: bytes of the block's input, which is all that is kept with activation checkpointing.
        flops: operations of matrix products in a forward pass, without the two kernels.
    """

    saved: float
    entering: float
    flops: float


@dataclass(frozen=True)
class ModelCost:
    """Of a model. Bytes are of one device.

    Attributes:
        parameters: of the whole model; `embedding` of them are looked up or are the head.
        weights, gradients, optimizer: bytes; weights are those stored, their copies under mixed precision, and those of
            two blocks and of the embedding that FSDP2 gathers.
        activations, recomputed: bytes kept for the backward pass, without and with activation checkpointing.
        logits: bytes of the logits at hand and their gradient.
        state, cache: bytes of one sequence in decoding: recurrent states, and keys and values.
        forward: operations of a token in a forward pass; three times as many in training.
    """

    parameters: int
    embedding: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    recomputed: float
    logits: float
    state: float
    cache: float
    forward: float


def model_cost(
    *,
    vocab_size: int,
    dim: int,
    depth: int,
    mixer: Any,
    seq_len: int,
    batch_tokens: int,
    mlp_ratio: float = 8 / 3,
    tie_embeddings: bool = True,
    precision: str = "bf16-mixed",
    devices: int = 1,
    strategy: str = "single",
) -> ModelCost:
    """Counts.

    Args:
        vocab_size, dim, depth, mixer, mlp_ratio, tie_embeddings: as of :class:`mixers.backbone.Decoder`.
        seq_len: T, tokens of a sequence.
        batch_tokens: of one device in one forward pass.
        precision: of Lightning's, see PRECISIONS.
        devices: processes.
        strategy: of STRATEGIES.

    Raises:
        SpecError: a model, precision or strategy that is none of these.
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    if strategy not in STRATEGIES:
        raise unknown("strategy", strategy, STRATEGIES)
    pattern = parse_pattern(mixer)
    few = Decoder(8, dim=dim, depth=len(pattern), mixer=pattern, mlp_ratio=mlp_ratio)
    of_kernels = [known_flops(block.mixer, seq_len) for block in few.blocks]
    of_layer = [block_cost(block, dim, precision) for block in few.blocks]
    layers = [n % len(pattern) for n in range(depth)]
    in_blocks = sum(p.numel() for n in layers for p in few.blocks[n].parameters())
    embedding = vocab_size * dim * (1 if tie_embeddings else 2)
    parameters = in_blocks + embedding + dim
    stored, product = PRECISIONS[precision]
    share = devices if strategy == "fsdp2" else 1
    copies = parameters * product if precision.endswith("-mixed") else 0  # autograd keeps them, whole on every device
    largest = max(sum(p.numel() for p in block.parameters()) for block in few.blocks)
    gathered = (embedding + 2 * largest) * stored if strategy == "fsdp2" else 0  # of this block and the next
    held = [held_in_decoding(few.blocks[n].mixer, seq_len, product) for n in layers]
    head = 2 * vocab_size * dim
    return ModelCost(
        parameters=parameters,
        embedding=embedding,
        weights=parameters * stored / share + copies + gathered,
        gradients=parameters * stored / share * (2 if strategy == "ddp" else 1),  # and DDP's buckets
        optimizer=2 * parameters * stored / share,
        activations=batch_tokens * sum(of_layer[n].saved for n in layers),
        recomputed=batch_tokens * (sum(of_layer[n].entering for n in layers) + max(cost.saved for cost in of_layer)),
        logits=min(LOGITS_AT_ONCE, batch_tokens * vocab_size) * (4 + 4 + product),
        state=sum(state for state, _ in held),
        cache=sum(cache for _, cache in held),
        forward=head + sum(of_layer[n].flops + of_kernels[n] for n in layers),
    )


def block_cost(block: nn.Module, dim: int, precision: str) -> BlockCost:
    """Runs a block over two lengths, with the kernels that keep what they keep on a GPU."""
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    block, counts = block.to(dtype), []
    # of no more tokens than a head's width the score `residual` is computed otherwise, see kernels.output_norm
    chunks = 1 + getattr(getattr(block.mixer, "memory", None), "value_dim", 0) // CHUNK
    lengths = (chunks * CHUNK, (chunks + 1) * CHUNK)
    with torch.no_grad():
        block(torch.randn(1, 2, dim, dtype=dtype))  # a router is examined the first time
    for tokens in lengths:
        x = torch.randn(1, tokens, dim, dtype=dtype, requires_grad=True)
        mixed = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
        with mixed, counted(block) as saved, as_on_a_gpu(saved):
            block(x * 1)
        counts.append((sum(saved.values()), x.numel() * x.element_size(), saved.flops))
    return BlockCost(*((b - a) / CHUNK for a, b in zip(*counts, strict=True)))


class Saved(dict):
    """Bytes of each storage that autograd keeps, by its address; `flops` of the matrix products meanwhile."""

    flops = 0


@contextmanager
def counted(module: nn.Module) -> Iterator[Saved]:
    """Counts the bytes that autograd keeps within it, each storage once and those of parameters not at all."""
    own = {x.untyped_storage().data_ptr() for x in (*module.parameters(), *module.buffers())}
    saved, alive = Saved(), []

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
            alive.append(x.detach())  # so that its address is not given to another
        return x

    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda x: x):
        yield saved
    saved.flops += counter.get_total_flops()


class _Kernel(torch.autograd.Function):
    """Runs a kernel and keeps tensors for a backward pass that never comes."""

    @staticmethod
    def forward(ctx, run: Callable, kept: Callable, *inputs: Tensor):
        outputs = run(*inputs)
        ctx.save_for_backward(*inputs, *kept(inputs, outputs))
        return outputs


@contextmanager
def as_on_a_gpu(saved: "Saved") -> Iterator[None]:
    """The mixers' two kernels keep what their Triton versions keep; their products are taken from what is counted.

    The delta rule: its inputs. Attention: q, k, v, the output, the log of every softmax's sum and, over stored tokens,
    their index and the ranks that a query sees.
    """
    rule, attend = mixers.memory.gated_delta_rule, mixers.ham.attend_new

    def uncounted(run: Callable) -> Callable:
        def counting(*inputs: Tensor):
            with FlopCounterMode(display=False) as counter:
                outputs = run(*inputs)
            saved.flops -= counter.get_total_flops()
            return outputs

        return counting

    def gated_delta_rule(q, k, v, g, beta, **options):
        run = uncounted(lambda *inputs: rule(*inputs, **options))
        return _Kernel.apply(run, lambda inputs, outputs: (), q, k, v, g, beta)

    def attend_new(q, k, v, stored, layout, **options):
        def kept(inputs, outputs):
            (_, T, H, _), H_kv = q.shape, k.shape[2]
            ranks = [] if stored is None else [q.new_empty(3, H_kv, T, dtype=torch.int32)]
            return outputs, q.new_empty(H, T, dtype=torch.float32), *ranks

        q, k, v = (q, k, v) if stored is None else (x.contiguous() for x in (q, k, v))
        return _Kernel.apply(uncounted(lambda *inputs: attend(*inputs, stored, layout, **options)), kept, q, k, v)

    places = (mixers.memory, "gated_delta_rule"), (mixers.ham, "attend_new"), (mixers.attention, "attend_new")
    before = [getattr(module, name) for module, name in places]
    for (module, name), ours in zip(places, (gated_delta_rule, attend_new, attend_new), strict=True):
        setattr(module, name, ours)
    try:
        yield
    finally:
        for (module, name), theirs in zip(places, before, strict=True):
            setattr(module, name, theirs)


def known_flops(mixer: Mixer, seq_len: int) -> float:
    """Operations of a token in a mixer's kernels. Raises SpecError for a mixer that they are not known of."""
    flops = kernel_flops(mixer, seq_len)
    if flops is None:
        raise SpecError(
            f"the operations of a {type(mixer).__name__} are not known; attention, GDN's family and HAM are"
        )
    return flops


def held_in_decoding(mixer: Mixer, seq_len: int, size: int) -> tuple[float, float]:
    """Bytes of the state, and of keys and values, after `seq_len` tokens of one sequence."""
    state = mixer.init_state(1, dtype=torch.float32)
    parts = (getattr(state, name, None) for name in ("recurrent", "conv"))
    held = sum(x.numel() * (4 if i == 0 else size) for i, x in enumerate(parts) if x is not None)
    if (kv := getattr(state, "kv", None)) is None:
        return held, 0.0
    usage = mixer.kv_usage if mixer.routes else 1.0
    window = getattr(mixer, "window", 0)
    stored = min(seq_len, window) if window and not mixer.routes else seq_len * usage
    return held, stored * kv.heads * kv.bytes_per_token / 4 * size


def plan(
    recipe: str,
    mixer: str,
    kv_usage: float | None,
    devices: int,
    strategy: str | None,
    precision: str | None,
    *,
    seq_len: int | None,
    batch_tokens: int | None,
    vocab_size: int,
    match: str | None = None,
    match_to: str = "ham",
) -> str:
    """The plan of `fit --recipe --mixer` as text; None is what the recipe says."""
    given = flags.parse(["--recipe", recipe, "--mixer", mixer, "--data", "tokens"])
    whole = given.recipe()
    model, data = whole["model"]["init_args"], whole["data"]["init_args"]
    options = {name: model[name] for name in ("dim", "depth", "mlp_ratio", "tie_embeddings") if name in model}
    sizes = {"seq_len": seq_len, "batch_tokens": batch_tokens}
    sizes = {name: data[name] if size is None else size for name, size in sizes.items()}
    strategy = strategy or ("ddp" if devices > 1 else "single")
    check_positive(devices=devices, vocab_size=vocab_size, **sizes)
    if strategy == "single" and devices > 1:
        raise SpecError(f"strategy 'single' is that of one device, got {devices}; of several: ddp or fsdp2")
    pattern, first = with_options(_pattern(given), **given.options, kv_usage=kv_usage), ""
    if match:
        other = with_options(_pattern(flags.parse(["--recipe", recipe, "--mixer", match_to])), **given.options)
        found = matched(match, pattern, other, **options, seq_len=sizes["seq_len"])
        options["mlp_ratio"], first = found.mlp_ratio, f"matches {match_to} with {found}\n"
    cost = model_cost(
        **options,
        **sizes,
        mixer=pattern,
        vocab_size=vocab_size,
        precision=precision or whole["trainer"].get("precision", "32-true"),
        devices=devices,
        strategy=strategy,
    )
    return first + table(cost, devices=devices, strategy=strategy, **sizes)


def _pattern(given: flags.Flags) -> Any:
    """What --mixer stands for."""
    return given.recipe()["model"]["init_args"]["mixer"] if given.mixer in flags.recipes() else given.mixer


def table(cost: ModelCost, *, devices: int, strategy: str, batch_tokens: int, seq_len: int) -> str:
    """The plan as text."""
    fixed = cost.weights + cost.gradients + cost.optimizer + cost.logits
    rows = {
        "parameters": f"{cost.parameters / 1e6:,.1f} M, of these {cost.embedding / 1e6:,.1f} M embedding and head",
        "weights": f"{cost.weights / GIB:.2f} GiB",
        "gradients": f"{cost.gradients / GIB:.2f} GiB",
        "optimizer (AdamW)": f"{cost.optimizer / GIB:.2f} GiB",
        "logits at hand": f"{cost.logits / GIB:.2f} GiB",
        f"activations, {batch_tokens} tokens": f"{cost.activations / GIB:.2f} GiB",
        "  with --activation_checkpointing": f"{cost.recomputed / GIB:.2f} GiB",
        "in all": f"{(fixed + cost.activations) / GIB:.2f} GiB",
        "  with --activation_checkpointing ": f"{(fixed + cost.recomputed) / GIB:.2f} GiB",
        "decoding, a sequence: state": f"{cost.state / 2**20:.2f} MiB",
        f"  keys and values after {seq_len} tokens": f"{cost.cache / 2**20:.2f} MiB",
        "operations of a token, forward": f"{cost.forward / 1e9:.3f} GFLOP",
        "  in training (three times)": f"{3 * cost.forward / 1e9:.3f} GFLOP",
    }
    width = max(map(len, rows))
    lines = [f"{name:<{width}}  {value}" for name, value in rows.items()]
    return "\n".join([f"each of {devices} devices, {strategy}; recomputing is not among the operations", "", *lines])
