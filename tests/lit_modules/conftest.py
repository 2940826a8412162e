import lightning.pytorch as pl
import pytest
import torch

from lit_modules.data.mqar import MQARData
from lit_modules.language_model import LanguageModel


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def make_trainer(tmp_path):
    """A quiet CPU trainer; options override its defaults."""

    def make(**options):
        defaults = {
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": tmp_path,
        }
        return pl.Trainer(**defaults | options)

    return make


@pytest.fixture
def make_model():
    """A tiny language model; options override its defaults."""

    def make(**options):
        torch.manual_seed(0)
        ham = {"name": "ham", "num_heads": 2, "head_dim": 8}
        return LanguageModel(**{"vocab_size": 33, "dim": 16, "depth": 2, "mixer": ham, "warmup_steps": 2} | options)

    return make


@pytest.fixture
def make_mqar():
    """A tiny recall task with a vocabulary of 33; options override its defaults."""

    def make(**options):
        sizes = {"num_pairs": 4, "num_keys": 16, "num_values": 16, "curriculum": [2, 4], "batch_size": 4}
        counts = {"batches_per_epoch": 5, "num_validation": 6, "num_test": 6}
        return MQARData(**sizes | counts | options)

    return make
