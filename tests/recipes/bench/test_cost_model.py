"""The cost model against other counts: pairs one by one, products by torch's counter, bytes of real tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from recipes.bench import cost_model
from recipes.bench.cost_model import MACHINES, Cost, Machine


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


def test_bytes_are_inputs_and_outputs_once():
    B, T, H, K, V = 2, 64, 3, 16, 32
    q, k, v, o = (torch.empty(B, T, H, n, dtype=torch.bfloat16) for n in (K, K, V, V))
    g, beta, state = torch.empty(B, T, H), torch.empty(B, T, H), torch.empty(B, H, K, V)
    prediction = torch.empty(B, T, H, V)
    io = sum(x.nbytes for x in (q, k, v, o, g, beta)) + 2 * state.nbytes
    assert cost_model.delta_rule(B, T, H, K, V).bytes == io
    assert cost_model.delta_rule(B, T, H, K, V, predict="values").bytes == io + prediction.nbytes
    assert cost_model.attention(B, T, H, K, V).bytes == sum(x.nbytes for x in (q, k, v, o))
    assert cost_model.attention(B, T, H, K, V, kv_usage=0.0).bytes == q.nbytes + o.nbytes


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
    assert 0.25 < share < 0.252


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
