"""Fitting the thresholds of a frozen model to data: the table of score quantiles that any KV usage is read from."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from mixers.registry import SpecError
from mixers.sharing import routing_mixers
from mixers.threshold import thresholds_of


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Any], run: Callable[[Any], Any] | None = None) -> int:
    """Replaces the quantile table of every threshold by that of the scores on some batches.

    The threshold is then set to the usage that it is asked for. In training the tables follow scores that change with
    every step, so they remember a few steps only; a frozen model needs no such haste. Use it at the end of training, or
    on data of your own. Scores change a little with the usage, as later layers see what earlier ones stored: it is held
    best at the usage that was set when this was called.

    Args:
        model: any module with routing mixers; its modes (train, eval) are put back.
        batches: what `run` takes; each counts the same. Every process of a distributed run needs as many.
        run: a forward pass over a batch; default `model(batch)`.

    Returns:
        The number of batches.

    Raises:
        SpecError: nothing in the model routes, or there is no batch; the tables are then as they were.
    """
    mixers, thresholds = routing_mixers(model), list(thresholds_of(model))
    if not thresholds:
        raise SpecError("the model has no KV threshold to calibrate: none of its mixers routes tokens")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    for threshold in thresholds:
        threshold.close_step()  # of training
    before = [(t.table.clone(), t.steps.clone()) for t in thresholds]
    count = 0
    try:
        for mixer in mixers:  # these alone note scores in training mode; dropout and the like stay off
            mixer.training = True
        for threshold in thresholds:
            threshold.averaging = True
        for batch in batches:
            for _ in range(2 if count == 0 else 1):  # the scores of a layer depend on what the layers before it store
                for threshold in thresholds:
                    threshold.steps.fill_(count)
                (run or model)(batch)
                for threshold in thresholds:
                    threshold.close_step()
            count += 1
        if not count:
            raise SpecError("there is no data to calibrate the KV thresholds on")
    except BaseException:
        for threshold, (table, _) in zip(thresholds, before, strict=True):
            threshold.table.copy_(table)
            threshold.drop_step()
        raise
    finally:
        for threshold, (_, steps) in zip(thresholds, before, strict=True):
            threshold.steps.copy_(steps.clamp(min=count))
            threshold.averaging = False
        for module, training in modes.items():
            module.training = training
    for threshold in thresholds:
        if threshold.follows_usage:
            threshold.set_usage(threshold.kv_usage)
    return count
