"""Where HAM takes hold of a model of transformers: its attention interface, its cache, and a hook before each module.

Every decoder of transformers that calls `ALL_ATTENTION_FUNCTIONS` gives its attention function the queries, keys and
values as it would attend with them: after projections, biases, norms and rotary positions, keys and values still
grouped. A function of ours under a name of our own (`NAME`), a layer of ours in the model's `Cache` that hands new keys
through, and a hook that notes the input and the cache of the call are all that HAM needs: no adapter for each host, and
no weight of the host is touched. A layer that was not taken, such as one with a sliding window of its own, is computed
as before.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from mixers.adapters.hf_cache import layer_of, leave_empty
from mixers.adapters.masks import beginnings, packed, read_mask
from mixers.adapters.wrappers import CACHES, PACKING, arguments_of, refuse
from mixers.registry import SpecError
from mixers.retrofit.hosted import HostSizes

NAME = "lightning_mixers"
CHILD = "ham"  # of the host's attention module

_found: list["Found"] | None = None  # what `probe` has seen


@dataclass
class Found:
    """An attention module that reaches the seam: what it was called with.

    Attributes:
        module: the module.
        sizes: of its heads.
        sliding: its own sliding window, None if it sees all that came before.
        wrong: why HAM cannot stand in for it, empty if it can.
    """

    module: nn.Module
    sizes: HostSizes
    sliding: int | None
    wrong: str = ""


@dataclass
class Call:
    """What the hook notes of a call of an attention module: its input (B, T, D) and its cache."""

    hidden: Tensor
    cache: Any


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **told: Any,
) -> tuple[Tensor, None]:
    """The attention function of hosts, as transformers calls it.

    Args:
        module: the host's attention module.
        query: (B, heads, T, K).
        key, value: (B, H, T, K or V): the new ones alone, as our cache hands them through.
        attention_mask: as `sdpa` has it.
        scaling: factor of q.k.
        dropout: of attention weights, which HAM has not.
        told: what else the model says.

    Returns:
        (B, T, heads, V), None.

    Raises:
        ValueError: something is asked for that cannot be honoured.
    """
    part = getattr(module, CHILD, None)
    if part is None:
        if _found is not None:
            _found.append(_describe(module, query, key, value, scaling, told))
            if _found[-1].wrong:  # the pass goes on, so that all that is wrong can be told
                return value.new_zeros(*query.shape[:3], value.shape[3]).transpose(1, 2), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **told
        )
    if dropout:
        raise ValueError(f"HAM has no dropout of attention weights, {dropout} was asked for: set attention_dropout=0")
    if told.pop("is_causal", None) is False:
        raise ValueError(f"HAM reads forwards in {type(module).__name__}: is_causal=False was asked for")
    call, part.call = part.call, None
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    B, T = q.shape[:2]
    if k.shape[1] != T or call.hidden.shape[:2] != (B, T):
        raise ValueError(
            f"HAM in {type(module).__name__} got {T} queries and {k.shape[1]} keys: attention to another sequence, or "
            "a cache of another model"
        )
    if part.watch is not None:
        out, weights = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **told)
        part.watch(call.hidden, q, k, v, out)
        return out, weights
    x = torch.cat([call.hidden.to(q), q.flatten(2), k.flatten(2), v.flatten(2)], -1)
    real, begins = read_mask(attention_mask, x, causal=True)
    begins = beginnings(x, real, begins, **{name: told.pop(name, None) for name in PACKING})
    refuse(type(module).__name__, {name: y for name, y in told.items() if y is not None and y is not False})
    rows, how = packed(x, real, begins)
    if call.cache is None:
        out = part(rows, **how)
    else:
        out = part(rows, call.cache.state_for(part, x, how.get("cu_seqlens")), **how)
        call.cache.keep(out.state, T)
    if out.routing is None:  # nothing but padding, of which a mixer gives back its input
        part.routing = None
        return v.new_zeros(B, T, q.shape[2], v.shape[3]), None
    part.routing = out.routing.map(Tensor.detach)  # kept, it would keep the graph of the call
    return out.hidden.reshape(B, T, q.shape[2], -1), None


def before_call(module: nn.Module, args: tuple, options: dict[str, Any]) -> None:
    """The hook before an attention module: notes its input, and puts a layer of ours into its cache."""
    part = getattr(module, CHILD)
    names = arguments_of(module)
    given = dict(zip(names, args, strict=False)) | options
    cache = next((found for name in CACHES if (found := given.get(name)) is not None), None)
    layer = None
    if cache is not None:
        layer = layer_of(cache, module.layer_idx, part)
        if part.training and torch.is_grad_enabled():  # models make a cache even to be trained
            if layer.read:
                raise ValueError(f"HAM in {type(module).__name__} is not trained on a cache that holds tokens already")
            leave_empty(cache, module.layer_idx)
            layer = None
    part.call = Call(given[names[0]], layer)


def register() -> None:
    """Make the seam known to transformers, under `NAME`."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def through_the_seam(model: PreTrainedModel) -> Iterator[None]:
    """Set the model's attention to ours; where that fails, or what is done within fails, it is put back.

    A config that is not the model's any more afterwards is as it was, too: other models may go by it.
    """
    register()
    before = {id(m.config): (m.config, m.config._attn_implementation) for m in _models(model)}
    kept: set[int] = set()
    try:
        if not model._can_set_attn_implementation():
            raise SpecError(
                f"{type(model).__name__} computes its attention without transformers' attention interface: HAM cannot "
                "reach it"
            )
        model.set_attn_implementation(NAME)
        yield
        kept = {id(m.config) for m in _models(model)}
    finally:
        for name in before.keys() - kept:
            config, implementation = before[name]
            config._attn_implementation_internal = implementation


@torch.no_grad()
def probe(model: PreTrainedModel) -> list[Found]:
    """The attention modules that a forward pass over two tokens reaches through the seam, in the order of their calls.

    Raises:
        SpecError: a module is called twice, or the model cannot do with tokens alone.
    """
    global _found
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    modes = {module: module.training for module in model.modules()}
    _found = []
    try:
        model.eval()
        model(input_ids=ids, use_cache=False)
        found = _found
    except Exception as error:  # whatever a model of others raises
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise SpecError(
            f"HAM cannot be put into {type(model).__name__}: a pass over two tokens fails ({what})"
        ) from error
    finally:
        _found = None
        for module, training in modes.items():
            module.training = training
    if len({id(one.module) for one in found}) < len(found):
        raise SpecError(f"{type(model).__name__} calls an attention module several times in a pass: HAM needs one each")
    layers = DynamicCache(config=model.config).layers
    for one in found:
        index = getattr(one.module, "layer_idx", None)
        if index is not None and any(hasattr(layer, "conv_states") for layer in layers[index : index + 1]):
            one.wrong = "a recurrent memory of the model's own shares its layer of the cache"
    return found


def _models(model: nn.Module) -> Iterator[PreTrainedModel]:
    return (module for module in model.modules() if isinstance(module, PreTrainedModel))


def _describe(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling, told: dict[str, Any]) -> Found:
    dim = getattr(module.config, "hidden_size", None)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    sizes = HostSizes(dim, query.shape[1], key.shape[1], query.shape[3], value.shape[3], scale)
    sliding = told.get("sliding_window") or getattr(module, "sliding_window", None)
    wrong = ""
    if not getattr(module, "is_causal", True) or told.get("is_causal") is False:
        wrong = "tokens see later ones"
    elif key.shape[2] != query.shape[2] or getattr(module, "is_cross_attention", False):
        wrong = "it attends to another sequence"
    elif getattr(module, "layer_idx", None) is None:
        wrong = "it has no layer_idx"
    elif dim is None:
        wrong = "its config has no hidden_size"
    else:
        for name in ("softcap", "s_aux", "position_bias", "sinks"):
            if told.get(name) is not None:
                wrong = f"its attention has {name}, which HAM has not"
    return Found(module, sizes, sliding, wrong)
