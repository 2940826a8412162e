"""What a stored token is worth: the error that its absence would make, to second order, in units of the loss.

Without key j what query i reads changes, for small weights, by a_ij (o_i - v_j) more or less, where a is the softmax
over all keys and o its read-out. What that does to the loss is about half its squared length in a metric G of
the head's read-out, so the worth of a token of a key head, summed over the queries beyond the window and those of its
group, is

    d_j = sum_{i >= j + window} sum_h a_ij^2 (v_j - o_i)^T G_h (v_j - o_i)

With G_h = W_o^hT F W_o^h, F = E[g g^T] the Fisher matrix of the loss in what the layer adds to the residual stream, d
is comparable across heads and layers: one threshold for all divides the budget. Without F it is comparable in a layer.
(KVzap, arXiv 2601.07891, and KVzip, 2505.23416, forecast the attention mass; a lead says that this does better.)
"""

import itertools

import torch
from torch import Tensor

FLOOR = 1e-12  # of what is taken the logarithm of
QUERIES = 256  # at a time: what they weigh stays in a processor's cache, and half of all pairs are never made


@torch.no_grad()
def worth(q: Tensor, k: Tensor, v: Tensor, metric: Tensor, *, scale: float, window: int) -> Tensor:
    """log d / 2 of every token; a dense pass, one head and some queries at a time.

    Args:
        q: (B, T, heads, K).
        k, v: (B, T, H, K or V).
        metric: (heads, V, V), symmetric and positive.
        scale: factor of q.k.
        window: queries nearer than this see the token anyway.

    Returns:
        (B, T, H) float32.
    """
    B, T, H = k.shape[:3]
    groups = q.shape[2] // H
    token = torch.arange(T, device=q.device)
    out = torch.zeros(B, H, T, device=q.device)
    for b, h in itertools.product(range(B), range(H)):
        keys, values = k[b, :, h].float().T, v[b, :, h].float()
        for head in range(h * groups, (h + 1) * groups):
            G = metric[head].float()
            vG = values @ G
            for start in range(0, T, QUERIES):
                rows = token[start : start + QUERIES]
                seen = token[: start + len(rows)]
                later = rows[:, None] - seen
                weights = (q[b, rows, head].float() * scale) @ keys[:, seen]
                weights = weights.masked_fill_(later < 0, -torch.inf).softmax(-1)  # (i, j)
                v_j = values[seen]
                o = weights @ v_j
                squared = weights.square_().mul_(later >= window)
                oG = o @ G
                of_v = squared.sum(0) * (vG[seen] * v_j).sum(-1)
                out[b, h, seen] += of_v - 2 * ((squared.T @ oG) * v_j).sum(-1) + squared.T @ (oG * o).sum(-1)
    return (out.transpose(1, 2).clamp(min=0) + FLOOR).log() / 2
