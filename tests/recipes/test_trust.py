"""What a checkpoint names is not run unless the user named its package; a test per command."""

import json
import shutil
import sys

import pytest
import torch

from mixers.registry import MIXERS, ROUTERS

EVIL = "import pathlib\npathlib.Path(__file__).with_name('marker').touch()\n"
CALLBACK = {"class_path": "lightning.pytorch.callbacks.LambdaCallback"}
CSV = {"class_path": "lightning.pytorch.loggers.CSVLogger"}
COMMANDS = {
    "fit": "fit --steps 9 --ckpt_path {path}",
    "validate": "validate --ckpt_path {path}",
    "test": "test --ckpt_path {path}",
    "predict": "predict --ckpt_path {path}",
    "generate": "generate --prompt a --max_new_tokens 1 --ckpt_path {path}",
    "calibrate": "calibrate --batches 1 --ckpt_path {path}",
    "export": "export --out new --ckpt_path {path}",
    "sweep": "sweep --kv_usages [0.5] --out new --ckpt_paths [{path}]",
    "figures": "figures --out new.png --tokens 8 --ckpt_path {path}",
    "lm_eval": "lm_eval --tasks no_such_task --device cpu --ckpt_path {path}",
}
ALL, SOME, DATA, FIT, ONE = list(COMMANDS), ["fit", "calibrate"], ["fit", "sweep"], ["fit"], ["generate"]


def data(class_path, **options):
    return lambda saved: saved["recipe"].update(data={"class_path": class_path, "init_args": options})


def trainer(**options):
    return lambda saved: saved["recipe"]["trainer"].update(options)


def hparam(**options):
    return lambda saved: saved["hyper_parameters"].update(options)


def callbacks(*callbacks):
    return trainer(callbacks=list(callbacks))


ATTACKS = {
    "model": (ALL, hparam(_class_path="evil.Model"), "evil.Model"),
    "model_called": (ONE, hparam(_class_path="subprocess.Popen"), "subprocess.Popen"),
    "not_a_model": (ONE, hparam(_class_path="recipes.checkpoint.generate.generate"), "LightningModule is expected"),
    "instantiator": (SOME, hparam(_instantiator="evil.build"), "evil.build"),
    "mixer": (SOME, hparam(mixer={"name": "evil.Mixer"}), "evil.Mixer"),
    "pattern": (ONE, hparam(mixer="gdn*3,evil.Mixer"), "evil.Mixer"),
    "colon": (ONE, hparam(mixer=[{"name": "ham"}, {"name": "evil:Mixer"}]), "evil:Mixer"),
    "router": (ONE, hparam(router="evil.Router"), "evil.Router"),
    "inner": (ONE, hparam(mixer={"name": "ham", "router": {"name": "evil.Router"}}), "evil.Router"),
    "threshold": (ONE, hparam(mixer={"name": "ham", "threshold": "evil.Threshold"}), "evil.Threshold"),
    "old_hparams": (ONE, lambda saved: saved.update(hparams={"mixer": {"name": "evil.Mixer"}}), "malformed"),
    "data": (DATA, data("subprocess.Popen", args=["touch", "marker"]), "subprocess.Popen"),
    "data_module": (FIT, data("evil.Data"), "evil.Data"),
    "not_data": (FIT, data("lightning.pytorch.Trainer"), "LightningDataModule is expected"),
    "data_text": (FIT, lambda saved: saved["recipe"].update(data="evil.Data"), "malformed"),
    "callback": (FIT, callbacks({"class_path": "evil.Callback"}), "evil.Callback"),
    "callback_text": (FIT, callbacks("evil.Callback"), "evil.Callback"),
    "callback_yaml": (FIT, callbacks('{"class_path": "\\u0065vil.Callback"}'), "evil.Callback"),
    "not_a_callback": (FIT, callbacks({"class_path": "lit_modules.data.text.TextData"}), "TextData"),
    "function": (FIT, callbacks(CALLBACK | {"init_args": {"on_fit_start": "os.abort"}}), "os.abort"),
    "ours": (FIT, callbacks(CALLBACK | {"init_args": {"on_fit_start": "recipes.cli.main"}}), "recipes.cli.main"),
    "deep": (FIT, trainer(logger=CSV | {"dict_kwargs": {"x": ["evil.f"]}}), "evil.f"),
    "file": (FIT, trainer(logger="settings.yaml"), "settings.yaml"),
    "strategy": (FIT, trainer(strategy="evil.Strategy"), "evil.Strategy"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("command", "attack"), [(command, name) for name, (commands, *_) in ATTACKS.items() for command in commands]
)
def test_what_a_checkpoint_names_is_not_run(run, checkpoint, here, monkeypatch, command, attack):
    monkeypatch.syspath_prepend(here)
    (here / "evil.py").write_text(EVIL)
    (here / "settings.yaml").write_text("class_path: evil.Logger")
    saved = torch.load(checkpoint, weights_only=True)
    _, change, named = ATTACKS[attack]
    change(saved)
    torch.save(saved, "bad.ckpt")
    error = run(COMMANDS[command].format(path="bad.ckpt")).error
    assert named in error and "bad.ckpt" in error
    assert "evil" not in sys.modules
    assert sorted(path.name for path in here.iterdir()) == ["bad.ckpt", "evil.py", "settings.yaml"]


def test_nor_what_an_exported_model_names(run, checkpoint, here, monkeypatch):
    monkeypatch.syspath_prepend(here)
    (here / "evil.py").write_text(EVIL)
    assert run(f"export --ckpt_path {checkpoint} --out model").code == 0
    config = json.loads((here / "model/config.json").read_text())
    (here / "model/config.json").write_text(json.dumps(config | {"mixer": {"name": "evil.Mixer"}}))
    assert "evil.Mixer" in run("lm_eval --tasks no_such_task --device cpu --ckpt_path model").error
    assert not (here / "marker").exists()


PARTS = """
from mixers.ham import HAM
from mixers import Router, register_mixer, register_router


@register_router("{router}")
class ByLength(Router):
    def forward(self, inputs):
        return inputs.v.norm(dim=-1)


@register_mixer("{mixer}")
class Mine(HAM):
    pass
"""


@pytest.fixture
def parts(here, monkeypatch):
    """The name of a module of the user's, which registers a mixer and a router; forgotten again afterwards."""
    name = f"parts_of_{here.name}"
    (here / f"{name}.py").write_text(PARTS.format(router="by_length", mixer="mine"))
    monkeypatch.syspath_prepend(here)
    yield name
    forget(name)


def forget(module):
    """As in a new process, nothing of it is registered."""
    sys.modules.pop(module, None)
    MIXERS._registered.pop("mine", None)
    ROUTERS._registered.pop("by_length", None)


@pytest.mark.parametrize(
    ("as_file", "commands"),
    [(False, FIT + ONE), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((True, FIT + ONE), (False, ALL)))],
)
def test_a_plug_in_is_asked_for_again_and_by_its_class(run, here, tiny, parts, as_file, commands):
    given = f"./{parts}.py" if as_file else parts
    result = run(f"fit {tiny} --plugin {given} --mixer mine --router by_length")
    assert result.code == 0, result.err
    path = "runs/mine-text-1/checkpoints/last.ckpt"
    assert f"--plugin {given}" in result.out.partition("next:")[2]
    saved = torch.load(path, weights_only=True)
    for options in (saved["hyper_parameters"], saved["recipe"]["model"]["init_args"]):
        assert options["mixer"]["name"] == f"{parts}.Mine"
        assert options["router"]["name"] == f"{parts}.ByLength"
    for command in commands:
        forget(parts)
        shutil.rmtree("new", ignore_errors=True)
        line = COMMANDS[command].format(path=path).replace("no_such_task", "")
        assert f"add --plugin {parts}" in run(line).error
        if command in ("fit", "test", "generate", "export"):  # all open it by the same function
            result = run(f"{line} --plugin {given}")
            assert result.code == 0, (line, result.err)


def test_the_next_commands_name_what_was_given_as_class_paths(run, here, tiny, parts):
    (here / "mine.yaml").write_text(f"model: {{init_args: {{router: {{name: {parts}.ByLength}}}}}}")
    result = run(f"fit {tiny} --config mine.yaml")
    assert result.code == 0 and result.out.partition("next:")[2].count(f"--plugin {parts}\n") == 3
    forget(parts)
    assert f"add --plugin {parts}" in run("test --ckpt_path last").error


@pytest.mark.parametrize("as_file", [False, True])
def test_what_a_plug_in_registers_is_listed(run, here, parts, as_file):
    result = run(f"ls routers --plugin {f'./{parts}.py' if as_file else parts}")
    assert result.code == 0 and ["by_length", f"{parts}:ByLength"] in [
        line.split()[:2] for line in result.out.splitlines()
    ]
