"""Scores learned from the task's loss, through a gate on the values that are stored.

x        score_t = sigmoid(MLP(x_t))                        the form reported of HAM's paper (arXiv 2603.22325)
error    score_t = sigmoid(MLP(x_t, 1 - cos(p_t, v_t), log ||u_t||))      sees the memory's error as well
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from mixers.registry import unknown
from mixers.routers.base import Router, RouterInputs


class Learned(Router):
    """A small MLP, one score per head.

    Args:
        form: `x` sees the token alone, `error` also how badly the memory predicts it.
        hidden: width of the MLP; default dim // 2.
    """

    trained_by_gate = True

    def __init__(self, dim: int, num_heads: int, *, form: str = "x", hidden: int | None = None) -> None:
        super().__init__(dim, num_heads)
        if form not in ("x", "error"):
            raise unknown("form", form, ("x", "error"), of=" for router 'learned'")
        self.form = form
        hidden = hidden or max(dim // 2, 1)
        features = dim + (2 * num_heads if form == "error" else 0)
        self.mlp = nn.Sequential(nn.Linear(features, hidden), nn.SiLU(), nn.Linear(hidden, num_heads))

    def forward(self, inputs: RouterInputs) -> Tensor:
        x = inputs.x
        if self.form == "error":
            angle = 1 - cosine_similarity(inputs.prediction, inputs.v.to(inputs.prediction.dtype), dim=-1)
            size = (inputs.write.norm(dim=-1) + 0.01).log()
            x = torch.cat([x, angle.to(x.dtype), size.to(x.dtype)], -1)
        return self.mlp(x).float().sigmoid()  # bfloat16 has few values around 0.5: too many ties
