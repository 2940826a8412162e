"""Names that come back in a text: bytes that can be recalled from the sequence, where others have to be foreseen.

Loss on all bytes hides recall: most of them follow from the last few, or from what the weights know of the language. A
name (of a variable, function, class, ...) that stood before, some way back, can be copied by a model that still has it.
Marked are its bytes after the first. Which name comes, and so its first byte, is for the program to say, and to be
foreseen; how it goes on has been read. Names that the training text has nowhere are marked apart: no weights know how
they go on, while they may know `self` and `append`. (So Zoology, arXiv 2312.04927, tells recall in text from the rest:
by bigrams that come back and are rare in training.)

Which bytes are marked follows from the text alone, so it is the same for all models; but a model that copies where
another name comes pays for it in the rest. Look at both.
"""

import keyword
import re
from collections.abc import Set

import torch

from lit_modules.data.stream import NAMES, Batch

WORD = re.compile(rb"[\w\x80-\xff]+")  # of bytes: ASCII alone is in \w
KEYWORDS = frozenset(word.encode() for word in keyword.kwlist)
SHORTEST = 4
REST, KNOWN, UNKNOWN = range(3)
"""What a byte is: none of a name that stood before, of one that the training text has too, of one that it has not."""


def is_name(word: bytes) -> bool:
    """Whether a word is an identifier of Python, no keyword, and at least SHORTEST bytes long."""
    return len(word) >= SHORTEST and not word[:1].isdigit() and word not in KEYWORDS


def names_in(text: bytes) -> set[bytes]:
    """All names in a text."""
    return {word for match in WORD.finditer(text) if is_name(word := match.group())}


def kinds_of(text: bytes, known: Set[bytes], *, distance: int) -> torch.Tensor:
    """What each byte of one sequence is.

    Args:
        text: the T bytes.
        known: names that the weights may know.
        distance: bytes, at least 1, from the beginning of a name to where it began the last time before.

    Returns:
        (T,) int64 of REST, KNOWN and UNKNOWN. A word that the end of the text may have cut is REST.
    """
    kinds = torch.full((len(text),), REST)
    last: dict[bytes, int] = {}
    for match in WORD.finditer(text):
        name, (begin, end) = match.group(), match.span()
        if not is_name(name):
            continue
        if name in last and begin - last[name] >= distance and end < len(text):
            kinds[begin + 1 : end] = KNOWN if name in known else UNKNOWN
        last[name] = begin
    return kinds


def with_names(batch: Batch, known: Set[bytes], *, distance: int) -> Batch:
    """A batch of bytes, packed in one row and asked for the next of each, with what each target is under NAMES.

    Args:
        batch: ``tokens`` and ``targets`` (1, T) int64, ``cu_seqlens`` (N + 1,).
        known, distance: see :func:`kinds_of`.

    Returns:
        The batch, and in it NAMES, (1, T) int64.
    """
    tokens, targets, bounds = batch["tokens"][0], batch["targets"][0], batch["cu_seqlens"].tolist()
    kinds = [
        kinds_of(bytes([*tokens[begin:end].tolist(), int(targets[end - 1])]), known, distance=distance)[1:]
        for begin, end in zip(bounds[:-1], bounds[1:], strict=True)
    ]
    return batch | {NAMES: torch.cat(kinds)[None]}
