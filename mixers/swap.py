"""Mixers in models that people already have: attention out, a mixer in, in place."""

import copy
import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixers.adapters import AttentionInfo, copy_projections, describe, reads, wrapper_of
from mixers.adapters.wrappers import InDecoder, Wrapper
from mixers.base import Mixer
from mixers.caches.bounded import BoundedCache
from mixers.registry import MIXERS, SpecError, parse_spec
from mixers.sharing import share_threshold


@dataclass
class Swap:
    """One module that was replaced.

    Attributes:
        name: of the module.
        was: its class.
        weights: what became of its q, k, v and o.
        biases: which of theirs were carried and which left out; empty if there are none.
        reads: which tokens a token sees now.
        cache: what the mixer keeps of a sequence, against what the host kept; empty where there is no cache.
        fused: how one weight of q, k and v was read, where that was not certain.
        rope: what the mixer has of the host's rotary positions.
    """

    name: str
    was: str
    weights: dict[str, str]
    biases: str
    reads: str = ""
    cache: str = ""
    fused: str = ""
    rope: str = ""

    @property
    def details(self) -> list[str]:
        """What was done, a line for each thing; modules of one kind have the same."""
        lines = [f"reads {self.reads}"] + [f"{part}: {what}" for part, what in self.weights.items()]
        lines += [f"taken for {self.fused} in one weight: pass carry_weights=False if not so"] if self.fused else []
        lines += [f"biases {self.biases}"] if self.biases else []
        return lines + [line for line in (self.rope, self.cache) if line]


class SwapReport(list[Swap]):
    """What `swap_mixers` did, a `Swap` for every layer; prints as a few lines."""

    def __str__(self) -> str:
        lines = [f"{len(self)} modules replaced"]
        alike: dict[tuple[str, ...], list[str]] = {}
        for swap in self:
            alike.setdefault((swap.was, *swap.details), []).append(swap.name)
        for (was, *details), names in alike.items():
            lines += [f"  {was}: {', '.join(names)}", *(f"    {detail}" for detail in details)]
        return "\n".join(lines)


def swap_mixers(
    model: nn.Module,
    mixer: str | Mapping[str, Any] = "ham",
    *,
    where: str = "*",
    layers: Iterable[int] | None = None,
    causal: bool | None = None,
    carry_weights: bool = True,
    **options: Any,
) -> SwapReport:
    """Replaces attention modules of a model by mixers, in place.

    Heads, grouped keys, widths, biases and the base of rotary positions are read from each module; q, k, v and o are
    copied where shapes allow. `attention` is then the host's own where that has no more to it (norms of queries and
    keys, scaled positions, a window of its own). Other mixers have more than these, so train what comes out. In
    decoders the mixer reads forwards, in encoders both ways; the direction is never guessed (see `causal`). Decoders
    read documents that are packed in a row alone: told by positions that start again, cu_seq_lens, seq_idx or a
    block-diagonal mask. What else a call asks for and a mixer cannot do is a ValueError. HAM layers share one
    threshold; the report says what their cache is of the host's own. Add `aux_loss(model)` to the loss if the router
    has one.

    Args:
        model: any module; Hugging Face decoders and Vision Transformers, nn.TransformerEncoder, timm's blocks, or
            anything whose attention `mixers.adapters.register_adapter` was told about.
        mixer: name or spec.
        where: pattern of module names, such as "model.layers.*.self_attn"; what no adapter knows is an error.
        layers: which of the modules that match, counted from 0, negative ones from the end; default all. Every other
            one makes a hybrid.
        causal: True if a token sees none that come later. To be given for a class of one's own, and for it alone: it is
            known of transformers' and timm's classes, and nn.MultiheadAttention is told by the mask of each call. Calls
            of a class of one's own have x (B, T, D), perhaps positions and a mask, and give a tensor (B, T, D), or
            (hidden, None) if they take a cache as in transformers.
        carry_weights: False leaves the mixers' weights as they are drawn.
        options: of the mixer; default: those the module has.

    Returns:
        What was replaced, and which weights were carried over.

    Raises:
        SpecError: nothing matches (the candidates are listed), a module that no adapter knows, a layer that is not
            there, a mixer or an option that is unknown, a direction that is missing or wrong. The model is then as it
            was.
    """
    layers = None if layers is None else list(layers)
    if "dim" in options or isinstance(mixer, Mapping) and "dim" in mixer:
        raise SpecError("dim is that of the module that is replaced; leave it out")
    chosen = _choose(model, where, layers)
    spec = parse_spec(mixer)
    made = []
    for name, module in chosen:
        info = describe(module)
        wrapper = wrapper_of(name, module, info, causal)
        known = MIXERS.options(spec["name"])
        built = MIXERS.build(_options_of(info, known, spec | options), dim=info.dim)
        weights = copy_projections(info, built) if carry_weights else dict.fromkeys("qkvo", "new: as asked")
        biases = weights.pop("biases", "new: as asked" if info.biases else "")
        like = next(module.parameters())
        built.to(device=like.device, dtype=like.dtype)
        new = wrapper(built, module).train(module.training)
        cache = _cache_report(info, built) if reads(new) == InDecoder.reads else ""
        rope = _rope_report(info, built) if "rope_base" in known else ""
        swap = Swap(name, type(module).__name__, weights, biases, reads(new), cache, info.fused, rope)
        made.append((name, new, swap))
    for name, new, _ in made:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(part, Wrapper) for part in module.modules()):
            module.use_nested_tensor = False  # a path of its own around its layers, which asks for weights of attention
    share_threshold(model)
    swap = {"mixer": spec | options, "where": where, "layers": layers, "causal": causal}
    _note_in_config(model, swap)
    for _, new, _ in made:
        new.described = swap
    return SwapReport(swap for *_, swap in made)


def _options_of(info: AttentionInfo, known: Iterable[str], given: dict[str, Any]) -> dict[str, Any]:
    """Those of a mixer: what is given, and of the others what the host tells, if the mixer knows such an option."""
    host = {"num_heads": info.num_heads, "head_dim": info.head_dim, "num_kv_heads": info.num_kv_heads}
    if given.get("num_value_heads") is not None:
        del host["num_kv_heads"]
    if info.biases and not isinstance(info.biases, bool):
        host["bias"] = True
    if info.rope_base is not None:
        host["rope_base"] = info.rope_base
    return {option: value for option, value in host.items() if option in known} | given


def _rope_report(info: AttentionInfo, mixer: Mixer) -> str:
    """What a mixer with rotary positions has of the host's."""
    if not getattr(mixer, "rope", False):
        return "" if info.rope_base is None else "rotary positions of the host were left out: as asked"
    if info.rope_base is None:
        return f"rotary positions: base {mixer.rope_base:g}; none known of the host"
    theirs = "the host's" if mixer.rope_base == info.rope_base else f"as asked, the host's is {info.rope_base:g}"
    more = f"; left out: {info.rope_more}" if info.rope_more else ""
    return f"rotary positions: base {mixer.rope_base:g}, {theirs}{more}"


def _cache_report(info: AttentionInfo, mixer: Mixer) -> str:
    """What a mixer keeps of a sequence, against what the host keeps in as many bytes for a number."""
    try:
        state = mixer.init_state(1)
    except NotImplementedError:
        return ""
    size = next(mixer.parameters()).element_size()
    theirs = 2 * info.num_kv_heads * info.head_dim * size
    memory = f"{state.bytes:,} bytes of memory a sequence"
    if not state.caches:
        return f"KV cache: none (the host's: {theirs:,} bytes a token); {memory}"
    (cache,) = state.caches
    usage, what, bound = 1.0, "KV cache", ""
    window, sinks = mixer.window_size(), getattr(mixer, "sinks", 0)
    near = " and ".join([f"the last {window}"] * (window > 0) + [f"the first {sinks}"] * (sinks > 0)) + " tokens"
    if not mixer.routes or mixer.router.window(mixer.threshold.kv_usage):
        bound = f", of {near} alone" if window else ""
    else:
        if mixer.threshold.follows_usage:
            usage = mixer.threshold.kv_usage
        else:
            bound = ", of as many tokens as pass the fixed threshold"
        bound += f", {near} among them" if window or sinks else ""
        if isinstance(cache, BoundedCache):
            bound += f", of at most {cache.limit + window} tokens a head"
        elif mixer.threshold.follows_usage:
            what += f" at usage {usage:g}"
    ours = usage * cache.heads * cache.bytes_per_token
    return f"{what}: {ours:,.0f} bytes a token, {ours / theirs:.2f}x the host's {theirs:,}{bound}; {memory}"


def _choose(model: nn.Module, where: str, layers: list[int] | None) -> list[tuple[str, nn.Module]]:
    named = [(name, module) for name, module in model.named_modules() if name]
    inside = tuple(f"{name}." for name, module in named if isinstance(module, Wrapper))
    found = [(n, m) for n, m in named if fnmatch.fnmatchcase(n, where) and not n.startswith(inside or ("\0",))]
    known = [(n, m) for n, m in found if describe(m) is not None]
    if not known and found and where != "*":
        name, module = found[0]
        children = ", ".join(child for child, _ in module.named_children()) or "no children"
        raise SpecError(
            f"no adapter knows {type(module).__name__} ({name}: {children}); "
            "tell mixers.adapters.register_adapter about it"
        )
    if not known:
        candidates = dict.fromkeys(re.sub(r"\d+", "*", n) for n, m in named if describe(m) is not None)
        hint = f"candidates: {', '.join(candidates)}" if candidates else "the model has no attention that we know"
        raise SpecError(f"no module matches {where!r}; {hint}")
    if layers is None:
        return known
    for layer in layers:
        if not -len(known) <= layer < len(known):
            raise SpecError(f"layer {layer} is not there: {where!r} matches {len(known)} modules")
    return [known[i] for i in sorted({layer % len(known) for layer in layers})]


def _note_in_config(model: nn.Module, swap: dict[str, Any]) -> None:
    """A Hugging Face config takes a note of the swap, by which `mixers.hf.swapped` builds the model again.

    The note goes into a copy, as other models may have been built from the same config.
    """
    shared = getattr(model, "config", None)
    if not hasattr(shared, "to_dict"):
        return
    config = copy.deepcopy(shared)
    config.mixer_swaps = [*getattr(shared, "mixer_swaps", []), swap]  # those that the wrappers have, no copies
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = config


def aux_loss(model: nn.Module) -> Tensor:
    """The sum of what routers and thresholds of swapped mixers add to the loss of the last call; a scalar.

    Routers that `mixers.retrofit.attach` put in have none: they are fitted by `python -m recipes retrofit`, and no loss
    of a training loop reaches their weights.
    """
    losses = [m.aux_loss for m in model.modules() if isinstance(m, Wrapper) and m.aux_loss is not None]
    return torch.stack(losses).sum() if losses else torch.zeros(())
