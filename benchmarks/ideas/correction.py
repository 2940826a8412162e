"""A forecast that starts as the residual and learns only a correction, from the task's own loss.

    score_t = log(||W_o^h u_t|| + 0.01) + w_h.x_t        w = 0 at the start

Why it could help: the size of a write says how badly the memory knows a token, not whether anybody will ask for it.
What nobody asks for (a filler, a separator) can often be told from the token itself, which a linear map of x_t sees. At
w = 0 this is the router `residual`, as the logarithm keeps the order of the scores: a model has to unlearn nothing.

The router `demand` has the same form, and is trained to match the attention that later tokens would pay. Here the gate
on stored values is what trains w: its gradient is how much the loss would fall were a stored token counted more. That
is the quantity that is wanted, but it comes from stored tokens near the threshold alone, and is noisy.
"""

import torch
from torch import Tensor, nn

from mixers import RouterInputs, register_router
from mixers.routers.residual import Residual


@register_router("correction")
class Correction(Residual):
    """The log of the residual plus a linear map of the token, whose gradient does not reach the model."""

    trained_by_gate = True

    def __init__(self, dim: int, num_heads: int, *, space: str = "output") -> None:
        super().__init__(dim, num_heads, space=space)
        self.correction = nn.Linear(dim, num_heads, bias=False)
        nn.init.zeros_(self.correction.weight)

    def forward(self, inputs: RouterInputs) -> Tensor:
        residual = torch.log(super().forward(inputs) + 0.01)
        return residual + self.correction(inputs.x.detach()).to(residual.dtype)
