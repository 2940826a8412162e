"""Text from a checkpoint, at any KV usage."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

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
        ckpt_path: checkpoint of a language model of bytes, or of `--data tokens`; "last" is that of the newest run; or
            the folder of a Hugging Face model, such as `recipes retrofit` writes.
        prompt_file: file to go on from, in place of a prompt.
        kv_usage: stored tokens / tokens, 0..1; default: as trained.
        max_new_tokens: tokens to write, which are bytes where the model reads bytes.
        temperature: of the draws; 0 takes the likeliest token each time.
        top_p: draw among the likeliest tokens that together have this probability.
        seed: of the draws.
        prefill: tokens of the prompt that are read at once.
        max_kv_bytes: stop with an error when keys and values take more.
        root: folder of runs, for "last".
    """
    import torch
    from tqdm import tqdm

    from lit_modules.generation import Continuation
    from recipes.checkpoint.model_folder import AsDecoder, is_model_folder, open_folder
    from recipes.checkpoint.opening import open_checkpoint

    if bool(prompt) == bool(prompt_file):
        raise SpecError("give either --prompt or --prompt_file")
    check_positive(max_new_tokens=max_new_tokens, prefill=prefill)
    check_range(0, 2**63, seed=seed)
    content = _read(prompt_file) if prompt_file else os.fsencode(prompt)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if is_model_folder(ckpt_path):
        opened = open_folder(ckpt_path, kv_usage=kv_usage)
        decoder, text, path = AsDecoder(opened.model.to(device)), _tokens_of_folder(opened), opened.path
    else:
        saved = open_checkpoint(ckpt_path, root=root)
        text = _tokens_of_data(saved) or Bytes()
        model = saved.language_model(of_bytes=isinstance(text, Bytes), kv_usage=kv_usage).to(device)
        decoder, path = model.decoder, saved.path
    tokens = text.encode(content, max_new_tokens)
    with tqdm(total=len(tokens), desc="reading", unit=text.unit, leave=False, disable=len(tokens) < prefill) as bar:
        start = time.perf_counter()
        written = Continuation(
            decoder,
            torch.tensor([tokens]),
            **dict(temperature=temperature, top_p=top_p, seed=seed, prefill=prefill, max_kv_bytes=max_kv_bytes),
            progress=lambda done, _: bar.update(done - bar.n),
        )
        read = time.perf_counter() - start
    sys.stdout.write(prompt)
    start = time.perf_counter()
    new: list[int] = []
    for part in text.decode(_until(written, text.ends, max_new_tokens, new)):
        sys.stdout.write(part)
        sys.stdout.flush()
    seconds = time.perf_counter() - start
    print()
    print(f"{path}:", file=sys.stderr)
    _report(written, f"{len(tokens):,} {text.unit}s", len(tokens) / read, read, len(new), seconds)


class Bytes:
    """Text of a model that reads UTF-8."""

    unit = "byte"
    ends: frozenset[int] = frozenset()

    def encode(self, content: bytes, more: int) -> list[int]:
        return list(content)

    def decode(self, tokens: Iterable[int]) -> Iterator[str]:
        pending = b""
        for token in tokens:
            pending += bytes([token])
            text = pending.decode("utf-8", errors="ignore")
            if text or len(pending) >= 4:  # a character may take up to four bytes
                yield text or "\N{REPLACEMENT CHARACTER}"
                pending = b""


class Tokens:
    """Text of a model with a tokenizer of its own.

    Args:
        tokenize: text -> ids.
        untokenize: ids -> text.
        ends: ids that end a text.
        longest: tokens that the model reads at most; None is any number.
        path: of the model, for messages.
    """

    unit = "token"

    def __init__(
        self,
        tokenize: Callable[[str], list[int]],
        untokenize: Callable[[list[int]], str],
        *,
        ends: list[int],
        longest: int | None,
        path: Path,
    ) -> None:
        self.tokenize, self.untokenize, self.ends = tokenize, untokenize, frozenset(ends)
        self.longest, self.path = longest, path
        self.last: list[int] = []  # of the prompt

    def encode(self, content: bytes, more: int) -> list[int]:
        """Raises SpecError for what is no text, or more than the model reads."""
        try:
            tokens = self.tokenize(content.decode())
        except UnicodeDecodeError as error:
            raise SpecError(f"the prompt is no UTF-8: {error}") from error
        if not tokens:
            raise SpecError("the prompt has no token")
        if self.longest is not None and len(tokens) + more > self.longest:
            what = f"{self.path} reads at most {self.longest:,} tokens: the prompt has {len(tokens):,}"
            raise SpecError(f"{what}, --max_new_tokens is {more:,}")
        self.last = tokens[-8:]
        return tokens

    def decode(self, tokens: Iterable[int]) -> Iterator[str]:
        ids = self.last.copy()  # a space may belong to the first token, or not, as the one before it says
        said = self.untokenize(ids)
        for token in tokens:
            ids.append(token)
            text = self.untokenize(ids)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a part of one
                yield text[len(said) :]
                said = text
        yield self.untokenize(ids)[len(said) :]


def _tokens_of_folder(opened: Any) -> Tokens:
    """Of a `recipes.checkpoint.model_folder.ModelFolder`."""
    tokenizer, ends = opened.tokenizer, opened.model.generation_config.eos_token_id
    return Tokens(
        lambda text: tokenizer(text, verbose=False)["input_ids"],
        tokenizer.decode,
        ends=ends if isinstance(ends, list) else [] if ends is None else [ends],
        longest=opened.longest,
        path=opened.path,
    )


def _tokens_of_data(saved: Any) -> Tokens | None:
    """Of a `recipes.checkpoint.saved.Saved`, if its data have a tokenizer: as they read their documents."""
    data = saved.token_data()
    return data and Tokens(data.encode, data.tokenizer.decode, ends=[data.end], longest=None, path=saved.path)


def _until(written: Iterator, ends: frozenset[int], count: int, seen: list[int]) -> Iterator[int]:
    """Up to `count` tokens of the only row, up to one that ends the text; `seen` gets them."""
    for token in islice(written, count):
        if int(token) in ends:
            return
        seen.append(int(token))
        yield seen[-1]


def _read(path: str) -> bytes:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise SpecError(f"--prompt_file {path}: {error.strerror}") from error
    if not content:
        raise SpecError(f"--prompt_file {path} is empty")
    return content


def _report(written, prompt: str, speed: float, read: float, new: int, seconds: float) -> None:
    from mixers.state import full_kv_bytes, kv_stored_bytes

    stored, whole = kv_stored_bytes(written.state), full_kv_bytes(written.state)
    of_all = f" ({stored / whole:.1%} of all of them)" if whole else ""
    lines = [
        f"read {prompt} in {read:.2f} s ({speed:,.0f}/s), wrote {new:,} in {seconds:.2f} s ({new / seconds:,.0f}/s)",
        f"holds {stored:,} bytes of keys and values{of_all}, {written.kv_cache_bytes:,} with free places in pages, and "
        f"{written.state_bytes:,} of states",
    ]
    print("\n".join(lines), file=sys.stderr)
