"""Softmax attention (arXiv 1706.03762), grouped queries (arXiv 2305.13245), rotary positions, optional window.

y_t = W_o sum_{j<=t} softmax_j(q_t.k_j / sqrt(K)) v_j         j > t - window where there is one
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.sequences import pad_packed, positions_in, real_tokens, unpad
from mixers.base import Mixer, MixerOutput, MixerState
from mixers.gated_delta_net import new_tokens
from mixers.kv_cache import KVCache
from mixers.layers import ShortConvolution, rotary
from mixers.registry import SpecError, check_positive


class Attention(Mixer):
    """Softmax attention that keeps every key and value.

    Args:
        dim: width D.
        num_heads: query heads.
        head_dim: K = V; default dim // num_heads.
        num_kv_heads: key and value heads, a divisor of `num_heads`; default `num_heads`.
        rope: rotate queries and keys by their position; False leaves positions to the rest of the model.
        rope_base: of the rotation's wavelengths, in tokens.
        window: see the last `window` tokens only; 0 sees all.
        conv_size: taps of a short convolution of q, k and v, as recurrent mixers have; 0 is none.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        rope: bool = True,
        rope_base: float = 10_000.0,
        window: int = 0,
        conv_size: int = 0,
    ) -> None:
        super().__init__()
        self.dim = dim
        check_positive(num_heads=num_heads)
        self.num_heads, self.num_kv_heads = num_heads, num_heads if num_kv_heads is None else num_kv_heads
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        self.rope, self.rope_base, self.window = rope, rope_base, window
        check_positive(num_kv_heads=self.num_kv_heads, head_dim=self.head_dim)
        if self.num_heads % self.num_kv_heads:
            raise SpecError(f"num_heads ({num_heads}) must be a multiple of num_kv_heads ({num_kv_heads})")
        if rope and self.head_dim % 2:
            raise SpecError(f"head_dim must be even for rope, got {self.head_dim}")
        if window < 0:
            raise SpecError(f"window must be 0 (none) or a number of tokens, got {window}")
        if conv_size < 0 or conv_size == 1:
            raise SpecError(f"conv_size must be 0 (none) or at least 2, got {conv_size}")
        self.heads = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        self.qkv = nn.Linear(dim, sum(self.heads) * self.head_dim, bias=False)
        self.conv = ShortConvolution(self.qkv.out_features, taps=conv_size) if conv_size else None
        self.out = nn.Linear(num_heads * self.head_dim, dim, bias=False)

    def init_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MixerState:
        weight = self.out.weight
        like = dict(dtype=dtype or weight.dtype, device=device or weight.device)
        cache = KVCache.empty(batch_size, self.num_kv_heads, self.head_dim, self.head_dim, **like)
        conv = None
        if self.conv is not None:
            conv = torch.zeros(batch_size, self.conv.taps - 1, self.qkv.out_features, **like)
        return MixerState(torch.zeros(batch_size, dtype=torch.long, device=like["device"]), conv=conv, kv=cache)

    def full_kv_bytes(self) -> int:
        return 2 * self.num_kv_heads * self.head_dim * self.out.weight.element_size()

    def projections(self) -> dict[str, Tensor]:
        parts = self.qkv.weight.split([heads * self.head_dim for heads in self.heads])
        return dict(zip("qkv", parts, strict=True)) | {"o": self.out.weight}

    def mix(self, x: Tensor, state: MixerState | None, cu_seqlens: Tensor | None) -> MixerOutput:
        qkv, conv = self.qkv(x), None
        if self.conv is not None:
            qkv, conv = self.conv(qkv, None if state is None else state.conv, cu_seqlens)
        q, k, v = qkv.unflatten(-1, (-1, self.head_dim)).split(self.heads, 2)
        if cu_seqlens is None:
            real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
            position = torch.arange(x.shape[1], device=x.device)[None]
        else:
            real = real_tokens(cu_seqlens)
            position = positions_in(cu_seqlens)[None]
        if state is not None and cu_seqlens is None:
            position = position + state.length[:, None]
        elif state is not None:
            position = position + state.length.repeat_interleave(cu_seqlens.long().diff())
        if self.rope:
            q, k = (rotary(part, position, self.rope_base) for part in (q, k))
        if cu_seqlens is not None:
            q, k, v = (pad_packed(part, real) for part in (q, k, v))

        a = self._attend(q, k, v) if state is None or state.kv.fresh else None
        if state is not None:
            # with a window nothing is stored: the cache keeps a token until the window has passed it
            stored = torch.full(k.shape[:3], not self.window, dtype=torch.bool, device=x.device)
            if a is None:
                a, cache = state.kv.attend(q, k, v, stored, real, self.head_dim**-0.5, self.window)
            else:
                cache = state.kv.follow(k, v, stored, real, self.window)
            state = MixerState(state.length + new_tokens(x, cu_seqlens), conv=conv, kv=cache)
        a = a if cu_seqlens is None else unpad(a, real)
        return MixerOutput(self.out(a.flatten(2)), state)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(N, T, H, K) -> (N, T, H, V). Padding is at the end, where causality hides it."""
        T = q.shape[1]
        mask = None
        if 0 < self.window < T:
            token = torch.arange(T, device=q.device)
            behind = token[:, None] - token
            mask = (behind >= 0) & (behind < self.window)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        gqa = self.num_kv_heads < self.num_heads
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa
        ).transpose(1, 2)
