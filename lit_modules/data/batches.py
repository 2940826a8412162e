"""The batch contract of :mod:`lit_modules.data`, checked where a model takes a batch."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.sequences import Layout
from lit_modules.data.stream import ANSWER, NAMES, PART, REPEATED, Batch
from mixers.registry import SpecError

IGNORED = -100
OPTIONAL = ("cu_seqlens", "padding_mask", REPEATED, PART, ANSWER, NAMES)
THEIRS = {"input_ids", "labels", "attention_mask"}


def check_batch(batch: Any, *, answers: tuple[str, ...], vocab_size: int, num_classes: int | None = None) -> None:
    """Refuses what is no batch as :mod:`lit_modules.data` describes it, before a model reads part of it as another.

    Values are looked at on the CPU alone: elsewhere the host would have to wait for them.

    Args:
        batch: what a data loader gave.
        answers: keys that the model needs beside ``tokens``.
        vocab_size: token ids are in 0..vocab_size-1.
        num_classes: labels are in 0..num_classes-1.

    Raises:
        SpecError: it names the keys, shapes, dtypes or values that were expected and found.
    """
    required = ("tokens", *answers)
    expected = f"a batch is a dict of {', '.join(required)} and, where needed, cu_seqlens or padding_mask"
    if not isinstance(batch, Mapping):
        raise SpecError(f"{expected}; got a {type(batch).__name__} (lit_modules.data says more)")
    if not set(required) <= set(batch) <= {*required, *OPTIONAL}:
        hint = " Of Hugging Face's batches, lit_modules.data.batches.from_hugging_face makes such ones."
        keys = ", ".join(map(str, batch)) or "nothing"
        raise SpecError(f"{expected}; got {keys} (lit_modules.data says more).{hint if THEIRS & set(batch) else ''}")
    tokens = batch["tokens"]
    if not (isinstance(tokens, Tensor) and tokens.ndim == 2 and tokens.numel()):
        raise SpecError(f"tokens must be int64 (B, T), got {_described(tokens)}")
    shapes = {
        "tokens": (torch.int64, tuple(tokens.shape)),
        "targets": (torch.int64, tuple(tokens.shape)),
        "label": (torch.int64, (len(tokens),)),
        "padding_mask": (torch.bool, tuple(tokens.shape)),
        ANSWER: (torch.int64, tuple(tokens.shape)),
        NAMES: (torch.int64, tuple(tokens.shape)),
    }
    for name in shapes.keys() & batch.keys():
        dtype, shape = shapes[name]
        given = batch[name]
        if not (isinstance(given, Tensor) and given.dtype == dtype and given.shape == shape):
            raise SpecError(f"{name} must be {_name(dtype)} {shape}, got {_described(given)}")
    if not tokens.is_cpu:
        return
    sizes = {"tokens": ("vocab_size", vocab_size), "targets": ("vocab_size", vocab_size)}
    if num_classes is not None:
        sizes["label"] = ("num_classes", num_classes)
    for name in sizes.keys() & batch.keys():
        ids, (source, size) = batch[name], sizes[name]
        wrong = ids[(ids < 0) | (ids >= size)]
        wrong = wrong[wrong != IGNORED] if name == "targets" else wrong
        if len(wrong):
            raise SpecError(f"{name} must be in 0..{size - 1}, as {source} says, got {int(wrong[0])}")
    if "cu_seqlens" in batch:
        try:
            Layout.of(batch["cu_seqlens"], tokens)
        except (ValueError, AttributeError) as error:
            raise SpecError(str(error)) from error


def from_hugging_face(batch: Mapping[str, Tensor]) -> Batch:
    """A batch for a language model from one as Hugging Face's collators and causal models have it.

        DataLoader(rows, batch_size=8, collate_fn=lambda some: from_hugging_face(collator(some)))

    Their labels stand at the token itself, and their models shift them; ours stand where the answer is due, a place
    earlier. Nothing is asked at the last token and at padding.

    Args:
        batch: ``input_ids`` and ``labels`` (B, T) integers, -100 where nothing is asked; ``attention_mask`` (B, T),
            optional, 1 at real tokens.

    Returns:
        ``tokens`` and ``targets`` (B, T) int64, and ``padding_mask`` (B, T) bool where there was a mask.

    Raises:
        SpecError: other keys. What they say (``position_ids``: of packed documents) would be lost.
    """
    if not {"input_ids", "labels"} <= set(batch) <= THEIRS:
        raise SpecError(f"expected input_ids, labels and, where needed, attention_mask; got {', '.join(batch)}")
    tokens, labels = batch["input_ids"].long(), batch["labels"].long()
    if labels.shape != tokens.shape:
        raise SpecError(f"labels must be {(*tokens.shape,)}, as input_ids, got {(*labels.shape,)}")
    made = {"tokens": tokens, "targets": F.pad(labels[:, 1:], (0, 1), value=IGNORED)}
    if "attention_mask" in batch:
        made["padding_mask"] = batch["attention_mask"].bool()
        made["targets"] = made["targets"].masked_fill(~made["padding_mask"], IGNORED)
    return made


def cut_to_length(batch: Batch, *, share: float) -> Batch:
    """The same tokens in shorter sequences: pieces of a length between a 16th of the longest and all of it.

    Args:
        batch: without padding.
        share: of the way from the one to the other, in 0..1.

    Returns:
        A packed row (1, B T) with more bounds.

    Raises:
        SpecError: the batch has padding.
    """
    if "padding_mask" in batch:
        raise SpecError("length_warmup cuts sequences without padding; these data have padding")
    count, tokens = batch["tokens"].shape
    bounds = batch.get("cu_seqlens")
    bounds = torch.arange(0, count * tokens + 1, tokens) if bounds is None else bounds.cpu().long()
    longest = int(bounds.diff().max())
    length = max(1, round(longest * (1 + 15 * share) / 16))
    starts = [torch.arange(begin, end, length) for begin, end in zip(bounds[:-1], bounds[1:], strict=True)]
    cut = torch.cat([*starts, bounds[-1:]]).to(torch.int32)
    row = {key: x.reshape(1, -1) for key, x in batch.items() if isinstance(x, Tensor) and x.shape == (count, tokens)}
    return batch | row | {"cu_seqlens": cut.to(batch["tokens"].device)}


def _described(given: Any) -> str:
    return f"{_name(given.dtype)} {tuple(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
