"""HAM's own score (arXiv 2603.22325): the angle between what the memory predicts and what came.

e_t = 1 - cos(p_t, v_t)         in [0, 2]; 1 at an empty state
"""

from torch import Tensor

from mixers.routers.base import Router, RouterInputs


class Cosine(Router):
    """Cosine distance of prediction and value."""

    predict = "statistics"

    def forward(self, inputs: RouterInputs) -> Tensor:
        pv, pp = inputs.statistics.unbind(-1)
        v_norm = inputs.v.to(pv.dtype).norm(dim=-1)
        return 1 - pv / (pp.sqrt().clamp(min=1e-8) * v_norm.clamp(min=1e-8))
