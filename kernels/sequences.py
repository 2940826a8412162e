"""How sequences lie in a tensor: one in each row, or packed end to end in one row, as in FlashAttention and fla.

A `Layout` is made once per forward pass and handed down to every layer and operation, which take it wherever they take
`cu_seqlens`. It asks the device once, for the bounds of the sequences; all else is computed from them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIKE_SIZE = 1.25


class Layout:
    """N sequences in (B, T). Use `Layout.of`.

    Attributes:
        batch, tokens: B and T.
        cu_seqlens: (N + 1,) int32, where the sequences packed in the one row begin, and its end; None of a sequence in
            each row. Sequences may be empty.
        longest: tokens of the longest sequence.
    """

    def __init__(self, batch: int, tokens: int, cu_seqlens: Tensor | None, device: torch.device) -> None:
        self.batch, self.tokens, self.cu_seqlens = batch, tokens, cu_seqlens
        self.device, self._made = device, {}
        if cu_seqlens is None:
            self.bounds, self.longest = None, tokens
            return
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.is_floating_point() or cu_seqlens.ndim != 1:
            raise ValueError(f"cu_seqlens must be a tensor (N + 1,) of integers, got {cu_seqlens!r}")
        self.bounds = _checked(cu_seqlens.tolist(), batch, tokens)
        self.longest = max(b - a for a, b in zip(self.bounds, self.bounds[1:], strict=False))
        self.cu_seqlens = cu_seqlens.int()

    @classmethod
    def of(cls, cu_seqlens: "Tensor | Layout | None", x: Tensor) -> "Layout":
        """The layout of a tensor: the one given, or a new one.

        Args:
            cu_seqlens: (N + 1,) bounds of the sequences packed in the one row, a layout, or None for a sequence in each
                row.
            x: (B, T, ...).

        Raises:
            ValueError: `cu_seqlens` is no tensor of integers or does not rise from 0 to T, or B is not 1; a layout of
                another shape.
        """
        if isinstance(cu_seqlens, Layout):
            if (cu_seqlens.batch, cu_seqlens.tokens) != x.shape[:2]:
                shape = cu_seqlens.batch, cu_seqlens.tokens
                raise ValueError(f"the layout is of {shape} (B, T), the input of {tuple(x.shape[:2])}")
            return cu_seqlens
        return cls(x.shape[0], x.shape[1], cu_seqlens, x.device)

    @property
    def lengths(self) -> Tensor:
        """(N,) int64, tokens of every sequence."""
        if not self.packed:
            return self.once("lengths", lambda: torch.full((self.batch,), self.tokens, device=self.device))
        return self.once("lengths", lambda: self.cu_seqlens.long().diff())

    @property
    def positions(self) -> Tensor:
        """(B, T) int64, place of every token in its sequence, as far as it is in the tensor."""
        return self.once("positions", self._positions)

    def _positions(self) -> Tensor:
        token = torch.arange(self.tokens, device=self.device)
        if not self.packed:
            return token.expand(self.batch, self.tokens)
        return token - self.per_token(self.cu_seqlens[:-1].long())

    @property
    def packed(self) -> bool:
        """Whether sequences lie end to end in one row."""
        return self.cu_seqlens is not None

    def __len__(self) -> int:
        """N."""
        return self.batch if self.bounds is None else len(self.bounds) - 1

    @property
    def documents(self) -> Tensor:
        """Index (T,) int64 of the packed sequence that every token belongs to."""
        return self.per_token(torch.arange(len(self), device=self.lengths.device))[0]

    def per_token(self, x: Tensor) -> Tensor:
        """What x (N, ...) says of the sequences, said of their tokens: (1, T, ...) packed, else (B, 1, ...)."""
        if not self.packed:
            return x[:, None]
        return torch.repeat_interleave(x, self.lengths, 0, output_size=self.tokens)[None]

    def positions_after(self, length: Tensor | None) -> Tensor:
        """(B, T) int64, positions where `length` (N,) tokens of every sequence came before."""
        return self.positions if length is None else self.positions + self.per_token(length)

    @property
    def real(self) -> Tensor:
        """(N, longest) bool: where the padded form of the sequences holds a token."""
        return torch.arange(self.longest, device=self.lengths.device) < self.lengths[:, None]

    def pad(self, x: Tensor) -> Tensor:
        """(1, T, ...) packed -> (N, longest, ...), zeros on the right; what is not packed stays as it is."""
        if not self.packed:
            return x
        padded = x.new_zeros(len(self) * self.longest, *x.shape[2:])
        return padded.index_copy(0, self._places(), x[0]).unflatten(0, (len(self), self.longest))

    def unpad(self, x: Tensor) -> Tensor:
        """(N, longest, ...) -> (1, T, ...); what is not packed stays as it is."""
        return x.flatten(0, 1)[self._places()][None] if self.packed else x

    def _places(self) -> Tensor:
        """(T,) where each token stands in the flattened padded form."""
        return self.once("places", lambda: self.documents * self.longest + self.positions[0])

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make()` gives, kept for the layers to come: tables that a kernel needs are made once per layout."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def _checked(bounds: list[int], batch: int, tokens: int) -> list[int]:
    if batch != 1:
        raise ValueError(f"cu_seqlens needs a batch of one packed row, got {batch} rows")
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != tokens or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens must rise from 0 to {tokens} (the tokens of the row), got {bounds}")
    return bounds


def like_sizes(counts: list[int]) -> list[int]:
    """Lengths of the runs of like counts: padding a run to its longest costs little.

    A count joins a run if it is up to LIKE_SIZE times and 16 smaller than the largest of the run.

    Args:
        counts: in descending order.

    Returns:
        Lengths that add up to that of `counts`.
    """
    sizes, first = [], None
    for count in counts:
        if first is not None and count * LIKE_SIZE + 16 >= first:
            sizes[-1] += 1
        else:
            sizes.append(1)
            first = count
    return sizes
