"""Attention over stored tokens as one mask over all pairs: the definition that faster versions are tested against."""

import torch
from torch import Tensor

from kernels.sequences import Layout


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
    """Shapes as in `kernels.routed_attention.routed_attention`; any float dtype."""
    T, groups = q.shape[1], q.shape[2] // k.shape[2]
    k, v, stored = (x.repeat_interleave(groups, 2) for x in (k, v, stored))
    token = torch.arange(T, device=q.device)
    behind = token[:, None] - token  # how far the key j lies behind the query t   (T, T)
    seen = stored.transpose(1, 2)[:, :, None, :] | (behind < window)
    seen = seen & (behind >= 0)
    if layout.packed:
        document = layout.documents
        seen = seen & (document[:, None] == document)
    logits = torch.einsum("bthk,bjhk->bhtj", q, k) * scale
    if bias is not None:
        logits = logits + bias.repeat_interleave(groups, 2).transpose(1, 2)[:, :, None, :]
    logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
    weights = logits.softmax(-1) * seen  # the product is what makes a query with nothing to see read exact zeros
    return torch.einsum("bhtj,bjhv->bthv", weights, v)
