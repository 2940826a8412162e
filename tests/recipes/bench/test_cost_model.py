"""The cost model against other counts: pairs one by one, products by torch's counter, bytes of real tensors."""

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from kernels.delta_rule import triton_backward, triton_chunks, triton_forward
from kernels.output_norm import torch_gram
from kernels.sequences import Layout
from recipes.bench import cost_model
from recipes.bench.cost_model import LAUNCHES, MACHINES, Cost, Machine


@given(st.integers(1, 40), st.integers(0, 50), st.sampled_from([0.0, 0.25, 1.0]))
def test_pairs_are_those_of_the_mask(T, window, usage):
    i, j = torch.arange(T)[:, None], torch.arange(T)
    causal, near = i >= j, i - j < window
    expected = (causal & near).sum() + usage * (causal & ~near).sum()
    assert cost_model.pairs(T, usage, window) == pytest.approx(expected.item())


def test_products_of_the_delta_rule_are_those_of_a_chunk_written_out():
    C, K, V = 16, 24, 40
    q, k, v, state = torch.randn(C, K), torch.randn(C, K), torch.randn(C, V), torch.randn(K, V)
    with FlopCounterMode(display=False) as counter:
        solved = (torch.eye(C) + (k @ k.T).tril(-1)) @ (v - k @ state)  # as many products as by the inverse
        _ = q @ state + (q @ k.T).tril() @ solved, state + k.T @ solved
    assert cost_model.delta_rule(1, C, 1, K, V, chunk=C).flops == counter.get_total_flops()


def test_products_of_attention_are_those_of_attention_written_out():
    T, K = 64, 16
    q, k, v = (torch.randn(T, K, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        out = (q @ k.T).softmax(-1) @ v
        forward = counter.get_total_flops()
        out.sum().backward()
    whole = T * T / cost_model.pairs(T)  # all pairs here, those that are seen in the model
    recomputed = forward / 2
    assert cost_model.attention(1, T, 1, K, K).flops * whole == pytest.approx(forward)
    train = cost_model.attention(1, T, 1, K, K, train=True).flops * whole
    assert train == pytest.approx(counter.get_total_flops() + recomputed)


def test_routed_attention_makes_seven_products_backward():
    """Its two kernels written out: dQ; dK and dV. Each has the logits and the gradient of the weights for itself."""
    T, K, V = 64, 16, 24
    (q, k), (v, d_out) = (torch.randn(2, T, size) for size in (K, V))
    with FlopCounterMode(display=False) as counter:
        _ = (q @ k.T).softmax(-1) @ v
        p, d_p = q @ k.T, d_out @ v.T
        _ = (p * d_p) @ k
        p, d_p = q @ k.T, d_out @ v.T
        _ = p.T @ d_out, (p * d_p).T @ q
    seen = cost_model.pairs(T) / T**2  # all pairs here
    apart = cost_model.attention(1, T, 1, K, V, train=True, apart=True)
    assert apart.flops == pytest.approx(counter.get_total_flops() * seen)
    o = torch.empty_like(v)
    launches = [(q, k, v, o), (o, d_out), (q, k, v, d_out), (q,), (q, k, v, d_out), (k, v)]
    size = q.element_size()
    moved = sum(x.nbytes for launch in launches for x in launch)
    assert cost_model.attention(1, T, 1, K, V, train=True, apart=True, size=size).bytes == moved


def test_bytes_of_attention_are_inputs_and_outputs_once():
    B, T, H, K, V = 2, 64, 3, 16, 32
    q, k, v, o = (torch.empty(B, T, H, n, dtype=torch.bfloat16) for n in (K, K, V, V))
    assert cost_model.attention(B, T, H, K, V).bytes == sum(x.nbytes for x in (q, k, v, o))
    assert cost_model.attention(B, T, H, K, V, kv_usage=0.0).bytes == q.nbytes + o.nbytes


class Launch:
    """Stands in for a Triton kernel: notes the bytes of the tensors that it is launched with, and runs nothing."""

    def __init__(self, kernel, moved, most, chunks):
        self.names, self.name = list(inspect.signature(kernel.fn).parameters), kernel.fn.__name__
        self.moved, self.share = moved, {most: chunks / most}  # tables have room for more chunks than there are

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, PREDICT=0, **options):
        unread = {"read": [{"v", "p"}, {"v"}, ()][PREDICT], "scan": {"g"}}
        for name, x in zip(self.names, args, strict=False):
            if isinstance(x, torch.Tensor) and x.is_floating_point() and name not in {"dp", *unread.get(self.name, ())}:
                twice = (self.name, name) in {("scan", "u"), ("scan_back", "w")}  # completed in place
                self.moved.append((self.name, name, x.nbytes * (1 + twice) * self.share.get(len(x), 1)))


@pytest.mark.parametrize("predict", ["none", "writes", "statistics", "values"])
def test_bytes_of_the_delta_rule_are_those_of_its_launches(predict, monkeypatch):
    B, T, H, K, V, C = 2, 64, 3, 24, 32, 32
    moved: list[tuple[str, str, float]] = []
    names = LAUNCHES["forward"].keys() | LAUNCHES["backward"].keys()
    for module in (triton_forward, triton_backward):
        for name in names & vars(module).keys():
            monkeypatch.setattr(module, name, Launch(getattr(module, name), moved, B * (T // C + 1), B * T // C))
    q, k, v = (torch.randn(B, T, H, n, requires_grad=True) for n in (K, K, V))
    g, beta = torch.randn(B, T, H), torch.randn(B, T, H)
    options = dict(scale=1.0, initial_state=None, layout=Layout.of(None, v), delta=True, predict=predict)
    o = triton_chunks.gated_delta_rule(q, k, v, g, beta, **options)[0]
    sizes, options = (B, T, H, K, V), dict(predict=predict, size=4, chunk=C)
    assert sum(x[-1] for x in moved) == pytest.approx(cost_model.delta_rule(*sizes, **options).bytes), moved
    o.sum().backward()
    assert {x[0] for x in moved} == names
    assert sum(x[-1] for x in moved) == pytest.approx(cost_model.delta_rule(*sizes, **options, train=True).bytes), moved


def test_the_score_adds_a_tenth_of_the_memorys_bytes_at_most():
    """It reads what the delta rule has written anyway; in training it costs no more, as it has no gradient."""
    B, T, H, V = 4, 8192, 16, 128
    score = cost_model.output_norm(B, T, H, V)
    rule, train = (cost_model.delta_rule(B, T, H, V, V, train=train) for train in (False, True))
    assert score.bytes < 0.1 * rule.bytes and score.bytes < 0.03 * train.bytes
    u, gram = torch.empty(4, 32, 2, 16, dtype=torch.bfloat16), torch.empty(2, 16, 16)
    weight, n = torch.empty(32, 2, 16), torch.empty(4, 32, 2)
    assert cost_model.output_norm(4, 32, 2, 16).bytes == sum(x.nbytes for x in (u, n, weight, gram, gram))
    with FlopCounterMode(display=False) as counter:
        torch_gram.output_norm(u, weight)
    assert cost_model.output_norm(4, 32, 2, 16).flops == counter.get_total_flops()
    table = cost_model.kernels(B, T, H, V, V, [0.25], 2)
    assert table["forward: score of the residual"] == [score] and score in table["train: HAM 0.25"]


def test_the_floor_is_the_slower_of_computing_and_moving():
    machine = Machine(tflops=1.0, terabytes=1.0)
    assert Cost(2e12, 1e12).floor(machine) == 2 and Cost(2e12, 1e12).bound(machine) == "compute"
    assert Cost(1e12, 3e12).floor(machine) == 3 and Cost(1e12, 3e12).bound(machine) == "memory"


@pytest.mark.parametrize("phase", ["forward", "train", "decode"])
def test_ham_costs_its_usage_of_attention_at_great_length(phase):
    h200 = MACHINES["h200"]
    table = cost_model.kernels(1, 2**20, 8, 128, 128, [0.25], 2)
    share = cost_model.floor(table[f"{phase}: HAM 0.25"], h200) / cost_model.floor(
        table[f"{phase}: attention, all keys"], h200
    )
    expected = 0.25 * (9 / 7 if phase == "train" else 1)  # products of ours, and of attention's five backward
    assert expected < share < 1.016 * expected


def test_the_command_prints_every_kernel(run):
    answer = run("cost --lengths [4096] --gpus [h200,a100] --kv_usages [0.25]")
    assert answer.code == 0
    assert answer.out.count("train: HAM 0.25") == 2 and "**a100**" in answer.out


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("--gpus [h20]", ["unknown gpu 'h20'", "h200"]),
        ("--lengths [0]", ["lengths", "at least 1"]),
        ("--kv_usages [2]", ["kv_usages", "2"]),
    ],
)
def test_mistakes(run, flags, parts):
    answer = run(f"cost {flags}")
    assert answer.code == 2
    assert [part for part in parts if part not in answer.err.strip().splitlines()[-1]] == []
