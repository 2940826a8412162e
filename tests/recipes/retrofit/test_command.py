"""`recipes retrofit` from end to end on a small model, as a user runs it."""

import json

import pytest
import torch

import mixers.hf  # noqa: F401
from mixers import set_kv_usage
from mixers.hf import byte_tokenizer
from mixers.retrofit import parts_of
from recipes.__main__ import main
from recipes.retrofit import run

SENTENCE = "The quick brown fox number {} jumps over the lazy dog and comes back for bone {}. "


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, intermediate_size=48, max_position_embeddings=8192, **sizes))
    folder = tmp_path_factory.mktemp("retrofit")
    model.save_pretrained(folder / "host")
    byte_tokenizer().save_pretrained(folder / "host")
    for kind in ("one", "two"):
        (folder / f"{kind}.txt").write_text("".join(SENTENCE.format(i, kind) for i in range(40)))
    return folder


def words(host, out, **options):
    given = {"model": host / "host", "text": f"[{host}/one.txt,{host}/two.txt]", "out": out}
    given |= dict(seq_len=96, sequences=8, window=8, sinks=2, hidden=4, distill=3) | options
    return ["retrofit", *(word for key, value in given.items() for word in (f"--{key}", str(value)))]


def opened(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_a_retrofit_is_a_folder_that_keeps_the_host_and_takes_any_usage(host, tmp_path, capsys):
    out = tmp_path / "ham"
    assert main(words(host, out)) == 0
    said = capsys.readouterr().out
    assert "8 sequences of 96 tokens: about" in said and "GiB" in said and f"written to {out}" in said
    model, before = opened(out), opened(host / "host")
    ids = torch.randint(1, 200, (1, 64))
    assert {part.threshold.kv_usage for part in parts_of(model).values()} == {0.25}
    with torch.no_grad():
        set_kv_usage(model, 1.0)
        torch.testing.assert_close(model(ids).logits, before(ids).logits, rtol=1e-4, atol=1e-5)
        set_kv_usage(model, 0.25)
        assert not torch.equal(model(ids).logits, before(ids).logits)
        assert model.generate(ids, max_new_tokens=3).shape == (1, 67)
    facts = json.loads((out / "retrofit.json").read_text())
    assert facts["plan"]["seq_len"] == 96 and set(facts["explained"]) == set(parts_of(model))
    assert not out.with_name("ham.progress").exists()


class Killed(BaseException):
    """As a signal: nothing catches it."""


@pytest.mark.parametrize(
    ("reads", "every"),
    [
        (19, 0),
        *(pytest.param(*at, marks=pytest.mark.slow) for at in ((3, 0), (10, 1000), (27, 1000), (34, 0), (34, 1000))),
    ],
)
def test_a_killed_retrofit_goes_on_where_it_was(host, tmp_path, monkeypatch, reads, every):
    """Killed in each of its phases, right after progress was kept or long after: 8 reads of the first, 8 of ..."""
    monkeypatch.setattr(run, "SAVE_EVERY", every)
    count = 0

    def read_then_die(cls):
        read = cls.read

        def counted(self, ids):
            nonlocal count
            if count == reads:
                raise Killed
            count += 1
            read(self, ids)

        return counted

    stages = (run.Sensitivity, run.Forecast, run.ReadOut, run.MemoryFit, run.Distillation)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert main(words(host, whole)) == 0
    with monkeypatch.context() as patch:
        for cls in stages:
            patch.setattr(cls, "read", read_then_die(cls))
        with pytest.raises(Killed):
            main(words(host, resumed))
    assert not resumed.exists() and resumed.with_name("resumed.progress").exists()
    count = -1000
    assert main(words(host, resumed)) == 0
    a, b = opened(whole).state_dict(), opened(resumed).state_dict()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-4, atol=1e-5, msg=name)


MISTAKES = {
    "no model": (dict(model="nowhere/at/all"), "nowhere/at/all is no causal language model"),
    "text too short": (dict(seq_len=4096), "no text is as long as a window of 4096 tokens"),
    "too few": (dict(sequences=500), "not 250"),
    "no text": (dict(text="[nowhere.txt]"), "nowhere.txt"),
    "window": (dict(kv_usage=0.05), "kv_usage 0.05 cannot be held: window and sinks alone are 0.104 of 96 tokens"),
    "usage": (dict(kv_usage=1.5), "kv_usage"),
    "repeat": (dict(repeat=2), "repeat"),
    "distill": (dict(distill=-1), "distill must be a number of at least 0, got -1"),
    "nothing to read": (dict(text="[]"), "8 sequences of 0 texts"),
    "fewer than texts": (dict(sequences=1), "1 sequences of 2 texts"),
    "window too long": (dict(window=40, kv_usage=0.5), "seq_len 96 is too short"),
    "one text, no brackets": (dict(text="nowhere.txt"), "data path 'nowhere.txt' cannot be read"),
    "positions": (dict(seq_len=10_000), "was made for: 8192 tokens"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(host, tmp_path, capsys, mistake):
    options, message = MISTAKES[mistake]
    out = tmp_path / "ham"
    assert main(words(host, out, **options)) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and message in error[0]
    assert not list(tmp_path.iterdir())


def test_another_plan_does_not_go_on_from_this_one(host, tmp_path, monkeypatch, capsys):
    def die(self, ids):
        raise Killed

    out = tmp_path / "ham"
    with monkeypatch.context() as patch:
        patch.setattr(run.Forecast, "read", die)
        with pytest.raises(Killed):
            main(words(host, out))
    assert main(words(host, out, seed=1)) == 2
    assert "is of another retrofit (seed=0)" in capsys.readouterr().err
    assert main(words(host, out)) == 0
    assert main(words(host, out)) == 2
    assert "exists already" in capsys.readouterr().err


def killed_at(patch, stage, read):
    """Makes a stage die at its `read`-th call."""
    before, count = stage.read, 0

    def counted(self, ids):
        nonlocal count
        count += 1
        if count == read:
            raise Killed
        before(self, ids)

    patch.setattr(stage, "read", counted)


def test_what_a_phase_came_to_is_kept_as_it_was_while_the_next_goes_on(host, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "SAVE_EVERY", 0)
    kept = {}
    for read in (1, 3):
        out = tmp_path / str(read)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_at(patch, run.Distillation, read)
            main(words(host, out))
        kept[read] = torch.load(out.with_name(f"{out.name}.progress") / "progress.pt")["memory"]["memories"]
    assert kept[3]
    torch.testing.assert_close(kept[3], kept[1], rtol=0, atol=0)


def test_time_is_counted_from_the_first_start(host, tmp_path, monkeypatch):
    out = tmp_path / "ham"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, run.Forecast, 1)
        main(words(host, out))
    file = tmp_path / "ham.progress" / "progress.pt"
    state = torch.load(file)
    torch.save(state | {"seconds": 3600.0, "peak_gib": 1000.0}, file)
    assert main(words(host, out)) == 0
    facts = json.loads((out / "retrofit.json").read_text())
    assert 60 < facts["minutes"] < 70 and facts["peak_gib"] == 1000


def test_damaged_progress_is_one_line(host, tmp_path, capsys):
    file = tmp_path / "ham.progress" / "progress.pt"
    file.parent.mkdir()
    for content in (b"", b"PK\x03\x04 cut off"):
        file.write_bytes(content)
        assert main(words(host, tmp_path / "ham")) == 2
        assert f"{file} cannot be read" in capsys.readouterr().err
        assert file.read_bytes() == content


def test_a_folder_that_cannot_be_written_is_told_before_the_work(host, tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    assert main(words(host, tmp_path / "file" / "ham")) == 2
    captured = capsys.readouterr()
    assert "cannot be written" in captured.err and "minutes" not in captured.out


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_a_host_in_half_precision_is_fitted_in_full(host, tmp_path, dtype):
    before = opened(host / "host").to(dtype)
    before.save_pretrained(tmp_path / "host")
    byte_tokenizer().save_pretrained(tmp_path / "host")
    assert main(words(host, tmp_path / "ham", model=tmp_path / "host")) == 0
    after = opened(tmp_path / "ham")
    assert after.dtype == dtype
    weights = after.state_dict()
    for name, value in before.state_dict().items():
        assert torch.equal(weights[name], value), name
    memories = [part.memory for part in parts_of(after).values()]
    assert all(p.isfinite().all() for memory in memories for p in memory.parameters())
    assert all(memory.out_map.any() for memory in memories)


def test_dropout_of_attention_is_switched_off_aloud(tmp_path, host, capsys):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(GPT2Config(vocab_size=256, **sizes)).save_pretrained(tmp_path / "gpt2")
    byte_tokenizer().save_pretrained(tmp_path / "gpt2")
    assert main(words(host, tmp_path / "ham", model=tmp_path / "gpt2")) == 0
    assert "attn_pdrop: set to 0" in capsys.readouterr().out
    assert opened(tmp_path / "ham").config.attn_pdrop == 0


def test_text_is_documents_as_everywhere(host, tmp_path):
    """A binary file in a folder is not read as text, and a line of a .jsonl file is its text alone."""
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"\x89PNG\0" * 1000)
    (folder / "b.jsonl").write_text(json.dumps({"text": "abcd" * 40}) + "\n")
    plan = run.Plan("", [str(folder)], 64, 2, 0, 0.25, 8, 2, True, 0, 0, 0)
    ids = run.read_text(plan, byte_tokenizer())
    letters = byte_tokenizer()("abcd", add_special_tokens=False)["input_ids"]
    assert ids.tolist() == [letters * 16] * 2
