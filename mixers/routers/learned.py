"""Scores learned from the task's loss, through a gate on the values that are stored.

x        score_t = sigmoid(MLP(x_t) + d_t)      the form reported of HAM's paper (arXiv 2603.22325), dithered
error    score_t = sigmoid(MLP(x_t, 1 - cos(p_t, v_t), log ||u_t||) + d_t)      sees the memory's error as well

Ours is the dither d_t, a small draw fixed by position, head and layer. In the first layer x_t is the token's embedding:
every occurrence of a token then scores alike, and no threshold can store a share of them. Without it usage missed what
was asked by up to 0.06 in 6 of 35 runs on recall, where a fifth of the tokens are one filler.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from mixers.registry import check_positive, check_range, unknown
from mixers.routers.base import Router, RouterInputs, draws


class Learned(Router):
    """A small MLP, one score per head.

    Args:
        form: `x` sees the token alone, `error` also how badly the memory predicts it.
        hidden: width of the MLP; default dim // 2.
        dither: width of the draws, in units of the logit; 0 is the paper's form.
    """

    trained_by_gate = True

    def __init__(
        self, dim: int, num_heads: int, *, form: str = "x", hidden: int | None = None, dither: float = 0.1
    ) -> None:
        super().__init__(dim, num_heads)
        if form not in ("x", "error"):
            raise unknown("form", form, ("x", "error"), of=" for router 'learned'")
        check_range(0, dither=dither)
        self.form, self.dither = form, dither
        hidden = max(dim // 2, 1) if hidden is None else hidden
        check_positive(hidden=hidden)
        features = dim + (2 * num_heads if form == "error" else 0)
        self.mlp = nn.Sequential(nn.Linear(features, hidden), nn.SiLU(), nn.Linear(hidden, num_heads))

    def forward(self, inputs: RouterInputs) -> Tensor:
        x = inputs.x
        if self.form == "error":
            angle = 1 - cosine_similarity(inputs.prediction, inputs.v.to(inputs.prediction.dtype), dim=-1)
            size = (inputs.write.norm(dim=-1) + 0.01).log()
            x = torch.cat([x, angle.to(x.dtype), size.to(x.dtype)], -1)
        logits = self.mlp(x).float()  # bfloat16 has few values around 0.5: too many ties
        if self.dither:
            logits = logits + self.dither * (draws(0, inputs.layer, self.num_heads, inputs.positions) - 0.5)
        return logits.sigmoid()
