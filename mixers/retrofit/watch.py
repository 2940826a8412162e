"""Learning from a host at work: its attention calls are shown to a watcher, and the host goes on as it is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from mixers.retrofit.parts import HostedPart

Watcher = Callable[[str, HostedPart, Tensor, Tensor, Tensor, Tensor, Tensor], None]
"""(name, part, h (B, T, D), q (B, T, heads, K), k (B, T, H, K), v (B, T, H, V), read-out (B, T, heads, V))"""


@contextmanager
def watched(parts: dict[str, HostedPart], watcher: Watcher) -> Iterator[None]:
    """Within it the host computes its own attention, and the watcher is shown what goes into it and what comes out."""
    try:
        for name, part in parts.items():
            part.watch = lambda *call, name=name, part=part: watcher(name, part, *call)
        yield
    finally:
        for part in parts.values():
            part.watch = None
