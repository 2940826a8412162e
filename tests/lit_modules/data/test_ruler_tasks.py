"""RULER's tasks: what is asked can be answered from the prompt, and its tokens are those of the text."""

import random
import re

import pytest

from lit_modules.data.ruler_tasks import TASKS, Needle, VariableTracking, ruler_sample, ruler_samples, string_recall
from mixers.hf import byte_tokenizer
from mixers.registry import SpecError

NEEDLE = re.compile(r"One of the special magic numbers for ([a-z]+-[a-z]+) is: (\d{7})\.")


def bytes_of(text: str) -> list[int]:
    return list(text.encode())


def pairs_of(text: str) -> list[int]:
    """A tokenizer that merges across the beginning of an answer: two bytes a token."""
    return [hash(text[i : i + 2]) for i in range(0, len(text), 2)]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("tokenizer", [bytes_of, byte_tokenizer()], ids=["callable", "transformers"])
@pytest.mark.parametrize("length", [2000, 3001])
def test_a_prompt_with_its_answer_is_as_long_as_fits(task, tokenizer, length):
    for sample in ruler_samples(task, tokenizer, count=3, length=length):
        ids = sample.prompt_ids + sample.answer_ids
        assert length - 100 < len(ids) <= length  # a sentence of filler has 90 characters
        assert bytes(ids).decode() == sample.prompt + sample.answer
        assert bytes(sample.prompt_ids).decode() == sample.prompt
        assert sum(sample.answer_sizes) == len(sample.answer_ids) and len(sample.answer_sizes) == len(sample.answers)
        assert string_recall(sample.answer, sample.answers) == 1 and string_recall("none", sample.answers) == 0


def test_the_number_is_that_of_the_word_asked_for():
    for task in ("niah_single_1", "niah_multikey_2"):
        for sample in ruler_samples(task, bytes_of, count=20, length=1500):
            told = NEEDLE.findall(sample.prompt)
            key = re.search(r"The special magic number for (\S+) mentioned in the provided text is$", sample.prompt)[1]
            assert [value for word, value in told if word == key] == list(sample.answers)
            assert len(told) == (1 if task == "niah_single_1" else sample.prompt.count("One of"))
            assert ("The grass is green" in sample.prompt) == (task == "niah_single_1")


def test_the_variables_are_those_that_hold_the_number():
    for sample in ruler_samples("variable_tracking", bytes_of, count=20, length=3000):
        text = sample.prompt.split("Memorize and track")[2]  # after the example
        value = re.search(r"assigned the value (\d{5}) in", text)[1]
        holds = {}
        for name, given in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):
            holds[name] = holds.get(given, given)
        assert list(holds) == list(sample.answers) and set(holds.values()) == {value}
        assert len(sample.answers) == 5 and text.endswith("5 variables are assgined the value " + value + ", they are:")


def test_variants():
    sample = ruler_sample(Needle(others=3), bytes_of, length=2000)
    told = dict(NEEDLE.findall(sample.prompt))
    assert len(told) == 4 and sample.answers[0] in told.values() and sample.prompt.count("The grass") > 10
    with pytest.raises(SpecError, match="others"):
        Needle(others=-1)
    sample = ruler_sample(VariableTracking(hops=1, example=False), bytes_of, length=1000)
    assert len(sample.answers) == 2 and sample.prompt.count("Memorize") == 1 and sample.prompt.count("VAR ") == 3
    declared = ruler_sample(VariableTracking(hops=1, declared=True), bytes_of, length=1500)
    assert declared.answers == tuple(f"VAR {name}" for name in sample.answers)
    assert re.search(r"they are: VAR [A-Z]{3} VAR [A-Z]{3}\n\nMemorize", declared.prompt)
    with pytest.raises(SpecError, match="hops"):
        VariableTracking(hops=0)


def test_seed_and_index_decide():
    def prompt(task, **options):
        return ruler_sample(task, bytes_of, length=2000, **options).prompt

    for task in TASKS:
        random.seed(1)  # of no matter
        assert prompt(task, seed=1, index=2) == prompt(task, seed=1, index=2)
        assert len({prompt(task, seed=seed, index=index) for seed in (1, 2) for index in (3, 4)}) == 4
        longer = ruler_sample(task, bytes_of, length=3000)
        assert longer.answers == ruler_sample(task, bytes_of, length=2000).answers  # the same facts, further apart


def test_needles_lie_anywhere():
    samples = ruler_samples("niah_single_1", bytes_of, count=60, length=1500)
    depths = [sample.prompt.index("One of the special") / len(sample.prompt) for sample in samples]
    assert min(depths) < 0.25 and max(depths) > 0.7


def newlines_merge(text: str) -> list[int]:
    """A tokenizer that merges a line's end with what comes after."""
    return [hash(part) for part in re.findall(r"\n+\w?|.", text)]


@pytest.mark.parametrize("task", [*TASKS.values(), Needle(others=3), VariableTracking(declared=True)])
def test_the_question_begins_after_the_context(task):
    """The last one: an instruction goes before the context, and an example with a question of its own."""
    chat = byte_tokenizer()
    chat.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    for tokenizer in (bytes_of, chat, newlines_merge):
        sample = ruler_sample(task, tokenizer, length=2000, chat=tokenizer is chat)
        begin = "What is the" if isinstance(task, Needle) else "Question: Find all"
        at = sample.prompt.rindex(begin)
        if tokenizer is newlines_merge:
            at = len(sample.prompt[:at].rstrip("\n"))
        ids = tokenizer(sample.prompt[at:])
        assert list(sample.prompt_ids[sample.question_at :]) == (ids["input_ids"] if tokenizer is chat else ids)


def test_the_chat_template_holds_the_question_and_the_answer_begins_after_it():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    sample = ruler_sample("niah_single_1", tokenizer, length=1500, chat=True)
    assert sample.prompt.startswith("<user>A special magic number is hidden")
    assert "text?<assistant>The special magic number for" in sample.prompt
    assert len(sample.prompt_ids + sample.answer_ids) <= 1500


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"task": "niah_single_9"}, "niah_single_9.*niah_single_1"),
        ({"length": 100}, "length 100 is too short"),
        ({"length": 0}, "length"),
        ({"chat": True}, "has no chat template"),
        ({"tokenizer": pairs_of, "task": "variable_tracking"}, "does not continue the ids of a prompt"),
    ],
)
def test_mistakes_are_named(options, said):
    given = {"task": "niah_single_1", "tokenizer": byte_tokenizer(), "length": 2000} | options
    with pytest.raises(SpecError, match=said):
        ruler_sample(given.pop("task"), given.pop("tokenizer"), **given)
