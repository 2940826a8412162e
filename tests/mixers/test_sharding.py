"""FSDP2 on two processes does what one process does, with the Triton operators in the middle."""

import torch
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close

from mixers import Decoder


def make():
    torch.manual_seed(0)
    options = dict(num_heads=2, head_dim=8, threshold={"name": "fixed", "tau": 0.2}, backend="triton")
    return Decoder(13, dim=16, depth=2, mixer={"name": "ham", "attention_backend": "triton", **options})


def tokens():
    return torch.randint(13, (4, 20), generator=torch.Generator().manual_seed(1))


def step(model, batch):
    """One step of SGD on a mean over the batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(batch).hidden.square().mean().backward()
    optimizer.step()


def run_rank(rank, file, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    model = make()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    step(model, tokens()[2 * rank : 2 * rank + 2])
    full = {name: p.full_tensor().detach().numpy() for name, p in model.named_parameters()}
    if rank == 0:
        results.update(full)
    torch.distributed.destroy_process_group()


def test_two_processes_do_as_one(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.start_processes(run_rank, (tmp_path / "meeting", results), nprocs=2, start_method="fork")
        sharded = dict(results)
    model = make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model, tokens())
    for name, p in model.named_parameters():
        assert_close(torch.from_numpy(sharded[name]), p.detach(), rtol=0, atol=1e-5)
    assert any((p.detach() - before[name]).abs().max() > 1e-3 for name, p in model.named_parameters())
