"""Methods of kvpress: the question is read with what is left of the context, the bytes are those asked for."""

import json
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import transformers

from lit_modules.data.ruler_tasks import Needle, RulerSample, ruler_samples
from mixers.hf import byte_tokenizer
from mixers.registry import SpecError
from recipes.retrofit import presses
from recipes.retrofit.contest import contest
from recipes.retrofit.presses import PRESSES, Pressed, make_press
from recipes.retrofit.scoring import recall

LENGTH, WINDOW, SINKS = 560, 8, 2
SIZES = dict(vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(num_key_value_heads=2, max_position_embeddings=2048)


class Every:
    """Has kvpress's protocol; keeps tokens in steps, so that what is left is known."""

    def __init__(self, **options):
        self.compression_ratio = None

    def places(self, tokens: int) -> torch.Tensor:
        count = int(tokens * (1 - self.compression_ratio))
        return torch.arange(count) * tokens // count

    @contextmanager
    def __call__(self, model):
        hooks = [layer.self_attn.register_forward_hook(self.hook, with_kwargs=True) for layer in model.model.layers]
        yield
        for hook in hooks:
            hook.remove()

    def hook(self, module, args, options, output):
        tokens = options["hidden_states"].shape[1]
        assert options["cache_position"].tolist() == list(range(tokens))
        layer = options["past_key_values"].layers[module.layer_idx]
        assert layer.keys.shape[2] == tokens
        layer.keys, layer.values = (x[:, :, self.places(tokens)] for x in (layer.keys, layer.values))


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """A model that can be told from another, and a test bed."""
    folder = tmp_path_factory.mktemp("presses")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    for weight in model.parameters():
        weight.data *= 3
    model.save_pretrained(folder / "host")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    tokenizer.save_pretrained(folder / "host")
    for part in ("prose/fit", "prose/test", "code/fit", "code/test"):
        (folder / "bed" / part).mkdir(parents=True)
        (folder / "bed" / part / "one.txt").write_text(" ".join(map(str, range(200))))
    return folder


@pytest.fixture
def standin(monkeypatch):
    names = ("SnapKVPress", "ExpectedAttentionPress", "KeyDiffPress")
    package = SimpleNamespace(**dict.fromkeys(names, Every), AdaKVPress=lambda press: press)
    package.SUPPORTED_MODELS = (transformers.LlamaForCausalLM, transformers.MistralForCausalLM)
    monkeypatch.setattr(presses, "kvpress", lambda: package)


def pressed(host, name="keydiff"):
    one = Pressed(name, str(host / "host"), None, seed=0, window=WINDOW, sinks=SINKS)
    one.model.eval()
    return one


def prompts(count=2, length=LENGTH):
    return ruler_samples(Needle(), byte_tokenizer(), count=count, length=length)


@torch.no_grad()
def test_the_question_sees_what_is_left_of_the_context(host, standin):
    """The same as the host under a mask that hides from the question what was dropped."""
    one, [sample] = pressed(host), prompts(1)
    one.hold(0.5, LENGTH)
    found = one.read(sample)
    ids = torch.tensor([sample.prompt_ids + sample.answer_ids])
    at, tokens = sample.question_at, ids.shape[1]
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    dropped = torch.ones(at, dtype=torch.bool)
    dropped[one.press.places(at)] = False
    mask[at:, :at] &= ~dropped
    assert 0 < dropped.sum() < at
    count = len(sample.answer_ids)
    expected, whole = (
        one.model(input_ids=ids, attention_mask=m).logits[0, -count - 1 : -1] for m in (mask[None, None], None)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - whole).abs().max() > 0.01
    one.hold(1.0, LENGTH)
    torch.testing.assert_close(one.read(sample), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share", [0.4, 0.7, 1.0])
def test_bytes_are_those_asked_for(host, standin, share):
    one = pressed(host)
    one.hold(share, LENGTH)
    with one.meter() as meter:
        recall(one.model, prompts(3), read=one.read, progress=False)
    assert len(meter.kept) == 3 and meter.kept == meter.pages
    assert max(meter.tokens) <= LENGTH and one.state_bytes == 0
    for kept, tokens in zip(meter.kept, meter.tokens, strict=True):
        assert kept == round(share * tokens) * one.bytes_per_token


def run(host, out, **options):
    small = dict(seq_len=96, windows=1, code_windows=1, samples=2, calibration=2, window=WINDOW, sinks=SINKS)
    small |= dict(usages=[0.5, 0.1], tasks=["prose", "single"], methods=["host", "snapkv"], lengths=[LENGTH])
    contest(str(host / "host"), str(host / "bed"), {0: "none"}, str(out), **small | options)
    return json.loads((out / "results.json").read_text())["rows"]


def test_a_contest_has_their_recall_alone(host, standin, tmp_path):
    rows = run(host, tmp_path)
    assert [(row["method"], row["usage"], row["task"]) for row in rows] == [
        ("host", 1.0, "prose"), ("host", 1.0, "single"), ("snapkv", 0.5, "single"), ("snapkv", 0.1, "single"),
    ]  # fmt: skip
    half, tenth = rows[2:]
    assert half["usage_held"] == pytest.approx(0.5, abs=0.01) and len(half["per_sample"]) == 2
    assert "recall alone" in half["note"] and "recall alone" in (tmp_path / "table.md").read_text()
    assert tenth["value"] is None and "question and answer" in tenth["left_out"]


def test_without_the_package_the_others_run(host, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "kvpress", None)  # as if it was not installed
    rows = run(host, tmp_path, methods=["host", "snapkv", "keydiff"])
    assert {row["method"] for row in rows} == {"host"}
    [said] = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert "snapkv, keydiff" in said and "pip install --no-deps kvpress" in said
    with pytest.raises(SpecError, match="pip install --no-deps kvpress"):
        run(host, tmp_path / "alone", methods=["snapkv"])


def test_hosts_that_it_does_not_fit_are_refused(host, standin):
    one = pressed(host)
    one.model = transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=8))
    with pytest.raises(SpecError, match="MistralForCausalLM has layers with a window"):
        one.hold(0.5, LENGTH)
    one.model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9))
    with pytest.raises(SpecError, match="does not know GPT2LMHeadModel, but LlamaForCausalLM"):
        one.hold(0.5, LENGTH)


@pytest.mark.parametrize("name", PRESSES)
def test_the_real_ones(host, name):
    pytest.importorskip("kvpress")
    ids = torch.randint(256, (3, 200), generator=torch.Generator().manual_seed(0)).tolist()
    samples = [RulerSample("", ("x",), tuple(row[:-2]), tuple(row[-2:]), (2,), 196) for row in ids]
    one = pressed(host, name)
    one.hold(1.0, 200)
    with torch.no_grad():
        for sample in samples:
            whole = one.model(input_ids=torch.tensor([sample.prompt_ids + sample.answer_ids])).logits[0, -3:-1]
            torch.testing.assert_close(one.read(sample), whole, rtol=1e-4, atol=1e-4)
    one.hold(0.5, 200)
    with one.meter() as meter:
        recall(one.model, samples, read=one.read, progress=False)
    assert meter.kept == pytest.approx([100 * one.bytes_per_token] * 3) and meter.tokens == [200] * 3
    assert meter.pages == ([200 * one.bytes_per_token] * 3 if name == "adakv" else meter.kept)
    with pytest.raises(SpecError, match="question and answer"):
        one.hold(0.02, 200)
        one.read(samples[0])
    assert type(make_press(name, window=WINDOW, sinks=SINKS)).__module__.startswith("kvpress.")


def test_a_mask_that_cannot_be_made_is_named(host):
    pytest.importorskip("kvpress")
    one = pressed(host, "adakv")
    one.hold(0.5, LENGTH)  # for a question of 100 tokens, in 8 dimensions, there is no key that none of them reads
    with pytest.raises(SpecError, match="adakv of kvpress: Could not find fake keys"), torch.no_grad():
        one.read(prompts(1)[0])
