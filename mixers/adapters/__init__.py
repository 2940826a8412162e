"""Attention modules of other people's models: how one is recognised, and what takes its place.

`describe` asks every adapter in turn. An adapter is a function of a module that answers with an `AttentionInfo`, or
None if it does not know the module; `register_adapter` adds one of your own before ours.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mixers.adapters.wrappers import CACHES, InBlock, InDecoder, InEncoder, InMultiheadAttention, Wrapper, arguments_of
from mixers.base import Mixer
from mixers.registry import SpecError


@dataclass
class AttentionInfo:
    """What an attention module tells of itself: sizes, weights, and what is to take its place.

    Attributes:
        dim: width D.
        num_heads: query heads.
        wrapper: class (mixer, module) of the nn.Module that takes its place and answers to its calls; it decides
            whether the mixer reads forwards or both ways. Default: see `wrapper_of`.
        num_kv_heads: key and value heads; default `num_heads`.
        head_dim: default dim // num_heads.
        weights: of q, k, v and o by these letters, (out, in), as far as they can be read.
        biases: of the same, (out,), as far as they can be read; True if there are some and they cannot.
        fused: how one weight of q, k and v was read, if another order of its rows could not be told from this one.
        rope_base: of the rotary positions of queries and keys, None if it has none or they are not known.
        rope_more: what its rotary positions have beside a base, in words; empty if nothing.
    """

    dim: int
    num_heads: int
    wrapper: Callable[[nn.Module, nn.Module], nn.Module] | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    weights: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] | bool = False
    fused: str = ""
    rope_base: float | None = None
    rope_more: str = ""

    def __post_init__(self) -> None:
        self.num_kv_heads = self.num_kv_heads or self.num_heads
        self.head_dim = self.head_dim or self.dim // self.num_heads


Adapter = Callable[[nn.Module], AttentionInfo | None]
ADAPTERS: list[Adapter] = []


def register_adapter(adapter: Adapter) -> Adapter:
    """Decorator that makes an adapter known; the newest is asked first.

        @register_adapter
        def mine(module):
            if isinstance(module, MyAttention):
                return AttentionInfo(dim=module.width, num_heads=module.heads, weights={"q": module.q.weight})

    Args:
        adapter: module -> `AttentionInfo`, or None for a module that it does not know.

    Returns:
        The adapter.
    """
    ADAPTERS.insert(0, adapter)
    return adapter


def describe(module: nn.Module) -> AttentionInfo | None:
    """What a module tells of itself, or None if no adapter knows it."""
    return next((info for adapter in ADAPTERS if (info := adapter(module)) is not None), None)


def wrapper_of(
    name: str, module: nn.Module, info: AttentionInfo, causal: bool | None
) -> Callable[[nn.Module, nn.Module], Wrapper]:
    """What takes the place of a module called `name`, by its direction and by what its callers expect of it.

    The direction is known of classes of transformers (their `is_causal`) and of timm (encoders); of others, `causal`
    must say it. Where calls have a cache, as in transformers, the answer is (hidden, None), elsewhere a tensor.

    Args:
        name: of the module in its model, for messages.
        module: the attention module.
        info: what its adapter says of it.
        causal: True if no token sees later ones, False if all see each other, None if the class says it.

    Returns:
        A class, or a function, (mixer, module) -> the module that takes the place.

    Raises:
        SpecError: a direction that is not known, or known to be another one.
    """
    was = f"{type(module).__name__} ({name})"
    if info.wrapper is not None:
        if causal is not None:
            raise SpecError(
                f"the direction of {was} is decided by its adapter, leave causal out: {reads(info.wrapper)}"
            )
        return info.wrapper
    known = _direction(module)
    if known is None and causal is None:
        raise SpecError(
            f"cannot tell whether a token sees later ones in {was}: say causal=True (it does not, as in decoders) or "
            "causal=False (it does, as in encoders)"
        )
    if None not in (known, causal) and known != causal:
        raise SpecError(
            f"{was} reads {'forwards' if known else 'both ways'} by its class, but causal={causal} was given"
        )
    causal = known if causal is None else causal
    if _package(module) == "transformers" or set(CACHES) & set(arguments_of(module)):
        return InDecoder if causal else InEncoder
    return partial(InBlock, causal=causal)


def reads(wrapper: object) -> str:
    """Which tokens a token sees behind a wrapper, or a class of such, in words: "forwards", "both ways", ..."""
    return getattr(wrapper, "reads", Wrapper.reads)


def _package(module: nn.Module) -> str:
    """The library that a module's class, or what it inherits from, is of, if it is one whose conventions are known."""
    packages = [cls.__module__.partition(".")[0] for cls in type(module).__mro__]
    return next((package for package in packages if package in ("transformers", "timm")), "")


def _direction(module: nn.Module) -> bool | None:
    """True for forwards, False for both ways, None where it is not known for certain."""
    if _package(module) == "timm":
        return False
    causal = getattr(module, "is_causal", None) if _package(module) == "transformers" else None
    return causal if isinstance(causal, bool) else None


def _attribute(module: nn.Module, *names: str) -> int | None:
    """The first of these that the module, or its config, has."""
    for place in (module, getattr(module, "config", None)):
        for name in names:
            if isinstance(value := getattr(place, name, None), int):
                return value
    return None


def _heads(module: nn.Module) -> int | None:
    return _attribute(module, "num_heads", "num_attention_heads", "n_heads", "n_head")


def _rope(module: nn.Module) -> dict[str, Any]:
    """`rope_base` and `rope_more` of a module's config: of all layers, or by their kind, as transformers has them."""
    config = getattr(module, "config", None)
    found = getattr(config, "rope_parameters", None) or {}
    found = found.get(getattr(module, "layer_type", None), found) if isinstance(found, Mapping) else {}
    base = found.get("rope_theta", getattr(config, "rope_theta", None))
    if not isinstance(base, int | float):
        return {}
    kind, share = found.get("rope_type", "default"), found.get("partial_rotary_factor", 1.0)
    more = [f"scaling {kind!r}"] * (kind != "default") + [f"a share of {share:g} of each head"] * (share != 1)
    return {"rope_base": float(base), "rope_more": " and ".join(more)}


def _linear(module: nn.Module, *names: str) -> list[nn.Linear] | None:
    """The children of these names, if all are linear."""
    layers = [getattr(module, name, None) for name in names]
    return layers if all(isinstance(layer, nn.Linear) for layer in layers) else None


@register_adapter
def four_projections(module: nn.Module) -> AttentionInfo | None:
    """q_proj, k_proj, v_proj and o_proj: Llama, Qwen, Mistral, Gemma, ViT of transformers; or out_proj: OPT, GPT-J."""
    heads = _heads(module)
    layers = _linear(module, "q_proj", "k_proj", "v_proj", "o_proj")
    if layers is None:
        layers = _linear(module, "q_proj", "k_proj", "v_proj", "out_proj")
        if _package(module) == "transformers" and not _direction(module):
            return None  # by these names, what is not causal may be attention to another sequence, as in BART
    if layers is None or heads is None:
        return None
    q, k, v, o = layers
    head_dim = q.out_features // heads
    if o.in_features != q.out_features or v.out_features != k.out_features or k.out_features % head_dim:
        return None  # more is in these weights than queries, keys and values, such as a gate
    return AttentionInfo(
        q.in_features,
        heads,
        num_kv_heads=k.out_features // head_dim,
        head_dim=head_dim,
        weights={part: layer.weight for part, layer in zip("qkvo", layers, strict=True)},
        biases={part: layer.bias for part, layer in zip("qkvo", layers, strict=True) if layer.bias is not None},
        **_rope(module),
    )


@register_adapter
def one_projection(module: nn.Module) -> AttentionInfo | None:
    """One weight of queries, keys and values, one after the other, keys and values possibly grouped.

    Phi-3, timm's ViT, litgpt, nanoGPT; as (in, out): GPT-2; head by head: GPT-NeoX.
    """
    heads = _heads(module)
    if heads is None or getattr(module, "is_cross_attention", False):
        return None
    by_head = False
    if found := _linear(module, "qkv_proj", "o_proj") or _linear(module, "qkv", "proj"):
        qkv, out = (layer.weight for layer in found)
    elif found := _linear(module, "query_key_value", "dense"):
        qkv, out = (layer.weight for layer in found)
        by_head = True
    elif (found := _linear(module, "c_attn", "c_proj")) and _package(module) != "transformers":
        qkv, out = (layer.weight for layer in found)
    elif all(type(getattr(module, name, None)).__name__ == "Conv1D" for name in ("c_attn", "c_proj")):
        found = [module.c_attn, module.c_proj]
        qkv, out = (layer.weight.T for layer in found)
    else:
        return None
    width = out.shape[1]  # of all query heads
    head_dim, grouped = width // heads, (len(qkv) - width) // 2
    if width % heads or len(qkv) != width + 2 * grouped or grouped % head_dim or by_head and grouped != width:
        return None
    if not grouped or heads % (grouped // head_dim):
        return None

    def parts(x: Tensor) -> Iterable[Tensor]:
        return (
            x.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(1, 2)
            if by_head
            else x.split([width, grouped, grouped])
        )

    biases = {} if found[0].bias is None else dict(zip("qkv", parts(found[0].bias), strict=True))
    if found[1].bias is not None:
        biases["o"] = found[1].bias
    return AttentionInfo(
        qkv.shape[1],
        heads,
        num_kv_heads=grouped // head_dim,
        head_dim=head_dim,
        weights=dict(zip("qkv", parts(qkv), strict=True)) | {"o": out},
        biases=biases,
        fused="" if _package(module) else "q, k and v " + ("head by head" if by_head else "one after the other"),
        **_rope(module),
    )


@register_adapter
def multihead_attention(module: nn.Module) -> AttentionInfo | None:
    """nn.MultiheadAttention, in nn.TransformerEncoderLayer and elsewhere."""
    if not isinstance(module, nn.MultiheadAttention) or not module._qkv_same_embed_dim:
        return None
    weights = dict(zip("qkv", module.in_proj_weight.chunk(3), strict=True)) | {"o": module.out_proj.weight}
    biases = {}
    if module.in_proj_bias is not None:
        biases = dict(zip("qkv", module.in_proj_bias.chunk(3), strict=True)) | {"o": module.out_proj.bias}
    return AttentionInfo(module.embed_dim, module.num_heads, InMultiheadAttention, weights=weights, biases=biases)


@torch.no_grad()
def copy_projections(info: AttentionInfo, mixer: Mixer) -> dict[str, str]:
    """Copies the projections of an attention module into a mixer's, with their biases, where shapes allow.

    Args:
        info: of the attention module.
        mixer: whose `projections` are written.

    Returns:
        What became of each of q, k, v and o: `carried`; `carried, each head 4 times` (grouped keys and values in a
        mixer that has as many as queries); or `new: ` and why. Of `biases`, if the host has any: which are carried and
        which are left out.
    """
    ours, biases, report, carried = mixer.projections(), mixer.biases(), {}, []
    their_biases = info.biases if isinstance(info.biases, Mapping) else dict.fromkeys("qkvo" if info.biases else "")
    for part in "qkvo":
        theirs, target = info.weights.get(part), ours.get(part)
        if theirs is None or target is None:
            report[part] = "new: " + ("not found in the host" if theirs is None else "the mixer has none")
            continue
        times = 1
        grouped = getattr(mixer, "num_kv_heads", None) == info.num_kv_heads  # then wider rows are not more heads
        if part in "kv" and not grouped and theirs.shape[0] < target.shape[0] == info.num_heads * info.head_dim:
            times = info.num_heads // info.num_kv_heads
        theirs = _each_head(theirs, info.num_kv_heads, times)
        if theirs.shape != target.shape:
            report[part] = f"new: {tuple(theirs.shape)} there, {tuple(target.shape)} here"
            continue
        target.copy_(theirs)
        report[part] = "carried" if times == 1 else f"carried, each head {times} times"
        if part in biases and their_biases.get(part) is not None:
            biases[part].copy_(_each_head(their_biases[part], info.num_kv_heads, times))
            carried.append(part)
    if their_biases:
        parts = {"carried": carried, "left out": [part for part in their_biases if part not in carried]}
        report["biases"] = "; ".join(f"{what}: {', '.join(which)}" for what, which in parts.items() if which)
    return report


def _each_head(x: Tensor, heads: int, times: int) -> Tensor:
    """Rows of every head of x (heads * rows, ...), so many times."""
    return x if times == 1 else x.unflatten(0, (heads, -1)).repeat_interleave(times, 0).flatten(0, 1)
