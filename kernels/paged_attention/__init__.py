"""Attention to keys and values that lie in pages, as many pages for a row (a sequence's head) as it stores.

o = sum_j softmax_j(scale q.k_j) v_j        over the tokens j that the row holds; 0 if it holds none
"""

import torch
from torch import Tensor

from kernels.dispatch import automatic, choose
from kernels.paged_attention.cache import PAGE as PAGE
from kernels.paged_attention.cache import PagedCache as PagedCache

BACKENDS = {
    "naive": "kernels.paged_attention.naive:attend",
    "torch": "kernels.paged_attention.torch_pages:attend",
    "triton": "kernels.paged_attention.triton_pages:attend",
}


def attend(
    q: Tensor,
    cache: PagedCache,
    *,
    scale: float = 1.0,
    beside: tuple[Tensor, Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of the queries of every row to what the row holds.

    Args:
        q: (R, G, K), G queries a row.
        cache: of R rows.
        scale: factor of q.k.
        beside: keys (R, W, K) and values (R, W, V) of tokens that lie in no page, and which of them are seen (R, W).
        backend: `naive`, `torch`, `triton` (no gradient) or `auto`: one that gives a gradient where one is due.

    Returns:
        (R, G, V) in the dtype of q; exact zeros for a row that sees nothing.

    Raises:
        ValueError: shapes that do not fit; a backend that does not exist or is not available.
    """
    if q.ndim != 3 or q.shape[0] != len(cache.length) or q.shape[2] != cache.k.shape[2]:
        rows, K = len(cache.length), cache.k.shape[2]
        raise ValueError(f"q must be ({rows}, G, {K}) (rows of the cache, queries, K), got {tuple(q.shape)}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, cache.k, cache.v)):
        if backend == "auto" and automatic(BACKENDS, q.device.type) == "triton":
            backend = "torch"
        if backend == "triton":
            raise ValueError("backend 'triton' of paged_attention gives no gradient; use 'torch'")
    _, run = choose("paged_attention", backend, BACKENDS, q.device)
    with torch.autocast(q.device.type, enabled=False):  # the dtype is that of q
        o, weight = run(q, cache, scale=scale)
        if beside is not None:
            keys, values, seen = beside
            logits = (q @ keys.to(q.dtype).mT * scale).to(weight.dtype).masked_fill(~seen[:, None], -torch.inf)
            share = torch.cat([weight[..., None], logits], -1).softmax(-1).nan_to_num()  # NaN: nothing is seen
            o = o * share[..., :1].to(q.dtype) + share[..., 1:].to(q.dtype) @ values.to(q.dtype)
        return o
