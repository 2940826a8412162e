"""How many tokens are stored: one number tau for a scope, and the usage it is to give.

A threshold may be that of the whole model (all its heads compete for one KV usage), of a layer, or of each head. It
keeps a table of quantiles of the scores seen in training, so that the KV usage can be set to anything afterwards.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kernels.sequences import Layout
from mixers.processes import pooled_over_ranks, processes, several_processes
from mixers.quantiles import LARGEST, LEVELS, averaged, fault, quantiles, value_above
from mixers.registry import DescribesMixers, SpecError, check_range, unknown

SAMPLE = 8192  # tokens of a step, of all ranks, that a layer's quantiles are taken from
CHECK_EVERY = 64  # steps; looking at the scores makes a GPU wait
SCOPES = ("model", "layer", "head")


class Threshold(nn.Module):
    """Base: the quantile table of the scores, an exponential mean over training steps, fixed at evaluation.

    Args:
        num_heads: heads H of the layer.
        kv_usage: stored tokens / tokens to aim at over the scope, in [0, 1].
        scope: `model` (shared by the layers of a model, see `mixers.share_threshold`), `layer` or `head`.
        momentum: of the exponential mean. Learned scores change by orders of magnitude while they are trained; what is
            left of old ones in the mean then puts tau far off (0.9 missed usage by up to 0.1 where 0.5 is within 0.01).
    """

    trained_by_gate = False
    follows_usage = True
    """False: tau is the user's, whatever the KV usage."""
    micro_batches = 1
    """Forward passes of a training step. If there are several, `close_step` alone ends it."""
    averaging = False
    """True while `mixers.calibrate` runs: every step counts the same, and nothing but the table moves."""

    def __init__(self, num_heads: int, *, kv_usage: float, scope: str = "model", momentum: float = 0.5) -> None:
        super().__init__()
        if scope not in SCOPES:
            raise unknown("scope", scope, SCOPES, of=" for the threshold")
        check_range(0, 1, momentum=momentum)
        self.scope, self.momentum = scope, momentum
        self.kv_usage = check_usage(kv_usage)
        groups = num_heads if scope == "head" else 1
        self.register_buffer("table", torch.zeros(groups, LEVELS, dtype=torch.float32))  # whatever the default
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self._pending: dict[int, Tensor] = {}  # layer -> scores (tokens, H) of the step under way
        self._counted: dict[str, Tensor] | None = None  # the buffers as they will be when that step is closed
        self._checked = False
        self._closed, self._warned = 0, False  # steps, by this process; of their scores
        self._went_back, self._moved, self._told = False, False, False  # see `_check_recomputed`
        self.router = ""
        """What gives the scores, as warnings name it; empty where all scores may well be the same."""
        self.shared = False  # by several layers
        self.usages: Tensor | None = None  # of the sequences of a training step, see `usage_per_sequence`

    def _apply(self, fn, recurse=True):
        """Follow the model to its device, but stay in float32: a table in bfloat16 cannot tell scores apart."""

        def moved(x: Tensor) -> Tensor:
            y = fn(x)
            return y if y.dtype == x.dtype else x.to(y.device)

        self._pending = {layer: moved(scores) for layer, scores in self._pending.items()}
        self._counted = None
        return super()._apply(moved, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """Saved once, under the first of the layers that share it: formats like safetensors refuse shared tensors."""
        places = getattr(destination, "_metadata", {})
        if all(place.get("threshold") != id(self) for place in places.values()):
            places.setdefault(prefix[:-1], {})["threshold"] = id(self)
            with self._step_counted():
                super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if not self.shared or any(name.startswith(prefix) for name in state_dict):
            self._pending, self._counted = {}, None  # of what was there before
            super()._load_from_state_dict(state_dict, prefix, *args)

    @contextmanager
    def _step_counted(self) -> Iterator[None]:
        """Within it the step under way counts, as it will when it is closed; afterwards all is as it was.

        So evaluation and saving see all of training and change nothing. With several processes, which would have to
        agree and may not all come here, they see what is closed.
        """
        if not self._pending or several_processes():
            yield
            return
        buffers, pending, closed = self._buffers, self._pending, self._closed
        try:
            if self._counted is None:
                with torch.inference_mode(False):
                    self._buffers = {name: x.clone() for name, x in buffers.items()}
                    self.close_step()
                self._counted = self._buffers
            self._buffers, self._pending = self._counted, {}
            yield
        finally:
            self._buffers, self._pending, self._closed = buffers, pending, closed

    def tau(self, training: bool | None = None) -> Tensor:
        """The threshold, (H,) or (1,) float32: -inf at usage 1, inf at usage 0, whatever the kind.

        In training (default: the module's mode) it is that of the steps that are closed, so that all layers of a step
        have the same; else the step under way counts, too.
        """
        if self.kv_usage in (0.0, 1.0):
            return torch.full_like(self.table[:, 0], math.inf if self.kv_usage == 0 else -math.inf)
        if self.averaging and self.follows_usage:
            return self.quantile(self.kv_usage)
        if self.training if training is None else training:
            return self.finite_tau()
        with self._step_counted():
            if not (self._checked or torch.compiler.is_compiling()):
                self._checked = True  # once: reading the counter makes a GPU wait
                if self.steps == 0:
                    message = "the KV threshold has seen no training step: its usage is not what was asked"
                    warnings.warn(message, stacklevel=2)
            return self.finite_tau()

    def finite_tau(self) -> Tensor:
        """The threshold (H,) or (1,) float32 at a KV usage strictly between 0 and 1, where it is neither inf nor -inf.

        What a subclass writes; `tau` is what callers ask.
        """
        raise NotImplementedError

    def tau_per_sequence(self, layout: Layout) -> Tensor:
        """tau at each sequence's own usage, read from the table.

        Args:
            layout: of the sequences, one for each of `usages`.

        Returns:
            (B, 1, groups), or (1, T, groups) of packed sequences: for scores (B, T, H).
        """
        usages = self.usages.to(self.table)
        place = (1 - usages) * (LEVELS - 1)
        low = place.long().clamp(max=LEVELS - 2)
        tau = torch.lerp(self.table[:, low], self.table[:, low + 1], place - low).T  # (N, groups)
        tau = tau.masked_fill((usages == 0)[:, None], math.inf).masked_fill((usages == 1)[:, None], -math.inf)
        return layout.per_token(tau)

    def set_usage(self, kv_usage: float) -> None:
        """Change the usage to aim at. The step under way ends."""
        kv_usage = check_usage(kv_usage)
        if not several_processes():
            self.close_step()
        self.kv_usage = kv_usage

    def quantile(self, kv_usage: float) -> Tensor:
        """The score that a share `kv_usage` of the scores seen lies above, (groups,)."""
        return value_above(self.table, kv_usage)

    def learns(self, state: object | None) -> bool:
        """Whether a mixer in training mode learns from a call: not where it goes on from a state without gradients.

        It then generates, unless the threshold is being calibrated.
        """
        return state is None or torch.is_grad_enabled() or self.averaging

    @torch.no_grad()
    def observe(self, layer: int, scores: Tensor) -> None:
        """Note a layer's scores (B, T, H) of a training step, infinite where a token is kept whatever its score.

        A step ends when one of its layers comes round again (if `micro_batches` is 1), or by `close_step`; tau is read
        after this call, so that all layers of a step have the same. Activation checkpointing runs layers again in the
        backward pass, where tau must be what it was in the forward pass, so those calls are not counted.
        """
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            self._check_recomputed()
            return
        if not scores.numel():
            return
        if layer in self._pending and self.micro_batches == 1:
            self._moved, self._went_back = not self._went_back, False
            self.close_step()
        elif not self._pending:  # closed by whoever trains
            self._moved = False
        self._counted = None
        tokens = scores.detach().float().flatten(0, 1)
        sample = max(1, SAMPLE // (self.micro_batches * processes()))
        if len(tokens) > sample:  # at steps of the golden ratio: even steps could hit the keys alone of key-value pairs
            place = torch.arange(sample, device=tokens.device, dtype=torch.double) * 0.6180339887498949
            tokens = tokens[(place % 1 * len(tokens)).long()]
        self._pending[layer] = torch.cat([self._pending[layer], tokens]) if layer in self._pending else tokens

    def _check_recomputed(self) -> None:
        """Warn, once, where a backward pass computes layers again that may have run before tau last moved."""
        if self._moved and not (self._told or self.averaging):
            self._told = True
            message = (
                "several forward passes came before a backward pass with activation checkpointing: the KV threshold "
                "moved after each, so all but the last are computed again with another one and their gradients are "
                "off; set threshold.micro_batches to their number, and call threshold.close_step() after each step, "
                "for threshold in mixers.threshold.thresholds_of(model)"
            )
            warnings.warn(message, stacklevel=2)
        self._went_back = True

    @torch.no_grad()
    def close_step(self) -> None:
        """Fold the scores of the step under way, those of all ranks as one, into the table."""
        if not self._pending:
            return
        scores = list(self._pending.values())
        self._pending, self._counted = {}, None
        grouped = torch.cat(scores).T if self.scope == "head" else torch.cat([s.flatten() for s in scores])[None]
        grouped = pooled_over_ranks(grouped)
        finite = grouped.nan_to_num(0.0, LARGEST, -LARGEST)
        table = quantiles(finite)
        if self.router and not torch.compiler.is_compiling():
            self._warn_of_ties(grouped, table)
        weight = 1 / (self.steps + 1).to(self.table)  # a tensor: reading it would make a GPU wait
        if not self.averaging:
            weight = weight.clamp(min=1 - self.momentum)
        table = table.to(self.table)
        self.table.copy_(averaged(torch.where(self.steps == 0, table, self.table), table, weight))
        self.steps += 1
        if not self.averaging:
            self.adjust(finite)

    def drop_step(self) -> None:
        """Forget the step under way, of which the weights learn nothing either."""
        self._pending, self._counted = {}, None

    def _warn_of_ties(self, scores: Tensor, table: Tensor) -> None:
        """Warn, once, of scores (groups, n) that do not allow the usage asked for."""
        self._closed += 1
        if self._warned or not (self.averaging or self._closed % CHECK_EVERY == 1):
            return
        if what := fault(scores, table, self.kv_usage):
            self._warned = True
            warnings.warn(f"router {self.router} {what}", stacklevel=3)

    def adjust(self, scores: Tensor) -> None:
        """Move what the kind of threshold moves, given the step's scores (groups, n)."""

    def usage_gap(self, scores: Tensor, tau: Tensor) -> Tensor:
        """Usage of scores (groups, n) at tau less the usage asked for; (groups,)."""
        return (scores > tau[:, None]).float().mean(1) - self.kv_usage

    def loss(self, scores: Tensor) -> Tensor | None:
        """A scalar that trains the threshold, or None."""
        return None


def check_usage(kv_usage: float) -> float:
    """`kv_usage` as a float.

    Raises:
        SpecError: it is no number in [0, 1].
    """
    if isinstance(kv_usage, bool) or not isinstance(kv_usage, (int, float)) or not 0 <= kv_usage <= 1:
        raise SpecError(f"kv_usage must be a number from 0 to 1, got {kv_usage!r}")
    return float(kv_usage)


def thresholds_of(model: nn.Module) -> Iterator[Threshold]:
    """Every threshold of a model, once."""
    return (module for module in model.modules() if isinstance(module, Threshold))


def set_kv_usage(model: nn.Module, kv_usage: float) -> None:
    """Set the KV usage of every threshold in `model`, in training or after it.

    Args:
        model: any module with routing mixers.
        kv_usage: stored tokens / tokens over each threshold's scope, in [0, 1]: 0 stores nothing, 1 everything.

    Raises:
        SpecError: a usage outside [0, 1]; a model in which nothing routes; a threshold that cannot be set.
    """
    found = list(thresholds_of(model))
    if not found:
        raise SpecError("the model has no KV usage to set: none of its mixers routes tokens")
    for threshold in found:
        threshold.set_usage(kv_usage)
    for module in model.modules():
        if isinstance(module, DescribesMixers):
            module.describe_usage(float(kv_usage))


@contextmanager
def usage_per_sequence(model: nn.Module, usages: Tensor) -> Iterator[None]:
    """Within it, a training step holds each sequence to its own KV usage, so that one model learns to do with any.

    Args:
        model: any module with thresholds; those that follow no usage (`fixed`) stay as they are.
        usages: (N,) in [0, 1], one for every sequence of the batch, packed ones counted one by one.
    """
    found = [threshold for threshold in thresholds_of(model) if threshold.follows_usage]
    for threshold in found:
        threshold.usages = usages
    try:
        yield
    finally:
        for threshold in found:
            threshold.usages = None
