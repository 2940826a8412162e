"""Keys of small norm are those that attention comes back to (arXiv 2406.11430): a rule for models that are trained.

e_t = -||k_t||
"""

from torch import Tensor

from mixers.routers.base import Router, RouterInputs


class KeyNorm(Router):
    """The smaller the norm of a key, the higher its score.

    Only for keys that have a norm of their own, as in a model of others (`mixers.retrofit`): our mixers normalise keys.
    """

    predict = "none"

    def forward(self, inputs: RouterInputs) -> Tensor:
        return -inputs.k.float().norm(dim=-1)
