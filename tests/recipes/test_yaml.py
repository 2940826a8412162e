"""Every recipe parses, and its model can be built and trained."""

import pytest

from lit_modules.data import DATA, MODELS
from recipes.flags import DATA_MODULES, recipes

# Their like is tried in every test run.
OTHERS = [f"mad_{name}" for name in ("noisy_recall", "fuzzy_recall", "compression", "memorization")] + ["mqar_zoology"]
SMALL = "--trainer.fast_dev_run true --trainer.enable_progress_bar false --model.dim 16 --model.depth 2"


@pytest.mark.parametrize("name", recipes())
def test_mixer_recipe(run, here, texts, name):
    data = f"--data.paths [{texts}] --data.held_out 0.3 --data.seq_len 32 --data.batch_tokens 64"
    result = run(f"fit --mixer {name} {data} --data.validation_tokens 64 --data.test_tokens 64 {SMALL}")
    assert (result.code, result.err) == (0, "")
    assert "bits per byte" in result.out
    assert not list(here.iterdir())  # fast_dev_run writes nothing


# All but tokens, which needs a tokenizer: see there.
TASKS = [pytest.param(name, marks=[pytest.mark.slow] * (name in OTHERS)) for name in DATA if name != "tokens"]


@pytest.mark.parametrize("name", TASKS)
def test_a_task_says_what_to_train(run, here, texts, name):
    drawn = "--data.batch_size 2 --data.num_validation 2"
    size = f"--data.paths {texts} --data.held_out 0.3" if name == "text" else drawn
    result = run(f"fit --data {name} --mixer gdn {size} {SMALL} --trainer.limit_val_batches 1")
    assert (result.code, result.err) == (0, "")


def test_a_task_names_its_model_its_metric_and_its_steps():
    for name in DATA:
        task = DATA_MODULES.get(name)
        assert task.model in MODELS and task.metric and task.defaults["steps"] > 0


def test_every_recipe_says_what_it_is():
    assert all(path.read_text().startswith("# ") for path in recipes().values())
