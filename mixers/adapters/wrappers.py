"""What stands in the place of an attention module: a mixer that answers to that module's calls."""

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from mixers.adapters.hf_cache import layer_of, leave_empty, tokens_in
from mixers.adapters.masks import beginnings, packed, read_mask
from mixers.base import Mixer, MixerOutput, Routing
from mixers.registry import DescribesMixers, with_usage
from mixers.threshold import thresholds_of

# What calls of attention hold that changes nothing for a mixer: positions, of which it has its own or none, and notes.
HARMLESS = {
    "position_embeddings", "cos", "sin", "rope", "freqs_cis",
    "cache_position", "use_cache", "max_length_q", "max_length_k", "num_items_in_batch", "output_hidden_states",
    "output_router_logits", "return_dict",
}  # fmt: skip
PACKING = ("position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k")
MASKS = ("attn_mask", "attention_mask", "mask")
CACHES = ("past_key_values", "past_key_value", "layer_past")


class Wrapper(nn.Module, DescribesMixers):
    """A mixer inside a model that knows nothing of mixers.

    Attributes:
        mixer: the mixer.
        routing: of the last call, None for mixers without a router.
        aux_loss: of the last call; `mixers.aux_loss(model)` adds those of all layers.
    """

    reads = "as its adapter says"
    """Which tokens a token sees, for people."""

    def __init__(self, mixer: Mixer, module: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer
        self.was = type(module).__name__
        self.arguments = arguments_of(module)
        self.layer_idx = getattr(module, "layer_idx", getattr(module, "layer_id", None))
        self.routing: Routing | None = None
        self.aux_loss: Tensor | None = None
        self.described: dict[str, Any] = {}  # in the model's config: the swap, with the mixer's spec

    def describe_usage(self, kv_usage: float) -> None:
        if self.described:
            self.described["mixer"] = with_usage(self.described["mixer"], kv_usage)

    def note(self, out: MixerOutput) -> Tensor:
        """The hidden (B, T, D) of an output, whose routing, without its gradients, and loss are kept."""
        self.routing = None if out.routing is None else out.routing.map(Tensor.detach)
        self.aux_loss = out.aux_loss
        return out.hidden

    def __getstate__(self) -> dict[str, Any]:
        """Without what is of the last call: tensors with gradients cannot be copied."""
        return self.__dict__ | {"routing": None, "aux_loss": None}

    def named(self, args: tuple, options: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by the names that the host gave them, first the input.

        Those that are None or False, which ask for nothing, are left out.
        """
        if len(args) > len(self.arguments):
            raise TypeError(f"{self.was} takes {len(self.arguments)} arguments, got {len(args)}")
        named = dict(zip(self.arguments, args, strict=False)) | options
        return {name: x for name, x in named.items() if x is not None and x is not False}

    def both_ways(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        """x (B, T, D) read from both ends by one mixer, the mean of the two: for hosts in which tokens see later ones.

        Both ways are one batch, so that a threshold counts them as one step.
        """
        two = torch.cat([x, x.flip(1)])
        if padding_mask is not None:
            padding_mask = torch.cat([padding_mask, padding_mask.flip(1)])
        forwards, backwards = self.note(self.mixer(two, padding_mask=padding_mask)).chunk(2)
        return (forwards + backwards.flip(1)) / 2

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        warn_of_lora_without_thresholds(self, state_dict)


class InDecoder(Wrapper):
    """In place of the causal attention of a Hugging Face decoder; answers with (hidden, None).

    Its state is kept in the model's `Cache`. Positions are ignored, a mixer has its own or none, but for the documents
    that they tell apart.

    Documents packed in a row (`mixers.adapters.masks.beginnings`) are read alone. A cache that was filled by them holds
    a state for each; it is refused as that of the rows.
    """

    reads = "forwards"

    def forward(self, *args: Any, **options: Any) -> tuple[Tensor, None]:
        if options.get("is_causal") is False:
            raise ValueError(f"a swapped mixer reads forwards in place of {self.was}: is_causal=False was asked for")
        given = self.named(args, options)
        x = given.pop(self.arguments[0])
        if given.keys() & {"encoder_hidden_states", "key_value_states"}:
            raise ValueError("a swapped mixer cannot attend to another sequence: cross-attention was asked for")
        real, begins = read_mask(given.pop("attention_mask", None), x, causal=True)
        begins = beginnings(x, real, begins, **{name: given.pop(name, None) for name in PACKING})
        cache = next((found for name in CACHES if (found := given.pop(name, None)) is not None), None)
        given.pop("is_causal", None)
        refuse(self.was, given)
        cache = getattr(cache, "self_attention_cache", cache)  # of an encoder and a decoder
        rows, how = packed(x, real, begins)
        trained = self.training and torch.is_grad_enabled()  # models make a cache even to be trained, an empty one
        if spared := cache is not None and trained and not tokens_in(cache, self.layer_idx):
            leave_empty(cache, self.layer_idx)
        if cache is None or spared:
            return self.note(self.mixer(rows, **how)).reshape(x.shape), None
        layer = layer_of(cache, self.layer_idx, self)
        out = self.mixer(rows, layer.state_for(self.mixer, x, how.get("cu_seqlens")), **how)
        layer.keep(out.state, x.shape[1])
        return self.note(out).reshape(x.shape), None


class InEncoder(Wrapper):
    """In place of attention in which all tokens see each other, in encoders; answers with (hidden, None)."""

    reads = "both ways"

    def forward(self, *args: Any, **options: Any) -> tuple[Tensor, None]:
        given = self.named(args, options)
        x = given.pop(self.arguments[0])
        real, _ = read_mask(given.pop("attention_mask", None), x, causal=False)
        if beginnings(x, real, **{name: given.pop(name, None) for name in PACKING}) is not None:
            raise ValueError("a swapped mixer that reads both ways takes no packed documents: one to a row")
        refuse(self.was, given)
        return self.both_ways(x, real), None


class InBlock(Wrapper):
    """In place of attention that answers with a tensor, as in timm's blocks or a class of one's own.

    Its mask may be (T, T), (B, T, T) or (B, 1, T, T), True or 0 where a query sees a key.
    """

    def __init__(self, mixer: Mixer, module: nn.Module, causal: bool) -> None:
        super().__init__(mixer, module)
        self.causal = causal
        self.reads = "forwards" if causal else "both ways"

    def forward(self, *args: Any, **options: Any) -> Tensor:
        given = self.named(args, options)
        x = given.pop(self.arguments[0])
        mask = given.pop(next((name for name in MASKS if name in given), ""), None)
        asked = given.pop("is_causal", options.get("is_causal"))
        if asked is not None and bool(asked) != self.causal and (asked or mask is None):  # a mask may say so, too
            way = "forwards" if self.causal else "both ways"
            raise ValueError(f"a swapped mixer reads {way} in place of {self.was}: is_causal={asked} was asked for")
        refuse(self.was, given)
        if isinstance(mask, Tensor) and mask.shape[-2:] == (x.shape[1], x.shape[1]) and mask.ndim < 4:
            mask = mask[None] if mask.ndim == 2 else mask
            mask = mask[:, None]
        elif isinstance(mask, Tensor) and mask.ndim != 4:
            raise ValueError(f"a mask of {self.was} must be (T, T), (B, T, T) or (B, 1, T, T), got {tuple(mask.shape)}")
        real, begins = read_mask(mask, x, self.causal)
        if not self.causal:
            return self.both_ways(x, real)
        rows, how = packed(x, real, beginnings(x, real, begins))
        return self.note(self.mixer(rows, **how)).reshape(x.shape)


class InMultiheadAttention(Wrapper):
    """In place of nn.MultiheadAttention over one sequence; answers with (hidden, None).

    With `is_causal`, or a mask that hides what is later, the mixer reads forwards, else both ways.
    """

    reads = "forwards or both ways, as the mask of each call says"

    def __init__(self, mixer: Mixer, module: nn.MultiheadAttention) -> None:
        super().__init__(mixer, module)
        self.rows_first = module.batch_first
        self.batch_first = False  # keeps nn.TransformerEncoderLayer from a path of its own around this module

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        for name, other in (("key", key), ("value", value)):
            if query.shape != other.shape or query.data_ptr() != other.data_ptr():
                raise ValueError(f"a swapped mixer cannot attend to another sequence: query and {name} differ")
        alone = query.ndim == 2
        x = query[None] if alone else query if self.rows_first else query.transpose(0, 1)
        mask = None
        if key_padding_mask is not None:
            hidden = key_padding_mask if key_padding_mask.dtype == torch.bool else key_padding_mask < 0
            mask = ~(hidden[None] if alone else hidden)
        if is_causal or _hides_later(attn_mask):
            y = self.note(self.mixer(x, padding_mask=mask))
        elif attn_mask is None:
            y = self.both_ways(x, mask)
        else:
            raise ValueError("a swapped mixer takes no attn_mask but a causal one; padding goes into key_padding_mask")
        return y[0] if alone else y if self.rows_first else y.transpose(0, 1), None


def arguments_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the positional arguments of a module's `forward`."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in inspect.signature(module.forward).parameters.values() if p.kind in positional)


def refuse(was: str, given: dict[str, Any]) -> None:
    """Raise ValueError for what is left of a call when all that can be honoured was taken from it."""
    for name in given.keys() - HARMLESS:
        kind = "" if isinstance(given[name], Tensor) else f"={given[name]!r}"
        raise ValueError(f"a mixer in place of {was} cannot honour the argument {name}{kind}")


def warn_of_lora_without_thresholds(module: nn.Module, state_dict: dict[str, Any]) -> None:
    """An adapter of PEFT holds no buffers unless `mixers.hf.save_adapter` wrote it: what it stores would differ."""
    adapter = any(".lora_" in name for name in state_dict) and not any(
        name.endswith(".head_bias") for name in state_dict
    )
    if adapter and any(True for _ in thresholds_of(module)):
        message = "this adapter was saved without KV thresholds, so other tokens are stored than when it was trained; "
        warnings.warn(message + "save it by mixers.hf.save_adapter", stacklevel=2)


def _hides_later(mask: Tensor | None) -> bool:
    if mask is None:
        return False
    hidden = (mask if mask.dtype == torch.bool else mask < 0).flatten(0, -3) if mask.ndim > 2 else mask
    hidden = hidden if hidden.dtype == torch.bool else hidden < 0
    return bool((hidden == torch.ones_like(hidden).triu(1)).all())
