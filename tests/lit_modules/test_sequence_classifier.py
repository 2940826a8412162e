import pytest
import torch
from torch.nn import functional as F

from lit_modules.data.classification import ClassificationData
from lit_modules.data.stream import REPEATED, FixedBatches
from lit_modules.sequence_classifier import SequenceClassifier


@pytest.fixture
def data():
    return ClassificationData(num_classes=2, num_noise=4, seq_len=12, batches_per_epoch=10, num_validation=40)


@pytest.fixture
def make_classifier(data):
    def make(**options):
        torch.manual_seed(0)
        ham = {"name": "ham", "num_heads": 2, "head_dim": 8}
        defaults = {"num_classes": 2, "vocab_size": data.vocab_size, "dim": 16, "depth": 1, "mixer": ham}
        return SequenceClassifier(**defaults | options)

    return make


@pytest.mark.parametrize("mixer", ["ham", "gdn", "attention"])
def test_padding_changes_nothing(make_classifier, mixer):
    model = make_classifier(mixer=mixer).eval()
    tokens = torch.randint(1, 5, (1, 9))
    mask = torch.arange(9) < 6
    with torch.no_grad():
        alone = model(tokens[:, :6])
        padded = model(tokens, padding_mask=mask[None])
        torch.testing.assert_close(padded, alone)
        torch.testing.assert_close(model(tokens.masked_fill(~mask, 4), padding_mask=mask[None]), padded)


def test_a_fit_changes_every_weight_and_reports(make_trainer, make_classifier, data):
    model = make_classifier(mixer="gdn", warmup_steps=1)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    trainer = make_trainer(max_steps=4, max_epochs=-1)
    trainer.fit(model, data)
    for name, weight in model.named_parameters():
        assert weight.isfinite().all() and not torch.equal(weight, before[name]), name
    trainer.validate(model, data, verbose=False)
    assert trainer.callback_metrics["val/loss"].isfinite()
    assert {"val/accuracy", "val/loss"} == {name for name in trainer.callback_metrics if "val" in name}


def test_validation_metrics_against_one_pass_by_hand(make_trainer, make_classifier, data):
    model = make_classifier().eval()
    logged = make_trainer().validate(model, data, verbose=False)[0]
    batches = list(data.val_dataloader())
    with torch.no_grad():
        logits = torch.cat([model(batch["tokens"], batch["padding_mask"]) for batch in batches])
    label = torch.cat([batch["label"] for batch in batches])
    assert logged["val/loss"] == pytest.approx(F.cross_entropy(logits, label).item(), rel=1e-4)
    assert logged["val/accuracy"] == pytest.approx((logits.argmax(-1) == label).float().mean().item())
    assert 0 <= logged["val/kv_usage/layer0"] <= 1
    assert make_trainer().predict(model, data)[0].shape == (16,)


def test_a_batch_that_another_rank_counts_is_not_counted(make_trainer, make_classifier, data):
    model = make_classifier().eval()
    batches = list(data.val_dataloader())
    once, twice = (
        make_trainer().validate(model, FixedBatches(batches + more), verbose=False)[0]
        for more in ([], [{**batches[0], REPEATED: True}])
    )
    assert once == twice


def test_a_checkpoint_loads_without_a_recipe(tmp_path, make_trainer, make_classifier, data):
    model, trainer = make_classifier(), make_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = SequenceClassifier.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
