"""A comparison trains on whatever fit trains on, the same models on the same data."""

import json
import shutil

import pytest
import yaml

from lit_modules.data import DATA
from mixers import SpecError
from mixers.registry import parse_pattern
from recipes.compare.run import build, settings_of
from recipes.task import DATA_MODULES, sized

CLASSES = """
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader


class Counting(pl.LightningDataModule):
    model = "language_model"
    vocab_size = 7

    def __init__(self, length: int = 12):
        super().__init__()
        self.length = length

    def train_dataloader(self):
        tokens = torch.arange(self.length + 1)[None] % 7
        return DataLoader([{"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}] * 4, batch_size=None)

    val_dataloader = test_dataloader = train_dataloader


class Named(Counting):
    metric = "perplexity"
    defaults = {"model": {"dim": 24, "depth": 3}, "mixer": {"num_heads": 3, "taps": 5}, "steps": 7}


class Wrong(Named):
    defaults = {"stepz": 7}


class Never(Named):
    defaults = {"steps": 0}


class Flat(Named):
    defaults = {"mixer": "gdn"}


class HuggingFace(Counting):
    def train_dataloader(self):
        return DataLoader([{"input_ids": torch.ones(1, 4).long(), "labels": torch.ones(1, 4).long()}], batch_size=None)


class Strange(Counting):
    model = "languag_model"
"""


@pytest.fixture
def own(here, monkeypatch):
    (here / "own_tasks.py").write_text(CLASSES)
    monkeypatch.syspath_prepend(here)
    monkeypatch.setenv("PYTHONPATH", str(here))  # of the workers


def settings(data, metric=None, data_options=None, **model_options):
    return settings_of(data, data_options=data_options or {}, model_options=model_options, metric=metric)


def built(data, **options):
    mixer = sized("gdn,attention", data if data in DATA or "own" in data else "text")
    return build(settings(data, **options) | {"mixer": mixer, "options": {}, "seed": 0})


SOME = ("text", "classification", "mad_recall")
OTHERS = [name for name in DATA if name not in (*SOME, "tokens")]  # which needs a tokenizer


@pytest.mark.parametrize(
    "data",
    [*SOME, "own_tasks.Named", "texts", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)],
)
def test_the_models_are_those_of_fit(run, own, texts, data):
    data = str(texts) if data == "texts" else data
    printed = yaml.safe_load(run(f"fit --data {data} --mixer gdn,attention --print_config").out)
    model, module = built(data)
    assert f"{type(model).__module__}.{type(model).__name__}" == printed["model"]["class_path"]
    theirs = {k: v for k, v in printed["model"]["init_args"].items() if k not in ("mixer", "vocab_size", "num_classes")}
    ours = {key: model.hparams[key] for key in theirs}
    assert json.loads(json.dumps(ours)) == theirs
    assert parse_pattern(model.hparams["mixer"]) == parse_pattern(printed["model"]["init_args"]["mixer"])
    assert settings(data)["steps"] == printed["trainer"]["max_steps"]
    name = settings(data)["data"]
    assert f"{type(module).__module__}.{type(module).__name__}" == printed["data"]["class_path"]
    given = {"seed": 0} if "seed" in DATA_MODULES.options(name) else {}
    defaults = {key: option.default for key, option in DATA_MODULES.options(name).items()}
    assert defaults | given | settings(data)["data_options"] == printed["data"]["init_args"]


def test_data_of_ones_own(run, own, here):
    line = "compare --data own_tasks.Counting --metric accuracy --mixers [gdn] --steps 2 --seeds 1 --jobs 1 --out out"
    result = run(f"{line} --model_options.dim 16 --model_options.depth 1 --data_options.length 6")
    assert result.code == 0, result.err
    row = json.loads((here / "out/results.json").read_text())["runs"][0]
    assert row["metric"] == "accuracy" and row["higher_is_better"] is True and row["tokens"] == 6
    assert "accuracy [min, max]" in (here / "out/table.md").read_text()


def test_a_mean_over_parts_of_data_without_parts_is_refused_before_training(run, own, here):
    line = (
        "compare --data own_tasks.Counting --metric mean_accuracy --mixers [gdn] --steps 2 --seeds 1 --jobs 1 --out out"
    )
    error = run(f"{line} --model_options.dim 16 --model_options.depth 1").error
    assert "the test split of Counting names no parts, so that there is no mean_accuracy" in error
    assert not (here / "out").exists()


def test_names_that_come_back_are_compared_on_bytes_of_text_alone(run, here):
    (here / "code").mkdir()
    for i in range(60):
        (here / f"code/{i}.py").write_text(f"name = other_{i}  # {'.' * 60}\n" * 6)
    sizes = "--model_options.dim 16 --model_options.depth 1 --data_options.seq_len 256 --data_options.batch_tokens 512"
    line = f"compare --metric name_bits_per_byte --mixers [gdn] --steps 1 --seeds 1 --jobs 1 {sizes} --out out"
    result = run(f"{line} --data {here}/code")
    assert result.code == 0 and "| bits per byte of | name (" in result.out, result.err
    row = json.loads((here / "out/results.json").read_text())["runs"][0]
    assert {"bits_per_byte", "name_bits_per_byte", "name_bytes", "rest_bits_per_byte"} <= row.keys()
    assert row["higher_is_better"] is False
    shutil.rmtree(here / "out")
    error = run(f"{line} --data {here}/code --data_options.name_distance 256").error
    assert "the test split of TextData marks no names that come back, so that there is no name_bits_per_byte" in error
    rates = "--learning_rates [0.001] --data_options.validation_tokens 40"
    error = run(f"{line} --data {here}/code {rates}").error
    assert "the val split of TextData marks no names that come back" in error
    error = run("compare --metric name_bits_per_byte --data mqar --out out").error
    assert "unknown metric 'name_bits_per_byte' of LanguageModel" in error
    assert not (here / "out").exists()


def test_what_a_task_gives_to_mixers_yields_to_what_they_were_given(run, own):
    (spec,) = parse_pattern(sized({"name": "ham", "head_dim": 8}, "mqar"))
    assert spec == {"name": "ham", "head_dim": 8, "num_heads": 2}
    assert sized("gdn,attention", "text") == "gdn,attention"
    assert sized("attention", "own_tasks.Named") == {"name": "attention", "num_heads": 3}
    printed = yaml.safe_load(
        run("fit --data mqar --mixer gdn --num_heads 1 --model.mixer.head_dim 8 --print_config").out
    )
    mixer = printed["model"]["init_args"]["mixer"]
    assert (mixer["num_heads"], mixer["head_dim"]) == (1, 8)


def test_metrics(own):
    assert (
        settings("own_tasks.Named")["metric"] == "perplexity"
        and settings("own_tasks.Named", "loss")["metric"] == "loss"
    )
    for data, metric, message in (
        ("own_tasks.Counting", None, "no attribute `metric`, what to compare: give --metric"),
        ("own_tasks.Named", "acuracy", "unknown metric 'acuracy' of LanguageModel; known: .* Did you mean 'accuracy'"),
        ("own_tasks.Named", "bits_per_byte", "unknown metric 'bits_per_byte'"),
        ("own_tasks.Wrong", None, "unknown key 'stepz' in `defaults` of data 'own_tasks.Wrong'.*Did you mean 'steps'"),
        (
            "own_tasks.Never",
            None,
            "'steps' in `defaults` of data 'own_tasks.Never' must be a number of at least 1",
        ),
        ("own_tasks.Flat", None, "'mixer' in `defaults` of data 'own_tasks.Flat' must be a dict, got 'gdn'"),
        ("own_tasks.Strange", "loss", "unknown model 'languag_model' of data 'own_tasks.Strange'"),
        ("own_tasks.Missing", "loss", "unknown class 'Missing'"),
        ("no/such/folder", None, "no/such/folder' cannot be read"),
    ):
        with pytest.raises(SpecError, match=message):
            built(data, metric=metric)


def test_a_registered_plug_in_reaches_the_workers(run, here, monkeypatch):
    monkeypatch.setattr(DATA_MODULES, "_registered", dict(DATA_MODULES._registered))  # forgotten again afterwards
    registered = CLASSES.replace("class Named", "@DATA_MODULES.register('counting')\nclass Named")
    (here / "my_counting.py").write_text("from recipes.flags import DATA_MODULES\n" + registered)
    line = "compare --plugin ./my_counting.py --data counting --mixers [gdn] --steps 1 --seeds 1 --jobs 1 --out out"
    result = run(f"{line} --model_options.dim 16 --model_options.depth 1")
    assert result.code == 0 and "perplexity" in result.out, result.err


def test_a_batch_of_another_kind_ends_a_fit_in_one_line(run, own, here):
    error = run("fit --data own_tasks.HuggingFace --mixer gdn --dim 16 --trainer.enable_progress_bar false").error
    assert "tokens, targets" in error and "got input_ids, labels" in error and "from_hugging_face" in error
    assert not list(here.glob("runs/*"))
