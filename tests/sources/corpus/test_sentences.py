from collections import Counter

import pytest
from sentencex import segment

from pcfg.common.files import InputError
from pretraining.sources.corpus.sentences import CHARACTERS_PER_CALL, Normalisation, select_sentences, split_document


def test_sentences_of_a_document():
    text = "Dr. Smith paid $3.50 to Mr. Jones. He\nleft!\r\n\r\nA  new\tparagraph without an end\n \nThe last one"
    expected = [
        "Dr. Smith paid $3.50 to Mr. Jones.",
        "He left!",
        "A new paragraph without an end",
        "The last one",
    ]
    assert split_document(text, Normalisation(), Counter()) == expected


@pytest.mark.parametrize(("form", "expected"), [("NFC", "café ﬁ²"), ("NFKC", "café fi2"), ("none", "cafe\u0301 ﬁ²")])
def test_normal_forms(form, expected):
    text = "\ufeffca\u200bfe\u0301\x00 \ufb01\u00ad\u00b2 \ud800\u2028"
    assert split_document(text, Normalisation(unicode=form), Counter()) == [expected]


def test_short_and_long_ones():
    counts = Counter()
    long = " ".join(["word"] * 3000)  # 14,999 characters, without an end
    lines = ["Short one.", "", "This one is long enough.", long, "x" * 25_000]
    found = select_sentences(lines, Normalisation(min_words=4), counts)
    assert counts == {"sentences that are too short": 2, "sentences that were cut": 1}
    assert found[0] == lines[2] and " ".join(found[1:]) == long and max(map(len, found)) <= 10_000
    found = select_sentences(["x" * 25_000], Normalisation(), counts)
    assert [len(part) for part in found] == [10_000, 10_000, 5_000]


def test_long_paragraphs():
    """Given to the splitter in parts, they come out as whole, and nothing is lost where a sentence has no end."""
    text = "".join(f"Sentence {i} of Mr. Smith has words (and more of them). He said so! " for i in range(500)).strip()
    assert len(text) > 6 * CHARACTERS_PER_CALL
    assert split_document(text, Normalisation(), Counter()) == [line.strip() for line in segment("en", text)]
    for odd in ("words without an end " * 3000, "中文句子。" * 3000, "x" * 20_000, "(see (this) " * 3000):
        found = split_document(odd, Normalisation(), Counter())
        assert "".join(found).replace(" ", "") == odd.replace(" ", "")


def test_no_language():
    with pytest.raises(InputError, match="--language English"):
        Normalisation(language="English")
