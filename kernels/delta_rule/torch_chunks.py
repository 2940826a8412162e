"""The gated delta rule in chunks: matrix products for all chunks at once, two small ones per chunk from state to state.

Within a chunk of C tokens that starts from state S, with b_i = g_1 + ... + g_i, decays f = e^b (from the start) and
e = e^(b_C - b) (to the end), and the readers R = [K; Q] stacked, as predictions and outputs are read alike (Q once for
each query head that shares the state):

    B = R K^T * D       D_ij = e^(b_i - b_j) where reader i sees token j: j < i in the rows of K, A, and j <= i below
    read        [P; O] = f R S + B U
    write       U  = beta (V - P)             =>  U = X beta (V - f K S),  X = (I + beta A)^-1
    next state  S' = f_C S + (e K)^T U

X is a substitution, never a Neumann series, which diverges for correlated keys. The gradients, Z being that of [P; O]
and dS that of S', run the same way from the end (without the delta rule, U = beta V: W = G, and Z stays as it is):

    G  = dL/dU = B^T Z + e K dS          W = X^T G
    dV = beta W                          Z_P -= beta W (what the write owes to the prediction)
    d_beta = W . (V - P)                 dS before the chunk = f_C dS + (f R)^T Z
    dR = f Z S^T + H K                   dK = H^T R + e U dS^T         H = Z U^T * D
    db = R . dR - K . dK                 (reading weighs by e^b, writing by e^-b)
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.autograd import first_order
from kernels.delta_rule.chunk_layout import chunk_layout
from kernels.sequences import Layout


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float,
    initial_state: Tensor,
    layout: Layout,
    delta: bool,
    chunk_size: int = 16,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes as in `kernels.delta_rule.gated_delta_rule`, k with as many heads as v, q with as many or a
    multiple; float32 or float64.
    """
    split, join, sizes, order = chunk_layout(layout, v.shape[2], chunk_size)
    sizes = [n * v.shape[2] for n in sizes]
    state = initial_state if order is None else initial_state[order]
    o, p, state = _Chunks.apply(q, k, v, g, beta, state.flatten(0, 1), scale, delta, split, join, sizes)
    state = state.unflatten(0, (-1, v.shape[2]))
    return o, p, state if order is None else state[torch.argsort(order)]


class _Chunks(torch.autograd.Function):
    """q, k, v, g, beta as given, state (N * H, K, V) -> o, prediction, state.

    Inside, R is (chunks * H, (1 + G) C, K), where G query heads read a state.
    """

    @staticmethod
    def forward(ctx, q, k, v, g, beta, state, scale, delta, split, join, sizes):
        queries = q.unflatten(2, (v.shape[2], -1)).unbind(3)
        R = torch.cat([split(x) for x in (k, *queries)], -2).flatten(0, -3)
        C = R.shape[1] // (1 + len(queries))
        if scale != 1:
            R[:, C:].mul_(scale)
        K, V = R[:, :C], split(v).flatten(0, -3)
        g, beta = (split(x).flatten(0, -2)[..., None] for x in (g, beta))

        D, f, e = _decays(g, len(queries))
        B = (R @ K.mT).mul_(D)
        fR, eK = f * R, e * K
        if delta:
            eye = torch.eye(C, dtype=q.dtype, device=q.device)
            # from the right, which is twice as fast; the inverse is the same
            X = torch.linalg.solve_triangular(beta * B[:, :C], eye, upper=False, unitriangular=True, left=False)
            Xb = X * beta.mT
            U, XK = Xb @ V, Xb @ fR[:, :C]
        else:
            X, U, XK = None, beta * V, None
        S, final = _scan(U, XK, eK, f[:, -1:], state, sizes)  # completes U
        PO = (fR @ S).baddbmm_(B, U)
        error = V - PO[:, :C] if delta else V

        ctx.save_for_backward(R, beta, D, f, e, B, X, S, U, error, state)
        ctx.scale, ctx.split, ctx.join, ctx.sizes = scale, split, join, sizes
        ctx.set_materialize_grads(False)
        return _each(PO[:, C:], C, join), join(PO[:, :C]), final

    @staticmethod
    @first_order("the torch backend of delta_rule")
    def backward(ctx, *grads):
        saved = ctx.saved_tensors  # once only: activation checkpointing computes them anew
        with torch.autocast(saved[0].device.type, enabled=False):  # it may be on where backward() is called
            return *_gradients(ctx, saved, *grads), None, None, None, None, None


def _gradients(ctx, saved, d_o: Tensor | None, d_p: Tensor | None, d_final: Tensor | None) -> tuple[Tensor, ...]:
    """Of q, k, v, g, beta and the initial state."""
    R, beta, D, f, e, B, X, S, U, error, state = saved
    C, split, join = U.shape[1], ctx.split, ctx.join
    K = R[:, :C]
    Z = _stack(d_p, d_o, U, R.shape[1] // C - 1, split)
    fR, eK = f * R, e * K
    W = B[:, C:].mT @ Z[:, C:]
    if d_p is not None:
        W.baddbmm_(B[:, :C].mT, Z[:, :C])
    if X is not None:
        W, eK = X.mT @ W, X.mT @ eK
    d_final = torch.zeros_like(state) if d_final is None else d_final
    dS, d_state = _scan_back(W, eK, fR, f[:, -1:], Z, None if X is None else beta, d_final, ctx.sizes)

    H = (Z @ U.mT).mul_(D)
    dR = (Z @ S.mT).mul_(f).baddbmm_(H, K)
    dK = (U @ dS.mT).mul_(e)
    at_end = (K * dK).sum((1, 2)) + f[:, -1, 0] * (S * dS).sum((1, 2))  # b_C is in e and in f_C
    dK.baddbmm_(H.mT, R)

    dq, dk, dv = _each(dR[:, C:] * ctx.scale, C, join), dR[:, :C] + dK, beta * W
    d_beta = W.mul_(error).sum(-1)
    dR[:, :C] -= dK
    db = dR.mul_(R).sum(-1).unflatten(1, (-1, C)).sum(1)
    db[:, -1] += at_end
    dg = db.flip(1).cumsum(1).flip(1)
    return dq, *(join(x) for x in (dk, dv, dg, d_beta)), d_state


def _each(x: Tensor, C: int, join: Callable[[Tensor], Tensor]) -> Tensor:
    """(., G C, X) of the query heads that share a state, joined to (B, T, heads, X)."""
    return torch.stack([join(part) for part in x.split(C, 1)], 3).flatten(2, 3)


def _decays(g: Tensor, G: int) -> tuple[Tensor, Tensor, Tensor]:
    """D (., (1 + G) C, C), f (., (1 + G) C, 1) and e (., C, 1).

    b is summed in double: after a reset (g very negative) float32 would lose the small decays that follow. What decays
    to nothing (e^-1000 is 0 in double too) may be -inf, whose differences would be NaN.
    """
    b = g.double().clamp(min=-1000).cumsum(1)
    D = (b - b.mT).to(g.dtype).clamp_(max=0).exp_()  # beyond the diagonal it could overflow
    causal = D.new_ones(D.shape[1:]).tril()
    see = torch.stack([causal.tril(-1)] + [causal] * G)
    return (D[:, None] * see).flatten(1, 2), b.exp().to(g.dtype).repeat(1, 1 + G, 1), D[:, -1, :, None]


def _stack(d_p: Tensor | None, d_o: Tensor | None, U: Tensor, G: int, split: Callable[[Tensor], Tensor]) -> Tensor:
    """Z (., (1 + G) C, V) of the gradients that there are."""
    heads = [None] * G if d_o is None else d_o.unflatten(2, (-1, G)).unbind(3)
    parts = [None if d is None else split(d).flatten(0, -3) for d in (d_p, *heads)]
    return torch.cat([torch.zeros_like(U) if part is None else part for part in parts], 1)


def _scan(U: Tensor, XK: Tensor | None, eK: Tensor, f_C: Tensor, state: Tensor, sizes: list[int]):
    """States at the start of every chunk, and the last ones; U, given as X beta V, becomes U in place.

    Chunks are time-major with the longest sequence first, so that step n works on the first `sizes[n]` rows alone.
    """
    state, starts = state.clone(), state.new_empty(len(U), *state.shape[1:])
    steps = zip(*(x.split(sizes) for x in (starts, U, U if XK is None else XK, eK, f_C)), strict=True)
    for start, u, xk, ek, decay in steps:
        S = state[: len(u)]
        start.copy_(S)
        if XK is not None:
            u.baddbmm_(xk, start, alpha=-1)
        S.mul_(decay).baddbmm_(ek.mT, u)
    return starts, state


def _scan_back(W, eK, fR, f_C, Z, beta: Tensor | None, d_state: Tensor, sizes: list[int]):
    """The same from the end: gradients of every chunk's next state, and of the initial ones.

    W, given as X^T B^T Z, and Z are completed in place. Without `beta` the writes owe nothing to the prediction.
    """
    d_state, d_next = d_state.clone(), d_state.new_empty(len(W), *d_state.shape[1:])
    steps = zip(*(x.split(sizes) for x in (d_next, W, eK, fR, f_C, Z, W if beta is None else beta)), strict=True)
    for d_after, w, ek, fr, decay, z, b in reversed(list(steps)):
        dS = d_state[: len(w)]
        d_after.copy_(dS)
        w.baddbmm_(ek, d_after)
        if beta is not None:
            z[:, : w.shape[1]].addcmul_(b, w, value=-1)
        dS.mul_(decay).baddbmm_(fr.mT, z)
    return d_next, d_state
