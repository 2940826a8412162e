"""Every registered mixer at its defaults, and HAM with every router and option: what the property tests run over."""

from functools import cache

import pytest
import torch
from torch.testing import assert_close

from mixers import build_mixer, list_mixers, list_routers, set_kv_usage
from mixers.caches.bounded import BoundedCache
from mixers.ham import HAM
from mixers.registry import MIXERS
from mixers.threshold_kinds import Fixed

DIM = 12
SMALL = {"num_heads": 2, "head_dim": 4}
HAMS = {
    **{f"ham {router}": {"router": router} for router in list_routers()},
    "ham sum": {"combine": "sum", "scope": "layer", "router": {"name": "residual", "space": "value"}},
    "ham controlled": {"threshold": "controlled", "scope": "head", "router": {"name": "learned", "form": "error"}},
    "ham window": {"router": {"name": "recency", "window": 3}},
    "ham delta_net": {"rule": "delta_net"},
    "ham linear_attention": {"rule": "linear_attention", "router": "cosine"},
    "ham grouped": {"num_value_heads": 4, "value_dim": 3, "conv_size": 2},
    "ham grouped queries": {"num_heads": 4, "num_kv_heads": 2, "router": "demand", "bias": True},
    "ham bounded": {"max_tokens": 4},
    "ham window and sinks": {"window": 5, "sinks": 2},
    "ham bounded window": {"max_tokens": 3, "window": 4, "sinks": 2},
    "ham bounded recency": {"max_tokens": 3, "router": {"name": "recency", "window": 3}},
    "ham fixed": {"threshold": {"name": "fixed", "tau": 0.9}, "router": "cosine"},
    "ham learned threshold": {"threshold": "learned", "scope": "head"},
}
# In a run of all tests those of benchmarks/ideas are registered too: tests/benchmarks/test_ideas.py checks them.
BUILTIN = [name for name in list_mixers() if MIXERS.origin(name).startswith("mixers.")]
CASES = {
    **{name: {"name": name} | {k: v for k, v in SMALL.items() if k in MIXERS.options(name)} for name in BUILTIN},
    **{case: {"name": "ham", **SMALL, **options} for case, options in HAMS.items()},
    "gdn grouped queries": {"name": "gdn", **SMALL, "num_heads": 6, "num_kv_heads": 2, "bias": True},
    "attention bias": {"name": "attention", **SMALL, "bias": True},
    "gdn grouped": {"name": "gdn", **SMALL, "num_value_heads": 4, "value_dim": 3, "conv_size": 2},
    "attention window": {"name": "attention", **SMALL, "window": 4},
    "attention grouped": {"name": "attention", **SMALL, "num_heads": 4, "num_kv_heads": 2, "rope": False},
    "attention all": {"name": "attention", **SMALL, "num_heads": 4, "num_kv_heads": 1, "window": 5, "conv_size": 4},
}
every_case = pytest.mark.parametrize("case", CASES)
every_ham = pytest.mark.parametrize("case", [case for case, spec in CASES.items() if spec["name"] == "ham"])
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def make(case, dtype=torch.float64, kv_usage=0.4):
    """A mixer with every weight off its start, and a threshold that has seen scores."""
    torch.manual_seed(0)
    mixer = build_mixer(CASES[case], dim=DIM)
    with torch.no_grad():
        for weight in mixer.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.3)
    if isinstance(mixer, HAM):
        mixer(torch.randn(4, 40, DIM))
        mixer.threshold.close_step()
        if not isinstance(mixer.threshold, Fixed):
            set_kv_usage(mixer, kv_usage)
    return mixer.to(dtype).eval()


@cache
def made(case, dtype=torch.float64):
    """The same for tests that only call it."""
    return make(case, dtype)


def tokens(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def bounds_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def mask_of(lengths, T):
    return torch.arange(T) < torch.tensor(lengths)[:, None]


def tensors_of(state):
    """The tensors of a state, by name."""
    found = {}
    for name, value in vars(state).items():
        if name == "kv" and value is not None:
            found |= entries_of(value)
        elif isinstance(value, dict):
            found |= {f"{name} {part}": x for part, x in value.items()}
        else:
            found[name] = value
    return {name: value for name, value in found.items() if value is not None}


def entries_of(cache):
    """What a cache holds, sequence by sequence and head by head, wherever it lies."""
    if isinstance(cache, BoundedCache):
        there = cache.near | (cache.score > -torch.inf)
        return {name: getattr(cache, name)[there] for name in ("k", "v", "score", "near")} | {"counts": cache.counts}
    k, v, there = cache.pages.rows(torch.arange(len(cache.pages.length)))
    found = {
        "k": k[there],
        "v": v[there],
        "counts": cache.counts,
        "recent k": k[:0].flatten(0, 1),
        "recent v": v[:0].flatten(0, 1),
    }
    if cache.recent is not None:
        seen = cache.recent.seen.transpose(1, 2)
        found |= {f"recent {name}": getattr(cache.recent, name).transpose(1, 2)[seen] for name in "kv"}
    return found


def assert_same(one, other, tolerance):
    """Hidden, routing and state of two outputs."""
    assert_close(one.hidden, other.hidden, rtol=tolerance, atol=tolerance)
    assert (one.routing is None) == (other.routing is None)
    if one.routing is not None:
        assert torch.equal(one.routing.stored, other.routing.stored)
        assert torch.equal(one.routing.lengths, other.routing.lengths)
        for name in ("scores", "g"):
            # scores and decay are float32 in any model
            assert_close(getattr(one.routing, name), getattr(other.routing, name), rtol=1e-5, atol=1e-5)
    if one.state is not None and other.state is not None:
        one, other = tensors_of(one.state), tensors_of(other.state)
        assert one.keys() == other.keys()
        for name in one:
            assert_close(one[name], other[name], rtol=10 * tolerance, atol=10 * tolerance)
