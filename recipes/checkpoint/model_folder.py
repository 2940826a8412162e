"""Folders of Hugging Face models where commands take checkpoints.

`recipes retrofit` and `recipes export` write such, and `mixers.hf` makes them known; any other causal language model of
transformers opens, too.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixers.base import MixerOutput
from mixers.registry import SpecError
from mixers.sharing import routing_mixers
from mixers.threshold import set_kv_usage, thresholds_of
from recipes.checkpoint.opening import check_finite
from recipes.messages import one_line
from recipes.trust import check_options

LENGTH = 2048  # tokens of a window of text, or as many as the model reads
WINDOWS = 32  # that a model is tested on


def is_model_folder(path: str) -> bool:
    """Whether a path of `--ckpt_path` is a folder, and not of a sharded checkpoint."""
    return path != "last" and Path(path).is_dir() and not (Path(path) / "meta.pt").exists()


def check_folder(path: Path) -> None:
    """Looks at what a folder says of its model, before anything that it names is built.

    Raises:
        SpecError: it is no model, or names code that is not trusted (:mod:`recipes.trust`).
    """
    file = path / "config.json"
    if not file.is_file():
        raise SpecError(f"{path} is a folder without config.json: neither a checkpoint nor a Hugging Face model")
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise SpecError(f"{file} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise SpecError(f"{file} is no config of a model, but {type(config).__name__}")
    if "mixer_swaps" in config:
        raise SpecError(f"{path} is a model that mixers were swapped into: it is opened by mixers.hf.swapped, not here")
    if "mixer" in config:
        from lit_modules.base import SequenceModule

        check_options({"mixer": config["mixer"]}, SequenceModule, file=file)
    if "mixer_retrofit" in config:
        from mixers.retrofit import HostedHAM

        note = config["mixer_retrofit"]
        check_options(note.get("options") if isinstance(note, dict) else None, HostedHAM, file=file)


@dataclass
class ModelFolder:
    """A model for evaluation, on the CPU, and its tokenizer; both of transformers."""

    path: Path
    model: Any
    tokenizer: Any

    @property
    def longest(self) -> int | None:
        """Tokens that the model reads at most, if it says so."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def windows(self, paths: list[str], length: int, *, count: int | None = None) -> Tensor:
        """Ids (N, T) int64 of windows of texts, N at most `count`, T `length` or as many as the model reads.

        Raises:
            SpecError: no text, or none that is long enough.
        """
        from lit_modules.data.files import find_files, read_texts
        from recipes.retrofit.scoring import windows

        texts = read_texts(find_files(paths), max_bytes=100_000_000)
        length = min(length, self.longest or length)
        found = windows((text.decode(errors="ignore") for text in texts), self.tokenizer, length=length)
        return found if count is None or count >= len(found) else found[torch.arange(count) * len(found) // count]

    def routed(self) -> "ModelFolder":
        """Itself. Raises SpecError if nothing in it routes."""
        if next(thresholds_of(self.model), None) is None:
            raise SpecError(f"{self.path}: the model has no KV threshold; `recipes retrofit` gives it one")
        return self


def open_folder(path: str, *, kv_usage: float | None = None) -> ModelFolder:
    """The model and the tokenizer of a folder.

    Args:
        path: the folder.
        kv_usage: stored tokens / tokens, 0..1; default: as saved.

    Raises:
        SpecError: it is no model, lacks weights or a tokenizer, names code that is not trusted, or has no such usage.
    """
    folder = Path(path)
    check_folder(folder)
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        import mixers.hf  # noqa: F401  # makes our models known
    except ImportError as error:
        raise SpecError(f"{folder} needs transformers 5: pip install 'lightning-mixers[hf]' ({error})") from error
    options = dict(local_files_only=True, trust_remote_code=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    except SpecError as error:
        raise SpecError(f"{folder}: {error}") from error
    except Exception as error:  # transformers, with whatever is in the folder
        what = f"{type(error).__name__}: {one_line(str(error))}"
        raise SpecError(f"{folder} cannot be opened as a causal language model with a tokenizer ({what})") from error
    if missing := sorted(info["missing_keys"]):
        raise SpecError(f"{folder} lacks {len(missing)} of its model's weights, such as {missing[0]}")
    check_finite(model.state_dict().items(), folder)
    if kv_usage is not None:
        set_kv_usage(model, kv_usage)
    return ModelFolder(folder, model.eval(), tokenizer)


@contextmanager
def usage_of(model: Any) -> Iterator[Callable[[], float]]:
    """Gives the KV usage over all that the model reads within it."""
    kept: list[tuple[float, float]] = []

    def note(mixer: Any, args: Any, out: MixerOutput) -> None:
        kept.append((float(out.routing.kept.sum()), float(out.routing.lengths.sum() * len(out.routing.kept))))

    hooks = [mixer.register_forward_hook(note) for mixer in routing_mixers(model)]
    try:
        yield lambda: sum(stored for stored, _ in kept) / sum(tokens for _, tokens in kept)
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class HostBytes:
    """What a layer of transformers' own holds, where `mixers.state` asks a mixer's state."""

    kv_bytes: int
    bytes: int = 0

    @property
    def stored_kv_bytes(self) -> int:
        return self.kv_bytes

    @property
    def full_kv_bytes(self) -> int:
        return self.kv_bytes


class AsDecoder:
    """A causal model of transformers as `lit_modules.generation.Continuation` asks a decoder, for one prompt.

    Its hidden are the logits of the last token, at every place; its state is the model's own cache.

    Args:
        model: used as it is: call ``eval()`` on it first.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.embedding, self.cache = model, model.get_input_embeddings(), None

    def init_state(self, batch_size: int, device: Any = None) -> list:
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)
        return []

    def __call__(self, tokens: Tensor, state: list, padding_mask: None = None) -> MixerOutput:
        logits = self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        return MixerOutput(logits.expand(-1, tokens.shape[1], -1), [_state(layer) for layer in self.cache.layers])

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


def _state(layer: Any) -> Any:
    if hasattr(layer, "state"):
        return layer.state
    return HostBytes(layer.keys.nbytes + layer.values.nbytes if layer.is_initialized else 0)
