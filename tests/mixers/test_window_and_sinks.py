"""HAM with a window and sinks: usage, what is seen, and what the caches hold."""

import pytest
import torch
from torch.testing import assert_close

from kernels.sequences import Layout
from mixers import allocate, build_mixer, calibrate, set_kv_usage
from mixers.sharing import share_threshold
from mixers.threshold_kinds import Calibrated


def ham(dim=16, **options):
    torch.manual_seed(0)
    return build_mixer("ham", dim=dim, num_heads=2, head_dim=8, **options)


class TestThreshold:
    def test_lengths_that_differ_leave_the_table_finite(self):
        """Of short sequences the window is a larger share: that level of the long ones' table stays what it was."""
        for lengths in ((400, 100, 400), (100, 400), (400, 100)):
            threshold = Calibrated(1, kv_usage=0.25)
            for step in range(3 * len(lengths)):
                n = lengths[step % len(lengths)]
                scores = torch.rand(1, n, 1).masked_fill((torch.arange(n) >= n - 40)[:, None], torch.inf)
                threshold.observe(0, scores)
                threshold.close_step()
            assert threshold.eval().tau().item() == pytest.approx(1 - (0.25 - 0.1) / 0.9, abs=0.1), lengths

    def test_a_usage_that_window_and_sinks_exceed_is_said(self):
        mixer = ham(window=20, sinks=2, kv_usage=0.25)
        with pytest.warns(
            UserWarning, match=r"the KV usage 0.25 becomes 0.55 \(0.55 of the scores are infinite, as those"
        ):
            calibrate(mixer, [torch.randn(4, 40, 16)])
        out = mixer(torch.randn(4, 40, 16))
        assert out.routing.stored.sum() == 4 * 2 * 2
        assert_close(out.routing.usage, torch.full((2,), 22 / 40))


def test_budgets_are_divided_by_the_scores_of_what_is_not_always_seen():
    """At 1 / 8, where the unit of a trial's bias is read, the table is infinite."""
    model = torch.nn.ModuleList([ham(window=12, sinks=2), ham(window=12, sinks=2)])
    share_threshold(model)
    x, target = torch.randn(2, 64, 16), torch.randn(2, 64, 16)

    def loss(_):
        return (model[1](model[0](x).hidden).hidden - target).square().mean()

    allocate(model, [None], loss, kv_usages=[0.5])
    assert all(mixer.head_bias.abs().max() < 100 for mixer in model)


@pytest.mark.parametrize("options", [{}, {"scope": "head"}, {"router": "cosine"}, {"router": "random"}])
@pytest.mark.parametrize("usage", [0.2, 0.5])
def test_the_usage_asked_for_includes_window_and_sinks(options, usage):
    mixer, x = ham(window=30, sinks=4, kv_usage=usage, **options), torch.randn(3, 256, 16)
    calibrate(mixer, [x])
    for set_to in (usage, 0.3):
        set_kv_usage(mixer, set_to)
        out = mixer.eval()(x, mixer.init_state(3))
        assert out.routing.usage.mean().item() == pytest.approx(set_to, abs=0.02)
        held = out.state.kv.counts.float().mean().item() / 256
        assert held == pytest.approx(set_to, abs=0.03)


@pytest.mark.parametrize(("window", "sinks"), [(4, 2), (0, 3), (5, 0), (40, 1), (1, 40)])
@pytest.mark.parametrize("usage", [0.0, 0.3, 1.0])
def test_what_is_seen(window, sinks, usage):
    """Against attention under a mask."""
    mixer = ham(window=window, sinks=sinks, combine="sum").double()
    calibrate(mixer, [torch.randn(2, 200, 16, dtype=torch.float64)])
    set_kv_usage(mixer, usage)
    x, T = torch.randn(2, 25, 16, dtype=torch.float64), 25
    out = mixer.eval()(x)
    t = torch.arange(T)
    behind = t[:, None] - t
    scored = out.routing.scores > mixer.threshold.tau()
    assert torch.equal(out.routing.stored, scored | (t < sinks)[:, None])
    seen = (behind >= 0) & (out.routing.stored.transpose(1, 2)[:, :, None] | (behind < window))  # (B, H, T, T)
    m = mixer.memory(x, None, None, Layout.of(None, x))
    q = m.q * mixer.log_scale.exp()[:, None]
    logits = torch.einsum("bthk,bjhk->bhtj", q, m.k).masked_fill(~seen, -torch.inf)
    a = torch.einsum("bhtj,bjhv->bthv", logits.softmax(-1).nan_to_num(), m.v)
    golden = (mixer.norm(m.read) + a).flatten(2) * torch.nn.functional.silu(mixer.gate(x))
    assert_close(out.hidden, mixer.out(golden), rtol=0, atol=1e-12)
    last = seen[:, :, -1].sum((0, 2))
    assert torch.equal(out.routing.kept, last.float())


def test_the_larger_window_counts():
    for router, window in ((3, 6), (9, 9)):
        mixer = ham(window=6, router={"name": "recency", "window": router})
        assert mixer.window_size() == mixer.eval()(torch.randn(1, 12, 16)).routing.window == window
