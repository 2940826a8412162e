"""The largest recipe, as small as a CPU needs it, from files to a model: by commands alone, on two processes."""

import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = "--dim 32 --depth 2 --num_heads 2 --head_dim 8 --seq_len 512 --batch_tokens 1024"
DATA = "--data.held_out 0.1 --data.validation_tokens 4096 --data.test_tokens 4096 --data.batches_per_epoch 8"
STEPS = "--steps 12 --trainer.val_check_interval 4 --trainer.log_every_n_steps 1 --trainer.enable_progress_bar false"
TWO = "--trainer.accelerator cpu --devices 2 --strategy fsdp2"


@pytest.fixture
def sources(here):
    """Python's own sources as a Parquet file, and a BPE tokenizer trained on them."""
    import pyarrow
    from pyarrow import parquet
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
    texts = [file.read_text(encoding="utf-8") for file in files]
    parquet.write_table(pyarrow.table({"text": texts}), here / "sources.parquet")
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer, trained.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trained.train_from_iterator(texts[:20], trainers.BpeTrainer(vocab_size=1000, special_tokens=["<end>"]))
    trained.save(str(here / "tokenizer.json"))


def start(line):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "recipes", *line.split()]
    return subprocess.Popen(
        words, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_the_largest_recipe_from_files_to_a_model(run, here, sources):
    how = "--tokenizer tokenizer.json --eos_token <end> --paths [sources.parquet]"
    assert run(f"tokenize {how} --out tokens --seconds 0.1").code == 0
    process = start(f"fit --recipe ham_800m --data.paths tokens {SMALL} {DATA} {STEPS} {TWO}")
    folder = here / "runs/ham-tokens-1"
    while process.poll() is None and not (folder / "checkpoints/last.ckpt").exists():
        time.sleep(0.02)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    out = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL, out
    assert (folder / "checkpoints/last.ckpt/meta.pt").exists()  # a folder of shards
    resumed = start("fit --ckpt_path last")
    out = resumed.communicate()[0]
    assert resumed.returncode == 0 and "validation after 12 steps" in out, out
    last = here / "runs/ham-tokens-2/checkpoints/last.ckpt"
    for command, part in (
        ("test --ckpt_path last", "test/perplexity"),
        ("sweep --ckpt_paths [last] --kv_usages [0,0.5] --out sweep", "written to sweep"),
        (f"convert --ckpt_path {last} --out whole.ckpt", "written to whole.ckpt"),
        ("export --ckpt_path last --out exported", "written to exported"),
        ("generate --ckpt_path last --prompt import --max_new_tokens 8", "import"),
        ("generate --ckpt_path exported --prompt import --max_new_tokens 8", "import"),
    ):
        result = run(command)
        assert result.code == 0 and part in result.out, (command, result)
