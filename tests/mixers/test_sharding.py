"""Two processes agree on a threshold, and FSDP2 does what one process does, with the Triton operators in the middle."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close

from mixers import Decoder
from mixers.registry import THRESHOLDS
from tests import interpreter
from tests.recipes.processes import FORKS


def make():
    torch.manual_seed(0)
    options = dict(num_heads=2, head_dim=8, threshold={"name": "fixed", "tau": 0.2}, backend="triton")
    return Decoder(13, dim=16, depth=2, mixer={"name": "ham", "attention_backend": "triton", **options})


def tokens():
    return torch.randint(13, (2, 20), generator=torch.Generator().manual_seed(1))


def step(model, batch):
    """One step of SGD on a mean over the batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(batch).hidden.square().mean().backward()
    optimizer.step()


def taus(rank):
    """Of a calibrated and a controlled threshold, after scores that are all 0 on rank 0 and all 1 on rank 1."""
    controlled = {"name": "controlled", "rate": 1.0, "start": 0.5}
    for spec, usage in (("calibrated", 0.5), (controlled, 0.25)):
        threshold = THRESHOLDS.build(spec, 1, kv_usage=usage)
        threshold.observe(0, torch.full((1, 10, 1), float(rank)))
        threshold.close_step()
        yield threshold.tau().item()


def seen(rank):
    """Scores of a rank: unlike those of the other, and not as many."""
    return torch.linspace(0, 1 + rank, 40 + 60 * rank).square()[None, :, None]


def pooled(*scores, scope="model"):
    threshold = THRESHOLDS.build("calibrated", 1, kv_usage=0.3, scope=scope)
    threshold.observe(0, torch.cat(scores, 1))
    threshold.close_step()
    return threshold.table


def run_rank(rank, folder):
    interpreter.speed_up()
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = {"taus": list(taus(rank)), "tables": [pooled(seen(rank), scope=scope) for scope in ("model", "head")]}
    mesh = init_device_mesh("cpu", (2,))
    model = make()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    step(model, tokens()[rank : rank + 1])
    found["weights"] = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_do_as_one(tmp_path):
    """In processes forked from one that has used torch for nothing yet: others may hang."""
    ranks = [FORKS.Process(target=run_rank, args=(rank, tmp_path), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(240)
    assert [process.exitcode for process in ranks] == [0, 0]
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert [one["taus"] for one in found] == [[0.5, 0.75]] * 2  # tau lies between; half of all tokens are stored
    for one in found:
        assert all(torch.equal(table, pooled(seen(0), seen(1))) for table in one["tables"])
    model = make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model, tokens())
    for name, p in model.named_parameters():
        for one in found:
            assert_close(one["weights"][name], p.detach(), rtol=0, atol=1e-5)
    assert any((p.detach() - before[name]).abs().max() > 1e-3 for name, p in model.named_parameters())
