"""Models of other mixers that are as large as one."""

import pytest
import torch

from lit_modules.base import with_options
from lit_modules.language_model import LanguageModel
from mixers import SpecError
from recipes import flags
from recipes.bench.model_cost import model_cost
from recipes.matching import matched

VOCABULARY = 50_304


def shape(size):
    """(mixer's options, model's) of a recipe."""
    given = flags.parse(["--recipe", size])
    model = given.recipe()["model"]["init_args"]
    return given.options, {"dim": model["dim"], "depth": model["depth"]}


def parameters(mixer, **options):
    with torch.device("meta"):
        return sum(p.numel() for p in LanguageModel(vocab_size=VOCABULARY, mixer=mixer, **options).parameters())


@pytest.mark.parametrize(
    "size", [pytest.param(size, marks=pytest.mark.slow) if size == "ham_400m" else size for size in flags.sizes()]
)
@pytest.mark.parametrize("name", ["attention", "gdn", "gdn,attention"])
def test_parameters_are_equal_to_a_percent(name, size):
    heads, options = shape(size)
    mixer, ham = with_options(name, **heads), with_options("ham", **heads)
    found = matched("parameters", mixer, ham, **options)
    wanted = parameters(ham, **options)
    assert parameters(mixer, **options, mlp_ratio=found.mlp_ratio) == pytest.approx(wanted, rel=0.01)
    if name == "attention":
        assert parameters(mixer, **options) < 0.95 * wanted and f"{found.size / 1e6:.4g} M" in str(found)


@pytest.mark.parametrize("name", ["attention", "gdn"])
def test_operations_are_equal_to_a_percent(name):
    heads, options = shape("ham_150m")
    mixer, ham = with_options(name, **heads), with_options("ham", **heads)
    found = matched("flops", mixer, ham, **options, seq_len=4096)
    rest = options | {"vocab_size": VOCABULARY, "seq_len": 4096, "batch_tokens": 4096, "precision": "32-true"}
    one, other = model_cost(mixer=mixer, mlp_ratio=found.mlp_ratio, **rest), model_cost(mixer=ham, **rest)
    assert one.forward == pytest.approx(other.forward, rel=0.01)


def test_what_cannot_be_matched_is_refused():
    for arguments, message in (
        (("bytes", "gdn", "ham"), "unknown match 'bytes'; known: parameters, flops"),
        (("flops", "gdn", "ham"), "no seq_len"),
        (("parameters", "ham", "attention"), "with the least MLPs the model has"),
    ):
        with pytest.raises(SpecError, match=message):
            matched(*arguments, dim=64, depth=2, mlp_ratio=0)


def test_fit_says_and_trains_what_it_matched(run, here, tiny):
    result = run(f"fit {tiny} --dim 64 --steps 1 --mixer attention --match parameters")
    assert result.code == 0 and "matches ham with mlp_ratio" in result.out
    ratio = torch.load("runs/attention-text-1/checkpoints/last.ckpt", weights_only=True)["hyper_parameters"][
        "mlp_ratio"
    ]
    assert ratio > 2.7 and f"mlp_ratio {ratio:.4g}:" in result.out
    assert "--match is of a new model" in run("fit --ckpt_path last --match parameters").error
    assert "goes with --match" in run(f"fit {tiny} --match_to gdn").error


def test_cost_plans_what_is_matched(run):
    plan = "cost --recipe ham_150m --seq_len 1024 --batch_tokens 1024"
    whole, alone, both = (
        run(f"{plan} --mixer {rest}").out for rest in ("ham", "attention", "attention --match parameters")
    )
    size = {out: float(out.partition("parameters ")[2].split()[0]) for out in (whole, alone)}
    assert size[alone] < 0.95 * size[whole] and both.startswith("matches ham with mlp_ratio")
    line = next(line for line in both.splitlines() if line.startswith("parameters"))
    assert float(line.split()[1]) == pytest.approx(size[whole], rel=0.01)


def test_compare_matches_every_contestant(run, here):
    options = '--data mqar --data_options {"num_pairs":4,"num_test":8} --steps 1 --seeds 1 --jobs 1'
    result = run(f"compare --mixers [ham,gdn] {options} --match parameters")
    assert result.code == 0, result.err
    assert result.out.count("mlp_ratio") == 2
