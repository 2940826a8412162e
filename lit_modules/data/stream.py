"""Loaders of ready-made batches: an endless, resumable one for training, a fixed one for evaluation."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from mixers.registry import SpecError

Batch = dict[str, Any]


def longest_document(cu_seqlens: Tensor) -> slice:
    """Where the longest document of a packed row is, given the bounds (N + 1,) of all."""
    longest = int(cu_seqlens.diff().argmax())
    return slice(int(cu_seqlens[longest]), int(cu_seqlens[longest + 1]))


class BatchStream:
    """Batches 0, 1, 2, ... made one by one as they are asked for; its whole state is the number of the next batch.

    Lightning saves and restores that number (``state_dict``), so a run resumed in the middle of an epoch sees exactly
    the batches that it would have seen. Lightning leaves a loader of this type alone under distributed strategies:
    ``make`` has to give each rank its own batches.

    Args:
        make: batch number -> batch.
        length: batches in what Lightning calls an epoch, at least 1; iterating again goes on with the next number.
        digest: of what batches are made from, if that is read from somewhere: with another one a number means nothing.
        source: what that is, for the message.
        size: of what is read in an order, how much a batch of all ranks takes. A run that goes on with another size,
            such as that of more ranks, goes on from the same place, to within a batch for each time through.
    """

    def __init__(
        self,
        make: Callable[[int], Batch],
        *,
        length: int,
        digest: str | None = None,
        source: str = "",
        size: int | None = None,
    ):
        self.make = make
        self.length = length
        self.size = size
        self.digest, self.source = digest, source
        self.next = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self.length):
            batch = self.make(self.next)
            self.next += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next, "digest": self.digest, "size": self.size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_same(state.get("digest"), self.digest, self.source)
        before = state.get("size")  # older versions did not say
        self.next = state["next"] if None in (before, self.size) else state["next"] * before // self.size


def check_same(before: str | None, now: str | None, what: str, flag: str = "--data.paths") -> None:
    """Compares the digest in a checkpoint with that of what is there now, where both know one.

    Args:
        before, now: the digests.
        what: they are of.
        flag: that names it.

    Raises:
        SpecError: they differ.
    """
    if None not in (before, now) and before != now:
        raise SpecError(
            f"{what} changed since the checkpoint was written: give the same to go on ({flag}), or start anew"
        )


REPEATED = "repeated"
"""A key of batches that another rank counts."""
PART = "part"
"""A key of evaluation batches: the name of the part that they belong to, and the names of all parts."""
ANSWER = "answer"
"""A key of evaluation batches: which answer of its sequence a token belongs to, (B, T) int64."""
NAMES = "names"
"""A key of evaluation batches of bytes: what each target is, (B, T) int64, see `lit_modules.data.names`."""


class FixedBatches:
    """The same batches every time, for evaluation: every ``world_size``-th one.

    The order wraps around, so that all ranks get equally many, as collective operations need; what is there for the
    second time has ``"repeated": True``, and is not to be counted.
    """

    def __init__(self, batches: Sequence[Batch], *, rank: int = 0, world_size: int = 1):
        count = -(-len(batches) // world_size)
        self.batches = [batches[i] for i in range(rank, len(batches), world_size)]
        self.batches += [{**batches[rank % len(batches)], REPEATED: True}] * (count - len(self.batches))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)
