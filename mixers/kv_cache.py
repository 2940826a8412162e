"""Keys and values of the tokens that are kept, and only those: ragged over sequences and heads."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from kernels.routed_attention.gathered import attend


@dataclass
class KVCache:
    """Rows laid end to end, row n * H + h holding the entries of sequence n and head h in order of position.

    k (M, K), v (M, V), counts (N, H) int64. With a local window also position (M,) int64 and stored (M,) bool:
    entries that are not stored leave when the window has passed them.
    """

    k: Tensor
    v: Tensor
    counts: Tensor
    position: Tensor | None = None
    stored: Tensor | None = None

    @classmethod
    def empty(cls, counts: Tensor, key_dim: int, value_dim: int, dtype: torch.dtype, window: int = 0) -> "KVCache":
        """A cache without entries; `counts` (N, H) is zeros."""
        zeros = dict(device=counts.device, dtype=dtype)
        cache = cls(torch.zeros(0, key_dim, **zeros), torch.zeros(0, value_dim, **zeros), counts)
        if window:
            cache.position, cache.stored = counts.new_zeros(0), counts.new_zeros(0, dtype=torch.bool)
        return cache

    @property
    def bytes(self) -> int:
        parts = (self.k, self.v, self.position, self.stored)
        return sum(x.numel() * x.element_size() for x in parts if x is not None)

    def map(self, function: Callable[[Tensor], Tensor]) -> "KVCache":
        present = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: function(x) for name, x in present.items() if x is not None})

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        stored: Tensor,
        real: Tensor,
        length: Tensor,
        scale: float,
        window: int = 0,
    ) -> tuple[Tensor, "KVCache"]:
        """Attend from T new tokens to the cache and to themselves; (read-out (N, T, H_q, V), the cache with them).

        Args:
            q: (N, T, H_q, K).
            k, v: (N, T, H, .).
            stored: (N, T, H) bool.
            real: (N, T) bool, False on the padding at the end of shorter sequences.
            length: (N,) tokens seen before these.
            window: tokens nearer than this are seen, stored or not.
        """
        N, T, H = k.shape[:3]
        new_position = length[:, None] + torch.arange(T, device=k.device)  # (N, T)
        held = self._padded()
        old, old_k, old_v, old_position, old_stored = held
        k_all = torch.cat([old_k, k.transpose(1, 2).to(self.k.dtype)], 2)  # (N, H, P + T, K)
        v_all = torch.cat([old_v, v.transpose(1, 2).to(self.v.dtype)], 2)
        position = torch.cat([old_position, new_position[:, None].expand(N, H, T)], 2)
        stored_all = torch.cat([old_stored, stored.transpose(1, 2)], 2)
        valid = torch.cat([old, real[:, None].expand(N, H, T)], 2)

        behind = new_position[:, None, :, None] - position[:, :, None, :]  # (N, H, T, P + T)
        seen = valid[:, :, None] & (behind >= 0) & (stored_all[:, :, None] | (behind < window))
        rows = q.unflatten(2, (H, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)  # (N H, groups, T, K)
        o = attend(
            rows, k_all.flatten(0, 1).to(q.dtype), v_all.flatten(0, 1).to(q.dtype), seen.flatten(0, 1), scale=scale
        )
        o = o.unflatten(0, (N, H)).permute(0, 3, 1, 2, 4).flatten(2, 3)

        end = (length + real.sum(1))[:, None, None]  # the next query's position
        keep = valid & (stored_all | (end - position < window))
        cache = KVCache(k_all[keep], v_all[keep], keep.sum(2))
        if window or self.position is not None:  # the usage, and so a window, may change on the way
            cache.position, cache.stored = position[keep], stored_all[keep]
        return o, cache

    def _padded(self) -> tuple[Tensor, ...]:
        """(valid, k, v, position, stored), each (N, H, P, ...) with P the fullest row's count."""
        most = int(self.counts.max()) if self.counts.numel() else 0
        valid = torch.arange(most, device=self.counts.device) < self.counts[..., None]

        def spread(x: Tensor) -> Tensor:
            return x.new_zeros(*valid.shape, *x.shape[1:]).masked_scatter(
                valid.view(*valid.shape, *(1,) * (x.dim() - 1)), x
            )

        # without a window every entry is an older, stored token: seen by all, so its position does not matter
        position = torch.full_like(valid, -1, dtype=torch.long) if self.position is None else spread(self.position)
        stored = valid if self.stored is None else spread(self.stored)
        return valid, spread(self.k), spread(self.v), position, stored
