"""Fitting a checkpoint's KV thresholds to data of one's own."""

from itertools import islice
from pathlib import Path

from mixers.registry import SpecError


def calibrate(
    ckpt_path: str = "last",
    text: list[str] | None = None,
    kv_usage: float | None = None,
    batches: int = 32,
    allocate: bool = False,
    out: str = "",
    root: str = "runs",
) -> None:
    """Refits the KV thresholds of a byte-level language model to text; weights stay as they are.

    Prints the usage before and after, and writes the checkpoint anew.

    Args:
        ckpt_path: the checkpoint; "last" is that of the newest run.
        text: files or folders; default: the training text of the checkpoint's own recipe.
        kv_usage: usage to hold, 0..1; default: as trained.
        batches: of 8192 bytes, at most.
        allocate: also fit, on four of them, which heads a small budget goes to; takes some minutes for a large model.
        out: file to write; default: beside the checkpoint, `<name>-calibrated.ckpt`.
        root: folder of runs, for "last".

    Raises:
        SpecError: no such checkpoint, of another kind of model, or of one without thresholds; the file cannot be
            written.
    """
    import torch

    import mixers
    from lit_modules.callbacks import ALLOCATION_BATCHES
    from lit_modules.data.text import TextData
    from mixers.threshold import thresholds_of
    from recipes.checkpoint.opening import open_checkpoint
    from recipes.results import written_whole

    if batches < 1:
        raise SpecError(f"batches must be at least 1, got {batches}")
    saved = open_checkpoint(ckpt_path, root=root)
    path = saved.path
    model = saved.language_model(of_bytes=True, kv_usage=kv_usage).to("cuda" if torch.cuda.is_available() else "cpu")
    if next(thresholds_of(model), None) is None:
        raise SpecError(f"{path}: the model has no KV threshold to calibrate")
    own = saved.recipe.get("data", {}).get("init_args", {})
    source = {key: own[key] for key in ("paths", "text_field") if key in own} | ({"paths": text} if text else {})
    data = TextData(batch_tokens=8192, **source)
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
    target = Path(out) if out else path.resolve().with_name(f"{path.stem}-calibrated.ckpt")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    checkpoint["state_dict"] = model.cpu().state_dict()
    checkpoint["hyper_parameters"]["kv_usage"] = asked
    with written_whole(target) as part:
        torch.save(checkpoint, part)
    after = _usage(model, some)
    print(f"{path}: KV usage on {len(some)} batches: {before:.3f}, now {after:.3f} for {asked:g}; written to {target}")


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
