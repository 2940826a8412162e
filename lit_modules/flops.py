"""Operations of a token in training, and how many a second a GPU can do: what teraflops and MFU are made of."""

import re

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from torch import nn

from kernels.operations import MACHINES, attention_flops, delta_rule_flops
from mixers.attention import Attention
from mixers.base import Mixer
from mixers.gated_delta_net import GatedDeltaNet

DENSE = {name: machine.tflops for name, machine in MACHINES.items()}
DENSE |= {"h100 pcie": 756, "h100 nvl": 835, "h200 nvl": 835}  # slower ones of a name
"""Words of a GPU's name -> TFLOP/s in 16 bits, dense. Lightning's are the sparse ones for some of these."""


def flops_per_token(module: nn.Module, seq_len: float) -> float:
    """Operations of a token in training, three times those of a forward pass; none that is done again is counted.

    They are two for each weight of a matrix, and those of the kernels of attention, GDN's family and HAM, at the KV
    usage asked for. Of other mixers the kernels are not known, and their matrices alone are counted.

    Args:
        module: a model.
        seq_len: tokens of a sequence.
    """
    mixers = (part for part in module.modules() if isinstance(part, Mixer))
    return 3 * (2 * matrix_weights(module) + sum(kernel_flops(mixer, seq_len) or 0.0 for mixer in mixers))


def matrix_weights(module: nn.Module) -> int:
    """Weights that are multiplied with every token: of all matrices, a tied embedding once, an embedding alone not."""
    looked_up = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    multiplied = {id(part.weight) for part in module.modules() if isinstance(part, nn.Linear)}
    parameters = (p for p in module.parameters() if p.ndim == 2 and (id(p) in multiplied or id(p) not in looked_up))
    return sum(p.numel() for p in parameters)


def kernel_flops(mixer: Mixer, seq_len: float) -> float | None:
    """Operations of a token in a mixer's kernels, forward: of the delta rule, and of attention to what it stores.

    Args:
        mixer: None is the answer for one that is not of attention, GDN's family or HAM.
        seq_len: tokens of a sequence, 1 or more.
    """
    if isinstance(mixer, GatedDeltaNet):
        memory = mixer.memory
        heads, sizes = memory.num_reads, (seq_len, memory.head_dim, memory.value_dim)
        total = delta_rule_flops(*sizes)
        if mixer.routes:
            total += attention_flops(*sizes, kv_usage=mixer.kv_usage, window=mixer.window_size())
    elif isinstance(mixer, Attention):
        heads, usage = mixer.num_heads, 0.0 if mixer.window else 1.0
        total = attention_flops(seq_len, mixer.head_dim, mixer.head_dim, kv_usage=usage, window=mixer.window)
    else:
        return None
    return heads * total / seq_len


def available_flops(device: torch.device, precision: str) -> int | None:
    """Operations a second that a GPU can do: of DENSE in 16 bits, else as Lightning has it; None where it does not."""
    if device.type != "cuda":
        return None
    kinds = {"bf16": torch.bfloat16, "16": torch.float16, "32": torch.float32}
    kind = kinds.get(str(precision).partition("-")[0])
    words = {*re.split(r"\W+", torch.cuda.get_device_name(device).lower())}
    known = [name for name in DENSE if words.issuperset(name.split())]
    if known and kind in (torch.bfloat16, torch.float16):
        return int(1e12 * DENSE[max(known, key=len)])
    return kind and get_available_flops(device, kind)
