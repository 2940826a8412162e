"""Keys and values in pages from one pool: memory follows what every row stores, though rows differ wildly.

A row is a sequence's head. It holds as many pages of PAGE tokens as it stored tokens need, and a page it may yet need.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

PAGE = 64
"""Tokens of a page."""
SLACK = 64  # a pool grows by a 1 / SLACK of itself at least: copying it then costs little beside reading it


@dataclass
class PagedCache:
    """Keys and values of R rows (a sequence's head each).

    `append` gives a new cache and leaves the old one as it was, though both share their pages: what is new lies behind
    what the old one holds. Only the latest of such a family may write there; an older one copies its pages first.

    Attributes:
        k, v: (pages, PAGE, K or V); page 0 belongs to nobody: what is not stored is written there.
        table: (R, slots) int32, the pages of every row in order.
        length: (R,) int32, tokens that every row holds.
        free: (pages,) int32, page numbers; those from `used` on are free.
        used: () int32.
        reserved: tokens that fit into every row without asking the device how full it is.
    """

    k: Tensor
    v: Tensor
    table: Tensor
    length: Tensor
    free: Tensor
    used: Tensor
    reserved: int = 0
    version: int = 0
    newest: list[int] = field(default_factory=lambda: [0])

    @classmethod
    def empty(
        cls, rows: int, key_dim: int, value_dim: int, *, pages: int = 0, slots: int = 0, dtype: torch.dtype, device=None
    ) -> "PagedCache":
        """A cache without entries, which may grow.

        Args:
            rows: R.
            key_dim: K.
            value_dim: V.
            pages: of PAGE tokens each, that the pool holds at first.
            slots: pages that a row's table has room for at first.
            dtype: of keys and values.
            device: of all tensors.
        """
        like = dict(dtype=dtype, device=device)
        ints = dict(dtype=torch.int32, device=device)
        return cls(
            torch.zeros(pages + 1, PAGE, key_dim, **like),
            torch.zeros(pages + 1, PAGE, value_dim, **like),
            torch.zeros(rows, slots, **ints),
            torch.zeros(rows, **ints),
            torch.arange(pages + 1, **ints),
            torch.ones((), **ints),
        )

    @property
    def bytes(self) -> int:
        """Bytes of the pool, free pages included; the page of nobody and the page numbers are not counted."""
        return (
            (len(self.k) - 1)
            * PAGE
            * (self.k.shape[2] * self.k.element_size() + self.v.shape[2] * self.v.element_size())
        )

    def reserve(self, tokens: int | Tensor) -> "PagedCache":
        """A cache with places for more tokens: this one, or a larger one.

        Waits for the device, so call it once for many steps.

        Args:
            tokens: more in every row, or (R,) int32 numbers of them.
        """
        if not len(self.length):
            return self
        after = self.length + tokens
        pages, slots = len(self.k), self.table.shape[1]
        begun = (after + (PAGE - 1)) // PAGE - (self.length + (PAGE - 1)) // PAGE
        used, longest = torch.stack([begun.sum() + self.used, after.max().long()]).tolist()  # asked in one go
        if (missing := used - pages) > 0:
            more = max(missing, pages // SLACK)
            self = replace(
                self,
                k=torch.cat([self.k, self.k.new_zeros(more, *self.k.shape[1:])]),
                v=torch.cat([self.v, self.v.new_zeros(more, *self.v.shape[1:])]),
                free=torch.cat([self.free, torch.arange(pages, pages + more).to(self.free)]),
            )
        more = -(-longest // PAGE) - slots
        if more > 0:
            self = replace(self, table=torch.nn.functional.pad(self.table, (0, max(more, slots // SLACK))))
        if isinstance(tokens, int) and self.reserved < tokens:
            self = replace(self, reserved=tokens)
        return self

    def append(self, k: Tensor, v: Tensor, stored: Tensor) -> "PagedCache":
        """The cache with more tokens.

        Of several tokens a row the device is asked how many are stored, so that there are pages for those and no more.
        One token a row is appended without asking, but for every PAGE-th time: each row then gets a page in reserve, as
        soon as any stores something.

        Args:
            k: (R, T, K).
            v: (R, T, V).
            stored: (R, T) bool, which of them to append, in order.
        """
        T = stored.shape[1]
        if not stored.numel() or (T == 1 and self.reserved < 1 and not stored.any()):
            return self
        counts = stored.sum(1, dtype=torch.int32)
        if not self._may_write(k):
            self = self.select(torch.arange(len(counts), device=counts.device))
        if T > 1:
            self = self.reserve(counts)
        elif self.reserved < 1:
            self = self.reserve(PAGE)
        if self.table.shape[1] == 0:
            return self  # nothing is stored, and nothing ever was
        place = self.length[:, None] + stored.cumsum(1, dtype=torch.int32) - 1  # (R, T) within the row
        begins = stored & (place % PAGE == 0)  # a page, which it takes from the free ones, row by row
        taken = begins.flatten().cumsum(0, dtype=torch.int32).view_as(place)
        page = self.free[(self.used + taken - 1).clamp(0, len(self.free) - 1).long()]
        slots = self.table.shape[1]
        slot = (place // PAGE).clamp(0, slots - 1).long()
        table = torch.nn.functional.pad(self.table, (0, 1))  # a column for those that begin none
        table = table.scatter(1, torch.where(begins, slot, slots), page)[:, :slots].contiguous()
        if T > 1:  # what is stored, and nothing else, is written
            row, token = stored.nonzero(as_tuple=True)
            at = table[row, slot[row, token]].long(), (place[row, token] % PAGE).long()
            k, v = k[row, token], v[row, token]
        else:
            at = torch.where(stored, table.gather(1, slot), 0).long(), torch.where(stored, place % PAGE, 0).long()
        self.k[at], self.v[at] = k.to(self.k.dtype), v.to(self.v.dtype)
        self.newest[0] += 1
        return replace(
            self,
            table=table,
            length=self.length + counts,
            used=self.used + taken[-1, -1],
            reserved=self.reserved - 1 if T == 1 else 0,
            version=self.newest[0],
        )

    def _may_write(self, k: Tensor) -> bool:
        """Nobody has gone on from here yet, and no gradient or inference tensor stands against writing in place."""
        differentiable = torch.is_grad_enabled() and (k.requires_grad or self.k.requires_grad)
        frozen = self.k.is_inference() and not torch.is_inference_mode_enabled()
        return self.version == self.newest[0] and not differentiable and not frozen

    def select(self, rows: Tensor) -> "PagedCache":
        """A cache of its own with copies of some rows (n,) int64, in that order; a row may be taken twice."""
        length = self.length[rows]
        slots = -(-int(length.max()) // PAGE) if len(length) else 0
        table = self.table[rows, :slots]
        used = torch.arange(slots, device=length.device) * PAGE < length[:, None]
        old = table[used].long()
        new = torch.arange(1, len(old) + 1, device=length.device, dtype=torch.int32)
        nobody = old.new_zeros(1)
        return replace(
            self,
            k=self.k[torch.cat([nobody, old])],
            v=self.v[torch.cat([nobody, old])],
            table=torch.zeros_like(table).masked_scatter(used, new),
            length=length,
            free=torch.arange(len(old) + 1, device=length.device, dtype=torch.int32),
            used=torch.full_like(self.used, len(old) + 1),
            reserved=0,
            version=0,
            newest=[0],
        )

    def rows(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What some rows hold.

        Args:
            rows: (n,) int64.

        Returns:
            Keys (n, M, K) and values (n, M, V) in order, and which of the places hold a token, (n, M) bool.
        """
        length = self.length[rows]
        most = int(length.max()) if len(length) else 0
        pages = self.table[rows, : -(-most // PAGE)].long()
        exists = torch.arange(most, device=length.device) < length[:, None]
        k, v = (x[pages].flatten(1, 2)[:, :most] for x in (self.k, self.v))
        return k, v, exists

    def map(self, function) -> "PagedCache":
        """`function` applied to every tensor."""
        parts = ("k", "v", "table", "length", "free", "used")
        return replace(self, **{name: function(getattr(self, name)) for name in parts})
