"""Models of ours in EleutherAI's lm-evaluation-harness, under the name `lightning_mixers`.

The harness finds models in a table of its own and loads no plug-ins, so one of two things makes the name known: this
command, which is the harness's own command line, or `import recipes.checkpoint.harness` in a program that calls
`lm_eval`.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mixers.registry import SpecError
from mixers.threshold import check_usage, set_kv_usage

try:
    import lm_eval.models  # noqa: F401  # fills the table that the name goes into
    from lm_eval._cli import HarnessCLI
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise SpecError(f"lm_eval needs the harness: pip install 'lightning-mixers[eval]' ({error})") from error

import mixers.hf  # noqa: F401  # makes our models known
from recipes.checkpoint.export import write
from recipes.checkpoint.model_folder import check_folder, is_model_folder
from recipes.checkpoint.opening import open_checkpoint
from recipes.checkpoint.saved import Saved
from recipes.messages import one_line

NEWLINE = 10


@register_model("lightning_mixers")
class LightningMixersLM(HFLM):
    """The harness's Hugging Face model, which also takes a checkpoint of ours and a KV usage.

    Args:
        pretrained: a checkpoint ("last" is that of the newest run), or the folder of a Hugging Face model, such as
            `recipes retrofit` and `recipes export` write.
        kv_usage: stored tokens / tokens, 0..1; default: as trained or exported.
        prefix_token_id: stands before a text of which every token is scored. Default for models that read bytes: a
            newline, as they have seen no token that begins a text.
        options: of the harness's `hf`, such as batch_size, device, dtype, max_length.

    Raises:
        SpecError: no such checkpoint, not that of a language model, or a usage out of range.
    """

    def __init__(
        self,
        pretrained: str = "last",
        kv_usage: float | None = None,
        prefix_token_id: int | None = None,
        **options: Any,
    ) -> None:
        if kv_usage is not None:
            check_usage(kv_usage)
        options = {"backend": "causal"} | options
        saved = _opened(pretrained)
        if saved is None:
            try:
                super().__init__(pretrained, prefix_token_id=prefix_token_id, **options)
            except OSError as error:  # transformers' own way of refusing a folder, in many lines
                raise SpecError(f"{pretrained} cannot be opened: {one_line(str(error))}") from error
        else:
            with TemporaryDirectory() as folder:
                write(saved, Path(folder))
                print(f"lm_eval: weights of {saved.path}", file=sys.stderr)
                super().__init__(folder, prefix_token_id=prefix_token_id, **options)
        if prefix_token_id is None and self.vocab_size == 256:
            self.custom_prefix_token_id = NEWLINE
        if kv_usage is not None:
            set_kv_usage(self.model, kv_usage)


def _opened(pretrained: str) -> Saved | None:
    """The checkpoint, or None where it is the folder of a Hugging Face model.

    Raises:
        SpecError: it is neither a whole checkpoint nor such a folder, or names code that is not trusted
            (:mod:`recipes.trust`).
    """
    if not is_model_folder(pretrained):
        return open_checkpoint(pretrained)
    check_folder(Path(pretrained))
    return None


def lm_eval_command(args: list[str]) -> int:
    """`python -m recipes lm_eval ...`: as `lm_eval ...`, with our model as the default one.

    Args:
        args: those of the harness; `--ckpt_path PATH` stands for its argument `pretrained`.

    Returns:
        The exit code, 0.

    Raises:
        SpecError: what the harness, or the checkpoint, refuses.
    """
    args = _with_checkpoint(args)
    if not args or args[0].startswith("-") and not {"-h", "--help"} & {*args}:
        args = ["run", *args]
    if args[0] == "run" and not {"-h", "--help", "--model", "-M"} & {*args}:
        args = ["run", "--model", "lightning_mixers", *args[1:]]
    sys.argv = ["python -m recipes lm_eval", *args]
    harness = HarnessCLI()
    try:
        harness.execute(harness.parse_args())
    except ValueError as error:  # the harness's own way of refusing: an unknown task or model
        raise error if isinstance(error, SpecError) else SpecError(f"lm_eval: {error}") from error
    return 0


def _with_checkpoint(args: list[str]) -> list[str]:
    """--ckpt_path PATH as the harness has it: among the --model_args."""
    rest, given, words = [], None, iter(args)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag == "--ckpt_path":
            given = value if equals else next(words, "")
            if not given or given.startswith("--") or "," in given:
                raise SpecError(f"--ckpt_path needs a path without a comma, got {given!r}")
        else:
            rest.append(word)
    if given is None:
        return rest
    _opened(given)  # before the harness looks for its tasks
    for i, word in enumerate(rest):
        flag, equals, value = word.partition("=")
        if flag in ("--model_args", "-a"):
            if "pretrained=" in word + "".join(rest[i + 1 : i + 2]):
                raise SpecError("give either --ckpt_path or --model_args pretrained=...")
            at, value = (i, value) if equals else (i + 1, rest[i + 1])
            rest[at] = f"{flag}=" * bool(equals) + f"pretrained={given},{value}"
            return rest
    return [*rest, "--model_args", f"pretrained={given}"]
