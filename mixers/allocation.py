"""Which heads store more, by trial: a bias on every head's scores that lowers the loss at small KV usages.

Routers rank the tokens of one head well. What they say of two heads is less to be trusted: the error that a memory
makes in one layer may be large and of no consequence, and a token is worth storing only where later tokens read it. A
model trained at every usage is the worst case, as at large usages everything is stored everywhere and nothing tells
the heads apart. The loss tells, so it is asked: layers first, then heads, are tried with a bias up and down, and what
lowers the mean loss over some small usages is kept. Tokens within a head keep their order; nothing is trained.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mixers.base import Mixer
from mixers.calibration import calibrate
from mixers.processes import mean_over_ranks
from mixers.quantiles import INFINITE
from mixers.registry import SpecError
from mixers.sharing import routing_mixers
from mixers.threshold import Threshold, check_usage

USAGES = (1 / 16, 1 / 8, 1 / 4)
MIN_GAIN = 1e-3  # of the loss: less than that is not worth a bias
DOUBLINGS = 5


@torch.no_grad()
def allocate(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[Any], Tensor],
    *,
    kv_usages: Iterable[float] = USAGES,
    heads: bool | None = None,
    progress: bool = False,
) -> tuple[float, float]:
    """Sets `head_bias` of every mixer whose threshold several heads share, and calibrates the thresholds.

    A trial costs two forward passes over the first batch to calibrate, and one over each batch for each usage; there
    are two to ten trials for every layer and head.

    Args:
        model: any module with routing mixers; its modes (train, eval) are put back.
        batches: what `loss` takes; a few are enough. Every process of a distributed run needs as many.
        loss: a batch -> mean loss, a scalar: a forward pass through `model`.
        kv_usages: those at which the loss counts, all the same, in [0, 1].
        heads: also try the heads of each layer; default: if there are no more than 16 in all.
        progress: show a bar.

    Returns:
        The mean loss before and after.

    Raises:
        SpecError: no heads of the model share a threshold that follows the KV usage, there is no batch, or a usage is
            out of range.
    """
    mixers = allocatable_mixers(model)
    if not mixers:
        raise SpecError("there is nothing to allocate: no heads share a threshold that follows the KV usage")
    usages, batches = [check_usage(usage) for usage in kv_usages], list(batches)
    if not (usages and batches):
        raise SpecError("to allocate KV usage takes at least one batch and one usage")
    thresholds = {m.threshold: m.threshold.kv_usage for m in mixers}
    for threshold in thresholds:
        threshold.close_step()  # of training
    moved = [m.head_bias for m in mixers] + [x for t in thresholds for x in (*t.parameters(), *t.buffers())]
    before = [x.clone() for x in moved]
    modes = {module: module.training for module in model.modules()}

    def trial() -> float:
        for threshold in thresholds:
            threshold.set_usage(sorted(usages)[len(usages) // 2])
        calibrate(model, batches[:1], run=loss)
        total = torch.zeros((), device=mixers[0].head_bias.device)
        for usage in usages:
            for threshold in thresholds:
                threshold.set_usage(usage)
            total += sum(loss(batch).float() for batch in batches)
        return float(mean_over_ranks(total)) / (len(usages) * len(batches))

    model.eval()
    try:
        first = best = trial()
        units = [_spread(m.threshold) for m in mixers]
        several = len({id(m.threshold) for m in mixers}) < len(mixers)
        groups = [(i, slice(None)) for i in range(len(mixers))] if several else []
        if heads or heads is None and sum(len(m.head_bias) for m in mixers) <= 16:
            groups += [(i, slice(h, h + 1)) for i, m in enumerate(mixers) for h in range(len(m.head_bias))]
        for i, some in tqdm(groups, desc="allocating KV usage", leave=False, disable=not progress):
            best = _line_search(mixers[i].head_bias[some], units[i], best, trial)
    except BaseException:
        for threshold, usage in thresholds.items():
            threshold.set_usage(usage)
        for now, then in zip(moved, before, strict=True):
            now.copy_(then)
        raise
    finally:
        for module, training in modes.items():
            module.training = training
    for threshold, usage in thresholds.items():
        threshold.set_usage(usage)
    calibrate(model, batches, run=loss)
    return first, best


def allocatable_mixers(model: nn.Module) -> list[Mixer]:
    """The mixers of a model whose heads share a threshold that follows the KV usage."""
    return [m for m in routing_mixers(model) if m.threshold.follows_usage and m.threshold.scope != "head"]


def _line_search(bias: Tensor, unit: float, best: float, trial: Callable[[], float]) -> float:
    """Moves `bias`, in place, to where the loss is least, and returns that loss.

    Up by a unit, then two more, four, ... as long as that does not raise the loss, and back to where it was least; if
    that is where it began, the same downwards. A step may well change nothing: scores of another head can lie far off.
    """
    for sign in (1, -1):
        best_bias, least = bias.clone(), best
        for doubling in range(DOUBLINGS):
            bias += sign * unit * 2**doubling
            value = trial()
            if value < least * (1 - MIN_GAIN):
                best_bias, least = bias.clone(), value
            elif value > least * (1 + MIN_GAIN):
                break
        bias.copy_(best_bias)
        if least < best:
            return least
    return best


def _spread(threshold: Threshold) -> float:
    """The distance of high scores from the middle ones, in the units of the scores; infinite ones are of no head."""
    levels = threshold.table[threshold.table.abs() < INFINITE]
    if not len(levels):
        return 1e-6
    return max(float(levels[(len(levels) - 1) * 7 // 8] - levels[(len(levels) - 1) // 2]), 1e-6)
