"""The plan of a model against torch's counters on a whole one: parameters, operations, tensors kept for backward."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_modules.flops import flops_per_token
from mixers import Decoder, SpecError
from recipes.bench import cost_model
from recipes.bench.model_cost import as_on_a_gpu, counted, held_in_decoding, model_cost

HEADS = {"num_heads": 2, "head_dim": 16}
SIZES = {"vocab_size": 96, "dim": 48, "depth": 3}
TOKENS = 192


def plan(mixer, **options):
    return model_cost(
        mixer=mixer, **SIZES, **{"seq_len": TOKENS, "batch_tokens": TOKENS, "precision": "32-true"} | options
    )


def counts(mixer, *, as_gpu=True, **options):
    """A decoder, and what torch counts in its forward pass without the head."""
    torch.manual_seed(0)
    decoder = Decoder(mixer=mixer, **SIZES, **options)
    tokens = torch.randint(96, (1, TOKENS))
    decoder(tokens[:, :8])  # routers are examined
    with counted(decoder) as saved:
        if as_gpu:
            with as_on_a_gpu(saved):
                decoder(tokens)
        else:
            decoder(tokens)
    return decoder, saved


MIXERS = {
    "attention": {"name": "attention", **HEADS},
    "gdn": {"name": "gated_delta_net", **HEADS},
    "ham": {"name": "ham", "kv_usage": 0.5, **HEADS},
    "cosine": {"name": "ham", "router": "cosine", "combine": "sum", **HEADS},
    "learned": {"name": "ham", "router": "learned", **HEADS},
    "hybrid": [{"name": "gated_delta_net", **HEADS}, {"name": "attention", **HEADS}],
}


@pytest.mark.parametrize("name", MIXERS)
def test_parameters_bytes_and_products_are_those_of_the_whole_model(name):
    cost = plan(MIXERS[name])
    decoder, saved = counts(MIXERS[name])
    assert cost.parameters == sum(p.numel() for p in decoder.parameters())
    tail = TOKENS * (2 * 48 + 1) * 4 + TOKENS * 8  # the last norm keeps its input and what it made of it; ids
    assert sum(saved.values()) == pytest.approx(cost.activations + tail, rel=0.02)
    products = saved.flops / TOKENS
    kernels = cost.forward - 2 * 96 * 48 - products
    assert kernels > 0 and products == pytest.approx(2 * _multiplied(decoder), rel=0.05)


def _multiplied(decoder):
    return sum(p.numel() for name, p in decoder.named_parameters() if p.ndim == 2 and "conv" not in name) - 96 * 48


def test_attention_is_as_torch_keeps_and_counts_it_on_a_cpu():
    cost = plan(MIXERS["attention"])
    _, saved = counts(MIXERS["attention"], as_gpu=False)
    assert sum(saved.values()) == pytest.approx(cost.activations, rel=0.1)
    with sdpa_kernel(SDPBackend.MATH):  # products that torch counts
        _, saved = counts(MIXERS["attention"], as_gpu=False)
    every = 3 * 4 * 2 * 16 * TOKENS**2 - 3 * cost_model.attention(1, TOKENS, 2, 16, 16).flops  # pairs that are masked
    assert saved.flops == pytest.approx((cost.forward - 2 * 96 * 48) * TOKENS + every, rel=0.02)


def test_the_delta_rule_multiplies_about_as_much_on_a_cpu():
    _, gpu = counts(MIXERS["gdn"])
    _, saved = counts(MIXERS["gdn"], as_gpu=False)
    known = 3 * cost_model.delta_rule(1, TOKENS, 2, 16, 16, chunk=16).flops  # of which torch counts no substitution
    assert saved.flops - gpu.flops == pytest.approx(known, rel=0.2)


@pytest.mark.parametrize("mixer", ["attention", "gdn", "ham"])
def test_a_run_logs_the_operations_that_are_planned(mixer):
    """With the shapes of `ham_150m`, at which the score of a write goes by the Gram matrix of a head."""
    spec = {"name": mixer, "num_heads": 6, "head_dim": 128}
    sizes = {"vocab_size": 50_304, "dim": 768, "depth": 14, "mixer": spec}
    planned = model_cost(**sizes, seq_len=4096, batch_tokens=1, precision="32-true").forward
    with torch.device("meta"):
        assert flops_per_token(Decoder(**sizes), 4096) == pytest.approx(3 * planned, rel=0.02)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_recomputing_keeps_inputs_and_a_block(precision):
    cost = plan(MIXERS["ham"], precision=precision)
    number = 2 if precision == "bf16-true" else 4
    assert cost.recomputed == pytest.approx(TOKENS * 3 * 48 * number + cost.activations / 3)
    assert cost.activations <= plan(MIXERS["ham"]).activations


def test_what_is_shared_and_what_every_device_holds():
    one, ddp, fsdp = (plan(MIXERS["gdn"], devices=4, strategy=name) for name in ("single", "ddp", "fsdp2"))
    assert one.optimizer == ddp.optimizer == 4 * fsdp.optimizer == 8 * one.parameters
    assert ddp.gradients == 2 * one.gradients == 8 * fsdp.gradients
    assert one.activations == ddp.activations == fsdp.activations
    assert fsdp.weights - fsdp.parameters > 0 and one.weights == 4 * one.parameters


@pytest.mark.parametrize(("name", "usage"), [("attention", 1.0), ("ham", 0.5), ("gdn", 0.0)])
def test_state_and_cache_are_those_that_decoding_holds(name, usage):
    mixer = Decoder(mixer=MIXERS[name], **SIZES).blocks[0].mixer
    state, cache = held_in_decoding(mixer, 100, 4)
    assert cache == usage * 100 * 2 * 2 * 16 * 4
    tensors = [x for key, x in vars(mixer.init_state(1)).items() if key in ("recurrent", "conv") and x is not None]
    assert state == sum(x.nbytes for x in tensors)


def test_mistakes_are_named(run):
    with pytest.raises(SpecError, match="unknown precision '16-true'"):
        plan(MIXERS["gdn"], precision="16-true")
    answer = run("cost --recipe ham_80m")
    assert "unknown recipe 'ham_80m'" in answer.error
    for words, message in (
        ("--recipe ham_150m --seq_len 0", "seq_len must be at least 1, got 0"),
        ("--recipe ham_150m --devices 8 --strategy single", "'single' is that of one device, got 8"),
        ("--recipe ham_150m --lengths [10]", "lengths [10] is of kernels"),
        ("--mixer gdn", "mixer gdn needs a --recipe"),
    ):
        assert message in run(f"cost {words}").error
    assert "unknown strategy 'dp'" in run("cost --recipe ham_150m --strategy dp --mixer gdn").error


def test_the_command_prints_the_plan(run):
    answer = run("cost --recipe ham_150m --mixer gdn,attention --devices 8 --strategy fsdp2")
    assert answer.code == 0, answer.err
    for part in ("M, of these", "optimizer (AdamW)", "with --activation_checkpointing", "keys and values", "GFLOP"):
        assert part in answer.out
