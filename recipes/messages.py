"""jsonargparse's errors, which are trees over many lines, and Python's warnings, which are two, as one line."""

import difflib
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

KEY = re.compile(r'Parser key "([^"]+)":?\s*')
# What tells a user nothing: that a value fits no member of a union, and how that union is spelled.
NOISE = re.compile(r"(- )?(Does not validate|Subtypes:|Errors:|Given value|Problem with given|Expected a path)")
EXPECTED = re.compile(r"(?:- )?Expected an? (?:<class '(?:\w+\.)*(\w+)'>|typing\.(Literal\[.*\]))$")
UNKNOWN_FLAG = re.compile(r"(?:[Oo]ption|arguments:) '?(?:--)?([\w.]+)")


def program() -> str:
    """How the command line was started."""
    return "mixers" if Path(sys.argv[0]).stem == "mixers" else "python -m recipes"


def one_line(message: str, known: Iterable[str] = ()) -> str:
    """The message without line breaks; of a jsonargparse error, the parts that matter, in the words of the flags.

    Args:
        message: an error's text.
        known: flags without their dashes; the nearest is suggested if the error is about one that does not exist.
    """
    lines = [line.strip() for line in message.splitlines()]
    key = ".".join(KEY.findall(message)).replace("init_args.", "")
    given = next((line.partition(": ")[2] for line in lines if line.startswith("Given value: ")), "")
    lines = [KEY.sub("", line) for line in lines]
    expected = [match[1] or match[2] for line in lines if (match := EXPECTED.match(line))]
    facts = [line.removeprefix("- ") for line in lines if line and not NOISE.match(line) and not EXPECTED.match(line)]
    if not facts and expected:
        kinds = [kind for kind in dict.fromkeys(expected) if kind != "NoneType"]
        facts = [f"expected {' or '.join(kinds)}, got {given}"]
    text = re.sub(r"<class '([^']+)'>", r"\1", " ".join(dict.fromkeys(facts)))
    if match := UNKNOWN_FLAG.search(text):
        name = f"{key}.{match[1]}" if key else match[1].replace("init_args.", "")
        known = list(known)  # a flag that there is, but not for this class, is no slip of the pen
        close = [] if match[1] in known else difflib.get_close_matches(name, known, n=1)
        text += f". Did you mean --{close[0]}?" if close else ""
    return f"{key}: {text}" if key else text


def end_bars() -> None:
    """Ends the progress bars that an error left behind, so that what is said next has a line of its own."""
    if "tqdm" in sys.modules:
        for bar in list(sys.modules["tqdm"].tqdm._instances):
            bar.close()


def show_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    """For `warnings.showwarning`: one line on stderr, above a progress bar if there is one."""
    text = f"warning: {' '.join(str(message).split())}"
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(text, file=sys.stderr)
    else:
        print(text, file=sys.stderr)


def show_thread_error(error: Any) -> None:
    """For `threading.excepthook`: one line on stderr. A logger's thread ends so, and the logger then ends the run."""
    show_warning(f"a thread ended with {error.exc_type.__name__}: {error.exc_value}")
