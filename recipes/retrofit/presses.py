"""Methods of NVIDIA's kvpress in the contest of `recipes.retrofit.contest`: the host, its cache compressed by them.

snapkv              attention of the context's last tokens (arXiv 2404.14469)
expected_attention  attention forecast from the statistics of the context's queries (arXiv 2510.00636)
keydiff             keys unlike the others (arXiv 2504.15364)
adakv               expected_attention, a layer's budget divided over its heads (arXiv 2407.11550)

As kvpress runs RULER: the context is read to its end and compressed, and nothing of the question is known by then. The
question and the answer are read with what is left of it, and kept whole. So there is no perplexity of a text.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lit_modules.data.ruler_tasks import RulerSample
from mixers.registry import SpecError
from recipes.retrofit.methods import Contestant, Meter, Method
from recipes.retrofit.run import open_host

INSTALL = "pip install --no-deps kvpress && pip install fire termcolor cachetools"
NOTE = "of kvpress: chooses when the context was read to its end; recall alone, as no text is read from its start"
PRESSES = {
    "snapkv": Method("rival", note=NOTE),
    "expected_attention": Method("rival", note=NOTE),
    "keydiff": Method("rival", note=NOTE),
    "adakv": Method("rival", note=f"{NOTE}; it masks what it drops, and frees nothing: `pages` has what is held"),
}


def kvpress() -> ModuleType:
    """The package; the import wraps transformers' attention functions for this process, which changes no result.

    Raises:
        SpecError: it is not there, or cannot be imported.
    """
    try:
        return importlib.import_module("kvpress")
    except ImportError as error:
        raise SpecError(f"kvpress is not to be had ({error}): {INSTALL}") from error


def those_there(methods: list[str]) -> list[str]:
    """The methods without those whose package is missing, which are named in a line.

    Raises:
        SpecError: none is left.
    """
    pressed = [name for name in methods if name in PRESSES]
    if not pressed:
        return methods
    try:
        kvpress()
    except SpecError as error:
        if len(pressed) == len(methods):
            raise
        print(f"left out: {', '.join(pressed)}: {error}", file=sys.stderr)
        return [name for name in methods if name not in PRESSES]
    return methods


def make_press(name: str, *, window: int, sinks: int) -> Any:
    """The press of a name in PRESSES; its `compression_ratio` is still to be set.

    Args:
        name: a key of PRESSES.
        window: last tokens of the context that SnapKV goes by, and keeps.
        sinks: first tokens that expected attention keeps.
    """
    package = kvpress()
    makers = {
        "snapkv": lambda: package.SnapKVPress(window_size=window),
        "expected_attention": lambda: package.ExpectedAttentionPress(n_sink=sinks),
        "keydiff": lambda: package.KeyDiffPress(),
        # epsilon as on kvpress's leaderboard
        "adakv": lambda: package.AdaKVPress(package.ExpectedAttentionPress(n_sink=sinks, epsilon=1e-2)),
    }
    return makers[name]()


class Pressed(Contestant):
    """The host with a press of kvpress, see `Contestant`.

    Attributes:
        press: a context manager on a model, within which a prefill is compressed by `compression_ratio`.
    """

    def __init__(
        self, name: str, host: str, folder: None, *, seed: int, window: int, sinks: int, metrics: object = None
    ) -> None:
        self.name, self.method, self.parts, self.share = name, PRESSES[name], {}, 1.0
        self.least = max(1, window if name == "snapkv" else sinks if name != "keydiff" else 0)
        self.press = make_press(name, window=window, sinks=sinks)
        self.model, self.tokenizer = open_host(host)

    def hold(self, share: float, tokens: int, **calibration: object) -> None:
        """Keep to a share of the host's bytes; how much of a context that leaves is told by each prompt.

        Raises:
            SpecError: a model that kvpress does not know, or with sliding layers, whose masks go by places in a cache.
        """
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        known = kvpress().SUPPORTED_MODELS
        if not isinstance(self.model, known):
            names = ", ".join(model.__name__ for model in known)
            raise SpecError(f"kvpress does not know {type(self.model).__name__}, but {names}")
        if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=self.model.config).layers):
            raise SpecError(
                f"{type(self.model).__name__} has layers with a window of their own: no prefill to compress"
            )
        self.share = share

    def read(self, sample: RulerSample) -> Tensor:
        """The logits (A, V) of a sample's answer.

        Raises:
            SpecError: question and answer leave too little for the context; AdaKV cannot mask what it drops.
        """
        from transformers import DynamicCache

        ids = torch.tensor([sample.prompt_ids + sample.answer_ids], device=self.model.device)
        places = torch.arange(ids.shape[1], device=ids.device)
        start, count = sample.question_at, len(sample.answer_ids)
        after = ids.shape[1] - start
        keep = round(self.share * ids.shape[1]) - after
        if keep < self.least:
            what = f"question and answer ({after} tokens) and the {self.least} that {self.name} keeps of a context"
            raise SpecError(f"{what} alone exceed {self.share:g} of {ids.shape[1]} tokens")
        self.press.compression_ratio = max(0.0, 1 - (keep + 0.5) / start)  # it rounds down what is kept
        cache = DynamicCache(config=self.model.config)
        with self.press(self.model):  # which looks at `cache_position`, of earlier versions of transformers
            self.model.model(input_ids=ids[:, :start], past_key_values=cache, cache_position=places[:start])
        how = {"position_ids": places[None, start:], "logits_to_keep": count + 1}
        try:
            out = self.model(input_ids=ids[:, start:], past_key_values=cache, **how)
        except ValueError as error:  # AdaKV puts keys that no query reads for those it drops, where it finds any
            raise SpecError(f"{self.name} of kvpress: {error}") from error
        return out.logits[0, :-1]

    def meter(self) -> Meter:
        """Weighs its caches."""
        return _Scales(self)


class _Scales(Meter):
    def _weigh(self, model: nn.Module, args: tuple, options: dict[str, Any], output: Any) -> None:
        held, dropped = 0, 0.0
        for layer, block in zip(options["past_key_values"].layers, model.model.layers, strict=True):
            size = sum(x.numel() * x.element_size() for x in (layer.keys, layer.values))
            masked = getattr(block.self_attn, "masked_key_indices", None)  # of AdaKV: (rows, heads, places)
            held += size
            dropped += 0 if masked is None else size / layer.keys.shape[:3].numel() * len(masked[0])
        self.tokens.append(int(options["position_ids"][0, -1]) + 1)
        self.kept.append(held - dropped)
        self.pages.append(float(held))
