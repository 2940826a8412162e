"""What a retrofit learns, each part against its definition on a small host."""

import copy

import pytest
import torch

from mixers import calibrate, set_kv_usage
from mixers.registry import SpecError
from mixers.retrofit import attach, parts_of
from mixers.retrofit.distillation import Distillation
from mixers.retrofit.forecast import Forecast, fit
from mixers.retrofit.memory_fit import MemoryFit, ReadOut
from mixers.retrofit.sensitivity import Sensitivity
from mixers.retrofit.watch import watched
from mixers.retrofit.worth import worth
from mixers.routers.demand import Demand
from tests.mixers.retrofit.hosts import VOCABULARY, host


def retrofitted(**options):
    model = host("llama")
    attach(model, window=4, sinks=2, **options)
    return model


def some_ids(count=3, length=48, seed=0):
    return torch.randint(1, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def identity(name):
    return torch.eye(8).repeat(4, 1, 1)


def test_worth_is_the_second_order_error_of_leaving_a_token_out():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 12, 4, 8), torch.randn(1, 12, 2, 8), torch.randn(1, 12, 2, 8)
    root = torch.randn(4, 8, 8)
    metric = root @ root.mT
    found = worth(q, k, v, metric, scale=0.3, window=3)
    d = torch.zeros(12, 2)
    for h in range(4):
        for i in range(12):
            a = ((q[0, i, h] * 0.3) @ k[0, : i + 1, h // 2].T).softmax(-1)
            o = a @ v[0, : i + 1, h // 2]
            for j in range(i - 3 + 1):
                change = a[j] * (o - v[0, j, h // 2])
                d[j, h // 2] += change @ metric[h] @ change
    torch.testing.assert_close(found[0, :9].exp().square(), d[:9], rtol=1e-4, atol=1e-6)
    assert (found[0, 9:] < found[0, :9].min()).all()  # nobody beyond the window asks for the last ones


def test_the_change_that_worth_is_of_is_that_of_removing_a_key():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 200, 1, 8, dtype=torch.float64) * 0.3 for _ in range(3))

    def read(without=None):
        logits = q[0, -1, 0] @ k[0, :, 0].T
        if without is not None:
            logits[without] = -torch.inf
        return logits.softmax(-1) @ v[0, :, 0]

    a = (q[0, -1, 0] @ k[0, :, 0].T).softmax(-1)
    first_order = a[7] * (read() - v[0, 7, 0])
    torch.testing.assert_close(read(7) - read(), first_order, rtol=0.02, atol=0)


def test_sensitivity_is_the_mean_outer_product_of_the_loss_gradient():
    model = retrofitted()
    fisher = Sensitivity(model)
    for row in some_ids():
        fisher.read(row[None])
    for name, part in parts_of(model).items():
        total = fisher.sums[name]
        assert torch.equal(total, total.T) and torch.linalg.eigvalsh(total.double()).min() > -1e-6
        metric = fisher.metric(name)
        assert metric.shape == (4, 8, 8) and torch.linalg.eigvalsh(metric).min() > 0
        assert part.host[0].q_proj.weight.grad is None and part.host[0].q_proj.weight.requires_grad
    # by hand, of one layer and one sequence: what is drawn there is drawn again
    row, name = some_ids(1, seed=5), "model.layers.1.self_attn"
    again = Sensitivity(model)
    again.read(row)
    kept = []
    hook = model.get_submodule(name).register_forward_hook(lambda m, a, out: kept.append(out[0]))
    with watched(parts_of(model), lambda *_: None):
        logits = model(row, use_cache=False).logits[0]
    hook.remove()
    target = logits.softmax(-1).multinomial(1, generator=torch.Generator().manual_seed(0))[:, 0]
    (g,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, target, reduction="sum"), kept)
    g = g[0, 2:]
    torch.testing.assert_close(again.sums[name], g.T @ g, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("hidden", [0, 8])
def test_a_forecast_finds_what_is_linear_in_its_input(hidden):
    torch.manual_seed(0)
    router = Demand(16, 2, error=False, hidden=hidden)
    x = torch.randn(4000, 16) * torch.logspace(-2, 2, 16) + 3
    y = (x / torch.logspace(-2, 2, 16)) @ torch.randn(16, 2) + 1
    assert fit(router, x, y) > 0.99
    with torch.no_grad():
        assert (router.foresee(x) - y).abs().mean() < 0.2


def test_a_forecast_tells_what_is_worth_storing():
    model = retrofitted()
    forecast = Forecast(model, identity, reads=6)
    for row in some_ids(6):
        forecast.read(row[None])
    assert forecast.count == 6
    explained = forecast.solve()
    assert all(0 < share <= 1 for share in explained.values())  # on its own examples least squares cannot do worse
    assert all(part.router.forecast.weight.abs().sum() > 0 for part in parts_of(model).values())


def fitted(model, ids):
    read_out = ReadOut(model)
    for row in ids:
        read_out.read(row[None])
    read_out.solve()
    memory = MemoryFit(model, identity, steps=len(ids))
    for row in ids:
        memory.read(row[None])
    return read_out, memory


def test_memories_learn_and_leave_the_host_and_usage_1_alone():
    model = retrofitted()
    before = host("llama")
    ids = some_ids(6)
    set_kv_usage(model, 0.4)
    calibrate(model, [ids], run=lambda x: model(x, use_cache=False))
    _, memory = fitted(model, ids)
    assert set(memory.errors) == set(parts_of(model)) and memory.count == 6
    for name, weight in before.named_parameters():
        assert torch.equal(weight, model.get_parameter(name)), name
    assert all(part.memory.out_map.abs().sum() > 0 for part in parts_of(model).values())
    set_kv_usage(model, 1.0)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, before(ids).logits, rtol=1e-4, atol=1e-5)


def test_the_read_out_takes_error_off_what_it_was_fitted_to():
    model = retrofitted()
    ids = some_ids(4)
    set_kv_usage(model, 0.3)
    calibrate(model, [ids], run=lambda x: model(x, use_cache=False))
    read_out = ReadOut(model, usages=[0.3])
    for row in ids:
        read_out.read(row[None])
    read_out.solve()
    gaps = {name: [0.0, 0.0] for name in parts_of(model)}
    fit_of = ReadOut.learn

    class Measure(ReadOut):
        def __init__(self, model):
            maps = {n: p.memory.out_map.clone() for n, p in parts_of(model).items()}
            super().__init__(model, usages=[0.3])
            for name, part in self.parts.items():
                part.memory.out_map.data.copy_(maps[name])

        def learn(self, name, part, gap, remember):
            weight = 1 / gap.square().mean()
            gaps[name][0] += float(gap.square().sum() * weight)
            gaps[name][1] += float((gap - remember()).square().sum() * weight)

    assert Measure.learn is not fit_of
    measure = Measure(model)
    for row in ids:
        measure.read(row[None])
    assert all(after < before for before, after in gaps.values())


STAGES = {
    "sensitivity": Sensitivity,
    "forecast": lambda model: Forecast(model, identity, reads=4),
    "read-out": ReadOut,
    "memory": lambda model: MemoryFit(model, identity, steps=4),
    "distill": lambda model: Distillation(model, steps=4),
}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_goes_on_from_what_it_kept(stage):
    """Half, its state, and the rest in a new one is the same as all at once."""
    ids = some_ids(4)

    def ready():
        model = retrofitted()
        set_kv_usage(model, 0.4)
        calibrate(model, [ids], run=lambda x: model(x, use_cache=False))
        return STAGES[stage](model)

    whole, first, second = ready(), ready(), ready()
    for row in ids:
        whole.read(row[None])
    for row in ids[:2]:
        first.read(row[None])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for row in ids[2:]:
        second.read(row[None])
    a, b = tensors(whole.state_dict()), tensors(second.state_dict())
    assert a and whole.count == 4
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def tensors(state):
    if isinstance(state, dict):
        return [x for value in state.values() for x in tensors(value)]
    if isinstance(state, list | tuple):
        return [x for value in state for x in tensors(value)]
    return [torch.as_tensor(state, dtype=torch.float64)] if isinstance(state, torch.Tensor | int | float) else []


def test_distillation_moves_the_memories_alone_and_puts_usage_and_gradients_back():
    model = retrofitted()
    ids = some_ids(3)
    set_kv_usage(model, 0.5)
    calibrate(model, [ids], run=lambda x: model(x, use_cache=False))
    before = {name: p.clone() for name, p in model.named_parameters()}
    distillation = Distillation(model, steps=3, usages=[0.25])
    for row in ids:
        distillation.read(row[None])
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(".ham.memory." in name for name in moved)
    assert all(p.requires_grad for p in model.parameters())
    assert {part.threshold.kv_usage for part in parts_of(model).values()} == {0.5}
    assert list(distillation.errors) == ["0.25"]


def test_there_is_nothing_to_distil_without_memories():
    with pytest.raises(SpecError, match="no memories"):
        Distillation(retrofitted(memory=False), steps=1)


def test_a_host_whose_output_projection_is_unknown_is_refused_by_its_name():
    model = retrofitted()
    attention = model.model.layers[1].self_attn
    attention.somewhere = attention.o_proj
    del attention.o_proj
    with pytest.raises(SpecError, match=r"model.layers.1.self_attn has no output projection that is known"):
        Sensitivity(model)
