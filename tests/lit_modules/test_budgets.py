"""The KV usages that sequences are trained at."""

import pytest
import torch

from lit_modules.budgets import build_budget
from mixers import SpecError


@pytest.mark.parametrize(("zero", "one"), [(0.5, 0.125), (0.25, 0.25), (0, 0), (1, 0), (0, 1), (0.5, 0.5), (0.8, 0.2)])
def test_shares_are_as_asked_and_the_others_uniform(zero, one):
    usages = build_budget({"name": "any", "zero": zero, "one": one}).draw(100_000)
    assert usages.min() >= 0 and usages.max() <= 1
    rest = usages[(usages > 0) & (usages < 1)]
    for found, share in ((usages == 0, zero), (usages == 1, one), (usages < 0.3, zero + 0.3 * (1 - zero - one))):
        assert found.float().mean().item() == pytest.approx(share, abs=0.01)
    assert len(rest) / 1e5 == pytest.approx(1 - zero - one, abs=0.01)


def test_processes_draw_apart_and_stay_in_step():
    budget, drawn = build_budget("any"), []
    for rank in (0, 1):
        torch.manual_seed(0)
        first = budget.draw(50 + rank, rank=rank, processes=2)  # packed rows hold as many sequences as they do
        drawn.append((first[:50], torch.rand(3)))
    (one, then), (other, later) = drawn
    assert not torch.equal(one, other) and torch.equal(then, later)
    torch.manual_seed(0)
    assert torch.equal(budget.draw(100), torch.stack([one, other], 1).flatten())


def test_names_and_mistakes():
    assert build_budget("fixed") is None and build_budget("any").zero > 0
    for spec, message in (
        ("all", "unknown budget 'all'; known: fixed, any"),
        (
            {"name": "any", "zeros": 1},
            "unknown option 'zeros' of budget 'any'; known: zero, one, allocate. Did you mean 'zero'?",
        ),
        ({"name": "fixed", "zero": 1}, "unknown option 'zero' of budget 'fixed'"),
        ({"name": "any", "zero": 0.9, "one": 0.2}, "shares zero and one >= 0 of 1 in all, got 0.9 and 0.2"),
        ({"name": "any", "zero": "half"}, "shares zero and one >= 0 of 1 in all, got half and 0.125"),
        ({"name": "any", "allocate": "no"}, "allocate of budget 'any' must be true or false, got 'no'"),
    ):
        with pytest.raises(SpecError, match=message):
            build_budget(spec)
