"""Which bytes of a text are names that come back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_modules.data.names import DISTANCE, repeated_names
from lit_modules.data.text import TextData

FAR = b" " * DISTANCE


def marked(text):
    """The bytes that are marked, others as dots."""
    return bytes(byte if mark else ord(".") for byte, mark in zip(text, repeated_names(text), strict=True))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b"value" + FAR + b"value", b"alue"),  # not its first byte
        (b"value" + FAR[5:] + b"value", b"alue"),
        (b"value" + FAR[6:] + b"value", b""),  # too near
        (b"value" + FAR + b"value value", b"alue"),  # of two, the second is near the first
        (b"value" + FAR + b"values", b""),  # another name
        (b"val" + FAR + b"val", b""),  # too short
        (b"return self" + FAR + b"return self", b""),  # any program's
        (b"1234" + FAR + b"1234", b""),  # no name
        (b"_a1b" + FAR + b"(_a1b)", b"a1b"),
        (b"\xff\xfename" + FAR + b"\xffname", b"ame"),
        (b"", b""),
    ],
)
def test_names_that_come_back(text, found):
    assert marked(text).replace(b".", b"") == found


@given(st.lists(st.sampled_from([b"name", b"other", b"def", b"x", b"(", b" " * 10, b" " * 60]), max_size=30))
def test_it_is_what_a_search_backwards_finds(words):
    text = b" ".join(words)
    golden, at = [False] * len(text), 0
    for word in words:
        if word in (b"name", b"other"):
            before = (b" " + text[:at]).rfind(b" " + word + b" ")  # words end in a space, but for the last
            if before >= 0 and at - before >= DISTANCE:
                golden[at + 1 : at + len(word)] = [True] * (len(word) - 1)
        at += len(word) + 1
    assert repeated_names(text).tolist() == golden


def test_batches_mark_targets_of_their_own_sequence(tmp_path):
    """What another sequence had does not count, nor what training would have to compute."""
    for i in range(60):
        (tmp_path / f"{i}.py").write_text(f"once = 1\n{'x = 2' * 20}\nboth = both_{i} + {'2 + ' * 20} both_{i}\n" * 2)
    data = TextData(paths=[str(tmp_path)], seq_len=256, batch_tokens=1024, held_out=0.1)
    data.setup("test")
    assert "names" not in next(iter(data.train_dataloader()))
    found = 0
    for batch in [*data.val_dataloader(), *data.test_dataloader()]:
        bounds = batch["cu_seqlens"].tolist()
        for begin, end in zip(bounds, bounds[1:], strict=False):
            tokens, targets = (batch[key][0, begin:end].tolist() for key in ("tokens", "targets"))
            assert batch["names"][0, begin:end].tolist() == repeated_names(bytes([*tokens, targets[-1]]))[1:].tolist()
        found += int(batch["names"].sum())
    assert found > 0
