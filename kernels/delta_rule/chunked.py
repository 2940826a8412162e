"""The gated delta rule in chunks: matrix products within a chunk, one small product per chunk from state to state.

Within a chunk of C tokens that starts from state S, with b_i = g_1 + ... + g_i, decays f = e^b (from the start) and
e = e^(b_C - b) (to the end), and D_ij = e^(b_i - b_j) for i >= j:

    A = strict(K K^T * D)        Qm = Q K^T * D
    prediction  P  = f K S + A U
    write       U  = beta (V - P)             =>  U = X beta (V - f K S),  X = (I + beta A)^-1
    output      O  = f Q S + Qm U
    next state  S' = f_C S + (e K)^T U        =   M S + N,  M = f_C - (e K)^T X beta f K,  N = (e K)^T X beta V

M and N need no state, so all chunks are prepared at once and only S' = M S + N runs in order. The backward pass has the
same shape: with W = dL/dU = X^T (Qm^T dO + A^T dP + e K dS'), the gradients of the states run in order with M^T. X is a
substitution, never a Neumann series, which diverges for correlated keys.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.delta_rule.layout import chunk_layout


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
    split, join, sizes, order = chunk_layout(v, cu_seqlens, chunk_size)
    heads = v.shape[2]
    state = initial_state if order is None else initial_state[order]
    o, p, state = _Chunks.apply(
        *(split(x) for x in (q * scale if scale != 1 else q, k, v, g, beta)),
        state.flatten(0, 1),
        [n * heads for n in sizes],
        delta,
    )
    state = state.unflatten(0, (-1, heads))
    return join(o), join(p), state if order is None else state[torch.argsort(order)]


class _Chunks(torch.autograd.Function):
    """q, k (chunks * H, C, K), v (chunks * H, C, V), g and beta (chunks * H, C), state (N * H, K, V) -> O, P, state."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta, state, sizes, delta):
        C, K = k.shape[1:]
        D, f, e = _decays(g)
        beta = beta[..., None]
        KK, QK = (torch.cat([k, q], 1) @ k.mT).split(C, 1)
        A, Qm = (KK * D).tril_(-1), QK * D
        fk, fq, ek = k * f, q * f, k * e
        eye = torch.eye(C, dtype=k.dtype, device=k.device)
        M = f[:, -1:] * torch.eye(K, dtype=k.dtype, device=k.device)
        if delta:
            X = torch.linalg.solve_triangular(torch.baddbmm(eye, torch.diag_embed(beta[..., 0]), A), eye, upper=False)
            XV, XK = (X @ torch.cat([v, fk], -1).mul_(beta)).split([v.shape[-1], K], -1)
            M, N = M.baddbmm_(ek.mT, XK, alpha=-1), ek.mT @ XV
        else:
            X, XV = None, beta * v
            N = ek.mT @ XV
        starts, final = _scan(M, N, state, sizes)
        if delta:
            FK, out, XKS = (torch.cat([fk, fq, XK], 1) @ starts).split(C, 1)
            U = XV - XKS
        else:
            FK, out = (torch.cat([fk, fq], 1) @ starts).split(C, 1)
            U = XV
        P, out = torch.baddbmm(FK, A, U), torch.baddbmm(out, Qm, U)
        ctx.save_for_backward(q, k, v, beta, D, f, e, A, Qm, X, M, starts, U, P)
        ctx.sizes, ctx.delta, ctx.state_shape, ctx.device = sizes, delta, state.shape, v.device.type
        ctx.set_materialize_grads(False)
        return out, P, final

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        with torch.autocast(ctx.device, enabled=False):  # it may be on where backward() is called
            return _Chunks._backward(ctx, *grads)

    @staticmethod
    def _backward(ctx, dO, dP, d_final):
        q, k, v, beta, D, f, e, A, Qm, X, M, starts, U, P = ctx.saved_tensors
        C = k.shape[1]
        dO = torch.zeros_like(v) if dO is None else dO
        if d_final is None:
            d_final = v.new_zeros(ctx.state_shape)
        fk, fq, ek = k * f, q * f, k * e

        W = Qm.mT @ dO  # what dL/dU is made of, less the part that comes through the next state
        if dP is not None:
            W.baddbmm_(A.mT, dP)
        if ctx.delta:
            W = X.mT @ W
            toP = -beta * W if dP is None else torch.addcmul(dP, beta, W, value=-1)
        else:
            toP = dP
        dN = fq.mT @ dO
        if toP is not None:
            dN.baddbmm_(fk.mT, toP)
        d_next, d_state = _scan_back(M, dN, d_final, ctx.sizes)
        late = ek @ d_next
        W = torch.baddbmm(W, X.mT, late) if ctx.delta else W + late
        if ctx.delta:
            toP = -beta * W if dP is None else torch.addcmul(dP, beta, W, value=-1)
        elif toP is None:
            toP = torch.zeros_like(v)

        to = torch.cat([toP, dO], 1)
        dA, dQm = (to @ U.mT).split(C, 1)
        dKS, dQS = (to @ starts.mT).split(C, 1)
        dA, dQm = dA.tril(-1), dQm.tril()
        dKS, dQS, dKE = dKS * f, dQS * f, (U @ d_next.mT).mul_(e)
        KKK, QKK = dA * D, dQm * D
        dk = torch.baddbmm(dKS + dKE, KKK + KKK.mT, k).baddbmm_(QKK.mT, q)
        dq = torch.baddbmm(dQS, QKK, k)
        dv = beta * W
        d_beta = (W * (v - P if ctx.delta else v)).sum(-1)

        through_D = dA.mul_(A).add_(dQm.mul_(Qm))
        to_end = (k * dKE).sum(-1)
        db = (k * dKS).sum(-1) + (q * dQS).sum(-1) + through_D.sum(2) - through_D.sum(1) - to_end
        db[:, -1] += to_end.sum(-1) + f[:, -1, 0] * (starts * d_next).sum((1, 2))
        dg = db.flip(1).cumsum(1).flip(1)
        return dq, dk, dv, dg, d_beta, d_state, None, None


def _decays(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """D (., C, C), f and e (., C, 1). b is summed in double: after a reset (g very negative) float32 would lose the
    small decays that follow."""
    b = g.double().cumsum(-1)
    D = (b[:, :, None] - b[:, None, :]).to(g.dtype)
    D = D.masked_fill_(torch.ones_like(D[0], dtype=torch.bool).triu(1), -torch.inf).exp_()
    return D, b.exp().to(g.dtype)[..., None], D[:, -1, :, None]


def _scan(M: Tensor, N: Tensor, state: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """States at the start of every chunk, and the last ones, of S' = M S + N.

    Chunks are time-major with the longest sequence first, so that step n works on the first `sizes[n]` rows alone.
    """
    state, starts = state.clone(), torch.empty_like(N)
    for m, n, start in zip(M.split(sizes), N.split(sizes), starts.split(sizes), strict=True):
        start.copy_(state[: len(m)])
        torch.baddbmm(n, m, start, out=state[: len(m)])
    return starts, state


def _scan_back(M: Tensor, dN: Tensor, d_state: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """The same from the end: gradients of every chunk's next state, and of the initial ones."""
    d_state, d_next = d_state.clone(), torch.empty_like(dN)
    steps = list(zip(M.split(sizes), dN.split(sizes), d_next.split(sizes), strict=True))
    for m, d_n, d_after in reversed(steps):
        d_after.copy_(d_state[: len(m)])
        torch.baddbmm(d_n, m.mT, d_after, out=d_state[: len(m)])
    return d_next, d_state
