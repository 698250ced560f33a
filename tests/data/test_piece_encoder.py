"""Natural text as ids, against transformers' tokenizer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretraining.data import piece_encoder
from pretraining.data.piece_encoder import BLANK, PieceEncoder
from pretraining.data.vocabulary import SPECIAL_TOKENS, Vocabulary
from tests.bert_tokenizer import build_tokenizer

LETTERS = "abcdeilmnorstCAF"
MARKS = [".", ",", "'", "[", "]", "MASK", "\u0301", "\u00df", "\u4e2d", "\u00e9", "x"]
ENTRIES = [*SPECIAL_TOKENS, *LETTERS, *(f"##{letter}" for letter in LETTERS), "the", "cat", "##at", "Cat", *MARKS, "##\u4e2d"]
VOCABULARY = Vocabulary(ENTRIES)
TRICKY = [
    "The cats' caf\u00e9, o'clock.",
    "[MASK] the [SEP]the[CLS] [UNK] mask",
    "\u4e2d\u6587the \u4e2d",
    "a\u00a0cat\u2003the\u3000cat\u2028cat\u0085cat",  # spaces beyond ASCII
    "ca\x0bt c\x00at \x1ccat\ufffd ca\u00adt \u200bcat",  # controls, which are dropped
    "c" * 101 + " " + "c" * 100,
    "CAF\u00c9 cafe\u0301 \u0301cat \u0130 \u03a3\u0391\u03a3 \u1e9e",  # accents; a sigma that ends a word
    "the\tcat\rthe  cat ",
    "zebra ##s cat##s",
    "\U0001f600cat e\u0301\u0301\u0327",
]


def expected(text: str, tokenizer) -> list[list[int]]:
    flags = {"add_special_tokens": False, "split_special_tokens": True}
    return [tokenizer(line, **flags)["input_ids"] for line in text.split("\n")]


def encoded(encoder, text: str) -> list[list[int]]:
    ids, lengths = encoder.encode(text.encode())
    assert ids.dtype == lengths.dtype == np.int32
    assert len(ids) == np.maximum(lengths, 0).sum()
    return [part.tolist() for part in np.split(ids, np.cumsum(np.maximum(lengths, 0))[:-1])]


@pytest.fixture(scope="module")
def encoders():
    return {case: (PieceEncoder(VOCABULARY, case), build_tokenizer(VOCABULARY, case, 512)) for case in (True, False)}


@pytest.mark.parametrize("do_lower_case", [True, False])
def test_tricky_text(encoders, do_lower_case):
    encoder, tokenizer = encoders[do_lower_case]
    text = "\n".join(TRICKY)
    for _ in range(2):  # the second time all words are known
        assert encoded(encoder, text) == expected(text, tokenizer)
    assert any(VOCABULARY.unk_id in line for line in encoded(encoder, text))


@given(
    st.lists(
        st.one_of(
            st.sampled_from([*MARKS, *TRICKY, "the", "cat", " ", "\n", "\t"]), st.text(alphabet=LETTERS), st.text(max_size=9)
        )
    )
)
@settings(deadline=None, max_examples=200)
def test_any_text(encoders, parts):
    text = "".join(parts)
    for encoder, tokenizer in encoders.values():
        if text and not text.endswith("\n"):
            assert encoded(encoder, text) == expected(text, tokenizer)


def test_blank_lines_and_lines_that_have_no_token(encoders):
    encoder, _ = encoders[True]
    for text, lengths in (
        ("the cat\n\n \t\r\n\u200b\ncat", [2, BLANK, BLANK, 0, 1]),
        ("cat\n", [1]),
        ("\n", [BLANK]),
        ("", []),
    ):
        assert encoder.encode(text.encode())[1].tolist() == lengths


def test_many_words_and_a_memory_that_is_too_small(monkeypatch):
    """The table grows, and is given up when it is full; neither changes an id."""
    monkeypatch.setattr(piece_encoder, "MAX_WORDS", 2000)
    encoder, tokenizer = PieceEncoder(VOCABULARY, True), build_tokenizer(VOCABULARY, True, 512)
    rng = np.random.default_rng(0)
    sizes = []
    for _ in range(4):
        words = ["".join(rng.choice(list(LETTERS), size=rng.integers(1, 12))) for _ in range(1500)]
        text = " ".join(words)
        assert encoded(encoder, text) == expected(text, tokenizer)
        sizes.append(encoder._words)
    assert sizes[1] > 2000 > sizes[2]
