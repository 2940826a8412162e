"""`recipes retrofit` from end to end on a small model, as a user runs it."""

import json

import pytest
import torch

pytest.importorskip("transformers")

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
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, intermediate_size=48, **sizes))
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


@pytest.mark.parametrize("reads", [3, 10, 19, 27, 34])
def test_a_killed_retrofit_goes_on_where_it_was(host, tmp_path, monkeypatch, reads):
    """Killed in each of its phases: 8 reads of the first, 8 of the second, ..."""
    monkeypatch.setattr(run, "SAVE_EVERY", 0)
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
    "text too short": (dict(seq_len=100_000), "no text is as long as a window of 100000 tokens"),
    "too few": (dict(sequences=500), "not 250"),
    "no text": (dict(text="[nowhere.txt]"), "nowhere.txt"),
    "window": (dict(kv_usage=0.05), "kv_usage 0.05 cannot be held: window and sinks alone are 0.104 of 96 tokens"),
    "usage": (dict(kv_usage=1.5), "kv_usage"),
    "repeat": (dict(repeat=2), "repeat"),
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
