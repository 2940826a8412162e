"""How well a causal model of transformers predicts text and finds what it was told: a forward pass a sequence."""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from lit_modules.data.ruler_tasks import RulerSample, string_recall
from mixers.registry import SpecError, check_positive

CHUNK = 256  # positions whose logits are float32 at a time: a vocabulary of 50,000 makes 50 MB of them


@dataclass(frozen=True)
class TextScore:
    """How well text was predicted.

    Attributes:
        nll: negative log-likelihood of a token in nats, the mean over all tokens that were predicted.
        tokens: how many those were.
        per_sequence: (N,) float64, the mean nll of every sequence.
    """

    nll: float
    tokens: int
    per_sequence: Tensor

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll) if self.nll < 700 else math.inf


@dataclass(frozen=True)
class RecallScore:
    """How many answers were found.

    Attributes:
        exact: share of the samples whose answer is the greedy continuation of the prompt, whole and exactly.
        answers: mean share of a sample's answers (the number; each of the names) that are the greedy continuation of
            the prompt and the right answers before them. The same as `exact` where there is one answer.
        per_sample: (N,) bool, which were found exactly.
    """

    exact: float
    answers: float
    per_sample: Tensor


def windows(texts: Iterable[str], tokenizer: Callable[..., Any], *, length: int, count: int | None = None) -> Tensor:
    """Cuts documents into windows that do not overlap and lie in one document each; what is left over is not used.

    Args:
        texts: documents.
        tokenizer: of transformers; no special tokens are added.
        length: T, tokens of a window, 2 at least.
        count: N at most, taken evenly from all there are; None: all.

    Returns:
        Ids (N, T) int64.

    Raises:
        SpecError: no document is that long, or fewer windows than `count`.
    """
    if length < 2:
        raise SpecError(f"length {length} of a window must be at least 2: a token, and one to predict")
    longest, found = 0, []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        longest = max(longest, len(ids))
        found += [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    if not found:
        raise SpecError(f"no text is as long as a window of {length} tokens: the longest has {longest}")
    if count is not None:
        check_positive(count=count)
        if len(found) < count:
            raise SpecError(f"the texts make {len(found)} windows of {length} tokens, not {count}")
        found = [found[number * len(found) // count] for number in range(count)]
    return torch.tensor(found)


@torch.no_grad()
def perplexity(model: nn.Module, sequences: Tensor | Sequence[Tensor], *, progress: bool = True) -> TextScore:
    """Scores a model's prediction of every token from those before it in its sequence.

    Args:
        model: a causal model of transformers in any dtype; its mode (train, eval) is restored.
        sequences: ids, (N, T) int64 or N of shape (T,), each read by itself: see :func:`windows`.
        progress: show a bar.

    Raises:
        SpecError: no sequence, or one without a token to predict.
    """
    if not len(sequences) or min(len(ids) for ids in sequences) < 2:
        raise SpecError("perplexity needs sequences of at least 2 tokens: one, and one to predict")
    sums, counts = [], []
    with _evaluating(model), tqdm(sequences, desc="perplexity", disable=not progress, leave=False) as bar:
        for ids in bar:
            ids = ids.to(model.device)
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            parts = zip(logits.split(CHUNK), ids[1:].split(CHUNK), strict=True)
            sums.append(
                sum(cross_entropy(part.float(), target, reduction="sum").double().cpu() for part, target in parts)
            )
            counts.append(len(ids) - 1)
            bar.set_postfix_str(f"{math.exp(min(sum(sums) / sum(counts), 700)):.2f}")
    per_sequence = torch.stack(sums) / torch.tensor(counts, dtype=torch.float64)
    return TextScore(nll=float(sum(sums) / sum(counts)), tokens=sum(counts), per_sequence=per_sequence)


@torch.no_grad()
def recall(
    model: nn.Module,
    samples: Sequence[RulerSample],
    *,
    progress: bool = True,
    read: Callable[[RulerSample], Tensor] | None = None,
) -> RecallScore:
    """Scores what a model finds in one pass over each prompt with its answer, which tells what it would generate.

    Why it does: see :mod:`lit_modules.data.ruler_tasks`. That holds for a model whose output at a position does not
    depend on later tokens. Logits are made at the answer alone where the model has `logits_to_keep`.

    Args:
        model: a causal model of transformers in any dtype; its mode (train, eval) is restored.
        samples: from `ruler_samples`.
        progress: show a bar.
        read: gives the logits (A, V) that predict a sample's A answer tokens, where not one pass of the model does.

    Raises:
        SpecError: no sample.
    """
    _some(samples)
    read = read or partial(_in_one_pass, model)
    exact, shares = [], []
    with _evaluating(model), tqdm(samples, desc="recall", disable=not progress, leave=False) as bar:
        for sample in bar:
            right = read(sample).argmax(-1).cpu() == torch.tensor(sample.answer_ids)
            found = [bool(part.all()) for part in right.split(sample.answer_sizes)]
            exact.append(all(found))
            shares.append(sum(found) / len(found))
            bar.set_postfix_str(f"{sum(exact) / len(exact):.2f}")
    return RecallScore(sum(exact) / len(exact), sum(shares) / len(shares), torch.tensor(exact))


def _in_one_pass(model: nn.Module, sample: RulerSample) -> Tensor:
    ids = torch.tensor([sample.prompt_ids + sample.answer_ids], device=model.device)
    count = len(sample.answer_ids)
    keep = {"logits_to_keep": count + 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return model(input_ids=ids, use_cache=False, **keep).logits[0, -count - 1 : -1]


@torch.no_grad()
def generated_recall(
    model: nn.Module,
    tokenizer: Any,
    samples: Sequence[RulerSample],
    *,
    max_new_tokens: int | None = None,
    progress: bool = True,
) -> float:
    """RULER's own score: the mean share of the answers that occur in the text which a model generates greedily.

    Args:
        model: a causal model of transformers in any dtype.
        tokenizer: of the model.
        samples: from `ruler_samples`.
        max_new_tokens: None: as many as the answer has, and 8 more.
        progress: show a bar.

    Raises:
        SpecError: no sample.
    """
    _some(samples)
    shares = []
    with _evaluating(model), tqdm(samples, desc="recall", disable=not progress, leave=False) as bar:
        for sample in bar:
            ids = torch.tensor([sample.prompt_ids], device=model.device)
            count = max_new_tokens or len(sample.answer_ids) + 8
            how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": count, "do_sample": False}
            out = model.generate(ids, **how, pad_token_id=tokenizer.pad_token_id)
            shares.append(string_recall(tokenizer.decode(out[0, ids.shape[1] :]), sample.answers))
            bar.set_postfix_str(f"{sum(shares) / len(shares):.2f}")
    return sum(shares) / len(shares)


def _some(samples: Sequence[RulerSample]) -> None:
    if not samples:
        raise SpecError("recall needs at least one sample")


class _evaluating:
    """Turns dropout off for a while."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __enter__(self) -> None:
        self.training = self.model.training
        self.model.eval()

    def __exit__(self, *error: object) -> None:
        self.model.train(self.training)
