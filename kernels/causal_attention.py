"""Causal softmax attention of whole sequences, by what PyTorch has: the baseline, so it pays for nothing but itself.

A sequence in each row goes to `scaled_dot_product_attention`. Packed ones go to `torch.nn.attention.varlen` on CUDA,
where it can take them; elsewhere in groups of like length, so that padding is a fifth of the work at most.
"""

import inspect

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.sequences import Layout, like_sizes


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | Layout | None = None,
    *,
    scale: float | None = None,
    window: int = 0,
) -> Tensor:
    """Attend from every token to itself and the earlier ones of its sequence.

    Args:
        q: (B, T, H, K).
        k, v: (B, T, H_kv, K), H a multiple of H_kv.
        cu_seqlens: (N + 1,) bounds of the sequences packed in the one row (B = 1), or the layout made of them.
        scale: factor of q.k; None is K ** -0.5.
        window: see the last `window` tokens only, the query's own included; 0 sees all.

    Returns:
        (B, T, H, K) in the dtype of q.

    Raises:
        ValueError: `cu_seqlens` that do not fit, or a negative window.
    """
    if window < 0:
        raise ValueError(f"window must not be negative, got {window}")
    layout = Layout.of(cu_seqlens, q)
    if not layout.tokens:
        return v.repeat_interleave(q.shape[2] // v.shape[2], 2)
    if not layout.packed:
        return _dense(q, k, v, scale, window)
    if _varlen_takes(q):
        from torch.nn.attention.varlen import varlen_attn

        bounds, longest = layout.cu_seqlens, layout.longest
        o = varlen_attn(
            q[0], k[0], v[0], bounds, bounds, longest, longest,
            scale=scale, window_size=(window - 1 if window else -1, 0), enable_gqa=k.shape[2] < q.shape[2],
        )  # fmt: skip
        return o[None]
    lengths = [b - a for a, b in zip(layout.bounds, layout.bounds[1:], strict=False)]
    order = sorted((n for n in range(len(lengths)) if lengths[n]), key=lambda n: -lengths[n])
    outputs, places, first = [], [], 0
    for size in like_sizes([lengths[n] for n in order]):
        group, first = order[first : first + size], first + size
        longest = lengths[group[0]]
        tokens = torch.arange(longest, device=q.device)
        starts, ends = (torch.tensor([layout.bounds[n + i] for n in group], device=q.device)[:, None] for i in (0, 1))
        place = starts + tokens  # padding reads what comes next; causality hides it from the sequence's own tokens
        o = _dense(*(x[0][place.clamp(max=layout.tokens - 1)] for x in (q, k, v)), scale, window)
        real = place < ends
        outputs.append(o[real])
        places.append(place[real])
    return torch.cat(outputs)[torch.cat(places).argsort()][None]


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int) -> Tensor:
    T, mask = q.shape[1], None
    if 0 < window < T:
        token = torch.arange(T, device=q.device)
        behind = token[:, None] - token
        mask = (behind >= 0) & (behind < window)
    gqa = k.shape[2] < q.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    options = dict(attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=gqa)
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def _varlen_takes(q: Tensor) -> bool:
    """PyTorch's attention without padding runs FlashAttention: on CUDA, in half precision, with heads of up to 256."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] > 256 or q.shape[-1] % 8:
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # torch before 2.10
        return False
    return {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys()
