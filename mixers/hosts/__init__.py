"""Attention modules of other people's models: how one is recognised, and what takes its place.

`describe` asks every adapter in turn. An adapter is a function of a module that answers with a `Host`, or None if it
does not know the module; `register_host` adds one of your own before ours.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mixers.hosts.wrappers import InDecoder, InEncoder, InMultiheadAttention


@dataclass
class Host:
    """What an attention module tells of itself.

    Attributes:
        dim: width D.
        num_heads: query heads.
        wrapper: class (mixer, module) of the nn.Module that takes its place and answers to its calls.
        num_kv_heads: key and value heads; default `num_heads`.
        head_dim: default dim // num_heads.
        weights: of q, k, v and o by these letters, (out, in), as far as they can be read.
        biases: whether the projections have biases.
    """

    dim: int
    num_heads: int
    wrapper: Callable[[nn.Module, nn.Module], nn.Module]
    num_kv_heads: int | None = None
    head_dim: int | None = None
    weights: dict[str, Tensor] = field(default_factory=dict)
    biases: bool = False

    def __post_init__(self) -> None:
        self.num_kv_heads = self.num_kv_heads or self.num_heads
        self.head_dim = self.head_dim or self.dim // self.num_heads


Adapter = Callable[[nn.Module], Host | None]
ADAPTERS: list[Adapter] = []


def register_host(adapter: Adapter) -> Adapter:
    """Decorator: makes an adapter known; the newest is asked first."""
    ADAPTERS.insert(0, adapter)
    return adapter


def describe(module: nn.Module) -> Host | None:
    """What a module tells of itself, or None if no adapter knows it."""
    return next((host for adapter in ADAPTERS if (host := adapter(module)) is not None), None)


def _attribute(module: nn.Module, *names: str) -> int | None:
    """The first of these that the module, or its config, has."""
    for place in (module, getattr(module, "config", None)):
        for name in names:
            if isinstance(value := getattr(place, name, None), int):
                return value
    return None


def _heads(module: nn.Module) -> int | None:
    return _attribute(module, "num_heads", "num_attention_heads", "n_heads", "n_head")


def _causal(module: nn.Module) -> bool:
    return bool(getattr(module, "is_causal", getattr(module, "layer_idx", None) is not None))


def _wrapper(module: nn.Module) -> type[nn.Module]:
    return InDecoder if _causal(module) else InEncoder


@register_host
def four_projections(module: nn.Module) -> Host | None:
    """q_proj, k_proj, v_proj, o_proj: Llama, Qwen, Mistral, Gemma, ViT of transformers, ..."""
    names = {part: getattr(module, f"{part}_proj", None) for part in "qkvo"}
    if not all(isinstance(layer, nn.Linear) for layer in names.values()):
        return None
    heads = _heads(module)
    if heads is None:
        return None
    head_dim = names["q"].out_features // heads
    return Host(
        names["q"].in_features,
        heads,
        _wrapper(module),
        num_kv_heads=names["k"].out_features // head_dim,
        head_dim=head_dim,
        weights={part: layer.weight for part, layer in names.items()},
        biases=any(layer.bias is not None for layer in names.values()),
    )


@register_host
def gpt2(module: nn.Module) -> Host | None:
    """c_attn and c_proj, whose weights are (in, out): GPT-2."""
    qkv, out, heads = getattr(module, "c_attn", None), getattr(module, "c_proj", None), _heads(module)
    if getattr(qkv, "weight", None) is None or getattr(out, "weight", None) is None or heads is None:
        return None
    if getattr(module, "is_cross_attention", False):
        return None
    weights = dict(zip("qkv", qkv.weight.T.chunk(3), strict=True)) | {"o": out.weight.T}
    return Host(out.weight.shape[1], heads, InDecoder, weights=weights, biases=True)


@register_host
def one_projection(module: nn.Module) -> Host | None:
    """query_key_value and dense, head by head: GPT-NeoX. qkv and proj, one after the other: timm's ViT."""
    for names, by_head in ((("query_key_value", "dense"), True), (("qkv", "proj"), False)):
        qkv, out = (getattr(module, name, None) for name in names)
        heads = _heads(module)
        if not isinstance(qkv, nn.Linear) or not isinstance(out, nn.Linear) or heads is None:
            continue
        if qkv.out_features != 3 * out.in_features:
            continue
        w = qkv.weight
        parts = w.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(1, 2) if by_head else w.unflatten(0, (3, -1))
        weights = dict(zip("qkv", parts, strict=True)) | {"o": out.weight}
        return Host(qkv.in_features, heads, _wrapper(module), weights=weights, biases=qkv.bias is not None)
    return None


@register_host
def multihead_attention(module: nn.Module) -> Host | None:
    """nn.MultiheadAttention, in nn.TransformerEncoderLayer and elsewhere."""
    if not isinstance(module, nn.MultiheadAttention) or not module._qkv_same_embed_dim:
        return None
    weights = dict(zip("qkv", module.in_proj_weight.chunk(3), strict=True)) | {"o": module.out_proj.weight}
    biases = module.in_proj_bias is not None
    return Host(module.embed_dim, module.num_heads, InMultiheadAttention, weights=weights, biases=biases)


@torch.no_grad()
def carry(host: Host, mixer: nn.Module) -> dict[str, str]:
    """Copies the host's projections into the mixer's where shapes allow. What became of each: `carried`, `carried, each
    head 4 times` (grouped keys and values in a mixer that has as many as queries), or `new: ` and why."""
    ours, report = mixer.projections(), {}
    for part in "qkvo":
        theirs, target = host.weights.get(part), ours.get(part)
        if theirs is None or target is None:
            report[part] = "new: " + ("not found in the host" if theirs is None else "the mixer has none")
            continue
        times = 1
        if part in "kv" and theirs.shape[0] < target.shape[0] == host.num_heads * host.head_dim:
            times = host.num_heads // host.num_kv_heads
            theirs = theirs.unflatten(0, (host.num_kv_heads, -1)).repeat_interleave(times, 0).flatten(0, 1)
        if theirs.shape != target.shape:
            report[part] = f"new: {tuple(theirs.shape)} there, {tuple(target.shape)} here"
            continue
        target.copy_(theirs)
        report[part] = "carried" if times == 1 else f"carried, each head {times} times"
    return report
