"""What stands in the place of an attention module: a mixer that answers to that module's calls."""

from typing import Any

import torch
from torch import Tensor, nn

from mixers.base import Mixer, MixerOutput, Routing
from mixers.hosts.cache import layer_of


class Wrapper(nn.Module):
    """A mixer inside a model that knows nothing of mixers.

    Attributes:
        mixer: the mixer.
        routing: of the last call, None for mixers without a router.
        aux_loss: of the last call; `mixers.aux_loss(model)` adds those of all layers.
    """

    def __init__(self, mixer: Mixer, module: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer
        self.layer_idx = getattr(module, "layer_idx", None)
        self.routing: Routing | None = None
        self.aux_loss: Tensor | None = None

    def note(self, out: MixerOutput) -> Tensor:
        """The hidden of an output, whose routing and loss are kept."""
        self.routing, self.aux_loss = out.routing, out.aux_loss
        return out.hidden

    def both_ways(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        """x (B, T, D) read from both ends by one mixer, the mean of the two: for hosts in which tokens see later ones.
        Both ways are one batch, so that a threshold counts them as one step."""
        two = torch.cat([x, x.flip(1)])
        if padding_mask is not None:
            padding_mask = torch.cat([padding_mask, padding_mask.flip(1)])
        there, back = self.note(self.mixer(two, padding_mask=padding_mask)).chunk(2)
        return (there + back.flip(1)) / 2


class InDecoder(Wrapper):
    """In place of the causal attention of a Hugging Face decoder. Answers with (hidden, None), and keeps its state in
    the model's `Cache`. Positions are ignored: a mixer has its own, or none."""

    def forward(
        self,
        hidden_states: Tensor,
        *_: Any,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        encoder_hidden_states: Tensor | None = None,
        **__: Any,
    ) -> tuple[Tensor, None]:
        if encoder_hidden_states is not None:
            raise ValueError("a swapped mixer cannot attend to another sequence: cross-attention was asked for")
        mask = real_tokens_of(attention_mask, hidden_states)
        cache = past_key_values if past_key_values is not None else layer_past
        if cache is None or (self.training and torch.is_grad_enabled()):  # models make a cache even to be trained
            return self.note(self.mixer(hidden_states, padding_mask=mask)), None
        layer = layer_of(cache, self.layer_idx, self)
        out = self.mixer(hidden_states, layer.state_for(self.mixer, hidden_states), padding_mask=mask)
        layer.keep(out.state, hidden_states.shape[1])
        return self.note(out), None


class InEncoder(Wrapper):
    """In place of attention in which all tokens see each other: a Vision Transformer of transformers, which expects a
    tuple, or of timm, which expects a tensor."""

    def __init__(self, mixer: Mixer, module: nn.Module) -> None:
        super().__init__(mixer, module)
        self.tuple = hasattr(module, "config")

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *_: Any, **options: Any):
        if attention_mask is None:
            attention_mask = options.get("attn_mask")
        hidden = self.both_ways(hidden_states, real_tokens_of(attention_mask, hidden_states))
        return (hidden, None) if self.tuple else hidden


class InMultiheadAttention(Wrapper):
    """In place of nn.MultiheadAttention over one sequence; answers with (hidden, None). With `is_causal`, or a mask
    that hides what is later, the mixer reads forwards, else both ways."""

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
        if query.shape != key.shape or query.data_ptr() != key.data_ptr():
            raise ValueError("a swapped mixer cannot attend to another sequence: query and key differ")
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


def _hides_later(mask: Tensor | None) -> bool:
    if mask is None:
        return False
    hidden = (mask if mask.dtype == torch.bool else mask < 0).flatten(0, -3) if mask.ndim > 2 else mask
    hidden = hidden if hidden.dtype == torch.bool else hidden < 0
    return bool((hidden == torch.ones_like(hidden).triu(1)).all())


def real_tokens_of(mask: Any, x: Tensor) -> Tensor | None:
    """(B, T) bool, True where x (B, T, D) holds a token, from a mask as models hand it to attention; None if all do.

    Of (B, 1, T, S), True or 0 where a query sees a key, the diagonal tells: only padding does not see itself.

    Raises:
        ValueError: a mask of another kind.
    """
    if mask is None:
        return None
    B, T = x.shape[:2]
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        raise ValueError(
            f"a swapped mixer cannot read an attention mask of {type(mask).__name__}; load the model with "
            'attn_implementation="sdpa" or "eager"'
        )
    if mask.ndim == 4:
        mask = mask[:, 0].diagonal(mask.shape[-1] - mask.shape[-2], -2, -1)  # query t is key S - T + t
    real = mask[:, -T:] if mask.dtype == torch.bool else mask[:, -T:] >= (0 if mask.is_floating_point() else 1)
    return None if real.all() else real.expand(B, T)
