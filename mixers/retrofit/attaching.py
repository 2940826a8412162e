"""`attach`: HAM into a model of transformers, around its own attention; the model computes what it did before."""

import copy
import inspect
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from mixers.registry import SpecError, check_options
from mixers.retrofit.folder import become
from mixers.retrofit.hosted import HostedHAM, HostSizes
from mixers.retrofit.parts import HostedPart, install, parts_of
from mixers.retrofit.seam import probe, through_the_seam

DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")  # of attention weights, in configs


@dataclass
class Attached:
    """One layer.

    Attributes:
        name: of the attention module.
        was: its class.
        sizes: of its heads.
        kept: why the host's own attention was left to it; empty if HAM stands in for it.
    """

    name: str
    was: str
    sizes: HostSizes
    kept: str = ""


class AttachReport(list[Attached]):
    """What `attach` did, an `Attached` for every attention module; prints as a few lines."""

    def __str__(self) -> str:
        taken = [one for one in self if not one.kept]
        lines = [f"HAM around the attention of {len(taken)} of {len(self)} modules"]
        alike: dict[Any, list[str]] = {}
        for one in self:
            alike.setdefault((one.was, one.sizes, one.kept), []).append(one.name)
        for (was, s, kept), names in alike.items():
            heads = f"{s.num_heads} query and {s.num_kv_heads} key heads of {s.head_dim}"
            lines.append(f"  {was}: {', '.join(names)}: {f'left to the host: {kept}' if kept else heads}")
        return "\n".join(lines)


def attach(model: PreTrainedModel, *, layers: Iterable[int] | None = None, **options: Any) -> AttachReport:
    """Puts HAM around the attention of a decoder of transformers, in place.

    At KV usage 1, which is the default, the model computes what it did; a smaller one needs parts that are fitted
    (`python -m recipes retrofit`) or a router that needs no fitting, and thresholds that are calibrated. Weights of the
    host are untouched; each attention module gets a child named `ham`. Layers with a sliding window of their own keep
    it.

    Args:
        model: a causal language model that attends through transformers' attention interface.
        layers: which of the attention modules that can be taken, counted from 0; default all.
        options: of `mixers.retrofit.hosted.HostedHAM`.

    Returns:
        What was attached.

    Raises:
        SpecError: a model that this cannot be done to (named, with the reason), a layer that is not there, options that
            are unknown. The model is then as it was.
    """
    _check(model)
    parameters = inspect.signature(HostedHAM.__init__).parameters.values()
    known = {one.name: one for one in parameters if one.kind is one.KEYWORD_ONLY}
    check_options(options, known, of="HAM around a host")
    with through_the_seam(model):
        names = {module: name for name, module in model.named_modules()}
        report, parts = AttachReport(), []
        found = probe(model)
        wrong = sorted({f"{type(one.module).__name__}: {one.wrong}" for one in found if one.wrong})
        if wrong:
            raise SpecError(f"HAM cannot be put into {type(model).__name__}: {'; '.join(wrong)}")
        for name in DROPOUTS:
            if dropout := getattr(model.config, name, 0):
                what = f"HAM has no dropout of attention weights, {type(model).__name__} has {name}={dropout}"
                raise SpecError(f"{what}: load it by from_pretrained(..., {name}=0)")
        free = [one for one in found if not one.sliding]
        if not free:
            what = "no module of it reaches transformers' attention interface"
            if found:
                what = f"every layer has a sliding window ({found[0].sliding} tokens) and so keeps no full cache"
            raise SpecError(f"HAM cannot be put into {type(model).__name__}: {what}")
        chosen = _chosen(free, layers)
        for one in found:
            kept = f"a sliding window of {one.sliding} tokens" if one.sliding else ""
            kept = kept or ("" if any(one is other for other in chosen) else "not among the layers asked for")
            report.append(Attached(names[one.module], type(one.module).__name__, one.sizes, kept))
            if not kept:
                parts.append((one.module, HostedPart(one.sizes, **options)))
        sizes = {one.name: asdict(one.sizes) for one in report if not one.kept}
        note = {"modules": sizes, "options": copy.deepcopy(options)}
        become(model, note)
        install(model, dict(parts), note)
    return report


def _check(model: Any) -> None:
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise SpecError(f"HAM is put around the attention of transformers' models; {kind} is none: see swap_mixers")
    if getattr(model.config, "is_encoder_decoder", False) or getattr(model.config, "add_cross_attention", False):
        raise SpecError(f"HAM cannot be put into {kind}: it attends to another sequence")
    if parts_of(model):
        raise SpecError(f"{kind} has HAM already")
    if not model.can_generate():
        raise SpecError(f"HAM cannot be put into {kind}: it is no causal language model")


def _chosen(free: list, layers: Iterable[int] | None) -> list:
    if layers is None:
        return free
    layers = list(layers)
    if not layers:
        raise SpecError("no layer was asked for: layers is empty")
    for layer in layers:
        if not -len(free) <= layer < len(free):
            raise SpecError(f"layer {layer} is not there: {len(free)} attention modules can be taken")
    return [free[i] for i in sorted({layer % len(free) for layer in layers})]
