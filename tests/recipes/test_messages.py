import warnings

import pytest

from recipes import __main__ as main
from recipes.messages import one_line, show_warning

NESTED = """Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'lightning.pytorch.core.module.LightningModule'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'toy.Toy':
        {}
    - Expected a <class 'NoneType'>
  Given value type: <class 'jsonargparse._util.NestedArg'>
  Given value: NestedArg(key='mixr', val='x')"""
UNION = """Parser key "kv_usage":
          Does not validate against any of the Union subtypes
          Subtypes: [<class 'float'>, <class 'NoneType'>]
          Errors:
            - Expected a <class 'float'>
            - Expected a <class 'NoneType'>
          Given value type: <class 'str'>
          Given value: abc"""


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (NESTED.format("Option 'z_loss' is not accepted"), "model: Option 'z_loss' is not accepted"),
        ("unrecognized arguments: --modl 3", "unrecognized arguments: --modl 3. Did you mean --model?"),
        (
            NESTED.format("Option 'mixr' is not accepted"),
            "model: Option 'mixr' is not accepted. Did you mean --model.mixer?",
        ),
        (NESTED.format(UNION), "model.kv_usage: expected float, got abc"),
        ("Parser key \"trainer.max_steps\":\n  Expected a <class 'int'>. Got value: x", None),
        ("Parser key \"model.init_args.dim\":\n  Expected a <class 'int'>. Got value: x", None),
        ("two\nlines", "two lines"),
        ("one line", "one line"),
    ],
)
def test_one_line(message, expected):
    line = one_line(message, known=["model", "model.mixer", "z_loss"])
    assert "\n" not in line
    if expected:
        assert line == expected
    else:
        key = message.split('"')[1].replace("init_args.", "")
        assert line == f"{key}: Expected a int. Got value: x"


def test_a_warning_is_one_line_above_the_bar(capsys):
    from tqdm import tqdm

    with warnings.catch_warnings(), tqdm(total=2, unit="step") as bar:
        warnings.simplefilter("always")
        warnings.showwarning = show_warning
        bar.update()
        warnings.warn("two\n  lines", stacklevel=1)
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert "warning: two lines" in lines
    assert all(not line.strip() or line.strip().endswith("]") for line in lines if line != "warning: two lines")


def test_every_command_warns_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(main, "run", lambda command, args: warnings.warn(f"{command}\nis odd", stacklevel=1))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        main.main(["ls"])
    assert capsys.readouterr().err == "warning: ls is odd\n"


def test_an_error_stands_on_a_line_of_its_own_behind_a_bar(capsys, monkeypatch):
    from tqdm import tqdm

    from mixers.registry import SpecError

    def stops(*_):
        stops.bar = tqdm(total=2, unit="step")  # as a run that an error ends leaves it
        stops.bar.update()
        raise SpecError("no more")

    monkeypatch.setattr(main, "run", stops)
    assert main.main(["fit"]) == 2
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert lines[-1] == "error: no more" and "1/2" in lines[-2]
