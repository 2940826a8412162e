"""Window and sinks: what is seen whatever its score, and how it counts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.sequences import Layout
from mixers import SpecError
from mixers.always_seen import check_always_seen, counted, stored_behind
from tests.mixers.cases import bounds_of

sizes = st.integers(0, 6)


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4), window=sizes, sinks=sizes, seed=st.integers(0, 99))
def test_sequence_by_sequence(lengths, window, sinks, seed):
    """Packed, against a loop."""
    T = sum(lengths)
    scores = torch.randn(1, T, 2, generator=torch.Generator().manual_seed(seed))
    layout = Layout.of(bounds_of(lengths), scores)
    found = counted(scores, layout, layout.positions, window, sinks)
    behind = stored_behind(scores > 0, layout, window)
    start = 0
    for n, length in enumerate(lengths):
        kept = [t for t in range(length) if t < sinks or t >= length - window]
        expected = scores[0, start : start + length].clone()
        expected[kept] = torch.inf
        assert torch.equal(found[0, start : start + length], expected)
        far = scores[0, start : start + max(length - window, 0)] > 0
        assert torch.equal(behind[n], far.sum(0))
        start += length


def test_a_sequence_that_goes_on_has_no_sinks_left():
    scores = torch.zeros(2, 5, 1)
    layout = Layout.of(None, scores)
    found = counted(scores, layout, layout.positions_after(torch.tensor([0, 2])), 1, 3)
    assert found.isinf()[..., 0].tolist() == [[True] * 3 + [False, True], [True] + [False] * 3 + [True]]
    assert counted(scores, layout, layout.positions, 0, 0) is scores


@pytest.mark.parametrize(
    ("window", "sinks", "message"),
    [(-1, 0, "window must be 0 .* got -1"), (0, -2, "sinks must be .* got -2"), (1.5, 0, "got 1.5"), (True, 0, "True")],
)
def test_mistakes(window, sinks, message):
    with pytest.raises(SpecError, match=message):
        check_always_seen(window, sinks)
