"""Attention over stored tokens by gathering them: the cost follows what is stored, not the length.

Rows (one per sequence and key head) are sorted by how much they store and taken in groups of like size, so that one
full head beside empty ones costs what it stores and no more. Within a group, blocks of queries read only the stored
keys that some query of the block may see and, with a window, beside them the keys near the block that are not stored.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.sequences import Layout, like_sizes

DENSE_BELOW = 128
"""Sequences of up to so many tokens are cheaper as one masked product than as many small gathered ones: milliseconds of
forward and backward, masked / gathered, (8, T, 4, 32) in float32 on one thread of a CPU, interleaved:

    stored    T = 128      256          512           1024
    12.5 %    6.2 / 4.8    18.4 /  9.8  77.6 / 21.3   318 /  56
    25 %      6.4 / 5.5    18.4 / 11.6  80.8 / 32.7   316 /  81
    50 %      6.3 / 6.6    18.3 / 16.1  85.4 / 50.6   325 / 169

and with two sequences whose heads store unevenly 2.2 / 2.4, 2.1 / 2.4, 2.0 / 3.0 at T = 128."""
QUERY_BLOCK = 512
WINDOW_BLOCK = 128  # with a window: a block reads its own keys, seen or not


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stored: Tensor,
    bias: Tensor | None,
    *,
    scale: float,
    layout: Layout,
    window: int,
) -> Tensor:
    """Shapes as in `kernels.routed_attention.routed_attention`; any dtype that scaled_dot_product_attention takes."""
    q, k, v, stored = (layout.pad(x) for x in (q, k, v, stored))
    bias = None if bias is None else layout.pad(bias)
    T = q.shape[1]
    q = q.unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4)  # (B, H_kv, groups, T, K)
    k, v, stored = (x.transpose(1, 2) for x in (k, v, stored))  # (B, H_kv, T, ...)
    bias = None if bias is None else bias.transpose(1, 2)
    attend = _masked if max(DENSE_BELOW, 2 * window) >= T else _gathered
    o = attend(q, k, v, stored, bias, scale, window)
    return layout.unpad(o.permute(0, 3, 1, 2, 4).flatten(2, 3))


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, bias: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """Softmax attention of q (R, groups, T, K) over k, v (R, M, .), rows R; -> (R, groups, T, V).

    `seen` (R, T, M) bool says which keys a query sees; `bias` (R, M) is added to a key's logits. A query that sees
    nothing reads exact zeros.
    """
    mask = _mask(seen.any(-1), seen.shape[-1], q.dtype)
    if bias is None:
        mask[..., 1:].zero_().masked_fill_(~seen, -torch.inf)
    else:  # its gradient passes through the mask
        mask = torch.cat([mask[..., :1], torch.where(seen, bias.to(q.dtype)[:, None, :], -torch.inf)], -1)
    return _with_nothing_to_see(q, k, v, mask, scale)


def _mask(sees: Tensor, keys: int, dtype: torch.dtype) -> Tensor:
    """Additive mask (R, T, 1 + keys), yet to be filled but for its first column.

    That is an extra key, whose value is zero; a query sees it iff `sees` (R, T) is False. So a query with nothing else
    to see reads zeros, with finite gradients.
    """
    mask = torch.empty(*sees.shape, 1 + keys, dtype=dtype, device=sees.device)
    mask[..., 0] = torch.zeros_like(mask[..., 0]).masked_fill_(sees, -torch.inf)
    return mask


def _with_nothing_to_see(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention under a mask made by `_mask`."""
    k, v = (F.pad(x, (0, 0, 1, 0))[:, None].expand(-1, q.shape[1], -1, -1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], scale=scale)


def _masked(q, k, v, stored, bias, scale, window):
    """All keys, those that are not stored masked out."""
    shape, T = q.shape[:2], q.shape[3]
    q, k, v, stored = (x.flatten(0, 1) for x in (q, k, v, stored))
    bias = None if bias is None else bias.flatten(0, 1)
    later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    if window or bias is not None:
        near = ~torch.ones_like(later).tril(-window) if window else torch.zeros_like(later)
        o = attend(q, k, v, (stored[:, None, :] | near) & ~later, bias, scale)
    else:  # the same as one sum: the masks are most of the work for short sequences
        mask = _mask(stored.cumsum(1) > 0, T, q.dtype)
        zero = torch.zeros((), dtype=q.dtype, device=q.device)
        causal = torch.zeros(T, T, dtype=q.dtype, device=q.device).masked_fill_(later, -torch.inf)
        torch.add(torch.where(stored, zero, -torch.inf)[:, None, :], causal, out=mask[..., 1:])
        o = _with_nothing_to_see(q, k, v, mask, scale)
    return o.unflatten(0, shape)


def _gathered(q, k, v, stored, bias, scale, window):
    """Stored keys and those of the window only, row by row of like size."""
    shape = q.shape[:2]
    q, k, v, stored = (x.flatten(0, 1) for x in (q, k, v, stored))
    bias = None if bias is None else bias.flatten(0, 1)
    counts, order = stored.sum(1).sort(descending=True)
    outputs = []
    for rows in order.split(like_sizes(counts.tolist())):
        some_bias = None if bias is None else bias[rows]
        outputs.append(_one_group(q[rows], k[rows], v[rows], stored[rows], some_bias, scale, window))
    return torch.cat(outputs)[torch.argsort(order)].unflatten(0, shape)


def _one_group(q, k, v, stored, bias, scale, window):
    """Rows (R, ...) that store about as much."""
    T = stored.shape[1]
    most = int(stored.sum(1).max())
    # ranks to positions: a stable sort brings the stored tokens to the front, in order; what is past the count is never
    # visible, as its position is set past the end
    index = (~stored).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    position = torch.where(torch.gather(stored, 1, index), index, T)
    held = [torch.gather(x, 1, index[..., None].expand(-1, -1, x.shape[-1])) for x in (k, v)]
    held.append(None if bias is None else torch.gather(bias, 1, index))
    visible_at = stored.cumsum(1).amax(0).tolist()  # the most keys that some row shows to query t
    blocks, token, size = (
        [],
        torch.arange(T, device=q.device),
        min(QUERY_BLOCK, WINDOW_BLOCK) if window else QUERY_BLOCK,
    )
    for start in range(0, T, size):
        stop = min(start + size, T)
        m, query = visible_at[stop - 1], token[start:stop, None]
        seen = position[:, None, :m] <= query
        keys, values, some_bias = (None if x is None else x[:, :m] for x in held)
        if window:
            near = slice(max(start + 1 - window, 0), stop)
            behind = query - token[near]
            seen = torch.cat([seen, ~stored[:, None, near] & (behind >= 0) & (behind < window)], 2)
            keys, values = torch.cat([keys, k[:, near]], 1), torch.cat([values, v[:, near]], 1)
            some_bias = None if bias is None else torch.cat([some_bias, bias[:, near]], 1)
        blocks.append(attend(q[:, :, start:stop], keys, values, seen, some_bias, scale))
    return torch.cat(blocks, 2)
