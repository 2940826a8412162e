"""Which tokens stay when a head may keep so many: against putting them in one by one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.sequences import Layout
from mixers import SpecError, build_mixer
from mixers.caches.bounded import BoundedCache, best


def one_by_one(scores, limit):
    """For every token, the tokens that are held once it has come: the worst goes, of equals the newest."""
    held, seen = [], []
    for t, score in enumerate(scores):
        if score > -torch.inf:
            held.append(t)
            if len(held) > limit:
                held.remove(min(held, key=lambda j: (scores[j], -j)))
        seen.append(sorted(held))
    return seen


stored_or_not = st.one_of(st.just(-torch.inf), st.integers(0, 4).map(float))  # few values: many ties


@given(scores=st.lists(stored_or_not, min_size=1, max_size=20), limit=st.integers(1, 6))
def test_the_best_so_far_are_seen(scores, limit):
    expected = one_by_one(scores, limit)
    seen = best(torch.tensor([scores]), 0, limit)[0]
    assert [row.nonzero()[:, 0].tolist() for row in seen] == expected


@given(
    scores=st.lists(stored_or_not, min_size=2, max_size=20),
    limit=st.integers(1, 6),
    window=st.integers(0, 5),
    cuts=st.lists(st.integers(0, 20), max_size=4),
)
def test_a_cache_filled_in_parts_holds_the_same(scores, limit, window, cuts):
    cache = BoundedCache.empty(1, 1, 1, 1, limit=limit, dtype=torch.float64)
    place = torch.arange(len(scores), dtype=torch.float64).view(1, -1, 1, 1)
    bounds = sorted({0, len(scores), *(cut for cut in cuts if cut < len(scores))})
    for start, stop in zip(bounds, bounds[1:], strict=False):
        part = place[:, start:stop]
        score = torch.tensor(scores[start:stop]).view(1, -1, 1)
        o, cache = cache.attend(
            0 * part, part, part, score > -torch.inf, score, Layout.of(None, part), scale=1.0, window=window
        )
        near = max(window - 1, 0)
        for t in range(start, stop):  # a query of zeros reads the mean of what it sees
            far = one_by_one(scores[: max(t + 1 - window, 0)], limit)
            seen = (far[-1] if far else []) + list(range(max(t + 1 - window, 0), t + 1) if window else [])
            mean = sum(seen) / len(seen) if seen else 0.0
            assert o[0, t - start, 0, 0].item() == pytest.approx(mean)
        far = one_by_one(scores[: max(stop - near, 0)], limit)
        there = cache.near[0] | (cache.score[0] > -torch.inf)
        assert cache.k[0, there, 0].tolist() == (far[-1] if far else []) + list(range(max(stop - near, 0), stop))
        assert cache.counts.tolist() == [[int(there.sum())]] and cache.k.shape[1] <= limit + near


def test_mistakes():
    with pytest.raises(SpecError, match="max_tokens must be 0"):
        build_mixer("ham", dim=8, num_heads=2, max_tokens=-1)
