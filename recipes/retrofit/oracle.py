"""A router that sees the future: what a forecast of worth could come to. No model can be run with it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mixers.retrofit import parts_of
from mixers.retrofit.hosted import HostedHAM
from mixers.retrofit.worth import worth
from mixers.routers.base import Router, RouterInputs


class Oracle(Router):
    """What every token will turn out to be worth (`mixers.retrofit.worth`); `foresee` tells it."""

    predict = "none"
    worth: Tensor

    def forward(self, inputs: RouterInputs) -> Tensor:
        return self.worth


def foresee(model: nn.Module, metric: Callable[[str], Tensor]) -> None:
    """Tells the oracles of a retrofitted model, at every call, the worth of its tokens; a call is a whole sequence.

    Args:
        model: of whose parts all have this router.
        metric: of each part by name, see `Sensitivity.metric`.
    """
    for name, part in parts_of(model).items():
        part.register_forward_pre_hook(_telling(metric(name)))


def _telling(metric: Tensor) -> Callable[..., None]:
    @torch.no_grad()
    def tell(part: HostedHAM, args: tuple[Any, ...]) -> None:
        s = part.sizes
        _, q, k, v = args[0].split(s.widths, -1)
        q, k, v = (x.unflatten(-1, (-1, size)) for x, size in ((q, s.head_dim), (k, s.head_dim), (v, s.value_dim)))
        part.router.worth = worth(q, k, v, metric, scale=s.scale, window=part.window)

    return tell
