"""One command for every picture of a checkpoint: which there are, what each may be asked, and where it is written."""

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

from mixers.registry import SpecError, check_positive, unknown
from mixers.threshold import check_usage
from recipes.pictures import check_ending, save
from recipes.results import stamp, write_json

MOST_RUNS = 8

# What there is to draw. Each is a function of `Saved` (of several, for a curve) and those of the command's options that
# it has; it returns the picture, what it shows as plain numbers, and a clause to print.
PICTURES = {
    "kept": "recipes.figures.kept:kept",
    "error": "recipes.figures.needle:error",
    "scores": "recipes.figures.scores:scores",
    "gate": "recipes.figures.gate:gate",
    "heads": "recipes.figures.heads:heads",
    "curve": "recipes.figures.curve:curve",
}


def figures(
    ckpt_path: list[str] | str = "last",
    what: str = "kept",
    text: str | None = None,
    tokens: int | None = None,
    kv_usages: list[float] | None = None,
    sequences: int | None = None,
    out: str = "",
) -> None:
    """Draws what a trained model does: a picture, and the numbers in it as JSON.

    kept: what is stored of a text, or of facts that are told, told again and changed (models trained on mqar).
    error: how badly the memory predicts a needle in predictable filler (the paper's Fig. 3; models of bytes).
    scores: the router's mean score by position and layer over many sequences, and their spread (Fig. 4).
    gate: scores and the decay gate alpha along a sequence, resets (alpha < .05) marked (Fig. 5).
    heads: which layers and heads use a KV budget, at several budgets.
    curve: loss and KV usage over training, of up to 8 runs.
    The paper's Fig. 2, loss or accuracy over KV usage, is what `sweep` draws of trained models, and `compare` of the
    routers and references that it trains.

    Args:
        ckpt_path: checkpoint; "last" is that of the newest run. For a curve also a list: [one.ckpt,another.ckpt].
        what: kept, error, scores, gate, heads or curve.
        text: file to read, for kept and gate of a model of bytes; default: a module of the standard library, of which
            the test split may hold no part.
        tokens: how many to read, for kept, error (default 1056) and gate (default 384), where a model of other tokens
            than bytes reads as many of its first test sequence.
        kv_usages: for kept, usages to draw the growth of the cache at (default .5, .25, .1; the shading is at the
            model's own); for heads, those of the columns (default .0625, .125, .25, .5).
        sequences: for scores and heads, how many of the test split to read: default 1000, or as many as there are.
        out: picture to write, .png or .svg; the numbers go into a JSON file of the same name. Default:
            runs/figures/<run>.png for kept, runs/figures/<run>-<what>.png for the others.

    Raises:
        SpecError: no such checkpoint, text or picture; an option that the picture does not have; a model that it does
            not fit.
    """
    from recipes.checkpoint.opening import open_checkpoint

    if what not in PICTURES:
        raise unknown("picture", what, PICTURES, of=" (--what)")
    module, _, function = PICTURES[what].partition(":")
    draw = getattr(importlib.import_module(module), function)
    given = {"text": text, "tokens": tokens, "kv_usages": kv_usages, "sequences": sequences}
    given = {name: value for name, value in given.items() if value is not None}
    _check(what, given, [name for name in inspect.signature(draw).parameters if name != "saved"])
    paths = [ckpt_path] if isinstance(ckpt_path, str) else ckpt_path
    most = MOST_RUNS if what == "curve" else 1
    if not 1 <= len(paths) <= most:
        raise SpecError(f"--what {what} draws {'1 checkpoint' if most == 1 else f'1..{most}'}, got {len(paths)}")
    saved = [open_checkpoint(path) for path in paths]
    suffix = "" if what == "kept" else f"-{what}"
    path = check_ending(Path(out or f"runs/figures/{saved[0].folder.name}{suffix}.png"))
    stamped = stamp()  # before the repository is dirty with these files
    figure, shown, said = draw(saved if what == "curve" else saved[0], **given)
    of = [{"ckpt_path": str(one.path), "step": one.step, "model": _plain(one.hparams)} for one in saved]
    save(figure, path)
    made = {"what": what} | (of[0] if most == 1 else {"of": of})
    write_json(path.with_suffix(".json"), stamped | _ran() | made | shown)
    print(f"{said}; written to {path}")


def _check(what: str, given: dict[str, Any], known: list[str]) -> None:
    """Raises SpecError for an option that the picture does not have, or one out of its range."""
    for name in given:
        if name not in known:
            takes = ", ".join(f"--{option}" for option in known) or "no option but --out"
            raise SpecError(f"--{name} is not for --what {what}, which takes {takes}")
    check_positive(**{name: given[name] for name in ("tokens", "sequences") if name in given})
    for usage in given.get("kv_usages", []):
        check_usage(usage)
    if given.get("kv_usages") == []:
        raise SpecError("--kv_usages names no usage")


def _ran() -> dict[str, Any]:
    """The backends that were chosen until now."""
    from kernels.dispatch import CHOSEN

    return {"backends": dict(CHOSEN)}


def _plain(hparams: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(hparams), default=str))
