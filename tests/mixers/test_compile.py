"""torch.compile sees a whole HAM block: the Triton operators are opaque to it and nothing else breaks the graph."""

import pytest
import torch
from torch.testing import assert_close

from kernels import dispatch
from mixers import build_mixer


@pytest.mark.parametrize(
    ("router", "training", "more"),
    [
        pytest.param("residual", False, {}, marks=pytest.mark.slow),
        pytest.param("cosine", True, {}, marks=pytest.mark.slow),
        pytest.param("learned", True, {}, marks=pytest.mark.slow),
        ("residual", True, {"window": 3, "sinks": 2, "num_kv_heads": 1, "bias": True}),
    ],
)
def test_a_block_by_kernels_and_in_one_graph_does_as_it_does_without(router, training, more, monkeypatch):
    torch._dynamo.reset()
    torch.manual_seed(0)
    mixer = build_mixer("ham", dim=16, num_heads=2, head_dim=8, router=router, **more).double()
    x = torch.randn(2, 20, 16, dtype=torch.float64, requires_grad=True)
    mixer(x)
    mixer.train(training)

    def run(function):
        mixer.threshold.close_step()
        before = mixer.threshold.table.clone()
        out = function(x)
        leaves = [x, *(p for p in mixer.parameters() if p.requires_grad)]
        gradients = torch.autograd.grad(out.hidden.square().sum(), leaves, allow_unused=True, materialize_grads=True)
        seen = dict(mixer.threshold._pending)
        mixer.threshold._pending.clear()
        mixer.threshold.table.copy_(before)
        return [out.hidden, out.routing.scores, out.routing.stored, *gradients, *seen.values()]

    golden = run(mixer)
    assert golden[2].any() and not golden[2].all()
    monkeypatch.setitem(dispatch.PREFERENCE, "cpu", ("triton", "torch"))  # as on a GPU
    for function in (mixer, torch.compile(mixer, fullgraph=True, backend="aot_eager")):
        for one, other in zip(run(function), golden, strict=True):
            assert_close(one, other, rtol=0, atol=1e-8)
