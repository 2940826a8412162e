"""A folder for every run: runs/<mixer>-<data>-<number>."""

import re
import shutil
from contextlib import suppress
from itertools import count
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lit_modules.data import DATA


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


def run_name(mixer: str, data_class: str) -> str:
    """What a run is called before its number, such as ham-text; "*" stays as it is."""
    names = {path.replace(":", "."): name for name, path in DATA.items()}
    data = names.get(data_class, data_class.rpartition(".")[2].lower())
    mixer = re.sub(r"(\w+[.:])+(?=\w)", "", mixer)  # of a class path, the class
    return "-".join(part if part == "*" else re.sub(r"[^\w-]+", "_", part).strip("_") for part in (mixer, data))


def mixer_of(name: str, data_class: str) -> str:
    """What stands for the mixer in the name of a run on such data, which a run that goes on keeps; empty of others."""
    ours = re.fullmatch(rf"(.+){re.escape(run_name('', data_class))}-\d+", name)
    return ours[1] if ours else ""
