"""What a token costs, and what a GPU can do, as a run logs it."""

import pytest
import torch

from kernels.operations import attention_flops, delta_rule_flops
from lit_modules import flops
from lit_modules.data.stream import FixedBatches
from lit_modules.flops import available_flops, flops_per_token, kernel_flops, matrix_weights
from mixers.base import Mixer
from mixers.registry import MIXERS


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 5),  # none of ours: Lightning's
    ],
)
def test_a_gpu_goes_by_its_dense_rate(monkeypatch, name, teraflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(flops, "get_available_flops", lambda device, kind: int(5e12))
    for precision in ("bf16-mixed", "bf16-true", "16-mixed"):
        assert available_flops(torch.device("cuda"), precision) == teraflops * 1e12
    assert available_flops(torch.device("cuda"), "32-true") == 5e12
    assert available_flops(torch.device("cuda"), "64-true") is None
    assert available_flops(torch.device("cpu"), "bf16-mixed") is None


def test_kernels_are_added_to_the_matrices(make_model):
    model = make_model(mixer=["attention", {"name": "ham", "kv_usage": 0.5, "num_heads": 2, "head_dim": 8}])
    attention, ham = (block.mixer for block in model.decoder.blocks)
    K = attention.head_dim
    assert kernel_flops(attention, 40) * 40 == attention.num_heads * attention_flops(40, K, K)
    expected = 2 * (delta_rule_flops(40, 8, 8) + attention_flops(40, 8, 8, kv_usage=0.5))
    assert kernel_flops(ham, 40) * 40 == pytest.approx(expected)
    kernels = kernel_flops(attention, 40) + kernel_flops(ham, 40)
    assert flops_per_token(model, 40) == pytest.approx(6 * matrix_weights(model) + 3 * kernels)


def test_every_mixer_of_ours_is_known_and_of_others_the_matrices_are(make_model):
    for name in set(MIXERS.names()) - {"attention"}:
        mixer = make_model(mixer=name).decoder.blocks[0].mixer
        assert kernel_flops(mixer, 64) > 0, name
    model = make_model(mixer="gdn")
    model.other = Mixer()
    model.other.map = torch.nn.Linear(4, 4)
    assert kernel_flops(model.other, 64) is None
    assert flops_per_token(model, 64) == flops_per_token(model.decoder, 64) + 6 * 16


def test_a_run_logs_them_at_the_length_that_tokens_see(make_trainer, make_model):
    """Of documents packed into a row, of rows with padding, and of rows that a length warm-up cuts."""
    tokens = torch.randint(33, (1, 48))
    packed = {"tokens": tokens, "targets": tokens, "cu_seqlens": torch.tensor([0, 8, 48], dtype=torch.int32)}
    padded = {"tokens": tokens.view(2, 24), "targets": tokens.view(2, 24)}
    padded["padding_mask"] = torch.arange(24) < torch.tensor([[24], [6]])
    whole = {"tokens": tokens, "targets": tokens}
    for batch, length, options in (
        (packed, (8**2 + 40**2) / 48, {}),
        (padded, (24**2 + 6**2) / 30, {}),
        (whole, 48, {}),
        (whole, 3, {"length_warmup": 9}),
    ):
        model, trainer = make_model(**options), make_trainer(max_steps=1, log_every_n_steps=1, limit_val_batches=0)
        trainer.fit(model, FixedBatches([batch]))
        logged = {name: trainer.callback_metrics[f"trainer/{name}"] for name in ("teraflops", "tokens_per_second")}
        found = logged["teraflops"].item() * 1e12 / logged["tokens_per_second"].item()
        assert found == pytest.approx(flops_per_token(model, length), rel=1e-4), length
