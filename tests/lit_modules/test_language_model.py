import math

import jsonargparse
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F

from lit_modules import language_model
from lit_modules.callbacks import RNGState
from lit_modules.data.stream import REPEATED, FixedBatches
from lit_modules.data.text import TextData
from lit_modules.flops import kernel_flops
from lit_modules.language_model import LanguageModel
from mixers import SpecError
from mixers.threshold import thresholds_of


def test_loss_leaves_out_what_is_not_asked(make_model):
    model = make_model()
    hidden, targets = torch.randn(2, 5, 16), torch.randint(0, 33, (2, 5))
    targets[:, ::2] = -100
    loss, answers = model.token_loss(hidden, targets)
    logits = model.decoder.logits(hidden)
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, 1::2].flatten(0, 1), targets[:, 1::2].flatten()))
    assert torch.equal(answers, logits.argmax(-1))
    assert model.token_loss(hidden, torch.full_like(targets, -100))[0] == 0


def test_the_loss_in_chunks_is_the_loss_at_once_gradients_too(make_model, monkeypatch):
    model = make_model(tie_embeddings=False)
    targets = torch.randint(0, 33, (3, 7)).masked_fill(torch.rand(3, 7) < 0.3, -100)
    found = []
    for limit in (2**26, 33 * 4):
        monkeypatch.setattr(language_model, "LOGITS_AT_ONCE", limit)
        hidden = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        model.zero_grad()
        loss, answers = model.token_loss(hidden, targets)
        loss.backward()
        found.append((loss.detach(), answers, hidden.grad, model.decoder.head.weight.grad))
    for once, chunked in zip(*found, strict=True):
        torch.testing.assert_close(chunked, once)


def test_a_small_step_lowers_the_loss_of_its_batch(make_trainer, make_model, make_mqar):
    """Down the gradient, by so little that the loss is linear in it: so on every machine."""
    model = make_model(mixer="gdn", learning_rate=1e-4, warmup_steps=0).double()
    batch = next(iter(make_mqar(curriculum=None).train_dataloader()))
    before = model.loss(batch)
    make_trainer(max_steps=1, precision="64-true").fit(model, FixedBatches([batch]))
    assert model.loss(batch) < before


def test_a_short_fit_logs_what_was_agreed(make_trainer, make_model, make_mqar):
    model, data = make_model(learning_rate=0.01), make_mqar(curriculum=None, batch_size=16)
    trainer = make_trainer(max_steps=5, log_every_n_steps=1)
    trainer.fit(model, data)
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert logged["val/perplexity"] == pytest.approx(math.exp(logged["val/loss"]), rel=1e-4)
    assert {f"train/{name}" for name in ("loss", "accuracy", "kv_usage")} <= logged.keys()
    stats = ("learning_rate", "gradient_norm", "tokens", "tokens_per_second", "peak_memory_gb", "teraflops")
    stats += ("data_wait", "aux_loss")
    assert {f"trainer/{name}" for name in stats} <= logged.keys()
    assert all(logged[f"trainer/{name}"] > 0 for name in stats[:-1]) and logged["trainer/data_wait"] < 1
    length = next(iter(data.val_dataloader()))["tokens"].shape[1]
    multiplied = sum(p.numel() for p in model.parameters() if p.ndim == 2)  # the embedding is the head
    kernels = sum(kernel_flops(block.mixer, length) for block in model.decoder.blocks)
    rate = logged["trainer/teraflops"] * 1e12 / logged["trainer/tokens_per_second"]
    assert rate == pytest.approx(6 * multiplied + 3 * kernels, rel=1e-4)
    assert logged["trainer/tokens"] == 5 * 16 * length
    assert {"val/accuracy", "val/kv_usage/layer1"} <= logged.keys()
    assert "val/bits_per_byte" not in logged and not any("head" in name for name in logged)
    heads = [value for name, value in model.last_usage.items() if "head" in name]
    assert len(heads) == 4 and logged["val/kv_usage"] == pytest.approx(sum(heads) / 4)
    tested = trainer.test(model, data, verbose=False)[0]
    assert {"test/loss", "test/accuracy", "test/kv_usage"} <= tested.keys()


def test_the_z_loss_is_of_training_and_of_what_is_asked(make_trainer, make_model, make_mqar):
    batch = next(iter(make_mqar().train_dataloader()))
    plain, weighed = make_model(mixer="attention"), make_model(mixer="attention", z_loss=0.5)
    for model in (plain, weighed):
        model.log_step = lambda *args, **values: None
    asked = batch["targets"] != -100
    logits = weighed.decoder.logits(weighed.decoder(batch["tokens"]).hidden)[asked]
    expected = plain.training_step(batch, 0)["loss"] + 0.5 * logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(weighed.training_step(batch, 0)["loss"], expected)
    torch.testing.assert_close(weighed.eval().loss(batch), plain.eval().loss(batch))
    with pytest.raises(SpecError, match="z_loss"):
        make_model(z_loss=-1)


def test_lengths_warm_up_in_training_alone(make_trainer, make_model, make_mqar):
    seen = {True: [], False: []}
    model, data = make_model(length_warmup=4), make_mqar(curriculum=None)
    decode = model.decode

    def noted(batch):
        bounds = batch.get("cu_seqlens")
        longest = batch["tokens"].shape[1] if bounds is None else int(bounds.diff().max())
        seen[model.training].append((longest, batch["tokens"].numel()))
        return decode(batch)

    model.decode = noted
    with pytest.raises(SpecError, match="length_warmup is for text.*MQARData"):
        make_trainer(max_steps=6).fit(model, data)
    data.setup("fit")  # in whose loaders nothing says what they are of
    make_trainer(max_steps=6, limit_val_batches=1).fit(model, data.train_dataloader(), data.val_dataloader())
    whole = next(iter(data.val_dataloader()))["tokens"].shape
    lengths, tokens = zip(*seen[True], strict=True)
    assert list(lengths) == [max(1, round(whole[1] * (1 + 15 * step / 4) / 16)) for step in range(4)] + 2 * [whole[1]]
    assert {*tokens} == {whole.numel()}
    assert {length for length, _ in seen[False]} == {whole[1]}


def test_validation_metrics_against_one_pass_by_hand(make_trainer, make_model, make_mqar):
    model, data = make_model(mixer="attention", vocab_size=33).eval(), make_mqar()
    logged = make_trainer().validate(model, data, verbose=False)[0]
    batches = list(data.val_dataloader())
    targets = torch.cat([batch["targets"].flatten() for batch in batches])
    with torch.no_grad():
        logits = torch.cat([model(batch["tokens"]).flatten(0, 1) for batch in batches])
    assert logged["val/loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    asked = targets != -100
    assert logged["val/accuracy"] == pytest.approx((logits.argmax(-1) == targets)[asked].float().mean().item())
    assert not any("kv_usage" in name for name in logged)


def test_a_batch_that_another_rank_counts_is_not_counted(make_trainer, make_model, make_mqar):
    model = make_model().eval()
    batches = list(make_mqar().val_dataloader())
    once, twice = (
        make_trainer().validate(model, FixedBatches(batches + more), verbose=False)[0]
        for more in ([], [{**batches[0], REPEATED: True}])
    )
    assert once == twice and "val/kv_usage" in once


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i}.txt").write_text(f"{i} is followed by {i + 1}. " * 12)

    def make():
        return TextData(paths=[str(folder)], seq_len=32, batch_tokens=64, validation_tokens=64, held_out=0.1)

    return make


def test_text_is_measured_in_bits_per_byte(make_trainer, make_model, text):
    logged = make_trainer().validate(make_model(vocab_size=256), text(), verbose=False)[0]
    assert logged["val/bits_per_byte"] == pytest.approx(logged["val/loss"] / math.log(2), rel=1e-5)


def test_names_that_come_back_are_measured_apart(tmp_path, make_trainer, make_model):
    folder = tmp_path / "code"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i}.py").write_text(f"word = name_{i}\nword = name_{i} + name_{i} * {i}\n" * 4)
    options = dict(seq_len=64, batch_tokens=128, validation_tokens=512, held_out=0.2, name_distance=8)
    model, data = make_model(vocab_size=256, mixer="gdn").eval(), TextData(paths=str(folder), **options)
    logged = make_trainer().validate(model, data, verbose=False)[0]
    batches = list(data.val_dataloader())
    with torch.no_grad():
        logits = [model(batch["tokens"], cu_seqlens=batch["cu_seqlens"]) for batch in batches]
    targets = torch.cat([batch["targets"][0] for batch in batches])
    chances = torch.cat(logits, 1)[0].softmax(-1)[range(len(targets)), targets]
    kinds = torch.cat([batch["names"][0] for batch in batches])
    for what, chosen in {"name": kinds > 0, "unknown_name": kinds == 2, "rest": kinds == 0}.items():
        assert logged[f"val/{what}_bytes"] == chosen.sum() > 0
        expected = -chances[chosen].log2().mean().item()
        assert logged[f"val/{what}_bits_per_byte"] == pytest.approx(expected, rel=1e-4)
    again = FixedBatches([*batches, {**batches[0], REPEATED: True}])
    assert make_trainer().validate(model, again, verbose=False)[0] == logged
    unmarked = FixedBatches([{k: v for k, v in batch.items() if k != "names"} for batch in batches])
    plain = make_trainer().validate(model, unmarked, verbose=False)[0]
    assert plain["val/bits_per_byte"] == logged["val/bits_per_byte"] and not any("name" in key for key in plain)


@pytest.mark.parametrize(
    ("task", "micro_batches"), [("mqar", 1), pytest.param("text", 1, marks=pytest.mark.slow), ("text", 2)]
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit(
    tmp_path, make_trainer, make_model, make_mqar, text, task, micro_batches
):
    router = {"name": "learned"} if task == "text" else None

    def fit(name, ckpt_path=None):
        torch.manual_seed(0 if ckpt_path is None else 99)
        model = make_model(vocab_size=33 if task == "mqar" else 256, router=router)
        data = make_mqar(advance_at=0.9) if task == "mqar" else text()
        saver = ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = make_trainer(
            max_steps=10,
            val_check_interval=5,
            callbacks=[saver, RNGState()],
            enable_checkpointing=True,
            log_every_n_steps=1,
            accumulate_grad_batches=micro_batches,
        )
        trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=True)
        return model.state_dict(), {k: v for k, v in trainer.callback_metrics.items() if k.startswith("val")}

    whole, metrics = fit("whole")
    assert metrics
    for step in (3, 5):  # between validations, and before one
        resumed, resumed_metrics = fit(f"from{step}", tmp_path / "whole" / f"step={step}.ckpt")
        assert resumed.keys() == whole.keys()
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)
        assert resumed_metrics == metrics


def test_a_checkpoint_holds_plain_data_and_loads_without_a_recipe(tmp_path, make_trainer, make_model, make_mqar):
    mixer = [{"name": "ham", "num_heads": 2, "router": {"name": "learned"}}, "attention"]
    model = make_model(mixer=mixer, kv_usage=0.5)
    trainer = make_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(model, make_mqar())
    path = tmp_path / "a.ckpt"
    trainer.save_checkpoint(path)
    loaded = LanguageModel.load_from_checkpoint(path, weights_only=True)
    assert loaded.hparams == model.hparams and loaded.hparams.mixer == mixer
    tokens = torch.randint(0, 33, (1, 8))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens), model.eval()(tokens))


def test_the_checkpoint_of_another_model_is_one_clear_line(tmp_path, make_trainer, make_model, make_mqar):
    trainer = make_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(make_model(mixer="gdn"), make_mqar())
    path = tmp_path / "a.ckpt"
    trainer.save_checkpoint(path)
    message = "the checkpoint is of another model: mixer is 'gdn' there, 'attention' here$"
    with pytest.raises(SpecError, match=message):
        make_trainer().validate(make_model(mixer="attention"), make_mqar(), ckpt_path=path)


def test_predict_answers_at_every_position(make_trainer, make_model, make_mqar):
    model, data = make_model(), make_mqar()
    answers = make_trainer().predict(model.eval(), data)
    first = next(iter(data.test_dataloader()))["tokens"]
    with torch.no_grad():
        assert torch.equal(answers[0], model(first).argmax(-1))


def test_the_command_line_sees_every_option():
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(LanguageModel, "model")
    flags = ["--model.vocab_size=9", "--model.dim=8", "--model.mixer=gdn*3,attention", "--model.router.name=learned"]
    model = parser.parse_args(flags).model
    assert (model.vocab_size, model.dim, model.mixer) == (9, 8, "gdn*3,attention")
    assert {"kv_usage", "learning_rate", "betas", "warmup_steps", "schedule"} <= set(model.keys())


def test_a_model_for_every_budget_draws_a_usage_for_each_sequence(make_model, make_mqar, make_trainer):
    seen = []
    model = make_model(budget="any")
    forward = model.decoder.forward

    def spy(*args, **options):
        seen.append(next(thresholds_of(model)).usages)
        return forward(*args, **options)

    model.decoder.forward = spy
    make_trainer(max_steps=3).fit(model, make_mqar())
    assert all(u is not None and u.shape == (len(u),) for u in seen[:3]) and not torch.equal(seen[0], seen[1])
    seen.clear()
    make_trainer().test(model, make_mqar(), verbose=False)
    assert seen and all(u is None for u in seen)
