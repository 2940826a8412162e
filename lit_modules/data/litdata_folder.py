"""Folders of tokens that litdata's `optimize` wrote with its `TokensLoader`, by its own dataset and loader."""

import json
from collections.abc import Iterable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lit_modules.data.files import digest_of
from lit_modules.data.packing import split_at_ends
from lit_modules.data.stream import Batch
from lit_modules.data.workers import outlive_signals
from mixers.registry import SpecError


class LitdataRows:
    """Blocks of ``seq_len`` tokens and the one after them, as the folder has them one after the other.

    Args:
        folder: with litdata's index.json.
        end: the id that ends a document, whose bounds are then kept in one packed row; None cuts.
        seq_len: tokens of a block.
        held_out: share of the blocks in each of validation and test.
        seed: of the split and of the order.

    Raises:
        SpecError: litdata is missing, or the folder holds no tokens.
    """

    def __init__(self, folder: Path, *, end: int | None, seq_len: int, held_out: float, seed: int):
        try:
            from litdata import StreamingDataset, TokensLoader, train_test_split
        except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
            reason = str(error).splitlines()[0]
            raise SpecError(f"{folder} needs litdata: pip install 'lightning-mixers[litdata]' ({reason})") from error
        self.folder, self.end, self.seq_len = folder, end, seq_len
        try:
            _check_chunks(folder)
            rows = StreamingDataset(str(folder), item_loader=TokensLoader(seq_len + 1), shuffle=True, seed=seed)
            names = ("train", "validation", "test")
            shares = [1 - 2 * held_out, held_out, held_out]
            self.splits: dict[str, Any] = dict(zip(names, train_test_split(rows, shares, seed=seed), strict=True))
        except Exception as error:
            raise SpecError(f"litdata cannot open {folder}: {_reason(error)}") from error
        self.digest = digest_of([(folder / "index.json").read_bytes()])  # which lists the chunks

    def loader(self, split: str, row_tokens: int, num_workers: int) -> Any:
        """litdata's loader, which shares the blocks over ranks and workers and can be taken up anywhere."""
        from litdata import StreamingDataLoader

        rows = deepcopy(self.splits[split])  # a data set of litdata's knows where its one loader is
        how = {"batch_size": max(1, row_tokens // self.seq_len), "num_workers": num_workers, "drop_last": True}
        how |= {"collate_fn": self.batch, "worker_init_fn": outlive_signals}
        return _Loader(StreamingDataLoader(rows, **how), self.folder)

    def fixed(self, split: str, row_tokens: int) -> Iterator[Batch]:
        """The same batches every time, for every process."""
        rows, count = self.splits[split], max(1, row_tokens // self.seq_len)
        begins = range(0, len(rows) - count + 1, count)
        return _read((self.batch([rows[i] for i in range(begin, begin + count)]) for begin in begins), self.folder)

    def batch(self, blocks: list[Tensor]) -> Batch:
        """Of blocks (seq_len + 1,)."""
        rows = torch.stack([torch.as_tensor(block).long() for block in blocks])
        if self.end is not None:
            return split_at_ends(rows, self.end)
        return {"tokens": rows[:, :-1].contiguous(), "targets": rows[:, 1:].contiguous()}


class _Loader:
    """litdata's loader, where what goes wrong is one line that names the folder."""

    def __init__(self, loader: Any, folder: Path):
        self.loader, self.folder = loader, folder
        self.num_workers, self.load_state_dict = loader.num_workers, loader.load_state_dict

    def __iter__(self) -> Iterator[Batch]:
        return _read(self.loader, self.folder)

    def state_dict(self) -> dict[str, Any]:
        """litdata's, without the numbers of NumPy's in it: a checkpoint is plain data."""
        return tree_map(lambda x: x.item() if isinstance(x, np.generic) else x, self.loader.state_dict())


def _read(batches: Iterable[Batch], folder: Path) -> Iterator[Batch]:
    try:
        yield from batches
    except Exception as error:
        if "DataLoader worker (pid" in str(error):  # one died, which is no fault of the folder
            raise
        raise SpecError(f"litdata cannot read {folder}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Its last line: that of a worker begins with the traceback there."""
    return (str(error).strip().splitlines() or [repr(error)])[-1]


def _check_chunks(folder: Path) -> None:
    """Raises FileNotFoundError for a chunk that is missing: litdata would wait for it as if it were still to come."""
    for chunk in json.loads((folder / "index.json").read_text())["chunks"]:
        if not (folder / chunk["filename"]).is_file():
            raise FileNotFoundError(f"{chunk['filename']} is missing, which index.json lists")
