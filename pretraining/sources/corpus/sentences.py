"""From the text of a document to its sentences: normalisation, then Wikimedia's sentencex, which needs no download."""

import dataclasses
import re
import unicodedata
from collections import Counter
from typing import Literal, cast

from sentencex import segment

from pcfg.common.files import InputError

UNICODE_FORMS = ("NFC", "NFKC", "none")
MAX_CHARACTERS = 10_000  # per sentence; a longer one is cut
# Characters per call of the splitter: its time grows with the square of a paragraph of many brackets, or of Chinese.
CHARACTERS_PER_CALL = 1 << 12
# Control characters except white space, soft hyphens, zero-width spaces, marks of direction, the byte order mark,
# noncharacters, and half surrogates, which JSON can hold and UTF-8 can't.
INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\ufeff\ufffe\uffff\ud800-\udfff]"
)
PARAGRAPH = re.compile(r"\n[^\S\n]*\n\s*")


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """How a text is changed before and after it is split."""

    unicode: str = "NFC"  # a member of `UNICODE_FORMS`: the normal form
    min_words: int = 1  # sentences of fewer words are dropped
    language: str = "en"  # ISO 639-1 code, for the splitter's abbreviations

    def __post_init__(self):
        if not re.fullmatch("[a-z]{2,3}", self.language):
            raise InputError(f"--language {self.language}: no ISO 639 code such as en or de")

    def clean(self, text: str) -> str:
        """The text in its normal form, without invisible characters."""
        text = INVISIBLE.sub("", text)
        return text if self.unicode == "none" else unicodedata.normalize(cast(Literal["NFC", "NFKC"], self.unicode), text)


def split_document(text: str, rules: Normalisation, counts: Counter) -> list[str]:
    """The sentences of a document, their words separated by single spaces.

    Args:
        text: of the document, as read. An empty line ends a paragraph, and so a sentence; a single line end is a space.
        counts: dropped and cut sentences are added to it.
    """
    lines: list[str] = []
    for paragraph in PARAGRAPH.split(rules.clean(text)):
        lines += _split_paragraph(" ".join(paragraph.split()), rules.language)
    return select_sentences(lines, rules, counts)


def _split_paragraph(paragraph: str, language: str) -> list[str]:
    """The sentences of a paragraph, with the space after each.

    The last sentence of a call may continue in the next `CHARACTERS_PER_CALL`, and is split again together with them.
    """
    lines = []
    rest = ""
    start = 0
    while start < len(paragraph):
        stop = start + CHARACTERS_PER_CALL
        if stop < len(paragraph):
            space = paragraph.rfind(" ", start, stop)
            stop = stop if space < 0 else space + 1
        parts = segment(language, rest + paragraph[start:stop])
        start = stop
        rest = parts.pop() if start < len(paragraph) and parts else ""
        if len(rest) > CHARACTERS_PER_CALL:
            parts.append(rest)
            rest = ""
        lines += parts
    return lines


def select_sentences(lines: list[str], rules: Normalisation, counts: Counter) -> list[str]:
    """The stripped lines that have enough words; lines longer than `MAX_CHARACTERS` are cut.

    Args:
        lines: words separated by single spaces.
    """
    result = []
    for line in map(str.strip, lines):
        if not line:
            continue
        if line.count(" ") + 1 < rules.min_words:
            counts["sentences that are too short"] += 1
        elif len(line) > MAX_CHARACTERS:
            counts["sentences that were cut"] += 1
            result += _cut(line, MAX_CHARACTERS)
        else:
            result.append(line)
    return result


def _cut(text: str, size: int) -> list[str]:
    """Words separated by single spaces, in blocks of at most `size` characters, cut at spaces where there are any.

    >>> _cut("one two three", 8)
    ['one two', 'three']
    >>> _cut("abcdef", 4)
    ['abcd', 'ef']
    """
    blocks = []
    start = 0
    while len(text) - start > size:
        space = text.rfind(" ", start + 1, start + size + 1)
        stop = space if space > 0 else start + size
        blocks.append(text[start:stop])
        start = stop + (space > 0)
    return [*blocks, text[start:]] if start < len(text) else blocks
