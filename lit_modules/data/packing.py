"""Token ids of documents laid into rows, and the loader whose state is that of its library, over all processes."""

from collections.abc import Callable, Iterator
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from lit_modules.data.batches import IGNORED
from lit_modules.data.documents import Documents, State, content_of, drawn, in_order, read, split_of
from lit_modules.data.stream import Batch, check_same
from mixers.registry import SpecError


class PackedDocuments(IterableDataset):
    """Rows of tokens of one split, an endless stream of them or those of one epoch.

    Packed, a row is (1, row_tokens): pieces of documents of at most ``seq_len`` tokens with their bounds; a piece that
    meets the end of a row goes on in the next as a piece of its own. Cut, it is (row_tokens / seq_len, seq_len), one
    document after the other whatever the bounds. A document ends with the id that says so, which is a target; the first
    token of a document is none.

    The state is where the document begins that the next row begins in, and how far into it that is.

    Args:
        documents: as `open_documents` opens them.
        encode: text -> ids.
        field: of a document: its text, or its ids.
        end: the id that ends a document.
        split: train, validation or test.
        held_out: share of the documents in each of the last two.
        seq_len, row_tokens: of a row, see above.
        packed: or cut.
        seed: of the order.
        rank, world_size: of the process; each worker of each process has documents of its own.
        block: of a stream, see `in_order`.
        endless: else one epoch.
    """

    def __init__(
        self,
        documents: Documents,
        encode: Callable[[str], list[int]],
        *,
        field: str,
        end: int,
        split: str,
        held_out: float,
        seq_len: int,
        row_tokens: int,
        packed: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        block: int = 1000,
        endless: bool = True,
    ):
        self.documents, self.encode, self.field, self.end = documents, encode, field, end
        self.split, self.held_out = split, held_out
        self.seq_len, self.row_tokens, self.packed = seq_len, row_tokens, packed
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.block, self.endless = block, endless
        self.state: State = {}

    def state_dict(self) -> State:
        return self.state

    def load_state_dict(self, state: State) -> None:
        self.state = state

    def __iter__(self) -> Iterator[Batch]:
        tokens, targets = np.empty(self.row_tokens, np.int64), np.empty(self.row_tokens, np.int64)
        filled, bounds = 0, [0]
        for begun, ids, offset in self._pieces():
            asked = np.append(ids[1:], [] if self.packed else [IGNORED]).astype(np.int64)
            while offset < len(asked):
                count = min(len(asked) - offset, self.row_tokens - filled, self.seq_len if self.packed else len(ids))
                tokens[filled : filled + count] = ids[offset : offset + count]
                targets[filled : filled + count] = asked[offset : offset + count]
                offset, filled = offset + count, filled + count
                bounds.append(filled)
                if filled == self.row_tokens:
                    self.state = {"document": begun, "offset": offset}
                    yield self._row(tokens, targets, bounds)
                    filled, bounds = 0, [0]

    def _pieces(self) -> Iterator[tuple[State, np.ndarray, int]]:
        """Where a document begins, its ids, and how many of them were in rows before."""
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        share, shares = self.rank * workers + worker, self.world_size * workers
        order = {"seed": self.seed, "share": share, "shares": shares, "block": self.block}
        offset = self.state.get("offset", 0)
        stream = in_order(self.documents, self.state.get("document", {}), **order)
        if not self.endless:
            stream = takewhile(lambda found: found[0]["epoch"] == 0, stream)
        epoch = found = None
        for begun, document in read(stream):
            if begun["epoch"] != epoch:
                if found == 0 and not self.state:
                    raise SpecError(f"of {shares} processes that read, one has no text in the {self.split} split")
                epoch, found = begun["epoch"], 0
            if split_of(drawn(document, self.field), self.held_out) == self.split:
                content = content_of(document, self.field)
                ids = self.encode(content) if isinstance(content, str) else content
                ids = np.asarray(ids, np.int64)
                ids = ids if len(ids) and ids[-1] == self.end else np.append(ids, self.end)
                found += len(ids) > 1  # an end alone asks for nothing, and fills no row however often it is read
                yield begun, ids, offset
                offset = 0

    def _row(self, tokens: np.ndarray, targets: np.ndarray, bounds: list[int]) -> Batch:
        shape = (1, -1) if self.packed else (-1, self.seq_len)
        row: Batch = {"tokens": torch.tensor(tokens).view(shape), "targets": torch.tensor(targets).view(shape)}
        return row | ({"cu_seqlens": torch.tensor(bounds, dtype=torch.int32)} if self.packed else {})


def split_at_ends(rows: Tensor, end: int) -> Batch:
    """One packed row from rows of tokens that hold documents one after the other, each ended by the id ``end``.

    Args:
        rows: (B, T + 1) ids.

    Returns:
        A batch with ``tokens`` and ``targets`` (1, B T); nothing is asked after an end.
    """
    tokens, targets = rows[:, :-1], rows[:, 1:].masked_fill(rows[:, :-1] == end, IGNORED)
    begins = torch.zeros_like(tokens, dtype=torch.bool)
    begins[:, 0] = True
    begins[:, 1:] = tokens[:, :-1] == end
    bounds = torch.cat([begins.flatten().nonzero().flatten(), torch.tensor([tokens.numel()])])
    return {
        "tokens": tokens.reshape(1, -1),
        "targets": targets.reshape(1, -1),
        "cu_seqlens": bounds.to(torch.int32),
    }


class TokenLoader:
    """An endless loader around one of torchdata's or litdata's, which begins again where it ends.

    Its state is that loader's in every process, so that a resumed run sees exactly the batches that it would have seen.

    Args:
        loader: with `state_dict` and `load_state_dict`.
        length: batches in what Lightning calls an epoch.
        elastic: whether the library goes on with another number of processes or workers.
        count: of the documents, or the files of a stream; with another one its state means nothing.
        digests: of what else it means nothing without: of the `documents` and the `tokenizer`.
    """

    def __init__(
        self,
        loader: Any,
        *,
        length: int,
        elastic: bool = False,
        count: int | None = None,
        digests: dict[str, str | None] | None = None,
    ):
        self.loader, self.length, self.elastic = loader, length, elastic
        self.count, self.digests = count, digests or {}
        self.iterator: Iterator[Batch] | None = None

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self.length):
            yield self._next()

    def _next(self) -> Batch:
        for _ in range(2):
            try:
                if self.iterator is None:
                    self.iterator = iter(self.loader)
                return next(self.iterator)
            except StopIteration:
                self.iterator = None
            except SpecError as error:  # from a worker: with the traceback there, its last line the message
                raise SpecError(str(error).strip().splitlines()[-1].rpartition("SpecError: ")[2]) from error
            except RuntimeError as error:
                if "DataLoader worker" in str(error):
                    raise SpecError(f"a worker that loads data died: {str(error).splitlines()[0]}") from error
                raise
        raise SpecError("the data have fewer tokens than one batch asks for; give a smaller --batch_tokens")

    def state_dict(self) -> State:
        """Called in all processes at once, as Lightning does to make a checkpoint, of which the first writes one."""
        states = [self.loader.state_dict()]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, self.loader.state_dict())
        return {"workers": self.loader.num_workers, "processes": states, "count": self.count, "digests": self.digests}

    def load_state_dict(self, state: State) -> None:
        rank, processes = 0, 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
        was, now = (len(state["processes"]), state["workers"]), (processes, self.loader.num_workers)
        if was != now and not self.elastic:
            raise SpecError(
                f"data 'tokens' was read by {was[0]} processes of {was[1]} workers, and cannot go on with {now[0]} of"
                f" {now[1]}: give as many (--devices, --data.num_workers)"
            )
        if state.get("count") not in (None, self.count):
            raise SpecError(
                f"data 'tokens' has {self.count} documents, or files of a stream, but had {state['count']} when the"
                " checkpoint was written: give all of them to go on (--data.paths), or start anew"
            )
        for what, flag in (("documents", "--data.paths"), ("tokenizer", "--data.tokenizer")):
            before = state.get("digests", {}).get(what)  # earlier checkpoints have none
            check_same(before, self.digests.get(what), f"the {what} of data 'tokens'", flag)
        self.loader.load_state_dict(state["processes"][min(rank, was[0] - 1)])
        self.iterator = None
