"""Thresholds by layer, learned from the task's own loss, while the layers share one budget.

    score_t = log(||W_o^h u_t|| + 0.01) + b_l        stored iff score_t > tau, that is, iff log(...) > tau - b_l

with b_l = 0 at the start, learned for each layer (or each head), and tau the quantile of the scores of all layers, so
that the total is what was asked for: no penalty is needed, and adding the same number to every b_l changes nothing.

Why it could help: the sizes of writes are comparable across layers, what they are good for is not. At small budgets on
associative recall, `residual` gives most of the budget to the second layer, whose writes are larger, where the first
layer binds keys to values (docs/results.md). The gate's gradient compares tokens just above the threshold: where they
are worth more to the loss, b_l rises. It so moves towards the split at which the last token stored is worth as much in
each layer, which is what the best split has to fulfil.

(The threshold `learned` with scope `layer` is no such thing: its penalty holds every layer to the same usage.)
"""

import torch
from torch import Tensor, nn

from mixers import RouterInputs, register_router
from mixers.routers.residual import Residual


@register_router("layer_offset")
class LayerOffset(Residual):
    """The log of the residual plus a learned number.

    Args:
        per_head: one number for each head, not for each layer.
    """

    trained_by_gate = True

    def __init__(self, dim: int, num_heads: int, *, space: str = "output", per_head: bool = False) -> None:
        super().__init__(dim, num_heads, space=space)
        self.offset = nn.Parameter(torch.zeros(num_heads if per_head else 1))
        self.offset._no_weight_decay = True

    def forward(self, inputs: RouterInputs) -> Tensor:
        residual = torch.log(super().forward(inputs) + 0.01)
        return residual + self.offset.to(residual.dtype)
