"""Options of a class go with it when the user names another one, wherever it is named."""

import pytest
import yaml

from recipes.composition import compose, setting

CLASSES = """
import lightning.pytorch as pl

from lit_modules.language_model import LanguageModel


class Data(pl.LightningDataModule):
    model = "language_model"
    vocab_size = 16

    def __init__(self, seq_len: int = 64, batch_tokens: int = 99):
        super().__init__()


class Model(LanguageModel):
    def __init__(self, vocab_size: int = 16, dim: int = 24, mixer: str | dict = "gdn", learning_rate: float = 1e-4):
        super().__init__(vocab_size=vocab_size, dim=dim, mixer=mixer, learning_rate=learning_rate)
"""


@pytest.fixture
def printed(run, here, monkeypatch):
    """printed(flags) -> the configuration that a fit would run with; own.py and three YAML files are there to name."""
    (here / "own.py").write_text(CLASSES)
    (here / "data.yaml").write_text("data: {class_path: own.Data}")
    (here / "model.yaml").write_text("model: own.Model")
    (here / "text.yaml").write_text("data: {class_path: lit_modules.data.text.TextData, init_args: {seq_len: 77}}")
    monkeypatch.syspath_prepend(here)

    def _printed(flags):
        result = run(f"fit {flags} --print_config")
        assert result.code == 0, result.err
        return yaml.safe_load(result.out)

    return _printed


DATA = {"seq_len": 64, "batch_tokens": 99}
MODEL = {"dim": 24, "learning_rate": 1e-4, "mixer": "gdn"}


@pytest.mark.parametrize(
    ("flags", "data", "model"),
    [
        ("--config data.yaml", DATA, {"dim": 128, "depth": 4}),
        ("--data own.Data", DATA, {"dim": 128, "depth": 4}),
        ("--config=text.yaml --config=data.yaml --data.seq_len 5", DATA | {"seq_len": 5}, {}),
        ("--data.batch_tokens 7 --config text.yaml --config data.yaml", DATA | {"batch_tokens": 7}, {}),
        ("--config data.yaml --config text.yaml", {"seq_len": 77, "batch_tokens": 2048}, {"depth": 2}),
        ("--config model.yaml", {"seq_len": 256}, MODEL),
        ("--model own.Model", {"seq_len": 256}, MODEL),
        ("--config model.yaml --config data.yaml --model.dim 8", DATA, MODEL | {"dim": 8}),
        ("--config model.yaml --mixer gdn*3,attention", {}, MODEL | {"mixer": "gdn*3,attention"}),
    ],
)
def test_a_class_brings_its_own_defaults(printed, flags, data, model):
    config = printed(flags)
    assert config["data"]["init_args"].items() >= data.items()
    assert config["model"]["init_args"].items() >= model.items()


def test_data_in_a_config_brings_its_recipe(printed, here):
    (here / "mqar.yaml").write_text("data: {class_path: lit_modules.data.mqar.MQARData, init_args: {num_pairs: 8}}")
    by_file, by_flag = printed("--config mqar.yaml"), printed("--data mqar --data.num_pairs 8")
    assert by_file == by_flag


def test_a_recipe_that_is_asked_for_stays(printed):
    mixer = printed("--config model.yaml --mixer ham")["model"]["init_args"]["mixer"]
    assert mixer["name"] == "ham" and mixer["router"]["name"] == "residual"


def test_data_named_twice(run, printed):
    assert "--data mqar contradicts own.Data" in run("fit --data mqar --config data.yaml").error


def test_compose():
    one = {
        "model": {"class_path": "a.A", "init_args": {"dim": 1, "mixer": {"name": "x", "u": 1}}},
        "trainer": {"n": [1]},
    }
    two = {"model": {"init_args": {"mixer": {"name": "y"}}}, "trainer": {"n": [2], "m": 3}}
    whole = {
        "model": {"class_path": "a.A", "init_args": {"dim": 1, "mixer": {"name": "y"}}},
        "trainer": {"n": [2], "m": 3},
    }
    assert compose([one, two]) == compose([one, two], {"model": "A"}) == whole
    assert compose([one, two], {"model": "b.A"}) == whole | {"model": {"class_path": "b.A"}}


def test_the_last_setting_wins(here):
    (here / "c.yaml").write_text("ckpt_path: there\ntrainer: {max_steps: 3}")
    words = ["--ckpt_path=here", "--config", "c.yaml", "--trainer.max_steps", "4", "--config", "{weights_only: true}"]
    assert (setting(words, "ckpt_path"), setting(words, "trainer.max_steps")) == ("there", "4")
    assert setting(["--config", "nowhere.yaml", "--config", "[1"], "ckpt_path") is None
