"""Models of ours in EleutherAI's lm-evaluation-harness, under the name `lightning_mixers`.

The harness finds models in a table of its own and loads no plug-ins, so one of two things makes the name known: this
command, which is the harness's own command line, or `import recipes.harness` in a program that calls `lm_eval`.
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

from recipes.export import write

NEWLINE = 10


@register_model("lightning_mixers")
class LightningMixersLM(HFLM):
    """The harness's Hugging Face model, which also takes a checkpoint of ours and a KV usage.

    Args:
        pretrained: a checkpoint ("last" is that of the newest run), or a folder that `recipes export` wrote.
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
        if (Path(pretrained) / "config.json").is_file():
            super().__init__(pretrained, prefix_token_id=prefix_token_id, **options)
        else:
            with TemporaryDirectory() as folder:
                write(pretrained, Path(folder))
                super().__init__(folder, prefix_token_id=prefix_token_id, **options)
        if prefix_token_id is None and self.vocab_size == 256:
            self.custom_prefix_token_id = NEWLINE
        if kv_usage is not None:
            set_kv_usage(self.model, kv_usage)


def lm_eval_command(args: list[str]) -> int:
    """`python -m recipes lm_eval ...`: as `lm_eval ...`, with our model as the default one."""
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
