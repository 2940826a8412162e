"""Runs the command line in this process: starting another one costs ten seconds of imports."""

import json
import random
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import pytest
from matplotlib.figure import Figure

import lit_modules.callbacks
import lit_modules.routing_monitor
from lit_modules.generation import generate
from mixers.calibration import calibrate
from recipes.__main__ import main

TINY = (
    "--steps 6 --model.dim 16 --model.depth 2 --data.seq_len 32 --data.batch_tokens 64 --data.held_out 0.3"
    " --data.validation_tokens 128 --data.test_tokens 256 --trainer.val_check_interval 4"
    " --trainer.enable_progress_bar false"
)

CALIBRATED = 4  # batches that thresholds are fitted to at the end of a run, in place of 16
PIECES = "--data.seq_len 32 --data.batch_tokens 64 --data.held_out 0.3 --data.validation_tokens 256"
TOKENS = (
    f"--data tokens --data.paths DATA/texts.jsonl --data.tokenizer DATA/tokenizer.json --data.eos_token <e> {PIECES}"
)
TASKS = {
    "mqar": "--data mqar --data.num_pairs 2 --data.num_keys 8 --data.num_values 8 --data.num_validation 8",
    "text": f"--data.paths [DATA/text.txt] {PIECES}",
    "tokens": TOKENS,
    "workers": f"{TOKENS} --data.num_workers 2",
}
STEPS = "--steps 6 --model.dim 16 --model.depth 2 --trainer.val_check_interval 2 --trainer.enable_progress_bar false"


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of a refusal."""
        assert self.code == 2, (self.code, self.err)
        lines = self.err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), self.err
        assert "Traceback" not in self.err
        return lines[0].removeprefix("error: ")


def calibrate_little(model, batches, **options):
    return calibrate(model, islice(batches, CALIBRATED), **options)


@contextmanager
def cheap_ends():
    """Runs end with a calibration, a picture and a sample, which cost most and have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lit_modules.callbacks, "generate", lambda *args, **kw: generate(*args, **kw | {"num_tokens": 4}))
        patch.setattr(lit_modules.callbacks, "calibrate", calibrate_little)
        patch.setattr(lit_modules.routing_monitor, "routing_figure", lambda *args, **kw: Figure(figsize=(1, 1)))
        yield


@pytest.fixture(autouse=True)
def every_run_ends_cheaply():
    with cheap_ends():
        yield


@pytest.fixture(autouse=True)
def workers_of_a_comparison_are_forked(monkeypatch):
    """From a process that has imported everything, see `tests.recipes.processes`."""

    def context(method):
        from tests.recipes.processes import FORKS

        return FORKS

    monkeypatch.setattr("recipes.compare.pool.get_context", context)


@pytest.fixture
def run(capsys):
    """run("fit --mixer ham") -> Result. Words are split at spaces."""

    def _run(line: str) -> Result:
        capsys.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # as Python does for its users
            try:
                code = main(line.split())
            except SystemExit as exit:
                code = exit.code or 0
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return _run


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A folder of three small texts, the same on every machine."""
    folder = tmp_path_factory.mktemp("texts")
    for name in ("one", "two", "three"):
        (folder / f"{name}.txt").write_text(sentences(name))
    return folder


def sentences(seed: str) -> str:
    """8000 bytes of sentences; `random()` draws the same for a seed in every version of Python."""
    rng = random.Random(seed)
    words = ["a", "memory", "predicts", "what", "the", "next", "token", "says", "and", "stores", "surprise"]
    drawn = [words[int(rng.random() * len(words))] for _ in range(2500)]
    return ". ".join(" ".join(drawn[i : i + 9]).capitalize() for i in range(0, len(drawn), 9))[:8000]


@pytest.fixture(scope="session")
def tiny(texts):
    """Flags for a HAM that trains in a second."""
    return f"{TINY} --data.paths [{texts}]"


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory):
    """The folder in which a tiny HAM was trained; its run is runs/ham-text-1."""
    folder = tmp_path_factory.mktemp("trained")
    every_step = "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint --trainer.callbacks.save_top_k=-1"
    every_step += " --trainer.callbacks.every_n_train_steps=1 --trainer.callbacks.filename=all-{step}"
    with pytest.MonkeyPatch.context() as patch, cheap_ends():
        patch.chdir(folder)
        assert main(f"fit {tiny} {every_step}".split()) == 0
    return folder


@pytest.fixture
def checkpoint(trained):
    """The last checkpoint of that run."""
    return trained / "runs/ham-text-1/checkpoints/last.ckpt"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def line_of(tmp_path_factory):
    """line_of(task) -> a `fit` of six steps with a validation after every two; tasks: mqar, text, tokens, workers."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("data")
    texts = [". ".join(random.Random(i).sample(sentences("a").split(". "), 3)) for i in range(120)]
    (folder / "text.txt").write_text("\n".join(texts))
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel()
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, special_tokens=["<e>"]))
    trained.save(str(folder / "tokenizer.json"))
    return lambda task: f"fit {STEPS} {TASKS[task]}".replace("DATA", str(folder))
