"""Trained models along the dial: loss and accuracy at many KV usages, and the curve of what each budget costs."""

import logging
import warnings
from pathlib import Path
from typing import Any

from mixers.registry import SpecError

USAGES = [0.0, 0.0625, 0.125, 0.25, 0.5, 0.75, 1.0]


def sweep(
    ckpt_paths: list[str] | None = None,
    kv_usages: list[float] | None = None,
    long: int = 0,
    text: list[str] | str | None = None,
    out: str = "runs/sweep",
    root: str = "runs",
) -> None:
    """Tests checkpoints at several KV usages, each on the test split of the data it was trained on.

    The thresholds are read from the table that training left; `recipes calibrate` would fit them anew. Folders of
    Hugging Face models, such as `recipes retrofit` writes, are tested on a text of yours: perplexity of a token in up
    to 32 windows of 2048 tokens, or as many as the model reads.

    Args:
        ckpt_paths: one or several, such as one model trained with `--budget any` and some trained at a usage; "last" is
            that of the newest run, and the default. Or one or several folders.
        kv_usages: stored tokens / tokens, 0..1. Default: 0, 1/16, 1/8, 1/4, 1/2, 3/4, 1.
        long: also read that many test tokens as one sequence at each usage, and weigh the cache.
        text: file or folder that folders are tested on, or a list of such.
        out: folder for results.json, table.md and curve.png.
        root: folder of runs, for "last".
    """
    from mixers.threshold import check_usage
    from recipes.checkpoint.model_folder import is_model_folder
    from recipes.compare.curve import curve_table, draw_curves
    from recipes.results import stamp, write_json

    if long < 0:
        raise SpecError(f"long must be a number of tokens, got {long}")
    text = [text] if isinstance(text, str) else text
    usages = [check_usage(usage) for usage in kv_usages or USAGES]
    paths = ckpt_paths or ["last"]
    folders = [path for path in paths if is_model_folder(path)]
    if folders and len(folders) < len(paths):
        raise SpecError(f"{folders[0]} is the folder of a Hugging Face model, others are checkpoints: not one task")
    if bool(folders) != bool(text):
        raise SpecError("--text goes with folders of Hugging Face models, and they need it; checkpoints have their own")
    rows = _folder_rows(folders, usages, text, long) if folders else _checkpoint_rows(paths, usages, long, root)
    labels = [row["label"] for row in rows]
    rows = [row | {"label": row["ckpt_path"]} if labels.count(row["label"]) > 1 else row for row in rows]
    by_label = {row["label"]: [row] for row in rows}
    folder, stamped = Path(out), stamp()
    folder.mkdir(parents=True, exist_ok=True)
    text = curve_table(by_label) + (_weights_table(rows, long) if long else "")
    (folder / "table.md").write_text(text + "\n")
    write_json(folder / "results.json", stamped | {"kv_usages": usages, "runs": rows})
    draw_curves(by_label, folder / "curve.png")
    print(f"\n{text}\n\nwritten to {folder}/")


def _checkpoint_rows(paths: list[str], usages: list[float], long: int, root: str) -> list[dict[str, Any]]:
    """What each checkpoint gives at each usage."""
    from tqdm import tqdm

    from recipes.checkpoint.opening import open_checkpoint

    found = [open_checkpoint(path, root=root) for path in paths]
    loaded = [_load(saved) for saved in found]
    metrics = {metric for *_, metric in loaded}
    if len(metrics) > 1:
        raise SpecError(f"the checkpoints are of different tasks: {', '.join(sorted(metrics))}")
    texts = {saved.path: _first_tokens(data, long) for saved, (_, data, _) in zip(found, loaded, strict=True) if long}
    rows = []
    with tqdm(total=len(found) * len(usages), unit="test") as bar:
        for saved, (model, data, metric) in zip(found, loaded, strict=True):
            points = []
            for usage in usages:
                bar.set_postfix_str(f"{saved.folder.name} at {usage:g}")
                points.append(
                    {"asked": usage}
                    | _test(model, data, usage)
                    | (_weigh(model.eval().decoder, texts[saved.path].to(model.device)) if long else {})
                )
                bar.update()
            own = _test(model, data, None)
            options = {"budget": model.hparams.get("budget", "fixed")}
            label = f"{saved.folder.name} ({'any budget' if model.budget else 'fixed'})"
            row = {"label": label, "ckpt_path": str(saved.path), "metric": metric, "options": options, "curve": points}
            rows.append(row | own)
    return rows


def _folder_rows(folders: list[str], usages: list[float], text: list[str], long: int) -> list[dict[str, Any]]:
    """What the model of each folder gives at each usage."""
    import torch
    from tqdm import tqdm

    from mixers.threshold import thresholds_of
    from recipes.checkpoint.model_folder import LENGTH, WINDOWS, AsDecoder, open_folder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = [(opened := open_folder(path).routed(), opened.windows(text, LENGTH, count=WINDOWS)) for path in folders]
    for opened, _ in loaded:
        if long > (opened.longest or long):
            raise SpecError(f"{opened.path} reads at most {opened.longest:,} tokens, less than --long {long:,}")
    whole = {opened.path: opened.windows(text, long, count=1) for opened, _ in loaded if long}
    rows = []
    with tqdm(total=len(folders) * len(usages), unit="test") as bar:
        for opened, windows in loaded:
            model, path = opened.model.to(device), opened.path
            own = next(thresholds_of(model)).kv_usage
            points = []
            for usage in usages:
                bar.set_postfix_str(f"{path.name} at {usage:g}")
                points.append({"asked": usage} | _test_text(model, windows, usage))
                if long:
                    points[-1] |= _weigh(AsDecoder(model), whole[path].to(device))
                bar.update()
            row = {"label": path.name, "ckpt_path": str(path), "metric": "perplexity", "options": {"budget": "any"}}
            rows.append(row | {"windows": [*windows.shape], "curve": points} | _test_text(model, windows, own))
            model.cpu()
    return rows


def _test_text(model, windows, usage: float) -> dict[str, float]:
    """Perplexity at a usage, and the usage that it came to."""
    from mixers.threshold import set_kv_usage
    from recipes.checkpoint.model_folder import usage_of
    from recipes.retrofit.scoring import perplexity

    set_kv_usage(model, usage)
    with usage_of(model) as kept:
        score = perplexity(model, windows, progress=False)
    return {"perplexity": score.perplexity, "kv_usage": kept()}


def _load(saved) -> tuple[Any, Any, str]:
    """(model, data, metric) of a checkpoint."""
    from lit_modules.language_model import BYTES
    from mixers.threshold import thresholds_of

    data, model = saved.build_data(), saved.load()
    if next(thresholds_of(model), None) is None:
        raise SpecError(f"{saved.path}: the model has no KV usage to set")
    model.trained_usages = [threshold.kv_usage for threshold in thresholds_of(model)]  # layers may have their own
    usual = "bits_per_byte" if saved.hparams.get("vocab_size") == BYTES else "accuracy"
    return model, data, getattr(data, "metric", usual)


def _test(model, data, usage: float | None) -> dict[str, float]:
    """Metrics at a usage, or at that of training."""
    import lightning.pytorch as pl

    from mixers.threshold import set_kv_usage, thresholds_of

    if usage is None:
        for threshold, trained in zip(thresholds_of(model), model.trained_usages, strict=True):
            threshold.set_usage(trained)
    else:
        set_kv_usage(model, usage)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, devices=1)
        values = trainer.test(model, data, verbose=False)[0]
    return {name.removeprefix("test/"): value for name, value in values.items() if "layer" not in name}


def _first_tokens(data, count: int):
    """The first `count` tokens (1, count) of the test split, documents end to end."""
    import torch

    data.prepare_data()
    data.setup("test")
    tokens, have = [], 0
    for batch in data.test_dataloader():
        tokens.append(batch["tokens"].flatten())
        have += len(tokens[-1])
        if have >= count:
            return torch.cat(tokens)[None, :count]
    raise SpecError(f"the test split has {have:,} tokens, less than the {count:,} asked for; see --data.test_tokens")


def _weigh(decoder, tokens) -> dict[str, float]:
    """What is held after reading tokens (1, T), prefilled in chunks.

    Bytes of keys and values, pages and all, and those as a share of what softmax attention with these heads would hold.
    """
    from lit_modules.generation import Continuation
    from mixers.state import full_kv_bytes

    read = Continuation(decoder, tokens)
    all_of_it = full_kv_bytes(read.state)
    return {"long": tokens.shape[1], "kv_bytes": read.kv_cache_bytes, "of_attention": read.kv_cache_bytes / all_of_it}


def _weights_table(rows: list[dict[str, Any]], count: int) -> str:
    from recipes.results import markdown_table

    lines = [
        [row["label"], f"{p['asked']:g}", f"{p['kv_bytes']:,}", f"{p['of_attention']:.3f}"]
        for row in rows
        for p in row["curve"]
    ]
    header = [f"cache after {count:,} tokens", "KV usage", "bytes of keys and values", "of softmax attention's"]
    return "\n\n" + markdown_table(header, lines)
