"""Writing on from prompts, token by token, through the state: memory follows what the state holds."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mixers.backbone import Decoder, DecoderOutput
from mixers.in_place import InPlaceState
from mixers.registry import SpecError, check_positive
from mixers.state import kv_cache_bytes, state_bytes

PREFILL = 2048
RESERVED = 512
"""Tokens of every prompt that a state of fixed capacity is given places for at a time."""
SMALLEST = 1e-30
"""Temperature: a smaller one would be 0 in single precision, and draws alike."""


class Continuation:
    """What a decoder goes on to write: an endless iterator of the next token (B,) int64 of every prompt.

    Args:
        decoder: used as it is: call ``eval()`` on it first.
        prompts: (B, T) int64, or B tensors (T_i,) of any lengths, each of at least one token.
        temperature: of the draws, at least 0; 0 takes the likeliest token.
        top_p: draw among the likeliest tokens that together have this probability, in (0, 1].
        seed: of the draws.
        prefill: tokens of the prompts that are read at once, which bounds the memory that reading them takes.
        max_kv_bytes: what keys and values may take in all; None sets no limit.
        progress: called with the tokens read so far and those to read.
        in_place: whether what is written is read in states of fixed capacity, see `Decoder.reserve`; default: on a GPU.
            Not with `max_kv_bytes`, as they hold places for tokens to come, nor where weights are sharded or a mixer
            has no such states.

    Raises:
        SpecError: an empty prompt, an option out of its range, a mixer without states, or, at any time, more keys and
            values than allowed.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: Tensor | Sequence[Tensor],
        *,
        temperature: float = 0.8,
        top_p: float = 1.0,
        seed: int = 0,
        prefill: int = PREFILL,
        max_kv_bytes: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        in_place: bool | None = None,
    ) -> None:
        if not 0 <= temperature < math.inf:
            raise SpecError(f"temperature must be finite and at least 0, got {temperature}")
        if not 0 < top_p <= 1:
            raise SpecError(f"top_p must be above 0 and at most 1, got {top_p}")
        check_positive(prefill=prefill, **({} if max_kv_bytes is None else {"max_kv_bytes": max_kv_bytes}))
        if len(prompts) == 0 or min(len(prompt) for prompt in prompts) == 0:
            raise SpecError("a prompt must have at least one token")
        self.decoder, self.temperature, self.top_p = decoder, temperature, top_p
        self.max_kv_bytes, self.tokens_read = max_kv_bytes, 0
        weight = decoder.embedding.weight
        device = weight.device
        self._in_place = (device.type == "cuda" if in_place is None else in_place) and max_kv_bytes is None
        self._in_place &= hasattr(decoder, "reserve") and not isinstance(weight, DTensor)
        self._room = 0  # tokens that surely fit into a state of fixed capacity
        self.generator = torch.Generator(device).manual_seed(seed)
        try:
            self.state = decoder.init_state(len(prompts), device=device)
        except NotImplementedError as error:
            raise SpecError(f"nothing can be written without states: {error}") from error
        self._last = self._read([prompt.to(device) for prompt in prompts], prefill, progress)

    def __iter__(self) -> Iterator[Tensor]:
        return self

    @torch.no_grad()
    def __next__(self) -> Tensor:
        if self._last.ndim == 1:  # the token that was drawn last is yet to be read
            out = self._step(self._last[:, None])
            self._keep(out.state, len(self._last))
            self._last = out.hidden[:, -1]
        self._last = self._draw(self.decoder.logits(self._last).float())
        return self._last

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of keys and values that are held."""
        return kv_cache_bytes(self.state)

    @property
    def state_bytes(self) -> int:
        """Bytes of the recurrent memories and convolution tails."""
        return state_bytes(self.state)

    @torch.no_grad()
    def _read(self, prompts: list[Tensor], prefill: int, progress) -> Tensor:
        """The hidden state (B, D) of the last token of each prompt."""
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=prompts[0].device)
        tokens = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
        last = None
        for start in range(0, tokens.shape[1], prefill):
            part = tokens[:, start : start + prefill]
            real = torch.arange(start, start + part.shape[1], device=part.device) < lengths[:, None]
            out = self.decoder(part, state=self.state, padding_mask=None if real.all() else real)
            self._keep(out.state, int(real.sum()))
            here = (lengths - 1 - start).clamp(0, part.shape[1] - 1)
            hidden = out.hidden[torch.arange(len(part), device=part.device), here]
            ends = (lengths > start) & (lengths <= start + part.shape[1])
            last = hidden if last is None else torch.where(ends[:, None], hidden, last)
            if progress is not None:
                progress(int(lengths.clamp(max=start + part.shape[1]).sum()), int(lengths.sum()))
        return last

    def _step(self, token: Tensor) -> DecoderOutput:
        """What the decoder makes of one more token (B, 1) of every prompt."""
        if self._in_place and self._room < 1:
            if isinstance(self.state[0], InPlaceState):
                self._room = min(state.check() for state in self.state)  # there is more where less was stored
            if self._room < 1:
                return self._step_with_room(token)
        self._room -= 1
        return self.decoder(token, state=self.state)

    def _step_with_room(self, token: Tensor) -> DecoderOutput:
        """The same in new states with places for `RESERVED` tokens, if there are such of this decoder's mixers."""
        try:
            out = self.decoder(token, state=self.decoder.reserve(self.state, RESERVED))
        except ValueError:  # a cache with max_tokens, or a mixer of the user's whose state grows
            self._in_place = False
            return self.decoder(token, state=self.state)
        self._room = RESERVED - 1
        return out

    def _keep(self, state, count: int) -> None:
        self.state, self.tokens_read = state, self.tokens_read + count
        if self.max_kv_bytes is not None and self.kv_cache_bytes > self.max_kv_bytes:
            raise SpecError(
                f"keys and values take {self.kv_cache_bytes:,} bytes after {self.tokens_read:,} tokens, more than"
                f" max_kv_bytes {self.max_kv_bytes:,}; set a smaller kv_usage, or max_tokens of mixer 'ham'"
            )

    def _draw(self, logits: Tensor) -> Tensor:
        """(B, vocab_size) -> (B,)."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits - logits.amax(-1, keepdim=True)  # however small the temperature, the likeliest is divided to 0
        chances = (logits / max(self.temperature, SMALLEST)).softmax(-1)
        if self.top_p < 1:
            ordered, order = chances.sort(descending=True)
            before = ordered.cumsum(-1) - ordered  # the likeliest always stays
            chances = torch.zeros_like(chances).scatter(-1, order, ordered.masked_fill(before >= self.top_p, 0))
        return torch.multinomial(chances, 1, generator=self.generator)[:, 0]


def generate(
    decoder: Decoder, prompts: Tensor | Sequence[Tensor], *, num_tokens: int, **options
) -> Tensor | list[Tensor]:
    """Prompts and what a decoder goes on to write.

    Args:
        decoder: used as it is: call ``eval()`` on it first.
        prompts: (B, T) int64, or B tensors (T_i,) of any lengths, each of at least one token.
        num_tokens: to write after every prompt.
        options: of :class:`Continuation`.

    Returns:
        (B, T + num_tokens) int64 for prompts (B, T), else a list of tensors.

    Raises:
        SpecError: as :class:`Continuation` does.
    """
    check_positive(num_tokens=num_tokens)
    new = torch.stack([*islice(Continuation(decoder, prompts, **options), num_tokens)], 1)
    whole = [torch.cat([prompt, tokens.to(prompt)]) for prompt, tokens in zip(prompts, new, strict=True)]
    return torch.stack(whole) if isinstance(prompts, Tensor) else whole
