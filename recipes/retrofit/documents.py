"""Documents out of web pages and Python's sources, split so that nothing of a document is on both sides."""

import hashlib
import itertools
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

from lit_modules.data.files import find_files
from mixers.registry import SpecError

SHORTEST = 2000  # characters of a document
SHARE = 0.2  # of the text, for testing
REPEATED = 0.03  # of the sentences: quotations alone are fewer
LISTS = {"biblio", "arlinks", "new"}  # pages that are no prose
GENERATED = {"encodings", "pydoc_data"}  # tables
LEFT_OUT = GENERATED | {"idlelib", "lib2to3", "turtledemo", "ensurepip"}

Document = tuple[str, str, str]  # name, group (which stays on one side), text

BLOCKS = {"p", "div", "li", "ul", "ol", "dl", "dt", "dd", "blockquote", "pre", "center", "section", "hr", "table", "tr"}
BLOCKS |= {"td", "th", "h1", "h2", "h3", "h4", "h5", "h6"}
SILENT = {"head", "script", "style", "nav"}


class _Paragraphs(HTMLParser):
    """The paragraphs of a page, without those that are links for the most part: menus, tables of contents."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._text: list[str] = []
        self._linked = self._links = self._silent = 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self._silent += tag in SILENT
        self._links += tag == "a" and any(name == "href" for name, _ in attrs)
        if tag in BLOCKS:
            self._end_paragraph()
        elif tag == "br":
            self._text.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._silent = max(0, self._silent - (tag in SILENT))
        self._links = max(0, self._links - (tag == "a"))
        if tag in BLOCKS:
            self._end_paragraph()

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self._text.append(data)
            self._linked += len(data.strip()) if self._links else 0

    def close(self) -> None:
        super().close()
        self._end_paragraph()

    def _end_paragraph(self) -> None:
        text = " ".join("".join(self._text).split())
        if text and self._linked < len(text) / 2:
            self.paragraphs.append(text)
        self._text, self._linked, self._links = [], 0, 0  # a link does not outlive its paragraph: some are never closed


def html_to_text(page: str) -> str:
    """The prose of a web page, a blank line between paragraphs; what consists mostly of links is left out."""
    parser = _Paragraphs()
    parser.feed(page)
    parser.close()
    return "\n\n".join(parser.paragraphs)


def html_documents(pages: Iterable[Path]) -> Iterator[Document]:
    """The prose of web pages. Pages that repeat each other, such as an older wording of a chapter, are one group.

    Args:
        pages: files of HTML in UTF-8.

    Yields:
        Documents of at least 2,000 characters.
    """
    texts = {page.stem: html_to_text(page.read_text(encoding="utf-8", errors="replace")) for page in pages}
    texts = {name: text for name, text in texts.items() if len(text) >= SHORTEST and name not in LISTS}
    groups = repeating(texts)
    for name, text in texts.items():
        yield name, groups[name], text + "\n"


def repeating(texts: dict[str, str]) -> dict[str, str]:
    """Groups texts that repeat each other: two share a group if REPEATED of the shorter one's sentences are in both.

    Args:
        texts: by name.

    Returns:
        The group of every name, called after one of it. What repeats a member belongs to the group, too.
    """
    sentences = {name: {s for s in re.split(r"(?<=[.?!:;])\s+", text) if len(s) >= 40} for name, text in texts.items()}
    groups = {name: name for name in texts}
    for one, other in itertools.combinations(texts, 2):
        shared = len(sentences[one] & sentences[other])
        if shared > REPEATED * min(len(sentences[one]), len(sentences[other])) and groups[one] != groups[other]:
            joined = groups[other]
            groups = {name: groups[one] if group == joined else group for name, group in groups.items()}
    return groups


def code_documents() -> Iterator[Document]:
    """The sources of the running Python's standard library, without tests, tables and IDLE.

    Yields:
        Documents of at least 2,000 characters; a group is a top-level module.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for file in find_files(None):
        parts = file.relative_to(root).with_suffix("").parts
        if parts[0] in LEFT_OUT or parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        if len(text := file.read_text(encoding="utf-8", errors="replace")) >= SHORTEST:
            yield ".".join(parts), parts[0], text


def write_split(
    documents: Iterable[Document], folder: Path, *, suffix: str = ".txt", cap: int | None = None
) -> dict[str, dict[str, int]]:
    """Writes every document into `fit` or `test` of a folder.

    A fifth to two fifths of the text, whole groups, is for testing; a hash of the groups' names decides which.

    Args:
        documents: to write.
        folder: that gets the two.
        suffix: of the files' names.
        cap: characters in all, a fifth of them for testing; None: no limit. Which documents that leaves is decided by
            a hash of their names, too.

    Returns:
        The number of documents and of characters of each.

    Raises:
        SpecError: one of the two got no document.
    """
    documents = sorted(documents, key=lambda document: _digest(document[0]))
    sizes = Counter()
    for _, group, text in documents:
        sizes[group] += len(text)
    testing: set[str] = set()
    held_out = 0
    for group in sorted(sizes, key=_digest):
        if held_out < SHARE * sizes.total() and held_out + sizes[group] <= 2 * SHARE * sizes.total():
            testing.add(group)
            held_out += sizes[group]

    counts = {split: {"documents": 0, "characters": 0} for split in ("fit", "test")}
    for split in counts:
        (folder / split).mkdir()
    for name, group, text in documents:
        split, share = ("test", SHARE) if group in testing else ("fit", 1 - SHARE)
        count = counts[split]
        if cap is None or count["characters"] + len(text) <= cap * share:
            (folder / split / f"{name}{suffix}").write_text(text, encoding="utf-8")
            count["documents"] += 1
            count["characters"] += len(text)
    if not all(count["documents"] for count in counts.values()):
        raise SpecError(f"too few documents of at least {SHORTEST} characters to split: {counts}")
    return counts


def _digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=16).digest()
