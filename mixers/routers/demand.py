"""Learning by demand: how much later tokens will ask for this one, learned beside how badly it is predicted.

    score_t = log(||W_o^h u_t|| + 0.01) + w_h.x_t

w starts at zero (the residual router) and is trained only to match, by least squares, the z-scored log of the attention
mass that later queries give the key when all keys are there. That target costs a dense pass, in training alone. It is
z-scored over the tokens of a call, so accumulated micro-batches are not quite the larger batch for this router.
"""

import torch
from torch import Tensor, nn

from mixers.registry import check_range
from mixers.routers.base import Router, RouterInputs


class Demand(Router):
    """Residual in output space plus a linear forecast of demand.

    Args:
        weight: of the least-squares loss of the forecast.
    """

    def __init__(self, dim: int, num_heads: int, *, weight: float = 1.0) -> None:
        super().__init__(dim, num_heads)
        check_range(0, weight=weight)
        self.weight = weight
        self.forecast = nn.Linear(dim, num_heads, bias=False)
        nn.init.zeros_(self.forecast.weight)

    def forward(self, inputs: RouterInputs) -> Tensor:
        return (inputs.output_norm + 0.01).log() + self.forecast(inputs.x.detach()).to(inputs.output_norm.dtype)

    def loss(self, inputs: RouterInputs, scores: Tensor) -> Tensor:
        log_mass = (attention_mass(inputs) + 1e-3).log()
        mean, std = log_mass.mean((0, 1)), log_mass.std((0, 1), correction=0)
        forecast = self.forecast(inputs.x.detach()).to(log_mass.dtype)
        return self.weight * (forecast - (log_mass - mean) / (std + 1e-6)).square().mean()


@torch.no_grad()
def attention_mass(inputs: RouterInputs) -> Tensor:
    """Sum (B, T, H) of the attention weights that later tokens of the sequence give each key, all keys being there."""
    layout = inputs.layout
    q, k = layout.pad(inputs.q), layout.pad(inputs.k)
    logits = torch.einsum("bthk,bjhk->bhtj", q, k).float()
    T = q.shape[1]
    later = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    weights = logits.masked_fill(~later, -torch.inf).softmax(-1).tril(-1)
    if layout.packed:
        weights = weights * layout.real[:, None, :, None]
    return layout.unpad(weights.sum(2).transpose(1, 2))
