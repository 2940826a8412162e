"""Text from a checkpoint, at any KV usage."""

import sys
import time
from itertools import islice
from pathlib import Path

from mixers.registry import SpecError, check_positive, check_range


def generate(
    prompt: str = "",
    ckpt_path: str = "last",
    prompt_file: str = "",
    kv_usage: float | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.7,
    top_p: float = 1.0,
    seed: int = 0,
    prefill: int = 2048,
    max_kv_bytes: int | None = None,
    root: str = "runs",
) -> None:
    """Goes on writing from a prompt. The text goes to stdout as it is written, what it took to stderr.

    Args:
        prompt: text to go on from.
        ckpt_path: checkpoint of a byte-level language model; "last" is that of the newest run.
        prompt_file: file to go on from, in place of a prompt.
        kv_usage: stored tokens / tokens, 0..1; default: as trained.
        max_new_tokens: bytes to write.
        temperature: of the draws; 0 takes the likeliest byte each time.
        top_p: draw among the likeliest bytes that together have this probability.
        seed: of the draws.
        prefill: bytes of the prompt that are read at once.
        max_kv_bytes: stop with an error when keys and values take more.
        root: folder of runs, for "last".
    """
    import torch
    from tqdm import tqdm

    from lit_modules.generation import Continuation
    from recipes.checkpoint.opening import open_checkpoint

    if bool(prompt) == bool(prompt_file):
        raise SpecError("give either --prompt or --prompt_file")
    check_positive(max_new_tokens=max_new_tokens, prefill=prefill)
    check_range(0, 2**63, seed=seed)
    content = _read(prompt_file) if prompt_file else prompt.encode()
    saved = open_checkpoint(ckpt_path, root=root)
    model = saved.language_model(of_bytes=True, kv_usage=kv_usage).to("cuda" if torch.cuda.is_available() else "cpu")
    with tqdm(total=len(content), desc="reading", unit="byte", leave=False, disable=len(content) < prefill) as bar:
        start = time.perf_counter()
        written = Continuation(
            model.decoder,
            torch.tensor([list(content)]),
            **dict(temperature=temperature, top_p=top_p, seed=seed, prefill=prefill, max_kv_bytes=max_kv_bytes),
            progress=lambda done, _: bar.update(done - bar.n),
        )
        read = time.perf_counter() - start
    sys.stdout.write(prompt)
    start, pending = time.perf_counter(), b""
    for token in islice(written, max_new_tokens):
        pending += bytes(token.tolist())
        text = pending.decode("utf-8", errors="ignore")
        if text or len(pending) >= 4:  # a character may take up to four bytes
            sys.stdout.write(text or "\N{REPLACEMENT CHARACTER}")
            sys.stdout.flush()
            pending = b""
    seconds = time.perf_counter() - start
    print()
    print(f"{saved.path}:", file=sys.stderr)
    _report(written, len(content), read, max_new_tokens, seconds)


def _read(path: str) -> bytes:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise SpecError(f"--prompt_file {path}: {error.strerror}") from error
    if not content:
        raise SpecError(f"--prompt_file {path} is empty")
    return content


def _report(written, prompt: int, read: float, new: int, seconds: float) -> None:
    from mixers.state import full_kv_bytes, kv_stored_bytes

    stored, whole = kv_stored_bytes(written.state), full_kv_bytes(written.state)
    of_all = f" ({stored / whole:.1%} of all of them)" if whole else ""
    lines = [
        f"read {prompt:,} bytes in {read:.2f} s ({prompt / read:,.0f}/s), "
        f"wrote {new:,} in {seconds:.2f} s ({new / seconds:,.0f}/s)",
        f"holds {stored:,} bytes of keys and values{of_all}, {written.kv_cache_bytes:,} with free places in pages, and "
        f"{written.state_bytes:,} of states",
    ]
    print("\n".join(lines), file=sys.stderr)
