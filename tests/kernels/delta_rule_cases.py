"""Inputs of the delta rule: of all sizes, keys that are alike, decays that forget everything, writes that do not."""

import torch
from hypothesis import strategies as st
from torch.nn.functional import normalize

INPUTS = ("q", "k", "v", "g", "beta", "initial_state")


small_shapes = st.fixed_dictionaries(  # the interpreter is slow
    {
        "seed": st.integers(0, 1000),
        "H": st.just(1),
        "groups": st.integers(1, 2),
        "K": st.integers(1, 20),
        "V": st.integers(1, 20),
        "keys": st.sampled_from(["any", "alike", "some zero"]),
        "decay": st.sampled_from(["none", "any", "reset", "fast"]),
        "beta": st.sampled_from(["any", "0", "1"]),
    }
)

lengths_of_documents = st.lists(st.sampled_from([0, 0, 1, 5, 16, 17, 35]), min_size=1, max_size=5).filter(any)


def make(
    *,
    seed=0,
    B=1,
    T=8,
    H=2,
    K=4,
    V=4,
    groups=1,
    N=None,
    keys="any",
    decay="any",
    beta="any",
    dtype=torch.float64,
):
    """q, k, v, g, beta, initial_state. N sequences, B of them by default."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    q, k = normalize(normal(B, T, H, K), dim=-1), normal(B, T, H, K)
    if keys == "alike":
        k = normal(1, 1, H, K) + 1e-3 * k
    k = normalize(k, dim=-1) * {"zero": 0.0, "some zero": torch.rand(B, T, H, 1, generator=draw) > 0.5}.get(keys, 1.0)
    heads = B, T, H * groups
    g = {
        "none": torch.zeros(heads),
        "any": -normal(*heads).exp(),
        "slow": -1e-3 * normal(*heads).exp(),
        "reset": -1e4 * (torch.rand(heads, generator=draw) > 0.7),
        "fast": torch.full(heads, -1e4),
        "nothing left": torch.where(torch.rand(heads, generator=draw) > 0.7, -torch.inf, -normal(*heads).exp()),
    }[decay]
    strength = {"any": normal(*heads).sigmoid(), "0": torch.zeros(heads), "1": torch.ones(heads)}[beta]
    state = normal(N or B, H * groups, K, V)
    parts = q, k, normal(*heads, V), g, strength, state
    return {name: x.to(dtype).requires_grad_() for name, x in zip(INPUTS, parts, strict=True)}
