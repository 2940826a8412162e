"""Mixers in attention classes that people write themselves: direction, weights, and what their calls may ask."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import ViTConfig, ViTForImageClassification

from mixers import SpecError, swap_mixers
from tests.mixers.hosts import Attention, LitGPT, NanoGPT, Separate, Stack, plain

COS = torch.zeros(1, 7, 0)
OWN = {"timm's names": (Attention,), "nanogpt": (NanoGPT,), "litgpt": (LitGPT, COS, COS), "separate": (Separate,)}
every_own = pytest.mark.parametrize("own", OWN)


def made(own, dtype=torch.float64):
    torch.manual_seed(0)
    return Stack(*OWN[own]).to(dtype).eval()


def seen(model, x):
    """(T, T) bool: whether the output of a token changes with another token."""
    out, rows = model(x), []
    for t in range(x.shape[1]):
        other = x.clone()
        other[:, t] += 1
        rows.append((model(other) - out).abs().amax((0, 2)) > 1e-9)
    return torch.stack(rows, 1)


@every_own
@torch.no_grad()
def test_the_direction_is_asked_for_and_kept(own):
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    with pytest.raises(SpecError, match=r"later ones in \w+ \(blocks.0.attn\): say causal=True .* or causal=False"):
        swap_mixers(made(own), "ham", where="blocks.*.attn")
    assert torch.equal(seen(made(own), x), torch.ones(7, 7).tril().bool())
    for causal, reads in ((True, "reads forwards"), (False, "reads both ways")):
        model = made(own)
        report = swap_mixers(model, "ham", where="blocks.*.attn", causal=causal, kv_usage=1.0)
        assert reads in str(report)
        expected = torch.ones(7, 7).tril() if causal else torch.ones(7, 7)
        assert torch.equal(seen(model.double().eval(), x), expected.bool())


@every_own
@torch.no_grad()
def test_attention_with_the_carried_weights_is_the_same_function(own):
    """Any other order or orientation of rows would show."""
    model, x = made(own), torch.randn(2, 7, 16, dtype=torch.float64)
    theirs = copy.deepcopy(model)
    report = swap_mixers(model, {"name": "attention", "rope": False}, causal=True)
    assert len(report) == 2 and set(report[0].weights.values()) == {"carried"}
    assert report[0].biases == "carried: q, k, v, o"
    assert ("taken for q, k and v one after the other" in str(report)) == (own != "separate")
    assert_close(model(x), theirs(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("own", "part"), [("separate", "q_proj"), ("separate", "v_proj"), ("litgpt", "qkv"), ("nanogpt", "c_attn")]
)
def test_weights_that_hold_more_than_heads_are_not_misread(own, part):
    """A gate beside the queries, wider values, or one head that has a half."""
    model = made(own)
    for block in model.blocks:
        layer = getattr(block["attn"], part)
        setattr(block["attn"], part, nn.Linear(16, layer.out_features + 8))
    with pytest.raises(SpecError, match=r"no adapter knows \w+ \(blocks.0.attn: .*\); tell .*register_adapter"):
        swap_mixers(model, "gdn", where="*.attn", causal=True)


@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_masks_are_obeyed_or_refused(causal):
    model = Stack(Attention)
    swap_mixers(model, "gdn", causal=causal)
    model, x = model.double().eval(), torch.randn(2, 6, 16, dtype=torch.float64)
    tril, documents = torch.ones(6, 6).tril().bool(), torch.tensor([0, 0, 1, 1, 1, 1])
    real = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    padding = (tril if causal else tril | True) & real[:, None] & real[:, :, None]
    assert_close(model(x, attn_mask=padding)[1, :4], model(x[1:, :4])[0], rtol=1e-9, atol=1e-9)
    allowed = {"causal": tril, "packed": tril & (documents == documents[:, None])}
    for name, mask in allowed.items():
        for form in (mask, mask[None, None], torch.zeros(6, 6).masked_fill(~mask, -torch.inf)):
            if not causal:
                with pytest.raises(ValueError, match="reads both ways cannot obey this attention mask"):
                    model(x, attn_mask=form)
                continue
            parts = [x] if name == "causal" else [x[:, :2], x[:, 2:]]
            assert_close(model(x, attn_mask=form), torch.cat([model(p) for p in parts], 1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("own", "options", "message"),
    [
        ("litgpt", {"input_pos": torch.arange(7)}, "in place of LitGPT cannot honour the argument input_pos"),
        ("timm's names", {"attn_mask": torch.ones(2, 7) > 0}, r"a mask of Attention must be \(T, T\), .* got \(2, 7\)"),
        ("timm's names", {"attn_mask": torch.ones(7, 7).triu() > 0}, "reads forwards cannot obey this attention mask"),
        ("timm's names", {"attn_mask": torch.full((7, 7), -0.5)}, "cannot add the bias that is in this attention mask"),
        ("timm's names", {"window": 3}, "cannot honour the argument window=3"),
    ],
)
def test_what_a_call_asks_and_a_mixer_cannot_do(own, options, message):
    model = made(own)
    swap_mixers(model, "gdn", causal=True)
    with pytest.raises(ValueError, match=message):
        model(torch.randn(2, 7, 16, dtype=torch.float64), **options)


def test_a_direction_that_is_known_is_not_asked_for_nor_overruled():
    timm = Stack(type("Attention", (Attention,), {"__module__": "timm.layers.attention"}))
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2), 1, enable_nested_tensor=False)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    vit = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4))
    for model, reads, causal, message in (
        (timm, "both ways", True, r"Attention \(blocks.0.attn\) reads both ways by its class, but causal=True"),
        (
            plain("llama")[0],
            "forwards",
            False,
            r"LlamaAttention \(model.layers.0.self_attn\) reads forwards by its class",
        ),
        (vit, "both ways", True, r"ViTAttention \(.*\) reads both ways by its class"),
        (
            encoder,
            "forwards or both ways, as the mask of each call says",
            True,
            "is decided by its adapter, leave causal",
        ),
    ):
        with pytest.raises(SpecError, match=message):
            swap_mixers(model, "gdn", causal=causal)
        report = swap_mixers(model, "gdn")
        assert report[0].reads == reads and f"reads {reads}\n" in str(report)


@pytest.mark.slow
def test_the_former_name_of_the_folder_is_known():
    code = """
import mixers.hosts.wrappers
from mixers.adapters import ADAPTERS, AttentionInfo
from mixers.hosts import Host, register_host
from mixers.hosts.masks import beginnings

assert Host is AttentionInfo and mixers.hosts.wrappers.InDecoder.__module__ == "mixers.adapters.wrappers"
assert register_host(beginnings) is beginnings is ADAPTERS[0]
"""
    subprocess.run([sys.executable, "-c", code], check=True)
