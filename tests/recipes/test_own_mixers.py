"""Mixers of a user's own, which say and keep no more than they must, from training to writing."""

import pytest

PARTS = """
import torch
from mixers import Mixer, MixerOutput, MixerState, Router


class Stateless(Mixer):
    def __init__(self, *, dim):
        super().__init__()
        self.linear = torch.nn.Linear(dim, dim)

    def mix(self, x, state, cu_seqlens):
        return MixerOutput(self.linear(x), state)


class Pointwise(Stateless):
    def init_state(self, batch_size, device=None, dtype=None):
        return MixerState(torch.zeros(batch_size, dtype=torch.int64, device=device))


class Ahead(Router):
    def forward(self, inputs):
        return inputs.beta.flip(1).cumsum(1).flip(1)
"""


@pytest.fixture
def own(here, monkeypatch):
    """The module's name."""
    (here / "parts_of_ones_own.py").write_text(PARTS)
    monkeypatch.syspath_prepend(here)
    return "parts_of_ones_own"


def test_one_that_keeps_no_keys_is_trained_and_writes(run, own, tiny):
    result = run(f"fit {tiny} --plugin {own} --mixer {own}.Pointwise")
    assert (result.code, result.err) == (0, "") and "the model goes on from" in result.out
    written = run(f"generate --plugin {own} --prompt a --max_new_tokens 3")
    assert written.code == 0
    assert "holds 0 bytes of keys and values, 0 with free places in pages, and 0 of states" in written.err


def test_one_without_states_is_trained_and_says_that_it_cannot_write(run, own, tiny):
    result = run(f"fit {tiny} --plugin {own} --mixer {own}.Stateless,ham")
    reason = f"nothing can be written without states: mixer {own}.Stateless has no init_state"
    assert (result.code, result.err) == (0, "") and f"\nno sample: {reason}\n" in result.out
    assert "next:" in result.out
    assert run(f"generate --plugin {own} --prompt a --max_new_tokens 3").error.endswith(reason)


def test_a_wrong_router_ends_a_run_in_one_line(run, own, tiny):
    error = run(f"fit {tiny} --plugin {own} --mixer ham --router {own}.Ahead").error
    assert f"router {own}.Ahead looks at later tokens" in error
