import random
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import lit_modules.callbacks
from lit_modules.callbacks import CalibrateThresholds, NextSteps, RNGState, RunSummary, SampleText, usage_table
from lit_modules.data.text import TextData
from mixers.threshold import thresholds_of


def tables_of(model):
    return torch.stack([threshold.table.clone() for threshold in thresholds_of(model)])


def draw():
    return random.random(), np.random.rand(), torch.rand(2).tolist()


def test_random_state_survives_a_safe_load(tmp_path):
    torch.save(RNGState().state_dict(), tmp_path / "state.pt")
    expected = draw()
    assert draw() != expected
    restored = RNGState()
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    restored.on_train_start(None, None)
    assert draw() == expected
    restored.on_train_start(None, None)  # only once
    assert draw() != expected


class TestCalibrateThresholds:
    def test_a_fit_validates_with_thresholds_that_fit_its_last_weights(self, tmp_path, make_trainer, make_model):
        (tmp_path / "a.txt").write_bytes(bytes(random.Random(0).choices(b"abcdef \n", k=8000)))
        data = TextData(paths=[str(tmp_path / "a.txt")], seq_len=64, batch_tokens=512)
        tables = {}
        for callbacks in ([], [CalibrateThresholds(batches=3)]):
            model = make_model(vocab_size=256, learning_rate=0.1)
            validated = []
            model.on_validation_start = lambda model=model, seen=validated: seen.append(tables_of(model))
            make_trainer(max_steps=3, val_check_interval=3, callbacks=callbacks).fit(model, data)
            tables[len(callbacks)] = tables_of(model)
            assert torch.equal(validated[-1], tables[len(callbacks)])
        assert not torch.equal(tables[0], tables[1])

    def test_a_loader_without_a_data_module_stays_where_it_was(self, make_trainer, make_model, make_mqar):
        places = []
        for callbacks in ([], [CalibrateThresholds(batches=3)]):
            loader = make_mqar(curriculum=None).train_dataloader()
            make_trainer(max_steps=3, callbacks=callbacks, limit_val_batches=0).fit(make_model(), loader)
            places.append(loader.state_dict()["next"])
        assert places[0] == places[1] > 0

    def test_a_run_that_ends_before_its_last_step_says_what_its_checkpoints_lack(
        self, make_trainer, make_model, make_mqar
    ):
        callbacks = [CalibrateThresholds(batches=1)]
        options = dict(max_steps=9, max_epochs=1, limit_train_batches=2, enable_checkpointing=True)
        with pytest.warns(UserWarning, match="checkpoints were written before the KV thresholds were fitted"):
            make_trainer(**options, callbacks=callbacks).fit(make_model(), make_mqar())
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*were fitted")
            make_trainer(max_steps=2, enable_checkpointing=True, callbacks=callbacks).fit(make_model(), make_mqar())

    def test_a_model_without_a_router_is_left_alone(self, tmp_path, make_trainer, make_model):
        (tmp_path / "a.txt").write_text("a line of text\n" * 100)
        data = TextData(paths=[str(tmp_path / "a.txt")], seq_len=32, batch_tokens=64)
        callback = CalibrateThresholds()
        make_trainer(max_steps=2, callbacks=[callback]).fit(make_model(vocab_size=256, mixer="gdn"), data)
        assert not callback.done

    def test_a_budget_is_allocated_where_heads_share_one_and_where_it_says_so(
        self, monkeypatch, make_trainer, make_model, make_mqar
    ):
        calls = []

        def spy(model, batches, loss, **options):
            calls.append([loss(batch).item() for batch in batches])

        monkeypatch.setattr(lit_modules.callbacks, "allocate", spy)
        ham = {"name": "ham", "num_heads": 2, "head_dim": 8}
        silent = {"name": "any", "allocate": False}
        for budget, scope, times in (
            ("any", "model", 1),
            ("any", "head", 0),
            ("fixed", "model", 0),
            (silent, "model", 0),
        ):
            calls.clear()
            model = make_model(mixer=ham | {"scope": scope}, budget=budget)
            make_trainer(max_steps=2, callbacks=[CalibrateThresholds(batches=4)]).fit(model, make_mqar())
            assert len(calls) == times and all(len(losses) == 4 for losses in calls)


def test_usage_table():
    usage = {"kv_usage": 0.25, "kv_usage/layer0": 0.1, "kv_usage/layer0/head0": 0.2, "kv_usage/layer0/head1": 0.0}
    usage |= {f"kv_usage/layer{layer}": 0.4 for layer in (2, 10)} | {"kv_usage/layer10/head0": 0.4}
    lines = usage_table(usage).splitlines()
    assert lines[2].split() == ["0", "0.100", "0.200", "0.000"]
    assert [line.split()[0] for line in lines[2:]] == ["0", "2", "10", "all"]
    assert lines[-1].split() == ["all", "0.250"]


def test_the_end_of_a_fit(tmp_path, capsys, make_trainer, make_model):
    (tmp_path / "a.txt").write_text("a line of text\n" * 100)
    data = TextData(paths=[str(tmp_path / "a.txt")], seq_len=32, batch_tokens=64)
    commands = {"check": "run validate --config {config} --ckpt_path {checkpoint}", "watch": "board {log_dir}"}
    callbacks = [RunSummary(), SampleText(num_tokens=8), NextSteps(commands=commands)]
    callbacks.append(ModelCheckpoint(tmp_path / "saved"))
    trainer = make_trainer(
        max_steps=2,
        val_check_interval=2,
        callbacks=callbacks,
        logger=CSVLogger(tmp_path, name="logs"),
        enable_checkpointing=True,
    )
    model = make_model(vocab_size=256)
    trainer.fit(model, data)
    said = capsys.readouterr().out
    assert "validation after 2 steps: bits per byte" in said
    assert "KV usage" in said and "line of text" in said
    assert "{" not in said and "run validate" not in said  # there is no config.yaml
    assert f"board {tmp_path / 'logs'}" in said

    (tmp_path / "logs" / "version_0" / "config.yaml").touch()
    callbacks[2].on_fit_end(trainer, model)
    said = capsys.readouterr().out
    assert "config.yaml --ckpt_path" in said and f"{tmp_path / 'saved'}" in said


def test_other_data_has_no_sample_and_other_models_no_usage(capsys, make_trainer, make_model, make_mqar):
    callbacks = [RunSummary(), SampleText(), NextSteps(commands={"a": "{config}"})]
    make_trainer(max_steps=1, callbacks=callbacks).fit(make_model(mixer="gdn"), make_mqar(batches_per_epoch=1))
    said = capsys.readouterr().out
    assert "accuracy" in said
    assert not any(word in said for word in ("sample", "KV usage", "next:"))


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_prompt_of_ones_own(tmp_path, capsys, make_trainer, make_model, temperature):
    (tmp_path / "a.txt").write_text("a line of text\n" * 100)
    data = TextData(paths=[str(tmp_path / "a.txt")], seq_len=32, batch_tokens=64)
    sample = SampleText(prompt="once", num_tokens=3, temperature=temperature)
    make_trainer(max_steps=1, callbacks=[sample]).fit(make_model(vocab_size=256), data)
    assert "once|" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["rows", "padded", "packed"])
def test_a_sample_goes_on_from_text_however_it_is_laid_out(tmp_path, capsys, make_trainer, make_model, layout):
    """A data module of one's own that has `decode`: the prompt is its first row, or its longest piece."""
    tokens = torch.tensor([list(b"ab_____"), list(b"cde____")])
    batch = {"tokens": tokens, "targets": tokens}
    if layout == "padded":
        batch["padding_mask"] = tokens != ord("_")
    if layout == "packed":
        batch = {
            "tokens": tokens.view(1, -1),
            "targets": tokens.view(1, -1),
            "cu_seqlens": torch.tensor([0, 7, 10, 14]),
        }

    class Own(TextData):
        def val_dataloader(self):
            return [batch]

    (tmp_path / "a.txt").write_text("a line of text\n" * 100)
    data = Own(paths=[str(tmp_path / "a.txt")], seq_len=32, batch_tokens=64)
    make_trainer(max_steps=1, callbacks=[SampleText(num_tokens=3)]).fit(make_model(vocab_size=256), data)
    prompt = {"rows": "ab_____", "padded": "cde", "packed": "ab_____"}[layout]
    assert f"\n  {prompt}|" in capsys.readouterr().out
