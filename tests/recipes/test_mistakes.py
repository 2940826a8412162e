"""A mistake is one line on stderr and exit code 2, and leaves no folder behind."""

import pytest
import torch


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("--mixer hamm", ["unknown mixer 'hamm'", "Did you mean 'ham'?"]),
        ("--mixer no.such.Mixer", ["no.such"]),
        ("--mixer torch.nn.Linear", ["no mixer"]),
        ("--mixer gdn --config ham.yaml", ["--mixer gdn contradicts ham", "leave one out"]),
        ("--mixer ham --model.mixer gdn", ["--mixer ham contradicts gated_delta_net", "--model.mixer"]),
        ("--router cosin", ["unknown router 'cosin'", "Did you mean 'cosine'?"]),
        ("--router cosine --mixer gdn", ["router", "gated_delta_net"]),
        ("--router learned --model.router.form z", ["form", "'z'"]),
        ("--model.mixer.num_head 4", ["unknown option 'num_head'", "Did you mean 'num_heads'?"]),
        ("--model.mixer.num_heads two", ["num_heads", "'two'"]),
        ("--model.mixer.threshold calibratd", ["threshold", "Did you mean 'calibrated'?"]),
        ("--model.mixr gdn", ["model: Option 'mixr'", "Did you mean --model.mixer?"]),
        ("--model.depth two", ["model.depth", "two"]),
        ("--kv_usage 1.5", ["kv_usage", "1.5"]),
        ("--kv_usage lots", ["model.kv_usage", "lots"]),
        ("--data.paths [no_such_folder]", ["no_such_folder"]),
        ("--data.paths [empty.txt]", ["text"]),
        ("--data no/such", ["no/such", "does not exist"]),
        ("--data empty_folder", ["empty_folder", "no files"]),
        ("--data.paths empty.txt", ["empty.txt"]),
        ("--data txt", ["unknown data 'txt'", "Did you mean 'text'?"]),
        ("--data.seq_lem 3", ["seq_lem", "Did you mean --data.seq_len?"]),
        ("--data mqar --data.num_pairs 1000", ["num_pairs"]),
        ("--trainer.max_step 3", ["--trainer.max_step", "Did you mean --trainer.max_steps?"]),
        ("--trainer.accelerator abacus", ["abacus"]),
        ("--steps", ["--steps needs a value"]),
        ("--config no_such.yaml", ["no_such.yaml"]),
        ("--plugin no_such_module", ["no_such_module"]),
        ("--ckpt_path no_such.ckpt", ["no_such.ckpt"]),
        ("--ckpt_path empty.txt", ["empty.txt"]),
        ("--ckpt_path last", ["last", "runs"]),
        ("stray", ["stray"]),
    ],
)
def test_fit(run, here, line, parts):
    (here / "empty.txt").touch()
    (here / "ham.yaml").write_text("model: {init_args: {mixer: {name: ham}}}")
    (here / "empty_folder").mkdir()
    error = run(f"fit {line}").error
    assert [part for part in parts if part not in error] == []
    assert sorted(path.name for path in here.iterdir()) == ["empty.txt", "empty_folder", "ham.yaml"]


def test_mistake_that_shows_after_the_run_began(run, here):
    """What is in the files is known only once they are read, when the logger has made its folder."""
    (here / "short.txt").write_text("too short")
    assert "split" in run("fit --data.paths [short.txt]").error
    assert not list(here.glob("runs/*"))


def test_evaluation_needs_a_checkpoint(run, here):
    assert "--ckpt_path" in run("test --mixer ham").error


def test_file_that_is_no_checkpoint(run, here):
    torch.save({"state_dict": {}}, "weights.pt")
    assert "weights.pt" in run("test --ckpt_path weights.pt").error
