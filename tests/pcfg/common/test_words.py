"""Text to word indices, against str.split and a dictionary."""

import pickle
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pcfg.common.files import InputError
from pcfg.common.text import read_texts, text_blocks
from pcfg.common.words import WordIndex, padded

WHITE_SPACE = [character for character in map(chr, range(sys.maxunicode + 1)) if character.isspace()]
# Words that share beginnings, and characters that share bytes with the white space of Unicode.
WORDS = ["a", "b", "ab", "aba", "\u00e9", "\u00c2", "\u2010x", "\u3001", "\U0001f600", "\x01", "\u1681", "a\ufeff", "\u205e"]
INDEX = WordIndex(WORDS)


def naive_encode(words, texts):
    """The sentences as lists of indices; None instead of an unknown word."""
    ids = {word: index for index, word in enumerate(words)}
    return [[ids.get(word) for word in text.split()] for text in texts]


def rows(flat, lengths):
    return [row.tolist() for row in np.split(flat, np.cumsum(lengths)[:-1])] if len(lengths) else []


gaps = st.text(st.sampled_from([*" \n\n\r\t", *WHITE_SPACE]), min_size=1, max_size=3)
texts_of_known_words = st.lists(st.tuples(st.sampled_from(WORDS), gaps), min_size=1, max_size=40)


@given(texts_of_known_words, gaps)
@settings(max_examples=300, deadline=None)
def test_agrees_with_split_and_a_dictionary(tmp_path_factory, pieces, start):
    path = tmp_path_factory.getbasetemp() / "words.txt"
    path.write_bytes((start + "".join(word + gap for word, gap in pieces)).encode())
    flat, lengths = INDEX.encode(path.read_bytes(), "here")
    assert flat.dtype == lengths.dtype == np.int32
    assert rows(flat, lengths) == naive_encode(WORDS, read_texts(path))


@given(st.lists(st.text(st.sampled_from("ab\u00e9 \r\n"), max_size=8), min_size=1, max_size=8), st.integers(0, 5))
@example(["", "a", "b ba"], 0)
@settings(max_examples=300, deadline=None)
def test_the_first_unknown_word_is_named_with_its_sentence(lines, before):
    text = "\n".join(lines)
    sentences = [line for line in text.split("\n") if line.strip()]
    expected = naive_encode(WORDS, sentences)
    unknown = [(number, row.index(None)) for number, row in enumerate(expected) if None in row]
    if not unknown:
        assert rows(*INDEX.encode(text.encode(), "here")) == expected
        return
    number, position = unknown[0]
    with pytest.raises(InputError) as error:
        INDEX.encode(text.encode(), "here.txt", before)
    word = sentences[number].split()[position]
    assert str(error.value).startswith(f"here.txt: sentence {before + number + 1}: word {word!r} is not in the grammar;")


def test_all_white_space_of_unicode_separates_words_and_nothing_else_does():
    assert len(WHITE_SPACE) > 20
    for space in WHITE_SPACE:
        flat, lengths = INDEX.encode(f"a{space}b{space}\n".encode(), "here")
        assert flat.tolist() == [0, 1] and lengths.tolist() == ([1, 1] if space == "\n" else [2])
    others = [chr(code) for code in range(0x3100) if not chr(code).isspace()]
    index = WordIndex([f"a{character}b" for character in others])
    flat, lengths = index.encode("\n".join(index_word for index_word in (f"a{c}b" for c in others)).encode(), "here")
    assert flat.tolist() == list(range(len(others))) and (lengths == 1).all()


def test_words_with_the_same_slot_are_told_apart():
    """As many words as three letters give, so that many share a slot; every second one is unknown."""
    letters = [f"{a}{b}{c}" for a in "abcdefghij" for b in "abcdefghij" for c in "abcdefghij"]
    index = WordIndex(letters[::2])
    assert index.encode(" ".join(letters[::2]).encode(), "here")[0].tolist() == list(range(500))
    for word in letters[1::2]:
        with pytest.raises(InputError, match=f"sentence 1: word '{word}'"):
            index.encode(word.encode(), "here")


@given(st.binary(max_size=12))
@settings(max_examples=500, deadline=None)
def test_bytes_that_are_not_utf8_are_refused_with_their_line(content):
    text = b"a b\n" + content
    try:
        text.decode()
    except UnicodeDecodeError as wrong:
        line = text.count(b"\n", 0, wrong.start) + 1
        with pytest.raises(InputError, match=rf"^here.txt:{line}: not UTF-8 \(byte 0x{text[wrong.start]:02x}\)"):
            INDEX.encode(text, "here.txt")


def test_a_text_without_words_has_no_sentences():
    for text in (b"", b"\n \n\r\n"):
        flat, lengths = INDEX.encode(text, "here")
        assert flat.shape == lengths.shape == (0,)


def test_lists_of_sentences():
    flat, lengths = INDEX.encode_texts(["a b", " ab\nb\r\n", "a"], "here")
    assert rows(flat, lengths) == [[0, 1], [2, 1], [0]]
    with pytest.raises(InputError, match="here: sentence 2: no words"):
        INDEX.encode_texts(["a", " \n\u3000", ""], "here")
    with pytest.raises(InputError, match="here: sentence 3: word 'c' is not in the grammar"):
        INDEX.encode_texts(["a\nb", "a", "b c"], "here")
    assert INDEX.encode_texts([], "here")[0].shape == (0,)


def test_padded_agrees_with_row_by_row():
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 6, size=50)
    flat = rng.integers(100, size=lengths.sum())
    tokens = padded(flat, lengths, -1)
    assert tokens.shape == (50, 5) and tokens.dtype == np.int32
    assert tokens.tolist() == [row + [-1] * (5 - len(row)) for row in rows(flat, lengths)]
    assert padded(flat[:0], lengths[:0], -1).shape == (0, 0)


def test_repeated_words_are_refused_and_a_pickled_index_is_the_same():
    with pytest.raises(ValueError, match="distinct"):
        WordIndex(["a", "b", "a"])
    assert pickle.loads(pickle.dumps(INDEX)).encode(b"ab b", "here")[0].tolist() == [2, 1]


def test_blocks_of_a_file_give_what_the_whole_gives(tmp_path):
    rng = np.random.default_rng(1)
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(" ".join(rng.choice(WORDS, size=rng.integers(1, 9))) for _ in range(300)) + "\n")
    flat, lengths = INDEX.encode(path.read_bytes(), path)
    for size in (1, 50, 1000, 1 << 20):
        parts = [INDEX.encode(block, path) for block in text_blocks(path, size)]
        assert np.array_equal(np.concatenate([part[0] for part in parts]), flat)
        assert np.array_equal(np.concatenate([part[1] for part in parts]), lengths)
