"""From the text of a document to its sentences: normalisation, then Wikimedia's sentencex, which needs no download."""

import dataclasses
import re
import unicodedata
from collections import Counter

from sentencex import segment

from pcfg.common.files import InputError

UNICODE_FORMS = ("NFC", "NFKC", "none")
MOST_CHARACTERS = 10_000  # of a sentence; a longer one is cut
# Characters that the splitter is given at once: its time grows with the square of a paragraph of many brackets, or of Chinese.
AT_ONCE = 1 << 12
# Control characters but for white space, soft hyphens, zero-width spaces, marks of direction, the byte order mark,
# noncharacters; and half surrogates, which JSON can hold and UTF-8 can't.
INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\ufeff\ufffe\uffff\ud800-\udfff]"
)
PARAGRAPH = re.compile(r"\n[^\S\n]*\n\s*")


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """What becomes of a text before and after it is split.

    Args:
        unicode: a member of `UNICODE_FORMS`: the normal form.
        min_words: sentences of fewer words are dropped.
        language: ISO 639-1 code, for the splitter's abbreviations.
    """

    unicode: str = "NFC"
    min_words: int = 1
    language: str = "en"

    def __post_init__(self):
        if not re.fullmatch("[a-z]{2,3}", self.language):
            raise InputError(f"--language {self.language}: no ISO 639 code such as en or de")

    def clean(self, text: str) -> str:
        """The text in its normal form, without invisible characters."""
        text = INVISIBLE.sub("", text)
        return text if self.unicode == "none" else unicodedata.normalize(self.unicode, text)


def sentences(text: str, rules: Normalisation, counts: Counter) -> list[str]:
    """The sentences of a document; their words are parted by single spaces.

    Args:
        text: of the document, as it was read. An empty line parts paragraphs, and so sentences; a single line end is a space.
        counts: what was dropped or cut is added to it.
    """
    found = []
    for paragraph in PARAGRAPH.split(rules.clean(text)):
        found += _split(" ".join(paragraph.split()), rules.language)
    return kept(found, rules, counts)


def _split(paragraph: str, language: str) -> list[str]:
    """The sentences of a paragraph, with the space after each; `AT_ONCE` characters at a time.

    The last sentence of a part may go on in the next one, and is split again with it.
    """
    found, rest, start = [], "", 0
    while start < len(paragraph):
        stop = start + AT_ONCE
        if stop < len(paragraph):
            space = paragraph.rfind(" ", start, stop)
            stop = stop if space < 0 else space + 1
        parts = segment(language, rest + paragraph[start:stop])
        start = stop
        rest = parts.pop() if start < len(paragraph) and parts else ""
        if len(rest) > AT_ONCE:
            parts.append(rest)
            rest = ""
        found += parts
    return found


def kept(lines: list[str], rules: Normalisation, counts: Counter) -> list[str]:
    """Those lines that have enough words, stripped; a longer one than `MOST_CHARACTERS` in several.

    Args:
        lines: words parted by single spaces.
    """
    result = []
    for line in map(str.strip, lines):
        if not line:
            continue
        if line.count(" ") + 1 < rules.min_words:
            counts["sentences that are too short"] += 1
        elif len(line) > MOST_CHARACTERS:
            counts["sentences that were cut"] += 1
            result += _blocks(line, MOST_CHARACTERS)
        else:
            result.append(line)
    return result


def _blocks(text: str, most: int) -> list[str]:
    """A text of words parted by single spaces, in blocks of at most `most` characters, cut at spaces where there are any.

    >>> _blocks("one two three", 8)
    ['one two', 'three']
    >>> _blocks("abcdef", 4)
    ['abcd', 'ef']
    """
    blocks, start = [], 0
    while len(text) - start > most:
        place = text.rfind(" ", start + 1, start + most + 1)
        stop = place if place > 0 else start + most
        blocks.append(text[start:stop])
        start = stop + (place > 0)
    return [*blocks, text[start:]] if start < len(text) else blocks
