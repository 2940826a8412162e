"""check_mixer and check_router find what is wrong and name it, and let pass what is registered."""

import subprocess
import sys
import warnings
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from mixers import (
    Mixer,
    MixerOutput,
    MixerState,
    Router,
    SpecError,
    check_mixer,
    check_router,
    list_routers,
)
from tests.mixers.cases import BUILTIN
from tests.mixers.test_router_states import WRONG, Forgets, Twice, Unusual


@dataclass
class Total(MixerState):
    """What a mixer of one's own remembers: a dataclass of its own."""

    total: torch.Tensor  # (N, D)


class Decay(Mixer):
    """A sum that decays, (B, T, D) -> (B, T, D): the least that is right in everything."""

    def __init__(self, dim, *, decay=0.9, bias=True):
        super().__init__()
        self.dim, self.decay, self.linear = dim, decay, nn.Linear(dim, dim, bias=bias)

    def init_state(self, batch_size, device=None, dtype=None):
        like = dict(device=device or self.linear.weight.device)
        total = torch.zeros(batch_size, self.dim, dtype=dtype or self.linear.weight.dtype, **like)
        return Total(torch.zeros(batch_size, dtype=torch.long, **like), total)

    def mix(self, x, state, cu_seqlens):
        lengths = [x.shape[1]] * len(x) if cu_seqlens is None else cu_seqlens.diff().tolist()
        totals = self.init_state(len(lengths)).total if state is None else state.total
        rows = x.unbind(0) if cu_seqlens is None else x[0].split(lengths)
        done = [self.run(row, total) for row, total in zip(rows, totals, strict=True)]
        hidden = torch.stack([y for y, _ in done]) if cu_seqlens is None else torch.cat([y for y, _ in done])[None]
        if state is not None:
            total = torch.stack([total for _, total in done])
            state = Total(state.length + torch.tensor(lengths), total)
        return MixerOutput(self.linear(hidden), state)

    def run(self, row, total):
        out = [row[:0]]
        for token in row:
            total = self.decay * total + token
            out.append(total[None])
        return torch.cat(out), total


def wrong(**methods):
    return type("Wrong", (Decay,), methods)


def mix(change):
    """A mixer whose `mix` is called by way of `change(mixer, mix, x, state, cu_seqlens)`."""
    return wrong(mix=lambda self, x, s, c: change(self, lambda *args: Decay.mix(self, *args), x, s, c))


class Extra(Decay):
    def __init__(self, dim):
        super().__init__(dim)
        self.extra = nn.Parameter(torch.ones(dim))


class Unsaved(Decay):
    def __init__(self, dim):
        super().__init__(dim)
        self.sign = torch.randn(dim, dtype=torch.float64)

    def mix(self, x, state, cu_seqlens):
        return super().mix(x * self.sign, state, cu_seqlens)


def with_hidden(change):
    return mix(lambda self, mix, x, s, c: replace(out := mix(x, s, c), hidden=change(out.hidden)))


def in_place(self, mix, x, s, c):
    out = mix(x, s, c)
    if s is not None:
        s.total.copy_(out.state.total.detach())
    return out


WRONG_MIXERS = {
    "looks ahead": (
        with_hidden(lambda y: y + y.flip(1)),
        "no later token matters: no, hidden of earlier tokens differs by",
    ),
    "leaks across packing": (
        mix(lambda self, mix, x, s, c: mix(x, s, None) if c is not None and s is None else mix(x, s, c)),
        "packed documents are as if alone: no, hidden without a state differs by",
    ),
    "forgets its state": (
        mix(lambda self, mix, x, s, c: mix(x, s and replace(s, total=0 * s.total), c)),
        "any split of T gives the same: no, hidden differs by",
    ),
    "counts wrong": (
        mix(lambda self, mix, x, s, c: replace(o := mix(x, s, c), state=s and replace(o.state, length=s.length + 1))),
        r"the state's length is \[1, 1, 1, 1\], not \[9, 0, 1, 14\]",
    ),
    "writes into its state": (mix(in_place), "states are selected, saved and loaded: no, hidden after the same state"),
    "nan": (with_hidden(lambda y: y * torch.nan), "hidden is not finite"),
    "shape": (with_hidden(lambda y: y[..., :3]), r"hidden is \(2, 24, 3\) of x \(2, 24, 32\)"),
    "dtype": (with_hidden(lambda y: y.float()), "hidden is torch.float32 of x torch.float64"),
    "constant": (with_hidden(lambda y: 0 * y), "hidden does not depend on x"),
    "detached": (mix(lambda self, mix, x, s, c: mix(x.detach(), s, c)), "gradients .*: no, none reaches x"),
    "unused": (Extra, "gradients are finite and reach every parameter: no, none reaches extra"),
    "unsaved": (Unsaved, "a state dict brings everything back: no, hidden differs by"),
    "ends": (mix(lambda self, mix, x, s, c: mix(x, s, c) if c is None else c.nope), "it ends in AttributeError: "),
    "no state": (wrong(init_state=Mixer.init_state), "NotImplementedError: mixer .*Wrong has no init_state"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG_MIXERS)
def test_a_wrong_mixer_is_found(what):
    mixer, message = WRONG_MIXERS[what]
    with pytest.raises(AssertionError, match=rf"^mixer .*\.{mixer.__name__}: .*{message}") as error:
        check_mixer(mixer)
    assert "\n" not in str(error.value)


def test_a_right_mixer_passes():
    check_mixer(Decay)
    check_mixer(Decay, dim=5, dtype=torch.float32, decay=0.5, bias=False)


@pytest.mark.parametrize("name", BUILTIN)
def test_registered_mixers_pass(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_mixer(name)
        check_mixer(name, dtype=torch.float32)


@pytest.mark.parametrize("router", [*list_routers(), Unusual, Twice], ids=str)
def test_right_routers_pass(router):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_router(router)


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_router_is_found(what):
    router, _ = WRONG[what]
    with pytest.raises((SpecError, AssertionError), match=rf"router .*\.{router.__name__}") as error:
        check_router(router)
    assert "\n" not in str(error.value)


def gives(forward, **more):
    return type("Wrong", (Router,), {"forward": forward, **more})


def untrained(self, dim, num_heads):
    Router.__init__(self, dim, num_heads)
    self.linear = nn.Linear(dim, num_heads)


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (gives(lambda self, i: torch.full_like(i.g, 0.5)), "the KV usage asked for is stored: no, 0.000 of the tokens"),
        (gives(lambda self, i: i.beta.clamp(max=0.4)), "the KV usage asked for is stored: no, 0.000 of the tokens"),
        (
            gives(lambda self, i: self.linear(i.x), __init__=untrained),
            "none reaches router.linear.weight; a router is trained by its `loss` or with `trained_by_gate`",
        ),
    ],
    ids=["constant", "ties", "untrained"],
)
def test_what_the_first_step_does_not_tell_of_a_router_is_found(router, message):
    with (
        warnings.catch_warnings(record=True) as warned,
        pytest.raises(AssertionError, match=rf"^router .*\.Wrong: .*{message}"),
    ):
        warnings.simplefilter("always")
        check_router(router)
    told = [str(one.message) for one in warned if str(one.message).startswith("router ")]
    assert all("Wrong " in one for one in told) and bool(told) == ("KV usage" in message)


def test_names_specs_and_options():
    check_router({"name": "residual", "space": "value"})
    check_router("learned", form="error")
    with pytest.raises(SpecError, match="unknown option 'spaec' for router 'residual'"):
        check_router("residual", spaec="value")
    with pytest.raises(SpecError, match="unknown mixer 'hamm'"):
        check_mixer("hamm")
    with pytest.raises(SpecError, match="is no router: it does not subclass mixers.Router"):
        check_router(Decay)
    with pytest.raises(SpecError, match="is no mixer: it does not subclass mixers.Mixer"):
        check_mixer(Forgets)


@pytest.mark.slow
def test_they_need_no_test_tools():
    code = (
        "import sys; from mixers import check_mixer; check_mixer('gdn');"
        "assert not {'pytest', 'hypothesis', 'lightning'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
