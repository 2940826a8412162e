"""Routers against values worked out by other means, and what they may and may not learn from."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from kernels.sequences import Layout
from mixers import Decoder, Router, SpecError, build_mixer, list_routers, register_router
from mixers.registry import ROUTERS
from mixers.routers.base import RouterInputs
from mixers.routers.demand import attention_mass

B, T, D, H, K, V = 2, 6, 5, 2, 3, 4


@pytest.fixture
def inputs():
    """Inputs of no mixer in particular; what a mixer would derive, the write, is derived."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    v, prediction, beta = normal(B, T, H, V), normal(B, T, H, V), normal(B, T, H).sigmoid()
    return RouterInputs(
        x=normal(B, T, D),
        q=normal(B, T, H, K),
        k=normal(B, T, H, K),
        v=v,
        prediction=prediction,
        g=-normal(B, T, H).exp(),
        beta=beta,
        positions=torch.arange(T).expand(B, T),
        layer=0,
        output_weight=normal(D, H, V),
        layout=Layout.of(None, v),
        statistics=torch.stack([(prediction * v).sum(-1), prediction.square().sum(-1)], -1),
    )


def score(name, inputs, **options):
    return ROUTERS.build({"name": name, **options}, D, H).double()(inputs)


def make_ham(**options):
    torch.manual_seed(0)
    return build_mixer("ham", **{"dim": 12, "num_heads": 2, "head_dim": 4} | options)


class TestCosine:
    @pytest.mark.parametrize(
        ("prediction", "value", "distance"),
        [
            ([1, 2, 3, 0], [2, 4, 6, 0], 0),  # the same direction
            ([1, 2, 3, 0], [-1, -2, -3, 0], 2),  # the opposite
            ([1, 0, 0, 0], [0, 5, 0, 0], 1),
            ([0, 0, 0, 0], [3, 5, 1, 0], 1),  # an empty memory
            ([3, 4, 0, 0], [4, 3, 0, 0], 0.04),
        ],
    )
    def test_by_hand(self, inputs, prediction, value, distance):
        p, v = torch.tensor(prediction).double(), torch.tensor(value).double()
        inputs.v[0, 0, 0], inputs.statistics[0, 0, 0] = v, torch.stack([p @ v, p @ p])
        assert score("cosine", inputs)[0, 0, 0].item() == pytest.approx(distance, abs=1e-12)

    def test_against_numpy(self, inputs):
        p, v = inputs.prediction.numpy(), inputs.v.numpy()
        golden = 1 - (p * v).sum(-1) / (np.linalg.norm(p, axis=-1) * np.linalg.norm(v, axis=-1))
        assert_close(score("cosine", inputs), torch.from_numpy(golden), rtol=0, atol=1e-12)


class TestResidual:
    def test_value_space_is_the_norm_of_the_write(self, inputs):
        golden = np.linalg.norm(inputs.beta.numpy()[..., None] * (inputs.v - inputs.prediction).numpy(), axis=-1)
        assert_close(score("residual", inputs, space="value"), torch.from_numpy(golden), rtol=0, atol=1e-12)

    def test_output_space_is_what_the_write_does_to_the_layers_output(self, inputs):
        """||W_o^h u||, with W_o^h the columns of the projection that read head h."""
        projection = inputs.output_weight.flatten(1).numpy()  # (D, H V)
        for h in range(H):
            u = np.zeros((B, T, H * V))
            u[..., h * V : (h + 1) * V] = inputs.write[:, :, h].numpy()
            golden = torch.from_numpy(np.linalg.norm(u @ projection.T, axis=-1))
            assert_close(score("residual", inputs)[..., h], golden, rtol=0, atol=1e-12)

    def test_the_mixer_hands_over_its_projection(self):
        mixer = make_ham(router="residual").double()
        x = torch.randn(1, 9, 12, dtype=torch.float64)
        memory = mixer.memory(x, None, None, Layout.of(None, x), predict="values")
        u = memory.beta[..., None] * (memory.v - memory.prediction)
        for h in range(2):
            write = torch.zeros(1, 9, 8, dtype=torch.float64)
            write[..., 4 * h : 4 * h + 4] = u[:, :, h]
            golden = mixer.out(write).norm(dim=-1).float()
            assert_close(mixer(x).routing.scores[..., h], golden, rtol=0, atol=1e-6)

    def test_an_unknown_space(self):
        with pytest.raises(SpecError, match="unknown space 'valu' .* known: output, value. Did you mean 'value'?"):
            score("residual", None, space="valu")


class TestLearned:
    def test_the_x_form_sees_the_token_alone(self, inputs):
        router = ROUTERS.build({"name": "learned", "dither": 0}, D, H).double()
        first, _, last = router.mlp
        hidden = inputs.x.numpy() @ first.weight.detach().numpy().T + first.bias.detach().numpy()
        hidden = hidden / (1 + np.exp(-hidden)) @ last.weight.detach().numpy().T + last.bias.detach().numpy()
        assert_close(router(inputs), torch.from_numpy(1 / (1 + np.exp(-hidden))).float(), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("usage", [0.0625, 0.25])
    def test_a_share_of_equal_tokens_can_be_stored(self, inputs, usage):
        equal = dataclasses.replace(inputs, x=inputs.x.new_ones(2, 500, D), positions=torch.arange(500).expand(2, 500))
        scores = ROUTERS.build("learned", D, H).double()(equal)
        tau = torch.quantile(scores.flatten(0, 1), 1 - usage, dim=0)
        assert (scores > tau).float().mean((0, 1)).tolist() == pytest.approx([usage] * H, abs=0.01)

    def test_the_error_form_sees_the_error(self, inputs):
        router = ROUTERS.build({"name": "learned", "form": "error", "hidden": 3}, D, H).double()
        assert router.mlp[0].in_features == D + 2 * H
        before = router(inputs)
        inputs.prediction = -inputs.prediction
        assert not torch.allclose(router(inputs), before)

    @pytest.mark.parametrize("form", ["x", "error"])
    def test_the_task_trains_it_through_the_stored_values(self, form):
        mixer = make_ham(router={"name": "learned", "form": form}, kv_usage=0.5).train()
        mixer(torch.randn(2, 20, 12))
        mixer.threshold.close_step()
        mixer(torch.randn(2, 20, 12)).hidden.square().sum().backward()
        assert all(weight.grad.abs().max() > 0 for weight in mixer.router.parameters())

    def test_its_gate_does_not_show_in_the_output(self):
        mixer, x = make_ham(router="learned", threshold="learned"), torch.randn(2, 20, 12)
        mixer(x)
        trained = mixer.train()(x)
        mixer.threshold.close_step()
        plain = mixer.eval()(x)
        assert 0 < plain.routing.stored.float().mean() < 1
        assert torch.equal(trained.hidden, plain.hidden)

    def test_an_unknown_form(self):
        with pytest.raises(SpecError, match="unknown form 'y' for router 'learned'; known: x, error"):
            score("learned", None, form="y")


class TestDemand:
    def test_it_starts_as_the_log_of_the_residual(self, inputs):
        golden = (score("residual", inputs) + 0.01).log()
        assert_close(score("demand", inputs), golden, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("bounds", [None, [0, 4, 4, 5, 6]])
    def test_the_mass_that_later_tokens_give_a_key(self, inputs, bounds):
        if bounds:
            inputs = RouterInputs(**{name: x[:1] if name in ("q", "k") else x for name, x in vars(inputs).items()})
            inputs.layout = Layout.of(torch.tensor(bounds), inputs.q)
        q, k = inputs.q.numpy(), inputs.k.numpy()
        golden = np.zeros((len(q), T, H))
        for start, stop in zip(bounds[:-1], bounds[1:], strict=True) if bounds else [(0, T)]:
            for b, t, h in np.ndindex(len(q), T, H):
                if start <= t < stop:
                    weights = np.exp(k[b, start : t + 1, h] @ q[b, t, h])
                    golden[b, start:t, h] += (weights / weights.sum())[:-1]  # a token's own query is not later
        assert_close(attention_mass(inputs), torch.from_numpy(golden).float(), rtol=0, atol=1e-6)

    def test_the_loss_trains_the_forecast_alone(self):
        mixer = make_ham(router="demand").train()
        mixer(torch.randn(2, 20, 12)).aux_loss.backward()
        assert {name for name, weight in mixer.named_parameters() if weight.grad is not None} == {
            "router.forecast.weight"
        }

    def test_the_forecast_is_fitted_to_what_is_asked_for(self, inputs):
        """Least squares: at the z-scored log mass itself the loss is 0, and its gradient there, too."""
        router = ROUTERS.build("demand", D, H)
        log_mass = (attention_mass(inputs) + 1e-3).log()
        asked = (log_mass - log_mass.mean((0, 1))) / log_mass.std((0, 1), correction=0)
        inputs.x = torch.cat([asked, inputs.x[..., : D - H].to(asked)], -1)
        with torch.no_grad():
            router.forecast.weight.copy_(torch.eye(H, D))
        loss = router.loss(inputs, None)
        loss.backward()
        assert loss.item() == pytest.approx(0, abs=1e-8)
        assert_close(router.forecast.weight.grad, torch.zeros(H, D), rtol=0, atol=1e-4)
        torch.nn.init.zeros_(router.forecast.weight)
        assert router.loss(inputs, None).item() == pytest.approx(1, abs=1e-4)  # the variance of z-scores


class TestControls:
    def test_random_draws_are_uniform_and_differ_by_place(self):
        positions = torch.arange(5000)[None]

        def draw(layer=0, seed=0):
            place = dict.fromkeys(RouterInputs.__dataclass_fields__) | {"positions": positions, "layer": layer}
            return score("random", RouterInputs(**place), seed=seed)

        scores = draw()
        assert scores.dtype == torch.float32
        assert torch.equal(scores, draw())
        shares = torch.histogram(scores.flatten(), torch.linspace(0, 1, 11))[0] / scores.numel()
        assert_close(shares, torch.full((10,), 0.1), rtol=0, atol=0.02)
        everything = torch.cat([scores, draw(layer=1), draw(seed=1), draw(layer=2)], -1)[0]
        correlation = torch.corrcoef(everything.T) - torch.eye(8)
        assert correlation.abs().max() < 0.06
        later = torch.stack([everything[:-1, 0], everything[1:, 0]])
        assert torch.corrcoef(later)[0, 1].abs() < 0.06

    @pytest.mark.parametrize(
        ("usage", "shares"),
        [(0.25, [[0, 0], [1, 0]]), (0.125, [[0, 0], [0.5, 0]]), (0.5, [[0, 0], [1, 1]]), (0.875, [[1, 0.5], [1, 1]])],
    )
    def test_static_fills_whole_heads_the_last_layer_first(self, usage, shares):
        spec = {"name": "ham", "num_heads": 2, "head_dim": 4, "router": "static", "kv_usage": usage}
        decoder = Decoder(7, dim=8, depth=2, mixer=spec)
        text = torch.randint(7, (2, 600))
        decoder(text)
        decoder.blocks[0].mixer.threshold.close_step()
        stored = [routing.stored.float().mean((0, 1)).tolist() for routing in decoder.eval()(text).routing]
        assert stored == [pytest.approx(share, abs=0.02) for share in shares]

    def test_static_can_begin_with_the_first_layer(self):
        router = {"name": "static", "begin": "first"}
        decoder = Decoder(
            7, dim=8, depth=2, mixer={"name": "ham", "num_heads": 2, "head_dim": 4, "router": router, "kv_usage": 0.375}
        )
        text = torch.randint(7, (2, 600))
        decoder(text)
        decoder.blocks[0].mixer.threshold.close_step()
        stored = [routing.stored.float().mean((0, 1)).tolist() for routing in decoder.eval()(text).routing]
        assert stored == [pytest.approx(share, abs=0.02) for share in [[1, 0.5], [0, 0]]]

    def test_recency_sees_the_last_tokens(self):
        mixer = make_ham(router={"name": "recency", "length": 40}, kv_usage=0.1, combine="sum").double()
        x = torch.randn(2, 15, 12, dtype=torch.float64)
        out = mixer(x)
        assert out.routing.window == 4
        m = mixer.memory(x, None, None, Layout.of(None, x))
        q = (m.q * mixer.log_scale.exp()[:, None]).transpose(1, 2)
        behind = torch.arange(15)[:, None] - torch.arange(15)
        mask = (behind >= 0) & (behind < 4)
        a = scaled_dot_product_attention(q, m.k.transpose(1, 2), m.v.transpose(1, 2), mask, scale=1.0).transpose(1, 2)
        golden = (mixer.norm(m.read) + a).flatten(2) * torch.nn.functional.silu(mixer.gate(x))
        assert_close(out.hidden, mixer.out(golden), rtol=0, atol=1e-12)
        assert_close(out.routing.usage, torch.full((2,), 4 / 15))

    def test_a_window_of_recency_holds_at_any_usage_but_0(self):
        router = ROUTERS.build({"name": "recency", "window": 7}, D, H)
        assert [router.window(usage) for usage in (0.0, 0.1, 1.0)] == [0, 7, 7]

    @pytest.mark.parametrize("options", [{"window": -1}, {"length": 0}])
    def test_recency_refuses(self, options):
        with pytest.raises(SpecError, match="router 'recency' needs window >= 0 and length >= 1"):
            score("recency", None, **options)


class TestInputs:
    def test_routers_learn_through_x_alone(self):
        seen = []

        class Spy(Router):
            def forward(self, inputs):
                seen.append(inputs)
                return inputs.g

        mixer = make_ham().train()
        mixer.router = Spy(12, 2)
        mixer(torch.randn(2, 9, 12, requires_grad=True))
        inputs = vars(seen[0]) | {"gram": seen[0].gram, "output_norm": seen[0].output_norm}
        assert [name for name, x in inputs.items() if isinstance(x, torch.Tensor) and x.requires_grad] == ["x"]

    def test_positions_are_those_in_the_sequence(self):
        seen = []

        class Spy(Router):
            def forward(self, inputs):
                seen.append(inputs.positions.tolist())
                return inputs.g

        mixer = make_ham()
        mixer.router = Spy(12, 2)
        x = torch.randn(2, 5, 12)
        mixer(x)  # a router's first tokens are scored more than once
        seen.clear()
        state = mixer(x, mixer.init_state(2)).state
        mixer(x, state)
        state = mixer(x[:1], state, cu_seqlens=torch.tensor([0, 2, 5])).state
        mixer(x, state, padding_mask=torch.tensor([[0, 1, 0, 0, 1], [1, 0, 0, 0, 0]]).bool())
        assert seen == [[[0, 1, 2, 3, 4]] * 2, [[5, 6, 7, 8, 9]] * 2, [[5, 6, 5, 6, 7]], [[7, 8, 8]]]

    @pytest.mark.parametrize("name", sorted(set(list_routers()) - {"learned"}))
    def test_scores_that_are_not_learned_from_the_task_have_no_part_in_its_gradient(self, name):
        mixer = make_ham(router=name).train()
        mixer(torch.randn(2, 9, 12)).hidden.sum().backward()
        assert all(weight.grad is None for weight in mixer.router.parameters())


MINE = """
import torch

from mixers import Router


class MyRouter(Router):
    def forward(self, inputs):
        return 1 - torch.cosine_similarity(inputs.prediction, inputs.v, dim=-1)
"""


class TestRoutersOfUsers:
    @pytest.fixture(autouse=True)
    def forget_registrations(self, monkeypatch):
        monkeypatch.setattr(ROUTERS, "_registered", dict(ROUTERS._registered))

    def same_as_cosine(self, router):
        x = torch.randn(2, 9, 12)
        mine, cosine = make_ham(router=router)(x), make_ham(router="cosine")(x)
        assert type(mine) is type(cosine)
        assert_close(mine.routing.scores, cosine.routing.scores, rtol=0, atol=1e-5)
        assert torch.equal(mine.routing.stored, cosine.routing.stored)
        assert_close(mine.hidden, cosine.hidden, rtol=0, atol=1e-5)

    def test_by_the_name_it_was_registered_with(self):
        @register_router("cosine_again")
        class Mine(Router):
            def forward(self, inputs):
                return 1 - torch.cosine_similarity(inputs.prediction, inputs.v, dim=-1)

        assert "cosine_again" in list_routers()
        self.same_as_cosine("cosine_again")

    @pytest.mark.parametrize("path", ["{}.routers.MyRouter", "{}.routers:MyRouter"])
    def test_by_the_path_of_its_class(self, tmp_path, monkeypatch, path):
        package = tmp_path / "a_users_package"
        package.mkdir()
        (package / "routers.py").write_text(MINE)
        monkeypatch.syspath_prepend(tmp_path)
        self.same_as_cosine(path.format(package.name))

    def test_its_options_come_from_the_spec(self):
        @register_router("scaled")
        class Scaled(Router):
            def __init__(self, dim, num_heads, *, factor=1.0):
                super().__init__(dim, num_heads)
                self.factor = factor

            def forward(self, inputs):
                return self.factor * inputs.beta

        x = torch.randn(2, 9, 12)
        one, three = (make_ham(router={"name": "scaled", "factor": f})(x).routing.scores for f in (1.0, 3.0))
        assert_close(three, 3 * one)
        with pytest.raises(SpecError, match="unknown option 'facto' for router 'scaled'.* Did you mean 'factor'?"):
            make_ham(router={"name": "scaled", "facto": 2.0})


@pytest.mark.parametrize("predict", ["statistics", "none"])
def test_a_router_that_asked_for_no_write_is_told_so(predict):
    class Blind(Router):
        def forward(self, inputs):
            return inputs.output_norm

    Blind.predict = predict
    mixer = build_mixer("ham", dim=8, num_heads=2, head_dim=4)
    mixer.router = Blind(8, 2)
    with pytest.raises(SpecError, match="needs predict = 'writes'"):
        mixer(torch.randn(1, 4, 8))
