"""Where a loss or a gradient stopped being finite."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mixers.backbone import DecoderOutput
from mixers.base import MixerOutput


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The 2-norm of all gradients, a scalar of their dtype; of sharded ones, over all ranks."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that holds NaN or inf, or None. -inf is let pass: masks are made of it.

    Of a sharded tensor this rank's part is looked at.
    """
    for name, x in tensors:
        x = x.to_local() if isinstance(x, DTensor) else x
        if x.is_floating_point() and (x.isnan() | x.isposinf()).any():
            return name
    return None


@torch.no_grad()
def first_not_finite(module: nn.Module, loss: Any, batch: Any) -> str:
    """Names what is not finite first in a training step that failed.

    That is the first output when ``loss(batch)`` is computed again or, if all are finite, the gradient where the
    backward pass left the finite numbers.

    Args:
        module: whose parts are named; its gradients are there.
        loss: a batch -> scalar, a forward pass through the parts of ``module``.
        batch: of the step that failed.

    Returns:
        What it is, as a part of a sentence.
    """
    found: list[str] = []

    def watch(name: str):
        def hook(part: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not_finite(("", x) for x in _tensors(output)) is not None:
                found.append(f"the output of {name} ({type(part).__name__})")

        return hook

    hooks = [part.register_forward_hook(watch(name)) for name, part in module.named_modules() if name]
    try:
        with torch.compiler.set_stance("force_eager"):
            value = loss(batch)
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        return found[0]
    if not value.isfinite():
        return "the loss"
    gradients = {name: p.grad.abs() for name, p in module.named_parameters() if p.grad is not None}
    if name := not_finite(reversed(gradients.items())):
        return f"the gradient of {name}"
    largest = max(gradients, key=lambda name: float(gradients[name].max()))
    return f"the norm of the gradients (the largest is of {largest})"


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in what a module returned: one, several, or the hidden of a mixer or a decoder."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _tensors(part)
    elif isinstance(output, MixerOutput | DecoderOutput):
        yield output.hidden
