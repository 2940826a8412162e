"""Models that people have, with their attention swapped, under a plain Lightning Trainer."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from lit_modules.callbacks import CalibrateThresholds
from lit_modules.data.classification import ClassificationData
from lit_modules.data.files import find_files, read_texts
from mixers import aux_loss, calibrate, kv_cache_bytes, set_kv_usage, swap_mixers
from mixers.hf import swapped

HAM = {"name": "ham", "kv_usage": 0.25}


class Plain(pl.LightningModule):
    """What a user writes around a model: nothing in it knows of mixers but the sum of their losses."""

    def __init__(self, model, loss, learning_rate=3e-3):
        super().__init__()
        self.model, self.loss, self.learning_rate = model, loss, learning_rate

    def forward(self, batch):
        return self.loss(self.model, *batch)

    def training_step(self, batch, index):
        return self(batch) + aux_loss(self.model)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.learning_rate)


def fit(model, loss, data, *, steps, batch_size):
    """Trained in place; the data are tensors of as many rows. The loss on all of them before and after."""
    torch.manual_seed(1)
    trainer = pl.Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[CalibrateThresholds()],
    )  # fmt: skip
    loader = DataLoader(TensorDataset(*data), batch_size=batch_size, shuffle=True)
    with torch.no_grad():
        before = loss(model.eval(), *data)
    trainer.fit(Plain(model.train(), loss), loader)
    with torch.no_grad():
        return before, loss(model.eval(), *data)


def untouched(model, loss, data):
    """Names of the parameters that a backward pass gives no gradient, or one that is not finite."""
    model.train().zero_grad()
    (loss(model, *data) + aux_loss(model)).backward()
    return [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]


@torch.no_grad()
def check_usage(model, data):
    """Of the data that it is calibrated on, a model stores the share that was asked for."""
    calibrate(model.eval(), [data], run=lambda batch: model(*batch))
    model(*data)
    layers = [module.routing.usage for module in model.modules() if getattr(module, "routing", None) is not None]
    assert abs(torch.stack(layers).mean() - HAM["kv_usage"]) < 0.05


def windows(texts, count, length, seed):
    """(count, length) int64 bytes, from random places."""
    data = np.frombuffer(b"".join(texts), dtype=np.uint8)
    starts = np.random.default_rng(seed).integers(0, len(data) - length, count)
    return torch.from_numpy(data[starts[:, None] + np.arange(length)].astype(np.int64))


def next_byte(model, tokens):
    return model(tokens, labels=tokens).loss


@pytest.mark.parametrize("layers", [None, pytest.param([1], marks=pytest.mark.slow)], ids=["all layers", "a hybrid"])
def test_a_llama_trains_on_text_and_is_kept(tmp_path, layers):
    """Trained, generating with beams, saved, loaded, and exported for a program that knows only its class."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=96, pad_token_id=0, bos_token_id=None, eos_token_id=None,
        )
    ).double()  # fmt: skip
    swap_mixers(model, HAM, where="*.self_attn", layers=layers)
    texts = read_texts(find_files(None), max_bytes=40_000)
    data = windows(texts, 64, 96, seed=0)
    before, after = fit(model, next_byte, [data], steps=12, batch_size=16)
    assert after < before and not untouched(model, next_byte, [data[:4]])

    check_usage(model, [data])
    prompts, options = data[:3, :20], dict(num_beams=3, max_new_tokens=12, do_sample=False)
    written = model.generate(prompts, **options)
    assert written.shape == (3, 32) and torch.equal(written, model.generate(prompts, use_cache=False, **options))
    model.save_pretrained(tmp_path)
    again = swapped(LlamaForCausalLM).from_pretrained(tmp_path).eval()
    assert torch.equal(again.generate(prompts, **options), written)
    held = {}
    for usage in (0.1, 0.5):
        set_kv_usage(again, usage)
        cache = again(data, use_cache=True).past_key_values
        held[usage] = sum(kv_cache_bytes([layer.state]) for layer in cache.layers if hasattr(layer, "state"))
    assert held[0.1] < held[0.5]


class Classifier(nn.Module):
    def __init__(self, vocab_size, num_classes, dim=32):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(vocab_size, dim), nn.Embedding(16, dim)
        layer = nn.TransformerEncoderLayer(dim, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, tokens, real):
        hidden = self.encoder(self.embedding(tokens) + self.positions.weight, src_key_padding_mask=~real)
        return self.head((hidden * real[..., None]).sum(1) / real.sum(1, keepdim=True))


def test_a_transformer_encoder_trains_on_padded_sequences():
    draw = ClassificationData(num_classes=2, num_noise=4, seq_len=16).draw
    batch = draw(np.random.default_rng(0), batch_size=64, level=0)
    torch.manual_seed(0)
    model = Classifier(7, 2)
    swap_mixers(model, HAM | {"num_heads": 4}, where="encoder.layers.*.self_attn")
    data = [batch[key] for key in ("tokens", "padding_mask", "label")]
    assert not data[1].all()

    def loss(model, tokens, real, label):
        return F.cross_entropy(model(tokens, real), label)

    before, after = fit(model, loss, data, steps=10, batch_size=64)
    assert after < before and not untouched(model, loss, data)
    check_usage(model, data[:2])


def test_a_vision_transformer_trains():
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=4,
        num_channels=1, num_labels=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = ViTForImageClassification(config)
    swap_mixers(model, HAM, where="*.attention")
    data = [torch.randn(32, 1, 16, 16), torch.arange(32) % 4]
    before, after = fit(model, lambda m, x, y: m(x, labels=y).loss, data, steps=10, batch_size=32)
    assert after < before and not untouched(model, lambda m, x, y: m(x, labels=y).loss, data)
    check_usage(model, data[:1])
