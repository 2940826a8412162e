"""Tokenise a data set once, and see how fast tokens are read: `python -m recipes tokenize`."""

import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from lit_modules.data.documents import DRAW, TOKENIZER, content_of, drawn, read
from lit_modules.data.tokens import TOKENS, TokenData
from mixers.registry import SpecError, check_positive, check_range
from recipes.results import written_whole

BATCH = 1000  # documents that the tokenizer gets at once: it has threads of its own
SMALL_VOCABULARY = 2**16


def tokenize(
    tokenizer: str,
    paths: list[str] | str | None = None,
    hub: str | None = None,
    hub_config: str | None = None,
    split: str = "train",
    streaming: bool = False,
    field: str = "text",
    eos_token: str | None = None,
    out: str | None = None,
    tokens_per_file: int = 2**25,
    num_workers: int = 0,
    seconds: float = 5.0,
) -> None:
    """Writes documents as token ids, in Parquet, for `fit --data tokens --data.paths FOLDER`; times the loader alone.

    The folder holds the tokenizer, too. A document is held out, or not, as it would be without this step.

    Args:
        tokenizer: a name on the Hugging Face hub, a folder, or a tokenizer.json.
        paths: files and folders, or one of them: .parquet, .jsonl or .txt.
        hub: in place of paths, the name of a data set on the hub.
        hub_config: which of its configurations.
        split: of it.
        streaming: read as it comes, without a copy on disk.
        field: what holds a document's text.
        eos_token: the token that ends a document; default: the tokenizer's own.
        out: folder to write, new; without it nothing is written, and the loader that tokenises as it reads is timed.
        tokens_per_file: of a file at least; several processes read several files of a stream.
        num_workers: of the loader that is timed.
        seconds: for which it is timed.
    """
    check_positive(tokens_per_file=tokens_per_file)
    check_range(0, seconds=seconds)
    source = {"paths": paths, "hub": hub, "hub_config": hub_config, "split": split, "streaming": streaming}
    data = TokenData(**source, field=field, tokenizer=tokenizer, eos_token=eos_token, num_workers=num_workers)
    data.setup("fit")
    if out is not None:
        target = Path(out)
        if target.exists():
            raise SpecError(f"--out {out} exists; give a new folder")
        with written_whole(target) as part:
            part.mkdir()
            documents, tokens, took = _write(data, part, tokens_per_file)
            if tokens == documents:
                raise SpecError(f"there is no text in the {documents} documents of {', '.join(data.paths) or hub}")
            data.tokenizer.eos_token = data.tokenizer.convert_ids_to_tokens(data.end)
            data.tokenizer.save_pretrained(part / TOKENIZER)
        print(f"{documents} documents, {tokens} tokens in {took:.1f} s, {tokens / took:,.0f} tokens/s: {target}")
        data = TokenData(paths=[out], num_workers=num_workers)
        data.setup("fit")
    print(f"the loader alone, {num_workers} workers: {loader_speed(data, seconds):,.0f} tokens/s")
    if out is not None:
        print(f"next:\n  python -m recipes fit --data tokens --data.paths {out}")


def loader_speed(data: TokenData, seconds: float) -> float:
    """Tokens per second that the training loader gives, after its first batch."""
    batches = iter(data.train_dataloader())
    next(batches)
    begin, tokens = time.perf_counter(), 0
    for batch in batches:
        tokens += batch["tokens"].numel()
        if time.perf_counter() - begin > seconds:
            break
    return tokens / (time.perf_counter() - begin)


def _write(data: TokenData, folder: Path, tokens_per_file: int) -> tuple[int, int, float]:
    """Writes the files. Returns documents, tokens with their ends, and seconds."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter
    from tqdm import tqdm

    kind = pa.uint16() if data.vocab_size <= SMALL_VOCABULARY else pa.int32()
    schema = pa.schema([(TOKENS, pa.list_(kind)), (DRAW, pa.float64())])
    documents = tokens = files = 0
    begin, writer, held = time.perf_counter(), None, 0
    known = len(data.opened) if hasattr(data.opened, "__len__") else None
    try:
        with tqdm(total=known, desc="tokenizing", unit=" documents", unit_scale=True) as bar:
            for some in _batches(data.opened):
                texts = [content_of(document, data.field) for document in some]
                ids = data.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
                if writer is None:
                    writer = ParquetWriter(folder / f"tokens-{files:05}.parquet", schema, compression="zstd")
                    files, held = files + 1, 0
                columns = {TOKENS: ids, DRAW: [drawn(document, data.field) for document in some]}
                writer.write_table(pa.table(columns, schema=schema))
                count = sum(map(len, ids)) + len(ids)
                documents, tokens, held = documents + len(some), tokens + count, held + count
                bar.update(len(some))
                bar.set_postfix_str(f"{tokens / (time.perf_counter() - begin):,.0f} tokens/s")
                if held >= tokens_per_file:
                    writer.close()
                    writer = None
    finally:
        if writer is not None:
            writer.close()
    return documents, tokens, time.perf_counter() - begin


def _batches(documents: Any) -> Iterator[list[dict[str, Any]]]:
    stream = read(documents)
    while some := list(islice(stream, BATCH)):
        yield some
