"""Fitting a checkpoint's KV thresholds to data of one's own."""

from itertools import islice
from pathlib import Path
from typing import Any

from lit_modules.data import DATA
from mixers.registry import SpecError

USUAL = {"seq_len": 512, "batch_tokens": 8192}  # seq_len of checkpoints that do not say theirs
TEXT, TOKENS = (DATA[name].replace(":", ".") for name in ("text", "tokens"))


def calibrate(
    ckpt_path: str = "last",
    text: list[str] | str | None = None,
    kv_usage: float | None = None,
    batches: int = 32,
    allocate: bool = False,
    out: str = "",
    root: str = "runs",
) -> None:
    """Refits the KV thresholds of a language model to text; weights stay as they are.

    Prints the usage before and after, and writes the checkpoint, or the folder of a Hugging Face model, anew.

    Args:
        ckpt_path: the checkpoint of a language model of bytes or of `--data tokens`, "last" is that of the newest run;
            or the folder of a Hugging Face model, such as `recipes retrofit` writes.
        text: file or folder, or a list of such, for a model of bytes; default: what the checkpoint was trained on. A
            folder needs it.
        kv_usage: usage to hold, 0..1; default: as trained.
        batches: of 8192 bytes, at most, in pieces as long as in training, as usage depends on the length; of tokens, as
            in training; of a folder, of four windows of 2048 tokens or as
            many as the model reads.
        allocate: also fit, on four of them, which heads a small budget goes to; takes some minutes for a large model.
        out: file or folder to write; default: beside the checkpoint, `<name>-calibrated.ckpt`, or `<name>-calibrated`.
        root: folder of runs, for "last".

    Raises:
        SpecError: no such checkpoint, of another kind of model, or of one without thresholds; the file cannot be
            written.
    """
    import torch

    import mixers
    from lit_modules.callbacks import ALLOCATION_BATCHES
    from lit_modules.sharded import load_whole
    from mixers.threshold import thresholds_of
    from recipes.checkpoint.model_folder import is_model_folder
    from recipes.checkpoint.opening import CALIBRATED, open_checkpoint
    from recipes.results import written_whole

    text = [text] if isinstance(text, str) else text
    if batches < 1:
        raise SpecError(f"batches must be at least 1, got {batches}")
    if is_model_folder(ckpt_path):
        return _calibrate_folder(ckpt_path, text, kv_usage, batches, allocate, out)
    saved = open_checkpoint(ckpt_path, root=root)
    path = saved.path
    model = saved.language_model(of_bytes=saved.data != TOKENS, kv_usage=kv_usage)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    if not any(threshold.follows_usage for threshold in thresholds_of(model)):
        raise SpecError(f"{path}: the model has no KV threshold to calibrate")
    data = _data(saved, text)
    data.setup("fit")
    device = model.decoder.embedding.weight.device
    some = [
        {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
        for batch in islice(data.train_dataloader(), batches)
    ]
    before = _usage(model, some)
    if allocate:
        first, best = mixers.allocate(model.eval().decoder, some[:ALLOCATION_BATCHES], model.loss, progress=True)
        print(f"mean loss at KV usages 1/16, 1/8 and 1/4: {first:.4f}, allocated {best:.4f}")
    mixers.calibrate(model.decoder, some, run=model.decode)
    asked = next(thresholds_of(model)).kv_usage
    target = Path(out) if out else path.resolve().with_name(f"{path.stem}{CALIBRATED}.ckpt")
    checkpoint = load_whole(path)
    checkpoint["state_dict"] = model.cpu().state_dict()
    if kv_usage is not None:  # layers may have been trained at usages of their own
        checkpoint["hyper_parameters"]["kv_usage"] = asked
    with written_whole(target) as part:
        torch.save(checkpoint, part)
    after = _usage(model, some)
    usages = " and ".join(f"{usage:g}" for usage in dict.fromkeys(t.kv_usage for t in thresholds_of(model)))
    what = f"{path}, in pieces of at most {data.seq_len} tokens: KV usage on {len(some)} batches"
    print(f"{what}: {before:.3f}, now {after:.3f} for {usages}; written to {target}")


def _data(saved: Any, text: list[str] | None) -> Any:
    """The text, or what a `recipes.checkpoint.saved.Saved` was trained on."""
    from lit_modules.data.text import TextData

    if saved.data == TOKENS:
        if text:
            raise SpecError(f"{saved.path} reads tokens: it is calibrated on its own data, without --text")
        return saved.token_data()
    if not text and saved.data not in (None, TEXT):
        raise SpecError(f"{saved.path} was trained on {saved.data}, which is no text: give --text")
    own = saved.recipe.get("data", {}).get("init_args", {})
    alike = {key: own[key] for key in ("paths", "text_field", "seq_len") if key in own}
    return TextData(**(USUAL | alike | ({"paths": text} if text else {})))


def _calibrate_folder(
    path: str, text: list[str] | None, kv_usage: float | None, batches: int, allocate: bool, out: str
) -> None:
    """As `calibrate`, of the folder of a Hugging Face model."""
    import torch

    import mixers
    from lit_modules.callbacks import ALLOCATION_BATCHES
    from mixers.threshold import thresholds_of
    from recipes.checkpoint.model_folder import LENGTH, open_folder
    from recipes.checkpoint.opening import CALIBRATED
    from recipes.results import written_whole

    if not text:
        raise SpecError(f"{path} does not say what it was trained on: give --text")
    target = Path(out) if out else Path(path).resolve().with_name(f"{Path(path).resolve().name}{CALIBRATED}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise SpecError(f"--out {target} exists and is not an empty folder")
    opened = open_folder(path, kv_usage=kv_usage).routed()
    model = opened.model.to("cuda" if torch.cuda.is_available() else "cpu")
    some = opened.windows(text, LENGTH, count=4 * batches).to(model.device).split(4)

    def read(ids: torch.Tensor) -> Any:
        return model(input_ids=ids, use_cache=False, logits_to_keep=1)

    before = _usage_of_folder(model, some, read)
    if allocate:
        first, best = mixers.allocate(
            model, some[:ALLOCATION_BATCHES], lambda ids: model(input_ids=ids, labels=ids).loss, progress=True
        )
        print(f"mean loss at KV usages 1/16, 1/8 and 1/4: {first:.4f}, allocated {best:.4f}")
    mixers.calibrate(model, some, run=read)
    after = _usage_of_folder(model, some, read)
    with written_whole(target) as part:
        model.cpu().save_pretrained(part)
        opened.tokenizer.save_pretrained(part)
    asked = next(thresholds_of(model)).kv_usage
    print(f"{path}: KV usage on {len(some)} batches: {before:.3f}, now {after:.3f} for {asked:g}; written to {target}/")


def _usage_of_folder(model, batches, read) -> float:
    import torch

    from recipes.checkpoint.model_folder import usage_of

    with torch.no_grad(), usage_of(model) as kept:
        for batch in batches:
            read(batch)
    return kept()


def _usage(model, batches) -> float:
    import torch

    kept = tokens = 0.0
    with torch.no_grad():
        for batch in batches:
            batch = {name: x.to(model.device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
            for routing in model.eval().decode(batch).routing:
                if routing is not None:
                    kept += float(routing.kept.sum())
                    tokens += float(routing.lengths.sum()) * len(routing.kept)
    return kept / tokens
