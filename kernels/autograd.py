"""Backward passes that give first derivatives only, and say so when a second one is asked for."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def first_order(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator of the `backward` of an `autograd.Function`, of which `what` is the name in messages.

    `once_differentiable` raises when the graph of the gradients is walked to its end. `torch.autograd.grad` with
    `inputs` does not go there, and takes what is missing for zero: the second derivative would be wrong in silence.

    Raises:
        RuntimeError: in the first backward pass, if its own graph is wanted (`create_graph=True`).
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        inner = once_differentiable(backward)

        @wraps(backward)
        def checked(ctx: Any, *grads: Tensor | None) -> Any:
            if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*ctx.saved_tensors, *grads)):
                raise RuntimeError(
                    f"{what} has no second derivative: backward() or grad() was called with create_graph=True"
                )
            return inner(ctx, *grads)

        return checked

    return decorate
