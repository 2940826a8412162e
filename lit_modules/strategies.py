"""FSDP2 by a name: Lightning's ModelParallelStrategy, with all processes sharing the data and none the tensors."""

import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict

from lit_modules.sharded import named


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
        """Writes beside, then puts in place; Lightning writes over what a folder holds, shard by shard."""
        path = Path(self.broadcast(filepath))
        part = path.with_name(f"{path.name}.part")
        if self.is_global_zero:
            _remove(part)
        self.barrier()
        super().save_checkpoint(checkpoint, part, storage_options)
        self.barrier()
        if self.is_global_zero:
            put_in_place(part, path)
        self.barrier()

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
