"""A folder for every run: runs/<mixer>-<data>-<number>."""

import re
import shutil
from contextlib import suppress
from itertools import count
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_only


class RunFolder:
    """The folder of one run, made by its first process.

    Attributes:
        path: None until it is made.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self._made: list[Path] = []  # what is ours to remove

    def make(self, root: Path, name: str) -> None:
        """Makes `root/name-N` with the next number; runs that start together get one each.

        Processes of the same run but the first one make none.

        Raises:
            OSError: it cannot be made.
        """
        numbers = [int(match[1]) for path in root.glob(f"{name}-*") if (match := re.search(r"-(\d+)$", path.name))]
        newest = max(numbers, default=0)
        if getattr(rank_zero_only, "rank", 0) > 0:  # the first process has made it, and alone writes into it
            self.path = root / f"{name}-{max(newest, 1)}"
            return
        if not root.exists():
            root.mkdir(parents=True, exist_ok=True)
            self._made.append(root)
        for number in count(newest + 1):
            with suppress(FileExistsError):
                self.path = root / f"{name}-{number}"
                self.path.mkdir()
                self._made.append(self.path)
                return

    def drop_if_unused(self) -> None:
        """Removes what was made, unless there are checkpoints or metrics in it or, above it, other runs."""
        if not self._made or any(self.path.glob("checkpoints/*")) or (self.path / "metrics.csv").exists():
            return
        shutil.rmtree(self.path, ignore_errors=True)
        for folder in reversed(self._made):
            with suppress(OSError):
                folder.rmdir()
