"""Softmax attention that sees the stored tokens alone (the attention side of HAM, arXiv 2603.22325).

    o_t = sum_j softmax_j(scale q_t.k_j + bias_j) v_j   over j <= t of the same sequence with stored_j or t - j < window

and o_t = 0 exactly where that set is empty.
"""

import torch
from torch import Tensor

from kernels.dispatch import choose
from kernels.sequences import Layout

BACKENDS = {
    "naive": "kernels.routed_attention.naive:routed_attention",
    "torch": "kernels.routed_attention.torch_gathered:routed_attention",
    "triton": "kernels.routed_attention.triton_ranked:routed_attention",
    "flex": "kernels.routed_attention.flex:routed_attention",
    "flex_ranked": "kernels.routed_attention.flex:ranked",
}


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stored: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | Layout | None = None,
    window: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Attend from every token to the tokens stored so far.

    Args:
        q: (B, T, H, K).
        k, v: (B, T, H_kv, K or V), H a multiple of H_kv; query head h reads key head h // (H // H_kv).
        stored: (B, T, H_kv) bool.
        bias: (B, T, H_kv), added to the logits of a key.
        scale: factor of q.k; None is K ** -0.5.
        cu_seqlens: (N + 1,) bounds of the sequences packed in the one row (B = 1), or the layout made of them.
        window: the last `window` tokens, the query's own included, are seen whether they are stored or not.
        backend: `naive`, `torch`, `triton`, `flex`, `flex_ranked` (rivals to measure against) or `auto`.

    Returns:
        (B, T, H, V) in the dtype of v.

    Raises:
        ValueError: shapes that do not fit; a backend that does not exist or is not available.
    """
    _, run = choose("routed_attention", backend, BACKENDS, v.device)
    fit = q.ndim == k.ndim == v.ndim == 4 and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]
    if not fit or k.shape[:3] != v.shape[:3] or q.shape[2] % k.shape[2]:
        raise ValueError(f"q, k and v do not fit: {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    B, T, heads = k.shape[:3]
    for name, x in (("stored", stored), ("bias", bias)):
        if x is not None and x.shape != (B, T, heads):
            raise ValueError(f"{name} must be {(B, T, heads)} (B, T, H_kv), got {tuple(x.shape)}")
    if stored is None or stored.dtype != torch.bool:
        raise ValueError(f"stored must be bool, got {stored if stored is None else stored.dtype}")
    if window < 0:
        raise ValueError(f"window must not be negative, got {window}")
    layout = Layout.of(cu_seqlens, v)
    if 0 in (B, T):
        return v.repeat_interleave(q.shape[2] // heads, 2)
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    return run(q, k, v, stored, bias, scale=scale, layout=layout, window=window).to(v.dtype)
