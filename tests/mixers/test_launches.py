"""How much a GPU is asked to do, one thing after the other, for a layer's forward pass."""

import pytest
import torch
from torch.testing import assert_close

from kernels import dispatch
from kernels.sequences import Layout
from mixers import build_mixer
from recipes.bench.launches import PASSES, PRECISIONS, launches, layer, waits


@pytest.fixture
def on_a_gpu(monkeypatch):
    """What `auto` takes there."""
    monkeypatch.setitem(dispatch.PREFERENCE, "cpu", ("triton", "torch"))


@pytest.mark.filterwarnings("ignore:the KV threshold has seen no training step")
@pytest.mark.parametrize(
    ("name", "most", "packed", "training"),
    [("ham", 28, True, True), pytest.param("ham", 28, False, False, marks=pytest.mark.slow), ("gdn", 17, True, True)],
)
def test_a_layer_takes_few_launches(name, most, packed, training, on_a_gpu):
    """Tables of the layout are made by the first layer of a model; this is one of the others."""
    mixer = build_mixer(name, dim=16, num_heads=2, head_dim=8).train(training)
    x = torch.randn(1, 70, 16, requires_grad=training)
    layout = Layout.of(torch.tensor([0, 66, 70]) if packed else None, x)
    with torch.set_grad_enabled(training):
        mixer(x, cu_seqlens=layout)
        mixer.layer_index = 1
        with launches() as found:
            mixer(x, cu_seqlens=layout)
    assert found["triton prepare"] == 1  # not token by token
    assert sum(found.values()) <= most and not found["tolist"], found


@pytest.mark.parametrize(("name", "most"), [("ham", 40), pytest.param("gdn", 26, marks=pytest.mark.slow)])
def test_autocast_casts_a_layers_input_once(name, most):
    """And a weight once; the answer is that of float32."""
    (found, hidden), (_, exact) = (layer(name, "forward", precision) for precision in ("autocast", "float32"))
    assert found.total() <= most, found
    assert hidden.dtype == torch.bfloat16
    assert_close(hidden.float(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("name", "what", "most"),
    [("attention", "prefill", 2), ("ham", "prefill", 2), ("attention", "decode", 0), ("ham", "decode", 1)],
)
def test_a_layer_waits_seldom(name, what, most):
    """A prompt asks how many tokens are stored and which; a token more, whether any is, or nothing."""
    found, _ = layer(name, what, "float32")
    assert waits(found) <= most, found


def test_what_is_counted():
    """A wait is told apart from a view, and a kernel from an operation of PyTorch's."""
    x = torch.randn(3, 4)
    with launches() as found:
        x.T.reshape(12)[x.flatten() > 0].sum().item()
        x.tolist()
    assert found == {"clone": 1, "gt": 1, "index.bool": 1, "sum": 1, "_local_scalar_dense": 1, "tolist": 1}
    assert waits(found) == 3
    for precision in PRECISIONS:
        found, _ = layer("attention", PASSES[-1], precision)
        assert not waits(found) and sum(n for name, n in found.items() if name.startswith("triton ")) == 4
