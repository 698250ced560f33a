from collections import Counter

import pytest

from pcfg.artefacts import InputError
from pretraining.sources.sentences import Normalisation, kept, sentences


def test_sentences_of_a_document():
    text = "Dr. Smith paid $3.50 to Mr. Jones. He\nleft!\r\n\r\nA  new\tparagraph without an end\n \nThe last one"
    expected = [
        "Dr. Smith paid $3.50 to Mr. Jones.",
        "He left!",
        "A new paragraph without an end",
        "The last one",
    ]
    assert sentences(text, Normalisation(), Counter()) == expected


@pytest.mark.parametrize(("form", "expected"), [("NFC", "café ﬁ²"), ("NFKC", "café fi2"), ("none", "cafe\u0301 ﬁ²")])
def test_normal_forms(form, expected):
    text = "\ufeffca\u200bfe\u0301\x00 \ufb01\u00ad\u00b2 \ud800\u2028"
    assert sentences(text, Normalisation(unicode=form), Counter()) == [expected]


def test_short_and_long_ones():
    counts = Counter()
    long = " ".join(["word"] * 3000)  # 14,999 characters, without an end
    lines = ["Short one.", "", "This one is long enough.", long, "x" * 25_000]
    found = kept(lines, Normalisation(min_words=4), counts)
    assert counts == {"sentences that are too short": 2, "sentences that were cut": 1}
    assert found[0] == lines[2] and " ".join(found[1:]) == long and max(map(len, found)) <= 10_000
    found = kept(["x" * 25_000], Normalisation(), counts)
    assert [len(part) for part in found] == [10_000, 10_000, 5_000]


def test_an_enormous_paragraph():
    """It is given to the splitter in blocks, and nothing of it is lost."""
    text = "A sentence of some words. " * 100_000
    found = sentences(text, Normalisation(), Counter())
    assert " ".join(found) == text.strip() and len(found) == pytest.approx(100_000, abs=3)


def test_no_language():
    with pytest.raises(InputError, match="--language English"):
        Normalisation(language="English")
