"""HAM's own score (arXiv 2603.22325): the angle between what the memory predicts and what came.

e_t = 1 - cos(p_t, v_t)         in [0, 2]; 1 at an empty state
"""

from torch import Tensor
from torch.nn.functional import cosine_similarity

from mixers.routers.base import Router, RouterInputs


class Cosine(Router):
    """Cosine distance of prediction and value."""

    def forward(self, inputs: RouterInputs) -> Tensor:
        return 1 - cosine_similarity(inputs.prediction, inputs.v.to(inputs.prediction.dtype), dim=-1)
