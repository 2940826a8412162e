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
from mixers import aux_loss, kv_cache_bytes, set_kv_usage, swap_mixers
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


def fit(model, loss, data, *, steps, batch_size, learning_rate=3e-3):
    """Trained in place; the data are tensors of as many rows."""
    torch.manual_seed(1)
    trainer = pl.Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[CalibrateThresholds()],
    )  # fmt: skip
    loader = DataLoader(TensorDataset(*data), batch_size=batch_size, shuffle=True)
    trainer.fit(Plain(model, loss, learning_rate), loader)
    return model.eval()


def usage_of(model):
    """Stored tokens / tokens of the last call."""
    layers = [module.routing.usage for module in model.modules() if getattr(module, "routing", None) is not None]
    return torch.stack(layers).mean().item()


def windows(texts, count, length, seed):
    """(count, length) int64 bytes, from random places."""
    data = np.frombuffer(b"".join(texts), dtype=np.uint8)
    starts = np.random.default_rng(seed).integers(0, len(data) - length, count)
    return torch.from_numpy(data[starts[:, None] + np.arange(length)].astype(np.int64))


def next_byte(model, tokens):
    return model(tokens, labels=tokens).loss


@pytest.mark.parametrize("layers", [None, [1]], ids=["all layers", "a hybrid"])
def test_a_llama_learns_text_and_is_kept(tmp_path, layers):
    """Trained, generating with beams, saved, loaded, and exported for a program that knows only its class."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=96, pad_token_id=0, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    swap_mixers(model, HAM, where="*.self_attn", layers=layers)
    texts = read_texts(find_files(None), max_bytes=400_000)
    data, unseen = windows(texts[:-3], 1200, 96, seed=0), windows(texts[-3:], 64, 96, seed=1)
    with torch.no_grad():
        before = next_byte(model.eval(), unseen)
    fit(model.train(), next_byte, [data], steps=75, batch_size=16)
    with torch.no_grad():
        after = next_byte(model, unseen)
    frequencies = torch.bincount(data.flatten(), minlength=256) + 1.0
    unigram = F.cross_entropy(frequencies.log().expand(len(unseen), 96, -1).flatten(0, 1), unseen.flatten())
    assert before > 5 and after < unigram - 0.3, "it has learned more than the frequencies of bytes"
    assert abs(usage_of(model) - 0.25) < 0.04

    prompts, options = unseen[:3, :20], dict(num_beams=3, max_new_tokens=12, do_sample=False)
    written = model.generate(prompts, **options)
    assert written.shape == (3, 32) and torch.equal(written, model.generate(prompts, use_cache=False, **options))
    model.save_pretrained(tmp_path)
    again = swapped(LlamaForCausalLM).from_pretrained(tmp_path).eval()
    assert torch.equal(again.generate(prompts, **options), written)
    held = {}
    for usage in (0.1, 0.5):
        set_kv_usage(again, usage)
        cache = again(unseen, use_cache=True).past_key_values
        held[usage] = sum(kv_cache_bytes([layer.state]) for layer in cache.layers if hasattr(layer, "state"))
        assert abs(usage_of(again) - usage) < 0.05
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


def test_a_transformer_encoder_learns_an_order():
    """Which mark comes first, in sequences that end in padding: no bag of tokens tells."""
    draw = ClassificationData(num_classes=2, num_noise=4, seq_len=16).draw
    batch = draw(np.random.default_rng(0), batch_size=2048, level=0)
    unseen = draw(np.random.default_rng(1), batch_size=512, level=0)
    torch.manual_seed(0)
    model = Classifier(7, 2)
    swap_mixers(model, HAM | {"num_heads": 4}, where="encoder.layers.*.self_attn")
    data = [batch[key] for key in ("tokens", "padding_mask", "label")]
    fit(model, lambda m, x, real, y: F.cross_entropy(m(x, real), y), data, steps=120, batch_size=64)
    with torch.no_grad():
        right = model(unseen["tokens"], unseen["padding_mask"]).argmax(-1) == unseen["label"]
    assert right.float().mean() > 0.9
    assert abs(usage_of(model) - 0.25) < 0.06


def quadrants(count, seed):
    """Images (count, 1, 16, 16) of noise with a bright square; the label is its quadrant."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.randn(count, 1, 16, 16, generator=generator)
    places = torch.randint(0, 4, (count, 2), generator=generator)
    for image, (y, x) in zip(images, places.tolist(), strict=True):
        image[0, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] += 1
    return images, (places >= 2).long() @ torch.tensor([2, 1])


def test_a_vision_transformer_learns_where():
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=4,
        num_channels=1, num_labels=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = ViTForImageClassification(config)
    swap_mixers(model, HAM, where="*.attention")
    images, labels = quadrants(1024, seed=0)
    fit(model, lambda m, x, y: m(x, labels=y).loss, [images, labels], steps=150, batch_size=32)
    unseen, labels = quadrants(256, seed=1)
    with torch.no_grad():
        right = model(unseen).logits.argmax(-1) == labels
    assert right.float().mean() > 0.9
    assert abs(usage_of(model) - 0.25) < 0.06
