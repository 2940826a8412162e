"""Who is in the contest of `recipes.retrofit.contest`, and what keeps each to the same bytes.

host        the model as it is, with its own cache
ham         the retrofitted folder: forecast of demand, and the memory
demand      the same without the memory, whose bytes go to the cache: what the memory itself is worth
oracle      chooses by what tokens will turn out to be worth: the ceiling of a forecast, no method
recency     the first tokens and a window of all the rest of the budget (StreamingLLM, arXiv 2309.17453)
residual, cosine, key_norm, random, static      routers that need no fitting, around the host's own attention
snapkv, expected_attention, keydiff, adakv      methods of kvpress, see `recipes.retrofit.presses`
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernels.paged_attention.cache import PAGE
from lit_modules.data.ruler_tasks import RulerSample
from mixers import calibrate, set_kv_usage
from mixers.registry import SpecError
from mixers.retrofit import attach, parts_of
from mixers.retrofit.sensitivity import Sensitivity
from mixers.state import state_bytes
from mixers.threshold import thresholds_of
from recipes.retrofit.oracle import Oracle, foresee
from recipes.retrofit.run import open_host

UNFITTED = "unfitted: its memory's maps are the identity, its decay and write strength those it starts with"
SENSITIVITY = 1024  # tokens of a sequence of the oracle's backward passes


@dataclass(frozen=True)
class Method:
    """A way to choose what is kept.

    Attributes:
        kind: `host`, `ours`, `ceiling`, `rival` or `control`.
        router: that is put around the host's attention; None: a folder has it.
        scope: of its threshold. Scores in no unit that heads share are compared within a head, which keeps its share.
        keeps_memory: of a folder: False leaves the memory away.
        note: what to know about its figures.
    """

    kind: str
    router: str | None = None
    scope: str = "model"
    keeps_memory: bool = True
    note: str = ""


METHODS = {
    "host": Method("host"),
    "ham": Method("ours"),
    "demand": Method("ours", keeps_memory=False),
    "key_norm": Method("rival", "key_norm", scope="head"),
    "recency": Method("rival", "none"),
    "residual": Method("rival", "residual", scope="head", note=UNFITTED),
    "cosine": Method("rival", "cosine", scope="head", note=UNFITTED),
    "random": Method("control", "random"),
    "static": Method("control", "static"),
    "oracle": Method("ceiling", f"{Oracle.__module__}.{Oracle.__qualname__}", note="sees later tokens"),
}


def share_to_ask(share: float, tokens: int, *, length: int, always: int, state: float) -> float:
    """The KV usage to set, so that a sequence's cache and the state take a share of what the host's cache takes.

    Args:
        share: of the host's cache.
        tokens: of the sequence.
        length: of the sequences that the thresholds were calibrated on; where it is `tokens`, the result is
            `share - state / tokens`.
        always: window and sinks, in tokens.
        state: bytes that do not grow, in tokens.

    Raises:
        SpecError: window, sinks and state alone take more.
    """
    chosen = share * tokens - state - always
    if chosen < 0:
        what = f"window and sinks ({always} tokens) and state (as large as {state:.1f})"
        raise SpecError(f"{what} alone exceed {share:g} of {tokens} tokens")
    return (always + chosen / max(1, tokens - always) * max(0, length - always)) / length


class Contestant:
    """A method with its model.

    Args:
        name: a key of METHODS, or another one with a folder.
        host: folder.
        folder: retrofitted; not looked at where the method has a router.
        seed: of the draws of a control.
        window, sinks: of a method with a router.
        metrics: of the oracle: makes what `Sensitivity.metric` gives, of a model.
    """

    read: Callable[[RulerSample], Tensor] | None = None  # of prompts, see `recall`

    def __init__(
        self,
        name: str,
        host: str,
        folder: str | None,
        *,
        seed: int,
        window: int,
        sinks: int,
        metrics: Callable[[nn.Module], Callable[[str], Tensor]] | None = None,
    ) -> None:
        self.name, self.method = name, METHODS.get(name, Method("rival"))
        ours = self.method.kind != "host" and self.method.router is None
        self.model, self.tokenizer = open_host(folder if ours else host)
        if router := self.method.router:
            spec = {"name": router} | ({"seed": seed} if self.method.kind == "control" else {})
            attach(self.model, router=spec, scope=self.method.scope, memory=False, window=window, sinks=sinks)
        if name == "oracle":
            foresee(self.model, metrics(self.model))
        self.parts = parts_of(self.model)
        for part in self.parts.values():
            if not self.method.keeps_memory:
                part.adds_memory, part.memory = False, part.memory if part.looks_at_errors else None

    def meter(self) -> "Meter":
        """Weighs what it reads."""
        return Meter(self)

    @property
    def bytes_per_token(self) -> int:
        """Of keys and values, by all heads."""
        if not self.parts:
            return bytes_of(self.model)
        sizes = (part.sizes for part in self.parts.values())
        return sum(s.num_kv_heads * (s.head_dim + s.value_dim) for s in sizes) * self.model.dtype.itemsize

    @property
    def state_bytes(self) -> int:
        """Of the memories of one sequence."""
        return sum(state_bytes(part.init_state(1, dtype=self.model.dtype)) for part in self.parts.values())

    def hold(
        self, share: float, tokens: int, *, length: int, rows: Sequence[Tensor], tables: dict[str, Any], of: str
    ) -> None:
        """Keep to a share of the host's bytes in sequences of so many tokens.

        Args:
            share: cache and state / the host's cache.
            tokens: of the sequences to come.
            length: of the rows.
            rows: N sequences of ids (T,), to calibrate the thresholds on.
            tables: of thresholds calibrated before; one more if need be.
            of: what tells these thresholds from those of others of this name.

        Raises:
            SpecError: window, sinks and state alone take more.
        """
        if not self.parts:
            return
        first = next(iter(self.parts.values()))
        state = self.state_bytes / self.bytes_per_token
        if self.name == "recency":
            for part in self.parts.values():
                part.window = round(share * tokens) - part.sinks
            if first.window < 1:
                raise SpecError(f"{first.sinks} sinks alone exceed {share:g} of {tokens} tokens")
            set_kv_usage(self.model, 0.0)
            return
        how = {"length": length, "always": first.window + first.sinks, "state": state}
        key = f"{self.name} {share:g} {of}"
        if key not in tables:
            set_kv_usage(self.model, share_to_ask(share, length, **how))
            here = [row[None].to(self.model.device) for row in rows]
            calibrate(self.model, here, run=lambda row: self.model(input_ids=row, use_cache=False, logits_to_keep=1))
            tables[key] = [threshold.table.cpu() for threshold in thresholds_of(self.model)]
        for threshold, table in zip(thresholds_of(self.model), tables[key], strict=True):
            threshold.table.copy_(table)
            threshold.steps.fill_(len(rows))
        set_kv_usage(self.model, share_to_ask(share, tokens, **how))


@torch.no_grad()
def bytes_of(host: Any) -> int:
    """What a token takes in a host's own cache."""
    cache = host(input_ids=torch.zeros(1, 2, dtype=torch.long, device=host.device), use_cache=True).past_key_values
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values)) // 2


class Meter:
    """Weighs what every sequence that a contestant reads leaves in its cache.

    Attributes:
        kept: bytes of the keys and values that are kept, window and sinks among them, of each sequence.
        pages: the same with the free places of pages and of the window.
        tokens: of each sequence.
    """

    def __init__(self, contestant: Contestant) -> None:
        self.contestant, self.per_token = contestant, contestant.bytes_per_token
        self.kept: list[float] = []
        self.pages: list[float] = []
        self.tokens: list[int] = []

    def __enter__(self) -> "Meter":
        self.hook = self.contestant.model.register_forward_hook(self._weigh, with_kwargs=True)
        return self

    def __exit__(self, *error: object) -> None:
        self.hook.remove()

    def _weigh(self, model: nn.Module, args: tuple, options: dict[str, Any], output: Any) -> None:
        tokens = options["input_ids"].shape[1]
        self.tokens.append(tokens)
        if not self.contestant.parts:
            self.kept.append(self.per_token * tokens)
            self.pages.append(self.per_token * tokens)
            return
        kept = pages = 0.0
        for part in self.contestant.parts.values():
            one = (part.sizes.head_dim + part.sizes.value_dim) * model.dtype.itemsize
            kept += one * float(part.routing.kept.sum())
            stored = part.routing.stored.sum(1)  # (1, H)
            paged = float((stored + PAGE - 1).div(PAGE, rounding_mode="floor").sum()) * PAGE
            pages += one * (paged + part.num_heads * min(part.routing.window - 1, tokens))
        self.kept.append(kept)
        self.pages.append(pages)


def sensitivity_of(rows: Tensor) -> Callable[[nn.Module], Callable[[str], Tensor]]:
    """Makes the oracle's metric from rows (N, T) of ids, once for all models of one host."""
    known: dict[str, Tensor] = {}

    def metrics(model: nn.Module) -> Callable[[str], Tensor]:
        if not known:
            sensitivity = Sensitivity(model)
            for row in rows:
                sensitivity.read(row[None, :SENSITIVITY].to(model.device))
            known.update({name: sensitivity.metric(name) for name in parts_of(model)})
        return known.__getitem__

    return metrics
