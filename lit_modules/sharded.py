"""Sharded checkpoints, folders of torch.distributed.checkpoint: read as one and written from one, by one process.

Two parts of such a folder are pickles that torch reads without a look at what they name: its index, and values that
are no tensors. They are looked at here, so that `weights_only` holds for a folder, too.
"""

import io
import pickle
import warnings
import zipfile
from collections.abc import Iterator
from enum import EnumType
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from mixers.registry import SpecError

META = "meta.pt"  # what Lightning calls the file with all that is neither weights nor an optimizer's
WEIGHTS = "state_dict"
OPTIMIZER = "optimizer_{}"
INDEX = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},  # of Python 3.13
}
Optimizer = dict[str, Any]  # an optimizer's state_dict


def meta_file(path: Path) -> Path:
    """The file of a checkpoint with its plain data: of a sharded one, one in its folder."""
    return path / META if path.is_dir() else path


def load_whole(path: Path, *, optimizers: bool = True) -> dict[str, Any]:
    """A checkpoint, one file or sharded, on the CPU, as `torch.load` gives a file of Lightning's.

    Args:
        path: a file, or a folder.
        optimizers: False leaves out those of a folder.

    Raises:
        SpecError: the folder's index names code.
    """
    if path.is_file():
        return torch.load(path, map_location="cpu", weights_only=True)
    found: dict[str, Any] = {}
    planner = _Planner(keys=None if optimizers else {WEIGHTS})
    _load_state_dict(found, storage_reader=_Reader(path), planner=planner, no_dist=True)
    whole = torch.load(path / META, map_location="cpu", weights_only=True) | {WEIGHTS: found.pop(WEIGHTS)}
    if found:
        whole["optimizer_states"] = [_numbered(found[OPTIMIZER.format(i)]) for i in range(len(found))]
    return whole


def save_sharded(checkpoint: dict[str, Any], folder: Path, names: list[str]) -> None:
    """Writes a checkpoint as Lightning's ModelParallelStrategy writes it, in one shard.

    Args:
        checkpoint: what a file of Lightning's holds.
        folder: which is made.
        names: of the parameters, in the order of the optimizers' groups.

    Raises:
        SpecError: an optimizer of another number of parameters.
    """
    rest = dict(checkpoint)
    state = {WEIGHTS: rest.pop(WEIGHTS)}
    for i, optimizer in enumerate(rest.pop("optimizer_states", [])):
        state[OPTIMIZER.format(i)] = named(optimizer, names)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    torch.save(rest, folder / META)


def named(optimizer: Optimizer, names: list[str]) -> Optimizer:
    """An optimizer's state by the names of parameters in place of their numbers.

    Args:
        optimizer: its state_dict; numbers stand for parameters in the order of its groups.
        names: of the parameters, in that order.

    Raises:
        SpecError: there are more, or fewer, parameters.
    """
    numbers = [number for group in optimizer["param_groups"] for number in group["params"]]
    if len(numbers) != len(names):
        raise SpecError(f"the checkpoint's optimizer is of {len(numbers)} parameters, the model has {len(names)}")
    return _renamed(optimizer, dict(zip(numbers, names, strict=True)))


def _numbered(optimizer: Optimizer) -> Optimizer:
    """The reverse of `named`."""
    names = [name for group in optimizer["param_groups"] for name in group["params"]]
    return _renamed(optimizer, {name: i for i, name in enumerate(names)})


def _renamed(optimizer: Optimizer, keys: dict[Any, Any]) -> Optimizer:
    groups = [group | {"params": [keys[key] for key in group["params"]]} for group in optimizer["param_groups"]]
    return {"state": {keys[key]: state for key, state in optimizer["state"].items()}, "param_groups": groups}


def weights_in(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Reads all parts of a sharded checkpoint, and yields those of the weights, each with its name.

    Raises:
        SpecError: a part is missing, cut or does not have the checksum that was saved, or names code.
    """
    index = _Reader(folder).read_metadata().storage_data
    for key, part in index.items():
        where = f"{folder}: {key.fqn} in {part.relative_path}"
        try:
            with open(folder / part.relative_path, "rb") as file:
                file.seek(part.offset)
                content = io.BytesIO(file.read(part.length))
            damaged = zipfile.ZipFile(content).testzip()
        except (OSError, zipfile.BadZipFile) as error:
            raise SpecError(f"{where} is missing or damaged ({error})") from error
        if damaged:
            raise SpecError(f"{where} is damaged: {damaged} does not have the checksum that was saved with it")
        value = _plain(content, where)
        if key.fqn.startswith(f"{WEIGHTS}."):
            yield key.fqn.removeprefix(f"{WEIGHTS}."), value


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's, which also reads sharded checkpoints, whatever the strategy."""

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return load_whole(Path(path)) if Path(path).is_dir() else super().load_checkpoint(path, *args, **kwargs)


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # how Python 3.11.0 to 3.11.3 pickle a member of an enumeration
            return _member
        if name not in INDEX.get(module, ()):
            raise SpecError(f"its index names {module}.{name}, which is no part of one")
        return super().find_class(module, name)


def _member(of: Any, name: str) -> Any:
    if not (isinstance(of, EnumType) and name in of.__members__):
        raise SpecError(f"its index asks for {name} of {of!r}, which is no part of one")
    return of[name]


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        try:
            with open(Path(self.path, ".metadata"), "rb") as file:
                _Index(file).load()
            return super().read_metadata(*args, **kwargs)
        except Exception as error:  # pickle raises whatever the bytes make it
            raise SpecError(f"{self.path} is no sharded checkpoint, or a damaged one ({error})") from error


class _Planner(_EmptyStateDictLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        _plain(value, read_item.dest_index.fqn)
        value.seek(0)
        super().load_bytes(read_item, value)


def _plain(content: io.BytesIO, where: str) -> Any:
    content.seek(0)
    try:
        return torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load and pickle raise whatever the bytes make them
        raise SpecError(f"{where} holds no plain data ({type(error).__name__})") from error
