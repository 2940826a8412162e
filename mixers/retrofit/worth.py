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

import torch
from torch import Tensor

FLOOR = 1e-12  # of what is taken the logarithm of


@torch.no_grad()
def worth(q: Tensor, k: Tensor, v: Tensor, metric: Tensor, *, scale: float, window: int) -> Tensor:
    """log d / 2 of every token; a dense pass, one sequence and one key head at a time.

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
    later = token[:, None] - token
    hidden, far = later < 0, later >= window
    out = torch.empty(B, T, H, device=q.device)
    for b in range(B):
        for h in range(H):
            total = 0
            values = v[b, :, h].float()
            for head in range(h * groups, (h + 1) * groups):
                weights = (q[b, :, head].float() * scale) @ k[b, :, h].float().T
                weights = weights.masked_fill_(hidden, -torch.inf).softmax(-1)
                o = weights @ values
                squared = weights.square_().mul_(far)  # (i, j)
                G = metric[head].float()
                vG, oG = values @ G, o @ G
                total = total + squared.sum(0) * (vG * values).sum(-1)
                total = total - 2 * ((squared.T @ oG) * values).sum(-1) + squared.T @ (oG * o).sum(-1)
            out[b, :, h] = total
    return (out.clamp(min=0) + FLOOR).log() / 2
