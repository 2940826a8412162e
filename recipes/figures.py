"""What HAM keeps of a text, drawn from a checkpoint."""

import json
from pathlib import Path

import torch

from mixers.base import Routing
from mixers.registry import SpecError
from mixers.threshold import set_kv_usage
from recipes.results import stamp, write_json

COLUMNS = 88
STORED = "#d1495b"


def figures(
    ckpt_path: str,
    text: str = "",
    tokens: int = 1056,
    kv_usages: list[float] | None = None,
    out: str = "docs/ham.png",
) -> None:
    """Draws a text, shaded where the model stores it, and below how the KV cache grows along it.

    Args:
        ckpt_path: checkpoint of a byte-level language model with a router.
        text: file to read; default: a module of the standard library, of which the test split may hold no part.
        tokens: bytes of it to show.
        kv_usages: usages to draw the growth of the cache at; the shading is at the model's own.
        out: PNG to write; the figures go into a JSON file of the same name.
    """
    from lit_modules.language_model import LanguageModel
    from recipes.checkpoints import read

    path = Path(text or textwrap_path())
    if not path.is_file() or not Path(ckpt_path).is_file():
        raise SpecError(f"no such file: {path if Path(ckpt_path).is_file() else ckpt_path}")
    model = read(Path(ckpt_path)).load(LanguageModel).eval()
    content = path.read_bytes()[:tokens]
    usages = kv_usages or [0.5, 0.25, 0.1]
    own = _routing(model.decoder, content)
    if not own:
        raise SpecError(f"{ckpt_path}: the model has no router, so there is nothing to draw")
    growth = {}
    for usage in usages:
        set_kv_usage(model, usage)
        growth[usage] = (
            torch.cat([r.stored[0].float() for r in _routing(model.decoder, content)], -1).mean(-1).cumsum(0)
        )
    stored = torch.cat([r.stored[0].float() for r in own], -1)  # (T, heads of all layers)
    stamped = stamp()  # before the repository is dirty with these files
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    _draw(content, stored, growth, Path(out))
    figures = {"kv_usage": float(stored.mean()), "kept_per_token": stored.mean(-1).tolist()}
    figures["kept_at_the_end"] = {str(usage): float(kept[-1]) for usage, kept in growth.items()}
    hparams = json.loads(json.dumps(dict(model.hparams), default=str))
    write_json(Path(out).with_suffix(".json"), stamped | {"text": path.name, "model": hparams} | figures)
    print(f"{path.name}: {stored.mean():.1%} of all keys and values kept; written to {out}")


def textwrap_path() -> str:
    """A file that every Python has."""
    import textwrap

    return textwrap.__file__


@torch.no_grad()
def _routing(decoder, content: bytes) -> list[Routing]:
    return [r for r in decoder(torch.tensor([list(content)])).routing if r is not None]


def _draw(content: bytes, stored: torch.Tensor, growth: dict[float, torch.Tensor], path: Path) -> None:
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
        f"What HAM keeps: the redder a byte, the more of the {stored.shape[1]} heads store its key and value "
        f"({share.mean():.0%} in all)",
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
