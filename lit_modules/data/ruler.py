"""RULER (arXiv 2404.06654) to train and to test on: prompts of a given length whose answers are to be found in them.

The tasks of :mod:`lit_modules.data.ruler_tasks` and :mod:`lit_modules.data.ruler_words` in RULER's own words: needles
in a haystack, single (a number in a repeating filler), among other such sentences, and with UUIDs for keys and values;
the tracking of variables; common and frequent words. A sequence is a prompt, of the task whose turn it is, and its
answers::

    tokens    A special magic number ... in the provided text is   4 8 1 5 1 6 2
    targets   . . .                                              4 8 1 5 1 6 2 .      . is -100: nothing is asked

Ids are bytes, or those of a tokenizer. With bytes, the space before an answer is given, not asked. RULER's score is
the share of the answers that occur in what a model generates, by task. Our `mean_accuracy` stands in for it: the share
of the answers whose tokens are all right, in the one order, each with the right answers before it. RULER takes
4,096 to 131,072 tokens and 500 samples of each task; some tasks need 1,000 to 5,000 bytes at least.
"""

from typing import Any

import numpy as np
import torch

from lit_modules.data.batches import IGNORED
from lit_modules.data.generated import TRAIN, GeneratedData, blank
from lit_modules.data.ruler_tasks import TASKS, Needle, RulerSample, ruler_sample
from lit_modules.data.ruler_words import CommonWords, FrequentWords
from lit_modules.data.stream import ANSWER, PART, Batch, BatchStream
from lit_modules.data.tokens import load_tokenizer
from mixers.registry import SpecError, check_positive, unknown

BYTES = 256
RULER = {
    "niah_single_1": TASKS["niah_single_1"],
    "niah_multikey_2": TASKS["niah_multikey_2"],
    "niah_multikey_3": Needle(others=None, uuids=True),
    "variable_tracking": TASKS["variable_tracking"],
    "common_words": CommonWords(),
    "frequent_words": FrequentWords(),
}


class RulerData(GeneratedData):
    """RULER: needles, variables and words to be found in a long text.

    Args:
        tasks: names of RULER, which take turns, batch by batch; or one of them.
        seq_len: T, at most, prompt and answers together; shorter ones are padded on the right.
        tokenizer: of Hugging Face's: a folder, a `tokenizer.json`, or a name on the hub; None for bytes.
        batch_size: sequences per step and rank.
        num_validation, num_test: sequences of each task.
        options: see :class:`lit_modules.data.generated.GeneratedData`.

    Raises:
        SpecError: an unknown task, one that does not fit into `seq_len`, or no such tokenizer.
    """

    model = "language_model"
    metric = "mean_accuracy"
    defaults = {"model": {"dim": 128, "depth": 2, "learning_rate": 3e-3}, "steps": 1000}

    def __init__(
        self,
        *,
        tasks: list[str] | str = "niah_single_1",
        seq_len: int = 1024,
        tokenizer: str | None = None,
        batch_size: int = 8,
        num_validation: int = 64,
        num_test: int = 256,
        **options: Any,
    ):
        if options.get("num_train") is not None:
            raise SpecError(f"num_train {options['num_train']} was given, but ruler always draws new sequences")
        super().__init__(batch_size=batch_size, num_validation=num_validation, num_test=num_test, **options)
        check_positive(seq_len=seq_len)
        self.names = tuple(dict.fromkeys([tasks] if isinstance(tasks, str) else tasks))
        for name in self.names:
            if name not in RULER:
                raise unknown("task", name, RULER)
        if not self.names:
            raise SpecError(f"tasks must be some of {', '.join(RULER)}, got none")
        self.seq_len = seq_len
        self.tokenizer = _bytes if tokenizer is None else load_tokenizer(tokenizer)
        self.vocab_size = BYTES if tokenizer is None else len(self.tokenizer)
        for level in range(len(self.names)):
            self._sample(level, seed=0)  # refuses what does not fit

    def evaluation(self, split: int, num_sequences: int) -> list[Batch]:
        return [batch for level in range(len(self.names)) for batch in self.batches(split, num_sequences, level=level)]

    def train_dataloader(self) -> BatchStream:
        rank = getattr(self.trainer, "global_rank", 0)

        def make(number: int) -> Batch:
            level = number % len(self.names)
            batch = self.batch(TRAIN, number, batch_size=self.batch_size, level=level, rank=rank)
            return {key: batch[key] for key in ("tokens", "targets", "padding_mask")}

        return BatchStream(make, length=self.batches_per_epoch)

    def draw(self, rng: np.random.Generator, *, batch_size: int, level: int) -> Batch:
        """``tokens`` and ``targets`` (B, T) int64, ``padding_mask`` (B, T) bool, and what answer a token is part of."""
        samples = [self._sample(level, seed=int(rng.integers(2**62))) for _ in range(batch_size)]
        tokens, targets = blank(batch_size, max(len(s.prompt_ids) + len(s.answer_ids) for s in samples))
        real, owner = np.zeros(tokens.shape, dtype=bool), np.zeros_like(tokens)
        for row, sample in enumerate(samples):
            begin, ids = len(sample.prompt_ids), sample.prompt_ids + sample.answer_ids
            tokens[row, : len(ids)], real[row, : len(ids)] = ids, True
            due = slice(begin - 1, len(ids) - 1)  # where the answers' tokens are due
            targets[row, due] = sample.answer_ids
            owner[row, due] = np.repeat(np.arange(len(sample.answer_sizes)), sample.answer_sizes)
            if self.tokenizer is _bytes:  # the space before an answer
                targets[row, begin - 1 + np.cumsum([0, *sample.answer_sizes[:-1]])] = IGNORED
        arrays = {"tokens": tokens, "targets": targets, "padding_mask": real, ANSWER: owner}
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return batch | {PART: (self.names[level], self.names)}

    def _sample(self, level: int, *, seed: int) -> RulerSample:
        return ruler_sample(RULER[self.names[level]], self.tokenizer, length=self.seq_len, seed=seed)


def _bytes(text: str) -> list[int]:
    return list(text.encode())
