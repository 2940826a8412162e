"""A checkpoint of ours as a Hugging Face model: safetensors, config, and a line of code that finds the class."""

from pathlib import Path
from typing import TYPE_CHECKING

from mixers.registry import SpecError

if TYPE_CHECKING:
    from recipes.checkpoint.saved import Saved


def export(ckpt_path: str = "last", out: str = "", kv_usage: float | None = None, root: str = "runs") -> None:
    """Writes a folder that `AutoModelForCausalLM.from_pretrained` loads.

    It does so once `mixers.hf` is imported, or with `trust_remote_code=True`.

    Args:
        ckpt_path: checkpoint of a language model; "last" is that of the newest run.
        out: folder to write, which must not exist or be empty.
        kv_usage: stored tokens / tokens, 0..1, that the exported model starts with; default: as trained.
        root: folder of runs, for "last".

    Raises:
        SpecError: no such checkpoint, not that of a language model, or a folder that cannot be written; no
            transformers.
    """
    if not out:
        raise SpecError("give --out, the folder to write")
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SpecError(f"--out {out} exists and is not an empty folder")
    from recipes.checkpoint.opening import open_checkpoint
    from recipes.results import written_whole

    saved = open_checkpoint(ckpt_path, root=root)
    with written_whole(folder) as part:
        size = write(saved, part, kv_usage)
    print(f"{saved.path}: {size:,} parameters written to {folder}/\n")
    print(
        "import mixers.hf\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})"
    )


def write(saved: "Saved", folder: Path, kv_usage: float | None = None) -> int:
    """Writes the model, and its tokenizer, of bytes or of `--data tokens`; returns the number of parameters.

    Args:
        saved: the checkpoint.
        folder: an empty folder, or one to be made.
        kv_usage: stored tokens / tokens, 0..1; default: as trained.

    Raises:
        SpecError: the checkpoint is not that of a language model; no transformers.
    """
    model = saved.language_model()
    try:
        from mixers.hf import MixerConfig, MixerForCausalLM, byte_tokenizer
    except ImportError as error:
        raise SpecError(f"export needs transformers 5: pip install 'lightning-mixers[hf]' ({error})") from error
    from lit_modules.base import with_options
    from lit_modules.language_model import BYTES
    from recipes.limits import check_usages

    hparams = model.hparams
    usage = hparams.kv_usage if kv_usage is None else kv_usage
    keys = ("vocab_size", "dim", "depth", "mlp_ratio", "tie_embeddings")
    mixer = with_options(hparams.mixer, router=hparams.router, kv_usage=usage)
    check_usages(mixer)
    ours = MixerForCausalLM(MixerConfig(mixer=mixer, **{key: hparams[key] for key in keys}))
    ours.decoder.load_state_dict(model.decoder.state_dict())
    tokenizer = byte_tokenizer() if hparams.vocab_size == BYTES else None
    if tokenizer is None and (data := saved.token_data()):
        tokenizer = data.tokenizer
        for config in (ours.config, ours.generation_config):  # bytes have no end that was trained
            config.eos_token_id = data.end
            config.pad_token_id = data.end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ours.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return sum(p.numel() for p in ours.parameters())
