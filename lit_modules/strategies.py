"""FSDP2 by a name: Lightning's ModelParallelStrategy, with all processes sharing the data and none the tensors."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict

from lit_modules.disk import disk_error
from lit_modules.sharded import META, OPTIMIZER, WEIGHTS, named
from mixers.registry import SpecError


class FSDP2(ModelParallelStrategy):
    """Shards parameters, gradients and optimizer over all processes, block by block.

    Args:
        save_distributed_checkpoint: each process writes its part, into a folder; False writes one file.
        process_group_backend: of torch.distributed; None is that of the device.
    """

    def __init__(self, *, save_distributed_checkpoint: bool = True, process_group_backend: str | None = None):
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint, process_group_backend=process_group_backend
        )

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Writes beside, then puts in place; Lightning writes over what a folder holds, shard by shard.

        Raises:
            SpecError: in all processes, where one cannot write; what stood there before is as it was.
        """
        path = Path(self.broadcast(filepath))
        part = path.with_name(f"{path.name}.part")
        sharded = self._save_distributed_checkpoint and storage_options is None  # which Lightning refuses
        with self._all_or_none(path, part):
            if self.is_global_zero:
                _remove(part)
        with self._all_or_none(path, part):
            if sharded:
                _save_shards(checkpoint, part)
            else:
                super().save_checkpoint(checkpoint, part, storage_options)
        with self._all_or_none(path, part):
            if self.is_global_zero:
                if sharded:
                    with open(part / META, "wb") as file:
                        torch.save(checkpoint, file)
                put_in_place(part, path)

    @contextmanager
    def _all_or_none(self, path: Path, part: Path) -> Iterator[None]:
        """Lets processes go on once all have done what is within; where one cannot write, all raise SpecError.

        It would else be gone, while the others wait for it.
        """
        said, failure = "", None
        try:
            yield
        except (CheckpointException, OSError, RuntimeError, SpecError) as error:
            said, failure = _said(error), error
            if not said:  # no word of a file: a process is lost, and will not be heard below
                raise
        if self.reduce_boolean_decision(failure is None):
            return
        if self.is_global_zero:
            with suppress(OSError):
                _remove(part)
        said = self.broadcast(said) or said or "another process says why"
        raise SpecError(f"{path} cannot be written: {said}") from failure

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a folder as Lightning does, and a file of any strategy.

        Lightning takes the numbers in an optimizer's state for those of `model.parameters()`; they count through the
        optimizer's groups.
        """
        path = Path(self.broadcast(checkpoint_path))
        if path.is_dir():
            return super().load_checkpoint(path, weights_only)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        whole = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, checkpoint.pop("state_dict"), options=whole)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        states = checkpoint.pop("optimizer_states", [])
        for optimizer, state in zip(self.optimizers, states, strict=bool(self.optimizers)):  # none in an evaluation
            ours = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
            set_optimizer_state_dict(self.model, optimizer, named(state, ours), options=whole)
        return checkpoint


class _Writer(dcp.FileSystemWriter):
    """torch's, but raises the system's own error: that of torch loses its cause on the way to the other processes."""

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().write_data(*args, **kwargs)
        except RuntimeError as error:
            raise disk_error(error) or error from None


def _save_shards(checkpoint: dict[str, Any], folder: Path) -> None:
    """Writes this process's part of weights and optimizers, and takes them out of the checkpoint."""
    state = {WEIGHTS: checkpoint.pop(WEIGHTS)}
    state |= {OPTIMIZER.format(i): one for i, one in enumerate(checkpoint.pop("optimizer_states", []))}
    dcp.save(state, storage_writer=_Writer(folder))


def _said(error: BaseException) -> str:
    """Why a checkpoint cannot be written, of the first process that says so; nothing of errors of another kind."""
    if isinstance(error, CheckpointException):
        failures = [failure for failure, _ in error.failures.values()]
        return next(filter(None, map(_said, failures)), "") or f"{type(failures[0]).__name__}: {failures[0]}"
    found = disk_error(error)
    return found.strerror if found else ""


def put_in_place(part: Path, path: Path) -> None:
    """Makes `part` what is at `path`.

    A folder cannot be replaced at once: the one before is moved aside first, to a name under which `--ckpt_path last`
    finds it, should this be cut short.
    """
    before = path.with_name(f"{path.stem}-before{path.suffix}")
    if path.is_dir() or part.is_dir() and path.exists():
        _remove(before)
        path.replace(before)
    part.replace(path)
    _remove(before)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
