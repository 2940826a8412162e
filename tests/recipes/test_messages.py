import pytest

from recipes.messages import one_line

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
    line = one_line(message, known=["model", "model.mixer"])
    assert "\n" not in line
    if expected:
        assert line == expected
    else:
        key = message.split('"')[1].replace("init_args.", "")
        assert line == f"{key}: Expected a int. Got value: x"
