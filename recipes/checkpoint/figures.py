"""What a model keeps, drawn from a checkpoint: of a text, or of facts."""

import json
from pathlib import Path
from typing import Any

import torch

from kernels.dispatch import CHOSEN
from mixers.registry import SpecError, check_positive
from mixers.threshold import check_usage, set_kv_usage, thresholds_of
from recipes.checkpoint import figure_recall
from recipes.results import stamp, write_json

COLUMNS = 88
STORED = "#d1495b"


def figures(
    ckpt_path: str,
    text: str = "",
    tokens: int = 1056,
    kv_usages: list[float] | None = None,
    out: str = "",
) -> None:
    """Draws what a model keeps.

    Of a byte-level one: a text, shaded where it is stored, and how the KV cache grows along it. Of one that was
    trained on recall (mqar): facts that are told, told again and changed.

    Args:
        ckpt_path: checkpoint of a model with a router.
        text: file to read; default: a module of the standard library, of which the test split may hold no part.
        tokens: bytes of it to show.
        kv_usages: usages to draw the growth of the cache at; the shading is at the model's own.
        out: PNG to write; the figures go into a JSON file of the same name. Default: runs/figures/<run>.png.

    Raises:
        SpecError: no such checkpoint or text, or of a model without a router or of another task.
    """
    from lit_modules.data.mqar import MQARData
    from lit_modules.language_model import BYTES
    from recipes.checkpoint.opening import open_checkpoint

    check_positive(tokens=tokens)
    usages = [check_usage(usage) for usage in kv_usages or [0.5, 0.25, 0.1]]
    saved = open_checkpoint(ckpt_path)
    model = saved.language_model()
    recall = saved.build_data() if saved.data == f"{MQARData.__module__}.{MQARData.__name__}" else None
    path = Path(out or f"runs/figures/{saved.folder.name}.png")
    if model.hparams["vocab_size"] != BYTES and not recall:
        raise SpecError(f"{ckpt_path}: the model reads neither bytes nor the facts of mqar")
    if next(thresholds_of(model), None) is None:
        raise SpecError(f"{ckpt_path}: the model has no router, so there is nothing to draw")
    if recall and (text or kv_usages):
        raise SpecError(f"{ckpt_path} was trained on recall: --text and --kv_usages are for models that read bytes")
    content = Path(text or textwrap_path())
    if not content.is_file():
        raise SpecError(f"no such file: {content}")
    stamped = stamp()  # before the repository is dirty with these files
    path.parent.mkdir(parents=True, exist_ok=True)
    if recall:
        shown = figure_recall.figure(model.decoder, recall.num_keys, recall.num_values, path)
        said = ", ".join(f"{part} {share:.1%}" for part, share in shown["kept"].items())
    else:
        shown = _of_text(model, content, tokens, usages, path)
        said = f"{content.name}: {shown['kv_usage']:.1%}"
    asked = {"asked": next(thresholds_of(model)).kv_usage}
    ran = {"backends": dict(CHOSEN)}
    hparams = json.loads(json.dumps(dict(model.hparams), default=str))
    write_json(path.with_suffix(".json"), stamped | ran | {"model": hparams} | asked | shown)
    print(f"kept of all keys and values: {said}; written to {path}")


def _of_text(model, file: Path, tokens: int, usages: list[float], path: Path) -> dict[str, Any]:
    """Draws a text; returns what is shown as plain numbers."""
    content = file.read_bytes()[:tokens]
    asked = next(thresholds_of(model)).kv_usage
    stored = _stored(model.decoder, content)  # (T, heads of all layers)
    growth = {}
    for usage in usages:
        set_kv_usage(model, usage)
        growth[usage] = _stored(model.decoder, content).mean(-1).cumsum(0)
    set_kv_usage(model, asked)
    _draw(content, stored, growth, asked, path)
    shown = {"text": file.name, "kv_usage": float(stored.mean()), "kept_per_token": stored.mean(-1).tolist()}
    return shown | {"kept_at_the_end": {str(usage): float(kept[-1]) for usage, kept in growth.items()}}


def textwrap_path() -> str:
    """A file that every Python has."""
    import textwrap

    return textwrap.__file__


@torch.no_grad()
def _stored(decoder, content: bytes) -> torch.Tensor:
    """(T, heads of all layers) float: 1 where a head stores a byte."""
    out = decoder(torch.tensor([list(content)]))
    return torch.cat([r.stored[0].float() for r in out.routing if r is not None], -1)


def _draw(content: bytes, stored: torch.Tensor, growth: dict[float, torch.Tensor], asked: float, path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    cells = _layout(content)
    lines = max(line for line, _, _, _ in cells) + 1
    share = stored.mean(-1)
    figure = Figure(figsize=(10, 0.17 * lines + 3.2), layout="constrained")
    page, chart = figure.subplots(2, 1, height_ratios=[0.17 * lines, 2.4])
    for line, column, token, character in cells:
        shade = Rectangle((column, line), 1, 1, color=STORED, alpha=0.85 * float(share[token]) ** 0.7, lw=0)
        page.add_patch(shade)
        page.text(column + 0.5, line + 0.55, character, family="monospace", fontsize=7.5, ha="center", va="center")
    page.set(xlim=(0, COLUMNS), ylim=(lines, 0))
    page.axis("off")
    page.set_title(
        f"The redder a byte, the more of the {stored.shape[1]} heads store its key and value: {share.mean():.0%} of "
        f"this text ({asked:.0%} were asked for, on the text it was trained on)",
        fontsize=9,
        loc="left",
    )
    length = len(content)
    chart.plot(range(1, length + 1), range(1, length + 1), color="black", lw=1, label="softmax attention")
    for usage, kept in growth.items():
        chart.plot(range(1, length + 1), kept, lw=1.4, label=f"HAM, KV usage {usage:g}")
    chart.axhline(0, color="#30638e", lw=1, ls="--", label="recurrent memory alone")
    chart.set(
        xlabel="bytes read", ylabel="keys and values\nkept per head", xlim=(0, length), ylim=(-0.02 * length, length)
    )
    chart.legend(fontsize=8, frameon=False)
    chart.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)


def _layout(content: bytes) -> list[tuple[int, int, int, str]]:
    """(line, column, token, character) of every byte; long lines are folded, line ends shown."""
    cells, line, column = [], 0, 0
    for token, byte in enumerate(content):
        character = "\u21b5" if byte == 10 else chr(byte) if 32 <= byte < 127 else "\u00b7"
        cells.append((line, column, token, character))
        column += 1
        if byte == 10 or column == COLUMNS:
            line, column = line + 1, 0
    return cells
