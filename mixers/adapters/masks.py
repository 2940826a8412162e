"""What a host's masks and positions say of its tokens: which are real, and where packed documents begin."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.sequences import Layout

HIDDEN = -1e4  # an additive mask at or below this hides; hosts write -inf, the least of their dtype, or this


@torch.compiler.disable  # what is done depends on values, so a compiled graph breaks here, once
def read_mask(mask: Any, x: Tensor, causal: bool) -> tuple[Tensor | None, Tensor | None]:
    """What a mask, as models hand it to attention, says of x (B, T, D).

    Args:
        mask: None; (B, S), True or 1 where a token is real; or (B, 1, T, S), True or, of floats, 0 where a query sees a
            key. Query t is key S - T + t; earlier keys are those of a cache. Only padding does not see itself.
        x: the input.
        causal: whether the host's tokens see earlier ones alone, or all.

    Returns:
        Real tokens (B, T) bool, None if all are; beginnings of documents (B, T) bool, None if a mask cannot tell.

    Raises:
        ValueError: a mask that is not made of these, padding and a causal host's local window: a mixer cannot obey it.
    """
    if mask is None:
        return None, None
    B, T = x.shape[:2]
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        kind = f"{mask.ndim} dimensions" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"a swapped mixer cannot read an attention mask of {kind}; load the model with "
            'attn_implementation="sdpa" or "eager"'
        )
    if mask.ndim == 2:
        real = mask[:, -T:] > 0 if mask.dtype != torch.bool else mask[:, -T:]
        return (None if real.all() else real.expand(B, T)), None
    sees = _sees(mask, T).expand(B, T, -1)
    before = sees.shape[-1] - T
    real = sees.diagonal(before, -2, -1)
    seen = sees & real[:, :, None]  # what padding sees is of no account
    if (sees[..., before:] & ~real[:, None]).any():
        raise ValueError(
            "an attention mask hides a token from itself but not from others: it is neither real nor padding"
        )
    query = torch.arange(T, device=x.device)[:, None] + before
    distance = query - torch.arange(T + before, device=x.device)
    expected, begins = real[:, :, None], None
    if not causal:
        expected = expected & real[:, None]
    else:
        reached = distance[seen.any(0)]
        window = int(reached.max()) + 1 if len(reached) else 0
        expected = expected & ((distance >= 0) & (distance < window))
        if before:
            expected = expected & seen.any(1)[:, None]  # of the keys in a cache, none shows to be real but by this
        else:
            last, has_previous = _previous(real)
            begins = real & has_previous & ~sees.gather(2, last[..., None])[..., 0]
            document = begins.cumsum(1)
            expected = expected & real[:, None] & (document[:, :, None] == document[:, None])
    if not torch.equal(seen, expected):
        way = "forwards" if causal else "both ways"
        raise ValueError(
            f"a swapped mixer that reads {way} cannot obey this attention mask: it says more than which tokens are "
            "padding" + (" and where documents begin" if causal and not before else "")
        )
    return (None if real.all() else real), begins


@torch.compiler.disable
def beginnings(x: Tensor, real: Tensor | None, begins: Tensor | None = None, **told: Tensor | None) -> Tensor | None:
    """Where documents packed in the rows of x (B, T, D) begin, the first of a row left out; (B, T) bool, or None.

    Args:
        x: the input.
        real: from `read_mask`.
        begins: from `read_mask`.
        told: any of these, None or as Hugging Face's collators make them. `position_ids` (B or 1, T): a document begins
            wherever the next position is not the next number, as transformers reads them; beside padding, whose
            positions may be anything, where that of the next real token is not larger. `cu_seq_lens_q`, `cu_seq_lens_k`
            (N + 1,): bounds in one row. `seq_idx` (B or 1, T): the document of each token.

    Raises:
        ValueError: shapes that do not fit; bounds of queries and keys that differ.
    """
    B, T = x.shape[:2]
    found = [] if begins is None else [begins]
    for name in ("position_ids", "seq_idx"):
        ids = told.get(name)
        if ids is None:
            continue
        if ids.ndim != 2 or ids.shape[0] not in (1, B) or ids.shape[1] != T:
            raise ValueError(f"{name} must be {(B, T)} (B, T) for a swapped mixer, got {tuple(ids.shape)}")
        if name == "seq_idx":
            new = ids[:, 1:] != ids[:, :-1]
        elif real is None:
            new = ids.diff(dim=1) != 1
        else:
            ids = ids.expand(B, T)
            last, has_previous = _previous(real)
            new = (real & has_previous & (ids <= ids.gather(1, last)))[:, 1:]
        found.append(F.pad(new, (1, 0)).expand(B, T))
    bounds = [b for b in (told.get("cu_seq_lens_q"), told.get("cu_seq_lens_k")) if b is not None]
    if bounds:
        if not torch.equal(bounds[0], bounds[-1]):
            raise ValueError(
                "cu_seq_lens_q and cu_seq_lens_k differ: a swapped mixer has no keys apart from its queries"
            )
        found.append(F.pad(Layout.of(bounds[0], x).documents.diff() != 0, (1, 0))[None])
    begins = torch.stack(found).any(0) if found else None
    return begins if begins is not None and begins.any() else None


def packed(x: Tensor, real: Tensor | None, begins: Tensor | None) -> tuple[Tensor, dict[str, Tensor | None]]:
    """What a mixer is called with: x (B, T, ...), and the options of the call.

    Where documents begin, all rows are put end to end. Every row begins a document, one of nothing but padding, too.

    Args:
        x: the input.
        real: (B, T) bool from `read_mask`.
        begins: (B, T) bool from `beginnings`.

    Returns:
        x, or (1, B T, ...); and `padding_mask`, with `cu_seqlens` where documents begin.
    """
    if begins is None:
        return x, {"padding_mask": real}
    begins = begins.clone()
    begins[:, 0] = True
    bounds = F.pad(begins.flatten().nonzero()[:, 0], (0, 1), value=begins.numel()).to(torch.int32)
    real = None if real is None else real.flatten()[None]
    return x.flatten(0, 1)[None], {"padding_mask": real, "cu_seqlens": bounds}


def _sees(mask: Tensor, T: int) -> Tensor:
    """(B or 1, T, S) bool of a mask (B or 1, heads, T, S)."""
    if mask.shape[1] != 1:
        raise ValueError(f"a swapped mixer takes one attention mask for all heads, got {mask.shape[1]}")
    if mask.shape[2] not in (1, T) or mask.shape[3] < T:
        raise ValueError(f"an attention mask of {tuple(mask.shape)} does not fit {T} tokens")
    mask = mask[:, 0]
    if mask.is_floating_point():
        hidden = mask <= HIDDEN
        if (hidden | (mask == 0)).all():
            return (~hidden).expand(-1, T, -1)
        raise ValueError("a swapped mixer cannot add the bias that is in this attention mask to any score")
    return (mask > 0 if mask.dtype != torch.bool else mask).expand(-1, T, -1)


def _previous(real: Tensor) -> tuple[Tensor, Tensor]:
    """For every token of `real` (B, T): index (B, T) of the last real one before it, and whether there is one."""
    index = torch.arange(real.shape[1], device=real.device).expand_as(real)
    last = F.pad(torch.where(real, index, -1).cummax(1).values[:, :-1], (1, 0), value=-1)
    return last.clamp(min=0), last >= 0
