"""Names that come back: the bytes of a text that its earlier part tells, and nothing else in reach does.

Most bytes of a program follow from the few before them. What a model has to fetch from far behind is how a name goes
on that was there before; so loss on these bytes, apart, tells memories from one another where the mean does not (as
Zoology, arXiv 2312.04927, has it with n-grams that were seen before).
"""

import builtins
import keyword
import re

import numpy as np

LEAST = 4  # bytes of a name: shorter ones are told by what is near
DISTANCE = 64  # bytes back to the nearest of its kind: further than a short convolution or a sentence reaches
NAME = re.compile(rb"[A-Za-z_][A-Za-z0-9_]*")
KNOWN = {name.encode() for name in (*keyword.kwlist, *keyword.softkwlist, *dir(builtins), "self")}
"""Names that any program has: weights tell them, whatever came before."""


def repeated_names(text: bytes) -> np.ndarray:
    """Which bytes go on with a name that was there before.

    A name counts if it has `LEAST` bytes or more, is none of Python's own, and the nearest one like it begins
    `DISTANCE` bytes ahead of it or more. Its first byte does not count: that this name comes now is a choice, which no
    memory holds.

    Args:
        text: what a model reads of a document; a name cut at either end is the part that is there.

    Returns:
        (len(text),) bool.
    """
    found, last = np.zeros(len(text), dtype=bool), {}
    for match in NAME.finditer(text):
        name, start = match[0], match.start()
        if len(name) < LEAST or name in KNOWN:
            continue
        if name in last and start - last[name] >= DISTANCE:
            found[start + 1 : match.end()] = True
        last[name] = start
    return found
