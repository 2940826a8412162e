"""Layouts: what is said of packed sequences, and that the device is asked once."""

import pytest
import torch

from kernels.delta_rule import gated_delta_rule
from kernels.routed_attention import routed_attention
from kernels.sequences import Layout

BOUNDS = torch.tensor([0, 2, 2, 5], dtype=torch.int32)


def test_packed_sequences_are_described():
    layout = Layout.of(BOUNDS, torch.zeros(1, 5, 3))
    assert len(layout) == 3 and layout.longest == 3 and layout.packed
    assert layout.lengths.tolist() == [2, 0, 3]
    assert layout.positions.tolist() == [[0, 1, 0, 1, 2]]
    assert layout.documents.tolist() == [0, 0, 2, 2, 2]
    assert layout.real.tolist() == [[True, True, False], [False] * 3, [True] * 3]
    assert layout.per_token(torch.tensor([7, 8, 9])).tolist() == [[7, 7, 9, 9, 9]]


def test_rows_are_described():
    layout = Layout.of(None, torch.zeros(2, 3, 4))
    assert len(layout) == 2 and layout.longest == 3 and not layout.packed
    assert layout.lengths.tolist() == [3, 3] and layout.positions.tolist() == [[0, 1, 2]] * 2
    assert layout.per_token(torch.tensor([7, 8])).tolist() == [[7], [8]] and layout.real.all()
    x = torch.randn(2, 3, 4)
    assert layout.pad(x) is x and layout.unpad(x) is x


def test_padding_comes_back():
    layout, x = Layout.of(BOUNDS, torch.zeros(1, 5)), torch.randn(1, 5, 2)
    padded = layout.pad(x)
    assert torch.equal(padded[layout.real], x[0]) and not padded[~layout.real].any()
    assert torch.equal(layout.unpad(padded), x)
    assert layout.pad(x > 0).dtype == torch.bool


@pytest.mark.parametrize("bounds", [[0, 6], [1, 5], [0, 4, 2, 5], [0]])
def test_bounds_that_do_not_fit_are_refused(bounds):
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 5"):
        Layout.of(torch.tensor(bounds), torch.zeros(1, 5))


@pytest.mark.parametrize("bounds", [[0, 5], torch.tensor([0.0, 5.0]), torch.tensor([[0, 5]])], ids=str)
def test_bounds_that_are_no_row_of_integers_are_refused(bounds):
    with pytest.raises(ValueError, match=r"cu_seqlens must be a tensor \(N \+ 1,\) of integers"):
        Layout.of(bounds, torch.zeros(1, 5))


def test_a_layout_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"the layout is of \(1, 5\) \(B, T\), the input of \(1, 6\)"):
        Layout.of(Layout.of(BOUNDS, torch.zeros(1, 5)), torch.zeros(1, 6))


def test_operations_take_a_layout_and_ask_the_device_no_more(monkeypatch):
    q, k, v = torch.randn(3, 1, 5, 2, 4)
    stored = torch.rand(1, 5, 2) < 0.5
    layout = Layout.of(BOUNDS, q)
    golden = gated_delta_rule(q, k, v, cu_seqlens=BOUNDS)[0], routed_attention(q, k, v, stored, cu_seqlens=BOUNDS)
    monkeypatch.setattr(Layout, "__init__", lambda *_: pytest.fail("a second layout"))
    assert torch.equal(gated_delta_rule(q, k, v, cu_seqlens=layout)[0], golden[0])
    assert torch.equal(routed_attention(q, k, v, stored, cu_seqlens=layout), golden[1])
