"""What each picture of a checkpoint says, in the numbers beside it, and what it refuses."""

import csv
import json
import shutil

import pytest
import torch

from lit_modules.data.ruler_tasks import ruler_sample
from mixers.backbone import Decoder
from mixers.registry import SpecError
from recipes.figures.needle import SAMPLE, running_mean
from recipes.figures.reading import prediction_errors, rounded, sequences_in
from recipes.figures.scores import Positions
from recipes.pictures import spread


@pytest.fixture
def drawn(run, checkpoint, tmp_path):
    """drawn("--what scores") -> the JSON beside the picture."""

    def _drawn(options: str, ckpt_path=checkpoint) -> dict:
        out = tmp_path / "drawn.png"
        result = run(f"figures --ckpt_path {ckpt_path} --out {out} {options}")
        assert result.code == 0 and f"written to {out}" in result.out, result.err
        assert out.read_bytes()[:4] == b"\x89PNG" and out.stat().st_size > 5000
        return json.loads(out.with_suffix(".json").read_text())

    return _drawn


def test_errors_along_a_needle(drawn, run, checkpoint):
    shown = drawn("--what error --tokens 600")
    sample = ruler_sample("niah_single_1", lambda text: list(text.encode()), length=600, index=SAMPLE)
    parts = {part: sample.prompt[slice(*place)] for part, place in shown["parts"].items()}
    assert parts["needle"].startswith("One of the special magic numbers") and parts["needle"].endswith(".")
    assert parts["number"] == sample.answers[0] and parts["number"] in parts["needle"]
    assert parts["question"].startswith("What is") and parts["needle"] in parts["filler"]
    assert shown["tokens"] == len(sample.prompt) <= 600
    assert [*shown["error"]] == [*shown["score"]] == ["layer0", "layer1"]
    for layer, errors in shown["error"].items():
        assert len(errors) == shown["tokens"] and errors[0] == 1 and 0 <= min(errors) <= max(errors) <= 2
        first, end = shown["parts"]["needle"]
        assert shown["mean_error"][layer]["needle"] == pytest.approx(sum(errors[first:end]) / (end - first), abs=1e-4)
        begin, last = shown["parts"]["filler"]
        filler = errors[begin:first] + errors[end:last]
        assert shown["mean_error"][layer]["filler"] == pytest.approx(sum(filler) / len(filler), abs=1e-4)
    few = run(f"figures --ckpt_path {checkpoint} --what error --tokens 450").error
    assert "tokens 450 are too few for filler that repeats; try 628" in few
    assert "tokens: length 99 is too short" in run(f"figures --ckpt_path {checkpoint} --what error --tokens 99").error


def test_prediction_errors_are_the_cosine_routers_scores_whatever_the_router():
    torch.manual_seed(0)
    tokens = torch.randint(256, (2, 20))
    errors = {}
    for router in ("cosine", "random"):  # the second asks for no predictions
        torch.manual_seed(0)
        ham = {"name": "ham", "num_heads": 2, "head_dim": 8, "router": router}
        decoder = Decoder(256, dim=16, depth=3, mixer=[ham, "attention", "gdn"]).eval()
        with torch.no_grad(), prediction_errors(decoder) as found:
            routing = decoder(tokens).routing
        assert [*found] == [0, 2]
        errors[router] = found[0]
        assert not any(block.mixer.memory._forward_hooks for block in decoder.blocks[::2])
        if router == "cosine":
            torch.testing.assert_close(found[0], routing[0].scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(errors["cosine"], errors["random"])
    with (
        pytest.raises(SpecError, match="no layer of the model has a recurrent memory"),
        prediction_errors(Decoder(256, dim=16, depth=1, mixer="attention")),
    ):
        pass


def test_scores_by_position(drawn):
    shown = drawn("--what scores --sequences 5")
    counts = shown["sequences_per_position"]
    assert shown["sequences"] == counts[0] == 5 and counts == sorted(counts, reverse=True) and len(counts) == 32
    for layer in ("layer0", "layer1"):
        assert len(shown[layer]["mean"]) == len(shown[layer]["std"]) == 32 and min(shown[layer]["std"]) >= 0
    assert shown["layer0"]["tau"] == shown["layer1"]["tau"]  # one threshold for the model


def test_sequences_of_unequal_length_count_where_they_are():
    positions = Positions()
    positions.add(torch.tensor([1.0, 2.0]))
    positions.add(torch.tensor([3.0, 2.0, 5.0]))
    count, mean, std = (each.tolist() for each in positions.summary())
    assert (count, mean, std) == ([2, 2, 1], [2, 2, 5], [1, 0, 0])


def test_sequences_are_found_in_rows_in_packed_ones_and_between_padding():
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    assert sequences_in({"tokens": tokens}) == [(0, slice(0, 4)), (1, slice(0, 4))]
    bounds = torch.tensor([0, 1, 4], dtype=torch.int32)
    assert sequences_in({"tokens": tokens[:1], "cu_seqlens": bounds}) == [(0, slice(0, 1)), (0, slice(1, 4))]
    mask = torch.tensor([[False, True, True, True], [True, False, False, False]])
    assert sequences_in({"tokens": tokens, "padding_mask": mask}) == [(0, slice(1, 4)), (1, slice(0, 1))]


def test_scores_and_gate_along_a_text(drawn, recall):
    shown = drawn("--what gate --tokens 50")
    assert shown["of"] == "textwrap.py" and shown["tokens"] == 50
    for layer in (shown["layer0"], shown["layer1"]):
        assert len(layer["scores"]) == len(layer["alpha"]) == 50
        assert layer["stored_at"] == [i for i, score in enumerate(layer["scores"]) if score > layer["tau"]]
        assert layer["resets_at"] == [i for i, alpha in enumerate(layer["alpha"]) if alpha < 0.05]
        assert layer["resets_by_head"][layer["head"]] == len(layer["resets_at"])
    other = drawn("--what gate --tokens 7", recall / "runs/ham-mqar-1/checkpoints/last.ckpt")
    assert other["tokens"] == 7 and other["layer0"]["scores"] == [None] * 7  # of `all`: infinite
    assert other["layer0"]["stored_at"] == [*range(7)]


def test_usage_by_head(drawn):
    shown = drawn("--what heads --sequences 5 --kv_usages [1.0,0.0,0.5]")["kv_usages"]
    assert [column["asked"] for column in shown] == [0, 0.5, 1]
    none, half, whole = (column["by_head"] for column in shown)
    assert {head["kv_usage"] for head in none.values()} == {0} and {head["kv_usage"] for head in whole.values()} == {1}
    usages = [head["kv_usage"] for head in half.values()]
    assert [*half] == [f"layer{layer}/head{head}" for layer in range(2) for head in range(len(usages) // 2)]
    assert sum(usages) / len(usages) == pytest.approx(shown[1]["kv_usage"], abs=1e-4)
    assert sum(head["share"] for head in half.values()) == pytest.approx(1, abs=1e-3)


def test_learning_curves(drawn, run, recall, checkpoint, tmp_path):
    log = checkpoint.parents[1] / "metrics.csv"
    with log.open(newline="") as file:
        losses = [[int(row["step"]), float(row["val/loss"])] for row in csv.DictReader(file) if row["val/loss"]]
    alone = drawn("--what curve")["runs"]["ham-text-1"]
    assert alone["val/loss"] == losses and alone["train/loss"] and alone["val/kv_usage"]

    other = tmp_path / "elsewhere/ham-text-1"
    shutil.copytree(checkpoint.parents[1], other, symlinks=True)
    both = drawn("--what curve", f"[{checkpoint},{other}/checkpoints/last.ckpt]")
    assert [*both["runs"]] == ["runs/ham-text-1", "elsewhere/ham-text-1"] and len(both["of"]) == 2

    (other / "metrics.csv").write_text("step\n")
    line = f"figures --out {tmp_path}/no.png --what curve --ckpt_path"
    assert "has no losses yet" in run(f"{line} {other}/checkpoints/last.ckpt").error
    (other / "metrics.csv").write_text("step,train/loss\n1,high\n")
    assert "is no log of losses" in run(f"{line} {other}/checkpoints/last.ckpt").error
    (other / "metrics.csv").unlink()
    assert "no such file" in run(f"{line} {other}/checkpoints/last.ckpt").error
    assert "same run" in run(f"{line} [{checkpoint},{checkpoint}]").error
    foreign = recall / "runs/gdn-mqar-1/checkpoints/last.ckpt"
    assert "different data" in run(f"{line} [{checkpoint},{foreign}]").error
    assert not (tmp_path / "no.png").exists()
    assert [*drawn("--what curve", foreign)["runs"]["gdn-mqar-1"]] == [
        "train/loss",
        "val/loss",
    ]


REFUSED = [
    ("TEXT --what score", "unknown picture 'score'"),
    ("TEXT --what scores --text a.txt", "--text is not for --what scores, which takes --sequences"),
    ("TEXT --what error --kv_usages [0.5]", "--kv_usages is not for --what error, which takes --tokens"),
    ("TEXT --what curve --tokens 5", "which takes no option but --out"),
    ("TEXT --what scores --sequences 0", "sequences must be at least 1"),
    ("TEXT --what heads --kv_usages [2]", "kv_usage"),
    ("TEXT --what heads --kv_usages []", "--kv_usages names no usage"),
    ("TEXT --what gate --text nowhere.txt", "no such file: nowhere.txt"),
    ("TEXT --out some.gif", "a picture ends in .png or .svg"),
    ("[TEXT,TEXT] --what gate", "--what gate draws 1 checkpoint, got 2"),
    ("HAM --what error", "is no language model of bytes"),
    ("HAM --what gate --text nowhere.txt", "--text is for models that read bytes"),
    ("HAM --what scores", "the router of layer 0 gives no finite scores"),
    *((f"GDN --what {what}", "the model has no router") for what in ("kept", "scores", "gate", "heads")),
]


@pytest.mark.parametrize(("line", "said"), REFUSED, ids=[line for line, _ in REFUSED])
def test_what_does_not_fit_is_refused_in_a_line(run, here, checkpoint, recall, line, said):
    for name, path in {"TEXT": checkpoint, "HAM": "ham-mqar-1", "GDN": "gdn-mqar-1"}.items():
        line = line.replace(name, str(recall / f"runs/{path}/checkpoints/last.ckpt" if name != "TEXT" else path))
    assert said in run(f"figures --ckpt_path {line}").error
    assert not list(here.iterdir())


def test_a_picture_is_of_the_kind_that_its_name_says(run, checkpoint, here):
    assert run(f"figures --ckpt_path {checkpoint} --what curve --out curve.svg").code == 0
    assert "<svg" in (here / "curve.svg").read_text() and (here / "curve.json").exists()
    assert run(f"figures --ckpt_path {checkpoint} --what curve").code == 0
    assert (here / "runs/figures/ham-text-1-curve.png").exists()


def test_small_helpers():
    assert running_mean(torch.tensor([0.0, 0.0, 4.0, 0.0]), 2).tolist() == [0, 0, 2, 2]
    assert spread(3, 6) == [0, 1, 2] and spread(24, 6) == [0, 5, 9, 14, 18, 23]
    assert rounded(torch.tensor([[1 / 3, torch.inf], [torch.nan, -0.5]])) == [[0.33333, None], [None, -0.5]]
