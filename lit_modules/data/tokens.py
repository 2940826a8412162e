"""Next-token prediction on data sets of Hugging Face's, with any of its tokenizers, or on litdata's folders."""

import json
import warnings
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from lit_modules.data.documents import INSTALL, TOKENIZER, TOKENS, check_field, count_of, open_documents, sample_of
from lit_modules.data.files import digest_of
from lit_modules.data.packing import PackedDocuments, TokenLoader
from lit_modules.data.stream import Batch, FixedBatches
from lit_modules.data.workers import outlive_signals
from mixers.registry import SpecError, check_positive, check_range


class TokenData(pl.LightningDataModule):
    """Next-token prediction on documents of a data set, tokenised as they are read or before (`recipes tokenize`).

    A document is in one split, by a hash of its content, and so are its copies. Its ids are those of the tokenizer
    without what that adds of its own accord, and an end. Each worker of each process reads documents of its own.

    Args:
        paths: files and folders, or one of them: ``.parquet``, ``.jsonl`` or ``.txt`` (a document each), which may be
            compressed; or a folder that litdata's `optimize` wrote with its `TokensLoader`.
        hub: in place of paths, the name of a data set on the Hugging Face hub.
        hub_config: which of its configurations.
        split: of it.
        streaming: read as it comes, without a copy on disk.
        field: what holds a document's text, or its ids; default: `tokens` of a folder from `tokenize`, else `text`.
        tokenizer: a name on the hub, a folder, or a `tokenizer.json`; default: the one in a folder from `tokenize`.
        eos_token: the token that ends a document; default: the tokenizer's own.
        documents: `packed`, with their bounds, so that nothing leaks across them; or `cut`, one after the other into
            rows of `seq_len`.
        seq_len: longest piece of a document that a model sees at once, in tokens.
        batch_tokens: tokens per step and rank.
        held_out: share of the documents in each of validation and test.
        validation_tokens, test_tokens: tokens to evaluate on at most, a fixed sample.
        num_workers: processes that read and tokenise, of each rank; 0 is none but its own.
        block: documents of a stream that are shuffled together; its files are shuffled, too.
        batches_per_epoch: what Lightning calls an epoch; the data go on and on.
        seed: of the order and the sample.

    Raises:
        SpecError: data or a tokenizer that cannot be opened, a package that is missing, or sizes out of range.
    """

    model = "language_model"
    metric = "perplexity"
    defaults = {"model": {"dim": 256, "depth": 4, "learning_rate": 2e-3}, "steps": 1000, "validate_every": 250}

    def __init__(
        self,
        *,
        paths: list[str] | str | None = None,
        hub: str | None = None,
        hub_config: str | None = None,
        split: str = "train",
        streaming: bool = False,
        field: str | None = None,
        tokenizer: str | None = None,
        eos_token: str | None = None,
        documents: Literal["packed", "cut"] = "packed",
        seq_len: int = 1024,
        batch_tokens: int = 8192,
        held_out: float = 0.01,
        validation_tokens: int = 65_536,
        test_tokens: int = 262_144,
        num_workers: int = 0,
        block: int = 1000,
        batches_per_epoch: int = 1000,
        seed: int = 0,
    ):
        super().__init__()
        sizes = {"seq_len": seq_len, "batch_tokens": batch_tokens, "block": block}
        evaluated = {"validation_tokens": validation_tokens, "test_tokens": test_tokens}
        check_positive(**sizes, **evaluated, batches_per_epoch=batches_per_epoch)
        check_range(0, seed=seed, num_workers=num_workers)
        if not 0 < held_out < 0.5:
            raise SpecError(f"held_out {held_out} is outside its range 0..0.5")
        if documents == "cut" and (batch_tokens % seq_len or min(evaluated.values()) < seq_len):
            raise SpecError(
                f"documents that are cut need batch_tokens ({batch_tokens}) that are a multiple of seq_len ({seq_len}),"
                " and as many tokens of validation and test at least"
            )
        self.paths = [paths] if isinstance(paths, str) else list(paths or [])
        self.source = {"hub": hub, "hub_config": hub_config, "split": split, "streaming": streaming}
        ours = self.paths[0] if len(self.paths) == 1 and Path(self.paths[0], TOKENIZER).is_dir() else None
        if tokenizer is None and ours is None:
            raise SpecError("data 'tokens' needs a --data.tokenizer: a name on the hub, a folder or a tokenizer.json")
        self.field = field or (TOKENS if ours else "text")
        self.tokenizer = load_tokenizer(tokenizer or str(Path(ours, TOKENIZER)))
        self.end = end_of_text(self.tokenizer, eos_token)
        self.vocab_size = len(self.tokenizer)
        self.packed, self.seq_len, self.batch_tokens = documents == "packed", seq_len, batch_tokens
        self.limits = {"validation": validation_tokens, "test": test_tokens}
        self.held_out, self.num_workers, self.block = held_out, num_workers, block
        self.batches_per_epoch, self.seed = batches_per_epoch, seed
        self.opened: Any = None

    @property
    def litdata(self) -> Path | None:
        """The folder, if it is one of litdata's."""
        folder = Path(self.paths[0]) if len(self.paths) == 1 else None
        return folder if folder and (folder / "index.json").is_file() else None

    def setup(self, stage: str) -> None:
        if self.opened is not None:
            return
        if self.litdata:
            from lit_modules.data.litdata_folder import LitdataRows

            sizes = {"seq_len": self.seq_len, "held_out": self.held_out, "seed": self.seed}
            self.opened = LitdataRows(self.litdata, end=self.end if self.packed else None, **sizes)
        else:
            if stage == "fit":
                _stateful_loader()  # before anything is read, or written by `tokenize`
            self.opened = open_documents(paths=self.paths, **self.source)
            check_field(self.opened, self.field)

    def rows(self, split: str, row_tokens: int, **options: Any) -> PackedDocuments:
        """The rows of a split, see :class:`lit_modules.data.packing.PackedDocuments`."""
        sizes = {"seq_len": self.seq_len, "row_tokens": row_tokens, "held_out": self.held_out, "block": self.block}
        how = {"field": self.field, "end": self.end, "packed": self.packed, "seed": self.seed}
        encode = partial(_encode, self.tokenizer)  # and nothing else of ours: workers that are not forked get a copy
        return PackedDocuments(self.opened, encode, split=split, **sizes, **how, **options)

    def _ranks(self) -> dict[str, int]:
        names = ("global_rank", 0), ("world_size", 1)
        rank, world_size = (getattr(self.trainer, name, default) for name, default in names)
        return {"rank": rank, "world_size": world_size}

    def train_dataloader(self) -> TokenLoader:
        if self.litdata:
            loader = self.opened.loader("train", self.batch_tokens, self.num_workers)
            digests = {"documents": self.opened.digest, "tokenizer": _digest(self.tokenizer)}
            return TokenLoader(loader, length=self.batches_per_epoch, elastic=True, digests=digests)
        loader_class = _stateful_loader()
        rows = self.rows("train", self.batch_tokens, **self._ranks())
        how = {"batch_size": None, "num_workers": self.num_workers, "worker_init_fn": outlive_signals}
        generator = torch.Generator().manual_seed(self.seed)  # else it draws from the model's
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*'set_vital' is deprecated")  # torchdata's own call
            loader = loader_class(rows, generator=generator, **how)
        sample = sample_of(self.opened, self.field, self.paths)
        digests = {"documents": sample, "tokenizer": _digest(self.tokenizer)}
        return TokenLoader(loader, length=self.batches_per_epoch, count=count_of(self.opened), digests=digests)

    def _fixed(self, split: str) -> FixedBatches:
        row_tokens = min(self.batch_tokens, self.limits[split])
        if not self.packed:
            row_tokens -= row_tokens % self.seq_len
        known = self.litdata
        rows = self.opened.fixed(split, row_tokens) if known else self.rows(split, row_tokens, endless=False)
        batches: list[Batch] = list(islice(rows, max(1, self.limits[split] // row_tokens)))
        if not batches:
            raise SpecError(
                f"too few documents to hold out: the {split} split, {self.held_out:g} of all, has less than"
                f" {row_tokens} tokens; give a larger held_out, or fewer {split}_tokens"
            )
        return FixedBatches(batches, **self._ranks())

    def val_dataloader(self) -> FixedBatches:
        return self._fixed("validation")

    def test_dataloader(self) -> FixedBatches:
        return self._fixed("test")

    def predict_dataloader(self) -> FixedBatches:
        return self.test_dataloader()

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        return _encode(self.tokenizer, text)

    def decode(self, tokens: Tensor) -> str:
        """The text of ids (T,)."""
        return self.tokenizer.decode(tokens.tolist())


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)


def _digest(tokenizer: Any) -> str:
    """Of all that makes text ids, not only of the vocabulary."""
    _encode(tokenizer, "")  # sets how to truncate and to pad, which would be part of it
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole = backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)  # one in Python
    return digest_of([whole.encode()])


def load_tokenizer(name: str) -> Any:
    """A tokenizer of transformers': by its name on the hub, from a folder, or from a `tokenizer.json`.

    Raises:
        SpecError: there is none, or transformers is missing.
    """
    try:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
    except ImportError as error:
        raise SpecError(f"tokenizer {name!r} needs transformers: {INSTALL} ({error})") from error
    try:
        if name.endswith(".json"):
            return PreTrainedTokenizerFast(tokenizer_file=name)
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # of tokenizers, of the network
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SpecError(f"tokenizer {name!r} cannot be loaded: {reason}") from error


def end_of_text(tokenizer: Any, eos_token: str | None) -> int:
    """The id that ends a document. Raises SpecError where the tokenizer has none, or not the one asked for."""
    token = eos_token or tokenizer.eos_token
    if token is None:
        some = ", ".join(repr(token) for token in list(tokenizer.get_added_vocab())[:5]) or "none"
        raise SpecError(f"the tokenizer names no end of a text: give --data.eos_token; its special tokens: {some}")
    if token not in tokenizer.get_vocab():
        raise SpecError(f"eos_token {token!r} is no token of the tokenizer")
    return tokenizer.convert_tokens_to_ids(token)


def _stateful_loader() -> Any:
    try:
        from torchdata.stateful_dataloader import StatefulDataLoader
    except ImportError as error:
        raise SpecError(f"data 'tokens' loads with torchdata: {INSTALL} ({error})") from error
    return StatefulDataLoader
