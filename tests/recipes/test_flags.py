import json

import pytest
import yaml

from mixers import SpecError
from recipes import flags
from recipes.flags import parse


def test_recipes_come_first_and_other_flags_keep_their_order():
    words = "--model.dim 3 --mixer ham --config mine.yaml --kv_usage 0.5 --data=mqar --steps 9 --seed 1"
    given = parse(words.split())
    assert given.recipe()["data"] == {"class_path": "lit_modules.data.mqar.MQARData"}
    words = "--model.dim 3 --config mine.yaml --model.kv_usage 0.5 --trainer.max_steps 9 --seed_everything 1"
    assert given.args() == words.split()


def test_defaults():
    recipe = parse([]).recipe()
    assert recipe["data"]["class_path"].endswith("TextData") and recipe["trainer"]["default_root_dir"] == "runs"
    assert recipe["model"]["init_args"]["mixer"]["name"] == "ham"


def test_a_mixer_without_a_recipe_is_a_flag():
    given = parse(["--mixer", "gdn*3,attention"])
    assert "mixer" not in given.recipe()["model"]["init_args"]
    assert given.args()[:2] == ["--model.mixer", "gdn*3,attention"]
    assert given.args(with_mixer=False) == []


def test_a_pattern_that_would_not_fit_deepens_the_model():
    assert parse(["--mixer", "gdn*5,attention", "--model.depth", "12"]).args()[2:] == [
        "--model.depth",
        "6",
        "--model.depth",
        "12",
    ]
    assert "--model.depth" not in parse(["--mixer", "gdn,attention"]).args()


def test_a_lone_name_becomes_a_mapping_that_options_can_be_added_to():
    assert json.loads(parse(["--mixer", "delta_net"]).args()[1]) == {"name": "delta_net"}
    assert json.loads(parse(["--router", "some.module.Router"]).args()[1]) == {"name": "some.module.Router"}
    spec = '{"name": "learned", "form": "x"}'
    assert parse(["--router", spec]).args()[1] == spec


def test_data_by_class_path_brings_its_recipe_or_its_model(tmp_path, monkeypatch):
    assert parse(["--data", "lit_modules.data.mqar:MQARData"]).recipe() == parse(["--data", "mqar"]).recipe()
    (tmp_path / "own_classes.py").write_text(
        "from lit_modules.data.classification import ClassificationData\n\nclass Own(ClassificationData):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    given = parse(["--data", "own_classes.Own"])
    recipe = given.recipe()
    assert recipe["model"]["class_path"] == "lit_modules.sequence_classifier.SequenceClassifier"
    assert recipe["model"]["init_args"]["dim"] == 64  # what a class inherits, it says
    assert recipe["data"] == {"class_path": "own_classes.Own"} and given.args() == []
    given = parse(["--data", "own_classes:Own", "--model", "lit_modules.language_model.LanguageModel"])
    assert given.args() == ["--model", "lit_modules.language_model.LanguageModel"]
    assert given.recipe()["data"] == {"class_path": "own_classes.Own"}


def test_data_that_is_a_path_is_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own: texts").mkdir()
    (tmp_path / "mqar").mkdir()
    for path in (str(tmp_path), "own: texts", "nowhere/to/be/found"):
        given = parse(["--data.seq_len", "3", "--data", path])
        assert given.task() == "text" and given.args() == ["--data.paths", json.dumps([path]), "--data.seq_len", "3"]
    assert parse(["--data", "mqar"]).task() == "mqar"
    with pytest.raises(SpecError, match="--data own: texts contradicts --data.paths elsewhere: leave one of them out"):
        parse(["--data", "own: texts", "--data.paths", "elsewhere"])


def test_names():
    assert parse(["--mixer", "hybrid"]).names() == ["gated_delta_net", "attention"]
    assert parse(["--mixer", "gdn*2"]).names() == ["gated_delta_net"] * 2
    assert parse(["--mixer", "[{name: ham, num_heads: 2}, gdn]"]).names() == ["ham", "gated_delta_net"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--mixer"], "--mixer needs a value"),
        (["--mixer", "--steps", "3"], "--mixer needs a value"),
        (["--mixer="], "--mixer needs a value"),
        (["--mixer", "hybird"], "Did you mean 'hybrid'?"),
        (["--mixer", "ham*none"], "'ham\\*none'"),
        (["--mixer", "{name: ham"], "as YAML"),
    ],
)
def test_mistakes(args, message):
    with pytest.raises(SpecError, match=message):
        parse(args)


def test_short_flags_reach_the_parser(run, here):
    line = "--dim 32 --depth 3 --lr 1e-2 --steps 7 --precision bf16-mixed --devices 1 --strategy ddp --seed 3"
    result = run(f"fit {line} --mixer hybrid --num_heads 2 --head_dim 8 --seq_len 64 --batch_tokens 128 --print_config")
    assert result.code == 0, result.err
    config = yaml.safe_load(result.out)
    model, trainer, data = config["model"]["init_args"], config["trainer"], config["data"]["init_args"]
    assert (model["dim"], model["depth"], model["learning_rate"]) == (32, 3, 1e-2)
    assert [(spec["num_heads"], spec["head_dim"]) for spec in model["mixer"]] == [(2, 8), (2, 8)]
    assert (trainer["max_steps"], trainer["precision"], trainer["devices"]) == (7, "bf16-mixed", "1")
    assert (trainer["strategy"], config["seed_everything"]) == ("ddp", 3)
    assert (data["seq_len"], data["batch_tokens"]) == (64, 128)


def test_heads_of_a_mixer_of_its_own_and_of_none(run, here):
    config = yaml.safe_load(run("fit --num_heads 8 --router cosine --print_config").out)
    assert config["model"]["init_args"]["mixer"]["num_heads"] == 8
    assert config["model"]["init_args"]["mixer"]["name"] == "ham"
    assert "'two'" in run("fit --num_heads two").error
    assert run("fit --numheads 2").error.endswith("Did you mean --num_heads?")
    assert run("fit --dept 2").error.endswith("Did you mean --depth?")


@pytest.mark.parametrize(
    "words", [["--compile"], ["--compile", "--steps", "3"], ["--compile=true"], ["--compile", "true"]]
)
def test_switches(words):
    assert parse(words).args()[:2] == ["--model.compile", "true"]


def test_help_names_every_short_flag():
    text = flags.help_text("fit")
    for flag in ["--plugin", "--ckpt_path", *flags.SHORT]:
        assert f"  {flag} " in text


@pytest.mark.parametrize(
    ("name", "mixer"),
    [
        *((name, "ham") for name in flags.sizes()),
        *(("ham_150m", mixer) for mixer in ("ham_paper", "attention", "gdn,attention")),
    ],
)
def test_a_size_takes_any_mixer(run, here, name, mixer):
    result = run(f"fit --recipe {name} --mixer {mixer} --seq_len 512 --print_config")
    assert result.code == 0, result.err
    config = yaml.safe_load(result.out)
    model, data = config["model"]["init_args"], config["data"]
    assert data["class_path"].endswith("TokenData") and data["init_args"]["seq_len"] == 512
    given = model["mixer"] if isinstance(model["mixer"], list) else [model["mixer"]]
    assert {spec["num_heads"] * spec["head_dim"] for spec in given} == {model["dim"]}
    assert config["trainer"]["precision"] == "bf16-mixed"


def test_a_size_on_other_data_and_with_other_heads(run, here):
    config = yaml.safe_load(run("fit --recipe ham_150m --data text --num_heads 3 --strategy fsdp2 --print_config").out)
    assert config["data"]["class_path"].endswith("TextData") and config["data"]["init_args"]["batch_tokens"] == 32768
    assert config["model"]["init_args"]["mixer"]["num_heads"] == 3
    assert config["trainer"]["strategy"]["class_path"] == "lit_modules.strategies.FSDP2"
    for own in (
        "--model.mixer.num_heads 12 --model.mixer.head_dim 64",
        '--mixer {"name":"ham","num_heads":12,"head_dim":64}',
    ):
        config = yaml.safe_load(run(f"fit --recipe ham_150m --data text {own} --print_config").out)
        mixer = config["model"]["init_args"]["mixer"]
        assert (mixer["num_heads"], mixer["head_dim"]) == (12, 64)
    assert run("fit --recipe ham_80m").error.startswith("unknown recipe 'ham_80m'; known: ham_150m, ham_400m, ham_800m")
