"""Documents by Hugging Face's `datasets`: opened, held out, read in an order by seed that can be taken up anywhere."""

import hashlib
import logging
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lit_modules.data.files import digest_of
from mixers.registry import SpecError, unknown

FORMATS = {".parquet": "parquet", ".jsonl": "json", ".ndjson": "json", ".txt": "text"}
COMPRESSED = {".gz", ".zst", ".xz", ".bz2"}
INSTALL = "pip install 'lightning-mixers[tokens]'"
SAMPLED = 64  # documents that stand for all where a checkpoint is compared with what is there
TOKENS = "tokens"  # the column in which `tokenize` writes ids
DRAW = "draw"  # and the one in which it keeps the draw of their text
TOKENIZER = "tokenizer"  # its folder for the tokenizer, whose vocabulary may be a .txt
State = dict[str, Any]
Documents = Any  # datasets.Dataset or datasets.IterableDataset, which take seconds to import


def import_datasets() -> Any:
    """The package. Raises SpecError where it is missing."""
    try:
        import datasets
    except ImportError as error:
        raise SpecError(f"data 'tokens' reads with Hugging Face's datasets: {INSTALL} ({error})") from error
    # a shuffle buffer of one document holds nothing between two, of which it warns all the same
    logging.getLogger("datasets.iterable_dataset").setLevel(logging.ERROR)
    return datasets


def find_documents(paths: Sequence[str]) -> tuple[str, list[str]]:
    """The files that paths name, in order, and the one format that all of them have; of folders, the files below.

    Raises:
        SpecError: a path that does not exist, another format, several formats, no file.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files = (file for file in path.rglob("*") if _format(file) and file.parent.name != TOKENIZER)
            found += sorted(file for file in files if file.is_file())
        elif not path.is_file():
            raise SpecError(f"data path '{path}' does not exist")
        elif _format(path) is None:
            raise SpecError(f"data path '{path}' is none of {', '.join(FORMATS)}, which may be compressed")
        else:
            found.append(path)
    formats = sorted({_format(file) for file in found})
    if len(formats) != 1:
        what = f"are of several formats: {', '.join(formats)}" if formats else f"hold no {', '.join(FORMATS)}"
        raise SpecError(f"data paths {', '.join(map(str, paths))} {what}")
    return formats[0], [str(file) for file in found]


def _format(file: Path) -> str | None:
    name = Path(file.stem) if file.suffix in COMPRESSED else file
    return FORMATS.get(name.suffix)


def open_documents(
    *, paths: Sequence[str], hub: str | None, hub_config: str | None, split: str, streaming: bool
) -> Documents:
    """Opens a data set of the hub, or files: of .txt each is a document, of the others each row or line.

    Raises:
        SpecError: both or neither are given, the package is missing, or the data cannot be opened.
    """
    if bool(paths) == bool(hub):
        raise SpecError("data 'tokens' reads --data.paths (files, folders) or --data.hub (a data set's name): give one")
    kind, files = find_documents(paths) if paths else ("", [])
    datasets = import_datasets()
    try:
        if hub:
            return datasets.load_dataset(hub, hub_config, split=split, streaming=streaming)
        options = {"sample_by": "document"} if kind == "text" else {}
        return datasets.load_dataset(kind, data_files={split: files}, split=split, streaming=streaming, **options)
    except Exception as error:  # of the package, of the network, of pyarrow
        what = _unreadable(kind, files) or f"data {hub or ', '.join(paths)} cannot be opened: {_reason(error)}"
        raise SpecError(what) from error


def _unreadable(kind: str, files: list[str]) -> str | None:
    """Names the first file that cannot be read, which the package does for some faults only."""
    for file in files:
        try:
            for _ in import_datasets().load_dataset(kind, data_files=[file], split="train", streaming=True).iter(1000):
                pass
        except Exception as error:
            return f"data '{file}' cannot be read: {_reason(error)}"
    return None


def count_of(documents: Documents) -> int:
    """How many documents there are, or of a stream, how many files."""
    return len(documents) if hasattr(documents, "select") else documents.num_shards


def sample_of(documents: Documents, field: str, paths: Sequence[str]) -> str | None:
    """A digest of the content of some documents, evenly spread; of a stream, of its local files' names and sizes."""
    if hasattr(documents, "select"):
        numbers = np.linspace(0, len(documents) - 1, min(SAMPLED, len(documents)), dtype=int)
        return digest_of(_raw(content) for content in documents[numbers.tolist()][field])
    if not paths:
        return None
    files = map(Path, find_documents(paths)[1])
    return digest_of(f"{file.name} {file.stat().st_size}".encode() for file in files)


def read(documents: Documents | Iterator[Any]) -> Iterator[Any]:
    """What iterating gives; whatever is wrong with a file is one line that names it.

    Raises:
        SpecError: a file cannot be read.
    """
    try:
        yield from documents
    except SpecError:
        raise
    except Exception as error:  # of pyarrow, of what unpacks files, of the network
        file = _file_under_way(error)
        where = f"data '{file}'" if file else "a document"
        raise SpecError(f"{where} cannot be read: {type(error).__name__}: {_reason(error)}") from error


def _file_under_way(error: Exception) -> str | None:
    """The file that the package was reading: it is in a variable there, and in the message for some faults only."""
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        file = frame.f_locals.get("file")
        if frame.f_globals.get("__name__", "").startswith("datasets.packaged_modules.") and isinstance(file, str):
            found = file.rpartition("::")[2]  # of gzip://a.jsonl::/data/a.jsonl.gz
    return found


def check_field(documents: Documents, field: str) -> None:
    """Raises SpecError unless the column `field` holds text or ids, or if there are no documents."""
    first = next(read(documents), None)
    if first is None:
        raise SpecError("the data are empty: there is no document")
    if field not in first:
        raise unknown("data.field", field, first)
    value = first[field]
    if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(x, int) for x in value)):
        raise SpecError(f"the field {field!r} holds neither text nor token ids, but {type(value).__name__}")


def content_of(document: dict[str, Any], field: str) -> str | list[int]:
    """The text or the ids of a document; of one without, an empty text."""
    content = document[field]
    return "" if content is None else content


def drawn(document: dict[str, Any], field: str) -> float:
    """In [0, 1), by a hash of the content alone: where a document is held out, so are its copies."""
    if field == TOKENS and isinstance(document.get(DRAW), float):  # others may have a column of this name
        return document[DRAW]
    raw = _raw(content_of(document, field))
    return int.from_bytes(hashlib.blake2b(raw, digest_size=6).digest(), "big") / 2**48


def _raw(content: str | list[int] | None) -> bytes:
    text = "" if content is None else content
    return text.encode("utf-8", "replace") if isinstance(text, str) else np.asarray(text, np.int64).tobytes()


def split_of(draw: float, held_out: float) -> str:
    """`test` or `validation`, a share of `held_out` each, or `train`."""
    return "test" if draw < held_out else "validation" if draw < 2 * held_out else "train"


def in_order(
    documents: Documents, state: State, *, seed: int, share: int, shares: int, block: int
) -> Iterator[tuple[State, dict[str, Any]]]:
    """A share of the documents in an order by seed and epoch, epoch after epoch.

    What is on disk is in an order of all documents. Of a stream the files are, and then the documents within a block.

    Args:
        documents: as `open_documents` opens them.
        state: where to begin: {} or one that was yielded.
        seed: of the order.
        share, shares: of every `shares` documents one is read, of 0..shares-1.
        block: documents of a stream that are read at once.

    Yields:
        The state to begin at this document, plain data, and the document.

    Raises:
        SpecError: fewer documents than shares.
    """
    if hasattr(documents, "select"):
        return _of_table(documents, state, seed, share, shares)
    return _of_stream(documents, state, seed, share, shares, block)


def _of_table(documents: Documents, state: State, seed: int, share: int, shares: int) -> Iterator[Any]:
    if shares > len(documents):
        raise SpecError(f"{len(documents)} documents cannot be shared by {shares} processes that read")
    epoch, first = state.get("epoch", 0), state.get("next", 0)
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(len(documents))[share::shares]
        for number in range(first, len(order)):
            yield {"epoch": epoch, "next": number}, documents[int(order[number])]
        epoch, first = epoch + 1, 0


def _of_stream(documents: Documents, state: State, seed: int, share: int, shares: int, block: int):
    from datasets.distributed import split_dataset_by_node

    shuffled = documents.shuffle(seed=seed, buffer_size=1)  # of the files alone
    mine = split_dataset_by_node(shuffled, rank=share, world_size=shares)
    epoch, number, first = state.get("epoch", 0), state.get("block", 0), state.get("next", 0)
    at = state.get("at")  # the library's state before the block; None at the beginning of an epoch
    while True:
        mine.set_epoch(epoch)
        if at is not None:
            mine.load_state_dict(at)
        for columns in mine.iter(block):  # where `iter(mine)` would split by workers once more
            some = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            order = np.random.default_rng([seed, epoch, share, number]).permutation(len(some))
            for i in range(first, len(order)):
                yield {"epoch": epoch, "block": number, "next": i, "at": at}, some[order[i]]
            at, first, number = mine.state_dict(), 0, number + 1
        if number == 0:
            raise SpecError(f"the documents cannot be shared by {shares} processes that read: one has none")
        mine = split_dataset_by_node(shuffled, rank=share, world_size=shares)  # without the state that it began at
        epoch, number, at = epoch + 1, 0, None


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    cause = f" ({_reason(error.__cause__)})" if error.__cause__ else ""
    return f"{lines[0]}{cause}"
