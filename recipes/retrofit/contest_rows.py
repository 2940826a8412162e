"""What a contest has measured so far, on disk after every row, and what the rows hang on."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from kernels.dispatch import CHOSEN
from mixers.registry import SpecError
from recipes.results import stamp, write_json, written_whole

Row = dict[str, Any]


class Results:
    """The rows so far.

    Args:
        folder: with results.json, if there are any.
        settings: that all rows share.
        digests: of the retrofitted folders, by method and seed: rows of others are left away.

    Raises:
        SpecError: the rows that are there have other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], digests: dict[tuple[str, int], str]) -> None:
        self.path, self.settings, self.digests, self.rows = folder / "results.json", settings, digests, []
        self.thresholds, self.stamps = folder / "thresholds.json", []
        self.tables: dict[str, Any] = {}
        if self.path.exists():
            try:
                kept = json.loads(self.path.read_text())
                self.rows, self.stamps, before = kept["rows"], kept["stamps"], kept["settings"]
            except (ValueError, KeyError, TypeError) as error:
                raise SpecError(f"{self.path} holds no contest: {type(error).__name__}: {error}") from error
            before = {"thresholds": "text"} | before
            other = {name: value for name, value in before.items() if settings.get(name) != value}
            if other:
                was = ", ".join(f"{name}={value}" for name, value in other.items())
                raise SpecError(f"{self.path} is of another contest ({was}): name another folder by --out")
        stale = [row for row in self.rows if digests.get((row["method"], row["seed"]), row["of"]) != row["of"]]
        if stale:
            print(
                f"{len(stale)} rows of {self.path} are of retrofits that were replaced: measured anew", file=sys.stderr
            )
            self.rows = [row for row in self.rows if row not in stale]
        self.done = {_key(row) for row in self.rows}
        if self.thresholds.exists():
            kept = json.loads(self.thresholds.read_text())
            if kept["settings"] == settings:
                self.tables = {name: [torch.tensor(table) for table in some] for name, some in kept["tables"].items()}
        self.saved = len(self.tables)

    def begin(self) -> None:
        """Note with what the rows to come are measured."""
        self.stamps.append(stamp())

    def has(self, method: str, usage: float, seed: int, task: str, length: int) -> bool:
        """Whether a row is there."""
        return (method, usage, seed, task, length) in self.done

    def add(self, row: Row) -> None:
        """Keep a row, on disk."""
        self.stamps[-1]["backends"] = dict(CHOSEN)
        self.rows.append(row | {"stamp": len(self.stamps) - 1})
        self.done.add(_key(row))
        write_json(self.path, {"settings": self.settings, "stamps": self.stamps, "rows": self.rows})

    def save_tables(self) -> None:
        """Keep the thresholds, on disk."""
        if len(self.tables) > self.saved:
            self.saved = len(self.tables)
            tables = {name: [table.tolist() for table in some] for name, some in self.tables.items()}
            with written_whole(self.thresholds) as part:
                part.write_text(json.dumps({"settings": self.settings, "tables": tables}) + "\n")


def _key(row: Row) -> tuple:
    return row["method"], row["usage"], row["seed"], row["task"], row["length"]
