"""Every idea keeps the contract of its kind, and does what its file says."""

import re
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks.ideas.aged import Aged
from benchmarks.ideas.rotated import Rotated
from benchmarks.ideas.unanswered import Unanswered
from benchmarks.ideas.unwritten import Unwritten
from kernels.delta_rule import gated_delta_rule
from kernels.sequences import Layout
from mixers import SpecError, build_mixer, calibrate, check_mixer, check_router
from mixers.ham import HAM
from recipes.compare.command import _read, check, expand
from recipes.compare.run import settings_of

FOLDER = Path(__file__).parents[2] / "benchmarks/ideas"
SIZES = dict(num_heads=2, head_dim=8)
ROUTERS = ["correction.Correction", "layer_offset.LayerOffset"]
MIXERS = {
    "aged.Aged": [{}, {"num_heads": 4, "num_kv_heads": 2, "sinks": 1, "window": 3}],
    "rotated.Rotated": [{}, {"rope_base": 1e6, "window": 3, "max_tokens": 4}],
    "unanswered.Unanswered": [{}, {"num_heads": 4, "num_kv_heads": 2, "sinks": 1, "scope": "head"}],
    "unwritten.Unwritten": [{}, {"num_heads": 4, "num_kv_heads": 2, "sinks": 1, "window": 3}],
}


@pytest.mark.parametrize("router", ROUTERS)
def test_routers_keep_the_contract_and_start_as_the_residual(router):
    check_router(f"benchmarks.ideas.{router}")
    x = torch.randn(2, 24, 32)
    torch.manual_seed(0)
    one = build_mixer("ham", dim=32, router=f"benchmarks.ideas.{router}")
    two = build_mixer("ham", dim=32)
    two.load_state_dict({name: weight for name, weight in one.state_dict().items() if "router" not in name})
    torch.testing.assert_close(one(x).routing.scores, (two(x).routing.scores + 0.01).log())


@pytest.mark.parametrize(("mixer", "options"), [(name, options) for name in MIXERS for options in MIXERS[name]])
def test_mixers_keep_the_contract(mixer, options):
    check_mixer(f"benchmarks.ideas.{mixer}", **SIZES | options)


def built(kind, kv_usage=0.25, **options):
    """A mixer in float64 that was calibrated, and tokens of which some come again."""
    torch.manual_seed(0)
    mixer = kind(32, **SIZES, kv_usage=kv_usage, **options).double().eval()
    x = torch.randn(4, 40, 32, dtype=torch.float64)
    calibrate(mixer, [x])
    return mixer, x


def alike(mixer):
    """HAM itself with the same weights."""
    ham = HAM(32, **SIZES).double().eval()
    ham.load_state_dict({name: weight for name, weight in mixer.state_dict().items() if name != "forgetting"})
    ham.threshold.kv_usage = mixer.threshold.kv_usage
    return ham


@pytest.mark.parametrize("kind", [Aged, Rotated, Unanswered, Unwritten])
def test_with_nothing_stored_all_are_ham(kind):
    mixer, x = built(kind, kv_usage=0.0)
    torch.testing.assert_close(mixer(x).hidden, alike(mixer)(x).hidden)


def test_rotated_attention_knows_the_order_of_what_is_stored():
    mixer, x = built(Rotated, kv_usage=1.0)
    assert (mixer(x).hidden - alike(mixer)(x).hidden).abs().max() > 1e-3


def test_an_aged_cache_counts_the_same_as_hams_but_for_what_it_forgets():
    faithful, x = built(Aged, kv_usage=1.0, start=1e-9)
    golden = alike(faithful)(x).hidden
    torch.testing.assert_close(faithful(x).hidden, golden, rtol=0, atol=1e-5)
    forgetful, _ = built(Aged, kv_usage=1.0, start=1e8)
    layout = Layout.of(None, x)
    m = forgetful._remember(x, None, layout)
    a, _ = forgetful._attend(m.q, m.k, m.v, torch.ones_like(m.beta, dtype=torch.bool), m.beta, 0, None, layout)
    torch.testing.assert_close(a, m.v)  # each token reads itself: all that was before is forgotten


def test_what_is_stored_is_not_written():
    mixer, x = built(Unwritten)
    state = mixer(x, mixer.init_state(4)).state
    stored = mixer(x).routing.stored
    assert 0.1 < stored.double().mean() < 0.4
    m = mixer.memory(x, None, None, Layout.of(None, x))
    _, _, expected = gated_delta_rule(m.q, m.k, m.v, m.g, m.beta * ~stored)
    torch.testing.assert_close(state.recurrent, expected)
    mixer.threshold.set_usage(1.0)
    assert not mixer(x, mixer.init_state(4)).state.recurrent.any()


def test_what_the_cache_answers_scores_nothing():
    mixer, x = built(Unanswered)
    x = torch.cat([x, x[:, 8:]], 1)  # 8: the convolution has to see the same again
    residual, ours = alike(mixer)(x).routing, mixer(x).routing
    assert (ours.scores <= residual.scores + 1e-6).all()
    first = ours.stored.double().cumsum(1) == 0
    torch.testing.assert_close(ours.scores[first], residual.scores[first])
    again = torch.zeros_like(ours.stored)
    again[:, 44:] = ours.stored[:, 12:40]  # after the convolution's taps
    assert again.any() and ours.scores[again].mean() < 0.7 * residual.scores[again].mean()


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        (Unanswered, {"router": "cosine"}, "needs router 'residual'"),
        (Unanswered, {"window": 3}, "without window"),
        (Unwritten, {"router": {"name": "residual", "space": "value"}}, "in output space"),
        (Unwritten, {"rule": "linear_attention"}, "a delta rule"),
        (Unwritten, {"max_tokens": 3}, "max_tokens must be 0"),
        (Rotated, {"head_dim": 7}, "must be even"),
        (Aged, {"router": "cosine"}, "its router is 'residual' or 'random'"),
        (Aged, {"max_tokens": 3}, "max_tokens must be 0"),
        (Aged, {"start": 0.0}, "must be above 0"),
    ],
)
def test_what_an_idea_cannot_do_is_refused(kind, options, says):
    with pytest.raises(SpecError, match=re.escape(says)):
        kind(32, **SIZES | options)


@pytest.mark.parametrize("file", ["contestants", "order"])
def test_the_contestants_can_be_built(file):
    contestants = list(expand(_read(FOLDER / f"{file}.yaml")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(contestants, settings_of("rewrite", data_options={}, model_options={}, metric=None))
    named = {path.stem for path in FOLDER.glob("*.py")} - {"__init__"}
    assert file != "contestants" or all(any(name in str(one) for one in contestants) for name in named)
