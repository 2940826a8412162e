"""Three tasks of RULER (arXiv 2404.06654) as prompts of a given length: recall that can be counted.

=====================  =================================================================================================
``niah_single_1``      one sentence in a filler that repeats says the number of a word; which number was it?
``niah_multikey_2``    the same, and the filler is sentences like it, about other words
``variable_tracking``  a number is given to a variable, that to a second, ... scattered over the filler; name them all
=====================  =================================================================================================

What the model reads is worded as in RULER's own generator; this code and its list of words (8,460 pairs) are our own.
Three differences: the filler comes in steps of a sentence, so that a prompt comes close to the length asked for; the
example that goes before variable tracking has 5 sentences of filler in place of about 10, to leave room at 1,000
tokens; the prompt does not end in a space, which tokenizers would take for a token of its own.

An answer counts as found if it is the model's greedy continuation of the prompt. One pass over prompt and answer tells:
greedy decoding gives the answer's tokens if and only if, at every position from the prompt's last token to the answer's
last but one, the argmax is the answer's next token. (By induction: as long as all were right, both have read the same.)
`recipes.retrofit.scoring` does that. It is stricter than RULER's own score, the share of the answers that occur in the
text generated (:func:`string_recall`): words around an answer, or another spelling in tokens, count as wrong. The share
of several answers is looser in one way: the right ones before an answer are given.
"""

import random
import string
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any, ClassVar, NamedTuple, Protocol

from mixers.registry import SpecError, check_positive, check_range, unknown

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_ADJECTIVES = """able acid aged agile airy alert amber ample arid azure bald basic bitter black blank bleak blond blue
bold brave brief bright brisk broad brown busy calm cheap chief civil clean clear clever close cloudy coarse cold cool
cosy crisp cruel curly damp dark dear deep dense dirty dizzy dry dull dusty eager early easy empty equal exact faint
fair fancy fast fierce final firm flat fluffy fond frail free fresh frosty full fuzzy gentle giant glad gloomy golden
grand grave gray green grim happy hard harsh heavy hollow honest huge humble icy idle"""
_NOUNS = """acorn actor alley anchor ankle apple apron arrow attic badge banjo barn basin basket beach bean bear bell
bench berry bird blanket boat bone book bottle bowl branch bread brick bridge broom bucket button cabin cactus camel
candle canoe carpet castle cave cellar chain chair cherry chimney circle cliff clock cloud coat coin comb copper coral
corn cotton couch cradle crow crown cup curtain daisy desk diary dish dome donkey door drum duck eagle engine fabric
falcon feather fence fiddle field finger flag flute forest fork fountain fox garden gate"""
ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()


class Question(NamedTuple):
    """What a user asks, which ends in the question itself; how the answer begins; what follows that, after spaces."""

    text: str
    asked: str
    prefix: str
    answers: list[str]


@dataclass(frozen=True)
class Needle:
    """A number, or a UUID, to be found among sentences.

    Attributes:
        others: sentences that say the numbers of other words, scattered over the filler. None: all sentences do, and
            there is no filler.
        uuids: in place of words and of their numbers.
    """

    others: int | None = 0
    uuids: bool = False
    smallest: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_range(0, others=self.others or 0)

    def ask(self, rng: random.Random, size: int) -> Question:
        """Draws a question with `size` sentences besides these; the draws do not depend on the size."""
        key, what = self._key(rng), "uuid" if self.uuids else "number"
        needles = [self._needle(key, value := self._value(rng))]
        depths = [rng.random()]
        for _ in range(self.others or 0):
            needles.append(self._other(rng, key))
            depths.append(rng.random())
        sentences = [self._other(rng, key) if self.others is None else FILLER for _ in range(size)]
        for needle, depth in zip(needles, depths, strict=True):
            sentences.insert(int(depth * (len(sentences) + 1)), needle)
        context = "\n".join(sentences)
        return Question(
            f"A special magic {what} is hidden within the following text. Make sure to memorize it. I will quiz you "
            f"about the {what} afterwards.\n{context}\n"
            + (asked := f"What is the special magic {what} for {key} mentioned in the provided text?"),
            asked,
            f" The special magic {what} for {key} mentioned in the provided text is",
            [value],
        )

    def _other(self, rng: random.Random, key: str) -> str:
        while (other := self._key(rng)) == key:
            pass
        return self._needle(other, self._value(rng))

    def _needle(self, key: str, value: str) -> str:
        return f"One of the special magic {'uuids' if self.uuids else 'numbers'} for {key} is: {value}."

    def _key(self, rng: random.Random) -> str:
        return _uuid(rng) if self.uuids else f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"

    def _value(self, rng: random.Random) -> str:
        return _uuid(rng) if self.uuids else _digits(rng, 7)


@dataclass(frozen=True)
class VariableTracking:
    """Variables that hold one number, the first by itself, each other through the one before.

    Attributes:
        hops: variables besides the first.
        example: begin with a shorter question that is answered, of names of three letters.
        declared: in answers, too, VAR stands before each name, as a small model writes them whatever it is shown.
    """

    hops: int = 4
    example: bool = True
    declared: bool = False

    def __post_init__(self) -> None:
        check_positive(hops=self.hops)

    @property
    def smallest(self) -> int:
        return self.hops + 1

    def ask(self, rng: random.Random, size: int) -> Question:
        """Draws a question with `size` sentences besides the assignments; the draws do not depend on the size."""
        question = self._ask(rng, size, letters=5)
        if not self.example:
            return question
        shown = self._ask(rng, self.hops + 1, letters=3)
        before = f"{shown.text}{shown.prefix} {' '.join(shown.answers)}\n\n"
        return question._replace(text=before + question.text)

    def _ask(self, rng: random.Random, size: int, *, letters: int) -> Question:
        count = self.hops + 1
        names: list[str] = []
        while len(names) < count:
            name = "".join(rng.choices(string.ascii_uppercase, k=letters))
            names += [name] if name not in names else []
        value = _digits(rng, 5)
        assignments = [f"VAR {names[0]} = {value}"]
        assignments += [f"VAR {name} = VAR {before} " for before, name in zip(names, names[1:], strict=False)]
        sentences = [f"{FILLER}\n"] * size
        # Distinct places, in order: at least one sentence of filler between two assignments.
        places = sorted(int(rng.random() * (size - self.hops)) for _ in range(count))
        for number, (place, assignment) in enumerate(zip(places, assignments, strict=True)):
            sentences.insert(place + 2 * number, assignment)
        context = " ".join(sentences)
        return Question(
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
            f"{context}\n"
            + (asked := f"Question: Find all variables that are assigned the value {value} in the text above."),
            asked,
            " Answer: According to the chain(s) of variable assignment in the text above, "
            f"{count} variables are assgined the value {value}, they are:",  # RULER's spelling
            [f"VAR {name}" if self.declared else name for name in names],
        )


class Task(Protocol):
    """What :func:`ruler_sample` asks: `size` is the number of sentences, or words, that make a prompt longer."""

    @property
    def smallest(self) -> int:
        """Least size, at least 1."""

    def ask(self, rng: random.Random, size: int) -> Question:
        """Draws a question of a size."""


TASKS: dict[str, Task] = {
    "niah_single_1": Needle(),
    "niah_multikey_2": Needle(others=None),
    "variable_tracking": VariableTracking(),
}


@dataclass(frozen=True)
class RulerSample:
    """A prompt and its answer.

    Attributes:
        prompt: all that the model reads before it answers, the answer's first words included ("... text is").
        answers: what is to be found: a number, or names in the order of their assignment.
        prompt_ids: tokens of the prompt.
        answer_ids: tokens that continue them, so that both together are the tokens of the whole text.
        answer_sizes: how many of those belong to each of the answers.
        question_at: index into `prompt_ids` where the question begins that follows the context; a token or so earlier
            where the tokenizer merges over its beginning.
    """

    prompt: str
    answers: tuple[str, ...]
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    answer_sizes: tuple[int, ...]
    question_at: int

    @property
    def answer(self) -> str:
        """What the model should continue the prompt with."""
        return "".join(f" {answer}" for answer in self.answers)


def ruler_samples(task: str | Task, tokenizer: Callable[..., Any], *, count: int, **options: Any) -> list[RulerSample]:
    """Samples of indices 0..count-1; the arguments are those of :func:`ruler_sample`."""
    check_positive(count=count)
    return [ruler_sample(task, tokenizer, index=index, **options) for index in range(count)]


def ruler_sample(
    task: str | Task,
    tokenizer: Callable[..., Any],
    *,
    length: int,
    seed: int = 0,
    index: int = 0,
    chat: bool = False,
) -> RulerSample:
    """A prompt with its answer, as long as fits in `length` tokens. Seed and index decide what is drawn.

    Args:
        task: a key of TASKS, or a variant such as ``VariableTracking(hops=1)``.
        tokenizer: from a text to its ids, a list or one of transformers; special tokens as it adds them by itself.
        length: tokens that prompt and answer may take.
        seed: of the sequence of samples.
        index: in that sequence.
        chat: put the question into the tokenizer's chat template; the beginning of the answer is the assistant's then.

    Raises:
        SpecError: an unknown task; a length that the question does not fit in; no chat template; a tokenizer that does
            not continue a prompt's ids when the text goes on (it adds a token at the end, or merges over words).
    """
    check_positive(length=length)
    if isinstance(task, str):
        if task not in TASKS:
            raise unknown("task", task, TASKS)
        task = TASKS[task]
    if chat and not getattr(tokenizer, "chat_template", None):
        raise SpecError(f"chat: {type(tokenizer).__name__} has no chat template")

    def sample(size: int) -> RulerSample:
        question = task.ask(random.Random(f"{seed} {index}"), size)
        return _tokenized(question, tokenizer, chat=chat)

    def fits(size: int) -> bool:
        made = sample(size)
        return len(made.prompt_ids) + len(made.answer_ids) <= length

    low = task.smallest
    if not fits(low):
        made = sample(low)
        needed = len(made.prompt_ids) + len(made.answer_ids)
        raise SpecError(f"length {length} is too short for {task}: its shortest prompt and answer take {needed} tokens")
    high = 2 * low
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return sample(low)


def string_recall(text: str, answers: Sequence[str]) -> float:
    """RULER's score of a generated text: the share of the answers that occur in it, in either case of letters."""
    return sum(answer.lower() in text.lower() for answer in answers) / len(answers)


def _tokenized(question: Question, tokenizer: Callable[..., Any], *, chat: bool) -> RulerSample:
    prompt = question.text + question.prefix
    if chat:
        messages = [{"role": "user", "content": question.text}]
        turn = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = turn + question.prefix.lstrip()

    def encode(text: str) -> list[int]:
        ids = tokenizer(text, add_special_tokens=False) if chat else tokenizer(text)  # the template has its own
        return list(ids["input_ids"] if isinstance(ids, Mapping) else ids)

    texts = [prompt]
    for answer in question.answers:
        texts.append(f"{texts[-1]} {answer}")
    ids = [encode(text) for text in texts]
    for shorter, longer, answer in zip(ids, ids[1:], question.answers, strict=False):
        if longer[: len(shorter)] != shorter:
            raise SpecError(f"the tokenizer does not continue the ids of a prompt when ' {answer}' follows it")
    return RulerSample(
        prompt=prompt,
        answers=tuple(question.answers),
        prompt_ids=tuple(ids[0]),
        answer_ids=tuple(ids[-1][len(ids[0]) :]),
        answer_sizes=tuple(len(longer) - len(shorter) for shorter, longer in zip(ids, ids[1:], strict=False)),
        question_at=len(commonprefix([ids[0], encode(prompt[: prompt.rindex(question.asked)])])),
    )


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _digits(rng: random.Random, count: int) -> str:
    return str(rng.randrange(10 ** (count - 1), 10**count))
