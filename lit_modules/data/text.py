"""Bytes of text, packed: by default the Python standard library's sources, which every machine has."""

from functools import cached_property, lru_cache

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from lit_modules.data.files import digest_of, find_files, read_texts, split_texts
from lit_modules.data.names import names_in, with_names
from lit_modules.data.stream import Batch, BatchStream, FixedBatches
from mixers.registry import SpecError, check_range


class PackedRows:
    """Texts cut into pieces, and the pieces laid end to end into rows of equal length, in an order by seed and epoch.

    A row is a pure function of (epoch, row), found by bisection: nothing has to be replayed to resume. A piece that
    meets the end of a row goes on in the next row as a piece of its own. The last byte of a text is only a target, its
    first is only an input.

    Args:
        texts: at least two bytes each.
        seq_len: longest piece, in tokens.
        row_tokens: tokens per row, or all there are if that is less.
        seed: of the order.
    """

    def __init__(self, texts: list[bytes], *, seq_len: int, row_tokens: int, seed: int):
        self.bytes = np.frombuffer(b"".join(texts), dtype=np.uint8)
        ends = np.cumsum([len(text) for text in texts])
        pieces = [np.arange(end - len(text), end - 1, seq_len) for text, end in zip(texts, ends, strict=True)]
        self.starts = np.concatenate(pieces)
        lasts = np.repeat(ends - 1, [len(piece) for piece in pieces])
        self.lengths = np.minimum(seq_len, lasts - self.starts)
        self.num_tokens = int(self.lengths.sum())
        self.row_tokens = min(row_tokens, self.num_tokens)
        self.num_rows = self.num_tokens // self.row_tokens
        self.seed = seed
        self.order = lru_cache(maxsize=2)(self.order)  # a row needs its epoch's order only

    def order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The pieces of an epoch in order, and where each begins when they are laid end to end."""
        pieces = np.random.default_rng([self.seed, epoch]).permutation(len(self.starts))
        return pieces, np.concatenate([[0], np.cumsum(self.lengths[pieces])])

    def row(self, epoch: int, row: int) -> Batch:
        """``tokens`` and ``targets`` (1, row_tokens) int64, ``cu_seqlens`` (pieces + 1,) int32."""
        pieces, bounds = self.order(epoch)
        begin, end = row * self.row_tokens, (row + 1) * self.row_tokens
        first, last = np.searchsorted(bounds, begin, side="right") - 1, np.searchsorted(bounds, end)
        cuts = bounds[first : last + 1].clip(begin, end)
        froms = self.starts[pieces[first:last]] + cuts[:-1] - bounds[first:last]
        index = np.repeat(froms - (cuts[:-1] - begin), np.diff(cuts)) + np.arange(self.row_tokens)
        return {
            "tokens": torch.from_numpy(self.bytes[index].astype(np.int64))[None],
            "targets": torch.from_numpy(self.bytes[index + 1].astype(np.int64))[None],
            "cu_seqlens": torch.from_numpy((cuts - begin).astype(np.int32)),
        }


class TextData(pl.LightningDataModule):
    """Next-byte prediction on text files; ids are the 256 bytes.

    A document, which is a file or a line of a ``.jsonl`` file, is in one split only; of fewer than 50, each is cut in
    three. The default text differs between versions of Python: compare bits per byte on the same one. In evaluations,
    names that come back are marked (:mod:`lit_modules.data.names`).

    Args:
        paths: files and folders, or one of them; None for the standard library's sources. Plain text of any suffix, and
            ``.jsonl`` with a JSON object in each line.
        text_field: of such an object, what holds the text.
        seq_len: longest piece of a text that a model sees at once, in bytes.
        batch_tokens: tokens per step and rank, packed into one row.
        max_bytes: text to read at most.
        held_out: share of the text in each of validation and test.
        validation_tokens, test_tokens: tokens to evaluate on at most, a fixed sample.
        name_distance: bytes after which a name counts as one that comes back.
        seed: of the order and the sample.

    Raises:
        SpecError: a path without text, or sizes out of range.
    """

    model = "language_model"
    metric = "bits_per_byte"
    vocab_size = 256
    # With the standard library's sources, about three minutes on two slow cores.
    defaults = {"model": {"dim": 128, "depth": 2, "learning_rate": 3e-3}, "steps": 400, "validate_every": 100}

    def __init__(
        self,
        *,
        paths: list[str] | str | None = None,
        text_field: str = "text",
        seq_len: int = 256,
        batch_tokens: int = 2048,
        max_bytes: int = 100_000_000,
        held_out: float = 0.05,
        validation_tokens: int = 32_768,
        test_tokens: int = 262_144,
        name_distance: int = 64,
        seed: int = 0,
    ):
        super().__init__()
        sizes = {"seq_len": seq_len, "batch_tokens": batch_tokens, "validation_tokens": validation_tokens}
        sizes |= {"test_tokens": test_tokens, "max_bytes": max_bytes, "name_distance": name_distance}
        for name, size in sizes.items():
            if size < 1:
                raise SpecError(f"{name} {size} must be at least 1")
        check_range(0, seed=seed)
        if not 0 < held_out < 0.5:
            raise SpecError(f"held_out {held_out} is outside its range 0..0.5")
        self.files = find_files(paths)
        named = [paths] if isinstance(paths, str) else paths or ["the standard library"]
        self.source = f"the text in {', '.join(map(str, named))}"
        self.text_field = text_field
        self.seq_len = seq_len
        self.batch_tokens = batch_tokens
        self.max_bytes = max_bytes
        self.held_out = held_out
        self.limits = {"validation": validation_tokens, "test": test_tokens}
        self.name_distance = name_distance
        self.seed = seed
        self.rows: dict[str, PackedRows] = {}
        self.digest: str | None = None

    def setup(self, stage: str) -> None:
        if self.rows:
            return
        texts = read_texts(self.files, max_bytes=self.max_bytes, text_field=self.text_field)
        self.digest = digest_of(texts)  # of all, so that sizes and splits may change in a run that goes on
        splits = split_texts(texts, held_out=self.held_out)
        for split, texts in splits.items():
            if not texts:
                raise SpecError(f"too little text for a {split} split: {sum(map(len, splits['train']))} bytes to train")
            row_tokens = min(self.batch_tokens, self.limits.get(split, self.batch_tokens))
            self.rows[split] = PackedRows(texts, seq_len=self.seq_len, row_tokens=row_tokens, seed=self.seed)

    def _ranks(self) -> tuple[int, int]:
        return getattr(self.trainer, "global_rank", 0), getattr(self.trainer, "world_size", 1)

    def train_dataloader(self) -> BatchStream:
        rows, (rank, world_size) = self.rows["train"], self._ranks()

        def make(number: int) -> Batch:
            return rows.row(*divmod(number * world_size + rank, rows.num_rows))

        length = max(1, rows.num_rows // world_size)
        size = world_size * rows.row_tokens
        return BatchStream(make, length=length, digest=self.digest, source=self.source, size=size)

    @cached_property
    def known_names(self) -> set[bytes]:
        """Names in the training text. They are looked for in evaluations alone: a second for 10 MB."""
        return names_in(self.rows["train"].bytes.tobytes())

    def _fixed(self, split: str) -> FixedBatches:
        rows, (rank, world_size) = self.rows[split], self._ranks()
        count = min(rows.num_rows, self.limits[split] // rows.row_tokens)
        batches = [with_names(rows.row(0, i), self.known_names, distance=self.name_distance) for i in range(count)]
        return FixedBatches(batches, rank=rank, world_size=world_size)

    def val_dataloader(self) -> FixedBatches:
        return self._fixed("validation")

    def test_dataloader(self) -> FixedBatches:
        return self._fixed("test")

    def predict_dataloader(self) -> FixedBatches:
        return self.test_dataloader()

    @staticmethod
    def decode(tokens: Tensor) -> str:
        """The text of ids (T,) in 0..255; bytes that are no UTF-8 become U+FFFD."""
        return bytes(tokens.tolist()).decode("utf-8", errors="replace")
