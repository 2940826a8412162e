"""The gated delta rule in chunks: matrix products within a chunk, one small product per chunk from state to state.

Within a chunk of C tokens that starts from state S, with b_i = g_1 + ... + g_i and D_ij = exp(b_i - b_j) for i >= j:

    prediction  P = e^b K S + strict(K K^T * D) U
    write       U = beta (V - P)       =>  (I + beta strict(K K^T * D)) U = beta (V - e^b K S)
    output      O = e^b Q S + (Q K^T * D) U
    next state  S' = e^(b_C) S + (e^(b_C - b) K)^T U  =  M S + N

The triangular inverse X gives U = X beta V - W S with W = X beta e^b K, so that M = e^(b_C) - Kd^T W and N = Kd^T X beta V
need no state: all chunks are prepared at once and only S' = M S + N runs in order (`_Scan`). The inverse is a
substitution, never a Neumann series, which diverges for correlated keys.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kernels.sequences import lengths_of


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    delta: bool,
    chunk_size: int = 16,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes as in `kernels.delta_rule.gated_delta_rule`, q and k with as many heads as v; float32 or float64."""
    split, join, sizes, order = _chunks(v, cu_seqlens, chunk_size)
    q, k, v, g, beta = (split(x) for x in (q, k, v, g, beta))  # (chunks * H, C, ...), time-major
    q = q * scale
    C, K = k.shape[1:]

    # b in double: after a reset (g very negative) the small decays that follow would drown in float32
    b = g.double().cumsum(-1)
    lower = torch.ones(C, C, dtype=torch.bool, device=g.device).tril()
    D = (b[:, :, None] - b[:, None, :]).to(g.dtype).masked_fill(~lower, -torch.inf).exp()
    from_start = b.to(g.dtype).exp()[..., None]
    to_end = (b[:, -1:] - b).to(g.dtype).exp()[..., None]
    whole = from_start[:, -1:]  # e^(b_C)

    KK, QK = (torch.cat([k, q], 1) @ k.mT).split(C, 1)
    KK, QK = (KK * D).tril(-1), QK * D
    eye = torch.eye(C, dtype=k.dtype, device=k.device)
    k_start, q_start, k_end = k * from_start, q * from_start, k * to_end
    if delta:
        X = torch.linalg.solve_triangular(eye + beta[..., None] * KK, eye, upper=False, unitriangular=True)
        X = X * beta[:, None, :]
        U0, W = (X @ torch.cat([v, k_start], -1)).split([v.shape[-1], K], -1)
        NM = k_end.mT @ torch.cat([U0, -W], -1)
        N, M = NM[..., : v.shape[-1]], NM[..., v.shape[-1] :]
        M = M + whole * torch.eye(K, dtype=k.dtype, device=k.device)
    else:
        U0, W = beta[..., None] * v, None
        N, M = k_end.mT @ U0, whole * torch.eye(K, dtype=k.dtype, device=k.device)

    heads = initial_state.shape[1]
    starts, final = _Scan.apply(M, N, initial_state[order].flatten(0, 1), [n * heads for n in sizes])
    if delta:
        KS, QS, WS = (torch.cat([k_start, q_start, W], 1) @ starts).split(C, 1)
        U = U0 - WS
    else:
        KS, QS = (torch.cat([k_start, q_start], 1) @ starts).split(C, 1)
        U = U0
    PU, OU = (torch.cat([KK, QK], 1) @ U).split(C, 1)
    final = final.unflatten(0, (-1, heads))[torch.argsort(order)]
    return join(QS + OU), join(KS + PU), final


class _Scan(torch.autograd.Function):
    """S_{n+1} = M_n S_n + N_n along the chunks of many sequences at once.

    Chunks are time-major with the longest sequence first, so that step n works on the first `sizes[n]` rows alone.
    """

    @staticmethod
    def forward(ctx, M: Tensor, N: Tensor, state: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
        state = state.clone()
        starts = torch.empty_like(N)
        for m, n, start in zip(M.split(sizes), N.split(sizes), starts.split(sizes), strict=True):
            live = state[: len(m)]
            start.copy_(live)
            torch.baddbmm(n, m, start, out=live)
        ctx.save_for_backward(M, starts)
        ctx.sizes = sizes
        return starts, state

    @staticmethod
    @once_differentiable
    def backward(ctx, d_starts: Tensor, d_state: Tensor):
        M, starts = ctx.saved_tensors
        d_state = d_state.clone()
        dN = torch.empty_like(starts)
        steps = zip(M.split(ctx.sizes), d_starts.split(ctx.sizes), dN.split(ctx.sizes), strict=True)
        for m, d_start, d_n in reversed(list(steps)):
            live = d_state[: len(m)]
            d_n.copy_(live)
            torch.baddbmm(d_start, m.mT, d_n, out=live)
        return dN @ starts.mT, dN, d_state, None


def _chunks(v: Tensor, cu_seqlens: Tensor | None, C: int):
    """How tokens become chunks: (split, join, chunks at each step, order of the sequences: longest first).

    `split` maps (B, T, H, ...) to (chunks * H, C, ...), time-major, short chunks filled with zeros: a zero key, value,
    write strength and log-decay leave the state as it is. `join` is its inverse.
    """
    B, T, H = v.shape[:3]
    if cu_seqlens is None:
        steps = -(-T // C)

        def split(x: Tensor) -> Tensor:
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, steps * C - T))
            return x.unflatten(1, (steps, C)).transpose(0, 1).transpose(2, 3).flatten(0, 2)

        def join(x: Tensor) -> Tensor:
            x = x.unflatten(0, (steps, B, H)).transpose(2, 3).transpose(0, 1).flatten(1, 2)
            return x[:, :T]

        return split, join, [B] * steps, torch.arange(B, device=v.device)

    lengths, order = lengths_of(cu_seqlens).sort(descending=True, stable=True)
    chunks = -(-lengths // C)
    steps = int(chunks.max())
    live = torch.arange(steps, device=v.device)[:, None] < chunks  # (steps, N): which sequences have a chunk n
    offset = (torch.arange(steps, device=v.device)[:, None] * C).expand_as(live)[live]
    sequence = torch.arange(len(lengths), device=v.device).expand_as(live)[live]
    within = offset[:, None] + torch.arange(C, device=v.device)  # (chunks, C)
    real = within < lengths[sequence, None]
    index = torch.where(real, cu_seqlens.long()[order][sequence, None] + within, T)  # T: a row of zeros
    back = torch.empty(T, dtype=torch.long, device=v.device)
    back[index[real]] = torch.arange(index.numel(), device=v.device)[real.flatten()]

    def split(x: Tensor) -> Tensor:
        x = F.pad(x[0], (0, 0) * (x.dim() - 2) + (0, 1))
        return x[index].transpose(1, 2).flatten(0, 1)

    def join(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, H)).transpose(1, 2).flatten(0, 1)[back][None]

    return split, join, live.sum(1).tolist(), order
