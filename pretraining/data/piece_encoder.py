"""Natural text as ids of BERT's WordPieces, straight from its bytes: each different word is tokenised once, in Rust.

BERT's tokenizer cuts a text at white space and before and after each punctuation mark. Cleaning, lower-casing, accents and
pieces then concern one word alone, so the ids of a text are those of its words and marks, one after the other; a known word
is looked up in the hash table of `pcfg.common.words`. `tests/data/test_piece_encoder.py` compares the ids with those of
transformers' tokenizer on whole sentences.

A special token in a text ("[MASK]") is plain text here, as for transformers with `split_special_tokens=True`.
"""

import numba
import numpy as np

from pcfg.common.words import fill_slots, find_slot, mixed
from pretraining.data.vocabulary import Vocabulary
from pretraining.data.wordpiece import wordpiece

BLOCK_BYTES = 1 << 20  # of text per call
MAX_WORDS = 1 << 20  # in the table; then it starts empty again
MAX_LETTERS = 1 << 26  # bytes of these words
BLANK = -1  # the length of a line without words


class PieceEncoder:
    """The ids of texts, by a table of all known words; `do_lower_case` strips accents as well.

    >>> from pretraining.data.vocabulary import SPECIAL_TOKENS
    >>> encoder = PieceEncoder(Vocabulary([*SPECIAL_TOKENS, "the", "cat", "##s", "."]), do_lower_case=True)
    >>> ids, lengths = encoder.encode(b"The cats.\\n\\nDogs\\n")
    >>> ids.tolist(), lengths.tolist()
    ([5, 6, 7, 8, 1], [4, -1, 1])
    """

    def __init__(self, vocabulary: Vocabulary, do_lower_case: bool):
        self._tokenizer = wordpiece(vocabulary, do_lower_case)
        self._tokenizer.encode_special_tokens = True
        self._forget()

    def _forget(self) -> None:
        self._words = 0  # punctuation marks are words too
        self._letters = np.empty(BLOCK_BYTES, dtype=np.uint8)  # of all words, one after the other
        self._ends = np.zeros(1, dtype=np.int64)  # word w: letters[ends[w]:ends[w + 1]]
        self._hashes = np.empty(0, dtype=np.uint64)
        self._slots = np.full(1, -1, dtype=np.int32)
        self._pieces = np.empty(0, dtype=np.int32)
        self._piece_ends = np.zeros(1, dtype=np.int64)  # word w: pieces[piece_ends[w]:piece_ends[w + 1]]

    def encode(self, text: bytes) -> tuple[np.ndarray, np.ndarray]:
        """The ids of whole lines of UTF-8 text, (M,) int32, line after line, without [CLS] and [SEP], and their lengths.

        The lengths (lines,) int32 are ids per line; `BLANK` for a line of white space only.
        """
        if self._words > MAX_WORDS or self._ends[self._words] > MAX_LETTERS:
            self._forget()
        letters = np.frombuffer(text, dtype=np.uint8)
        self._make_room(len(letters))
        words = np.empty(len(letters), dtype=np.int32)
        lines = np.empty(text.count(b"\n") + 1, dtype=np.int32)
        table = self._letters, self._ends, self._hashes, self._slots
        known = self._words
        number, self._words = _find(letters, *table, known, words, lines)
        self._tokenise(known)
        lines = lines[: len(lines) - text.endswith(b"\n")] if text else lines[:0]
        return _expand(words[:number], lines, self._pieces, self._piece_ends)

    def _make_room(self, size: int) -> None:
        """Make room in the table for the words of `size` bytes of text."""
        words = self._words + (size + 1) // 2 + 32  # the marks of ASCII
        self._letters = _at_least(self._letters, self._ends[self._words] + size)
        self._ends = _at_least(self._ends, words + 1)
        self._hashes = _at_least(self._hashes, words)
        if len(self._slots) < 2 * words:  # half full at most
            self._slots = np.full(1 << (2 * words).bit_length(), -1, dtype=np.int32)
            fill_slots(self._hashes[: self._words], self._slots)

    def _tokenise(self, known: int) -> None:
        """Add the pieces of the words from number `known` on."""
        ends = self._ends[known : self._words + 1].tolist()
        letters = self._letters[ends[0] : ends[-1]].tobytes()
        new = [letters[start - ends[0] : end - ends[0]].decode() for start, end in zip(ends, ends[1:], strict=False)]
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(new, add_special_tokens=False)]
        used = self._piece_ends[known]
        new_ends = used + np.cumsum([len(pieces) for pieces in ids], dtype=np.int64)
        self._piece_ends = _at_least(self._piece_ends, self._words + 1)
        self._piece_ends[known + 1 : self._words + 1] = new_ends
        self._pieces = _at_least(self._pieces, self._piece_ends[self._words])
        self._pieces[used : self._piece_ends[self._words]] = [piece for pieces in ids for piece in pieces]


def _at_least(array: np.ndarray, size: int) -> np.ndarray:
    """The array, or one of `size` or more entries that begins with its own."""
    if len(array) >= size:
        return array
    larger = np.empty(max(int(size), 2 * len(array)), dtype=array.dtype)
    larger[: len(array)] = array
    return larger


@numba.njit
def _is_space(byte):
    # White space of BERT's tokenizer in ASCII; other spaces stay inside a word, and are left to the tokenizer.
    return byte == 32 or byte == 9 or byte == 10 or byte == 13


@numba.njit
def _is_mark(byte):
    # Punctuation in ASCII; other marks stay inside a word too.
    return 33 <= byte <= 47 or 58 <= byte <= 64 or 91 <= byte <= 96 or 123 <= byte <= 126


@numba.njit(cache=True, nogil=True)
def _find(text, letters, ends, hashes, slots, known, words, lines):
    """Fill `words` with the numbers of the text's words and `lines` with the words per line (BLANK for none).

    Unknown words are added to the table. Returns the number of words of the text, and of the table.
    """
    place = 0
    number = 0
    line = 0
    first = 0
    while place < len(text):
        if _is_space(text[place]):
            if text[place] == 10:
                lines[line] = number - first if number > first else BLANK
                line += 1
                first = number
            place += 1
            continue
        start = place
        hashed = np.uint64(0)
        eight = np.uint64(0)
        shift = np.uint64(0)
        while place < len(text) and not _is_space(text[place]):
            if _is_mark(text[place]) and place > start:
                break
            eight |= np.uint64(text[place]) << shift
            shift += np.uint64(8)
            if shift == np.uint64(64):
                hashed = mixed(hashed, eight)
                eight = np.uint64(0)
                shift = np.uint64(0)
            place += 1
            if _is_mark(text[start]):
                break
        if shift > np.uint64(0):
            hashed = mixed(hashed, eight)
        slot = find_slot(text, start, place, hashed, letters, ends, hashes, slots)
        if slots[slot] < 0:
            slots[slot] = known
            hashes[known] = hashed
            letters[ends[known] : ends[known] + place - start] = text[start:place]
            ends[known + 1] = ends[known] + place - start
            known += 1
        words[number] = slots[slot]
        number += 1
    if line < len(lines):
        lines[line] = number - first if number > first else BLANK
    return number, known


@numba.njit(cache=True, nogil=True)
def _expand(words, lines, pieces, piece_ends):
    """The ids of `words` and their number per line; arguments as in `PieceEncoder` and `_find`."""
    total = 0
    for word in words:
        total += piece_ends[word + 1] - piece_ends[word]
    ids = np.empty(total, dtype=np.int32)
    lengths = np.empty(len(lines), dtype=np.int32)
    place = 0
    first = 0
    for line in range(len(lines)):
        start = place
        for word in words[first : first + max(lines[line], 0)]:
            for piece in range(piece_ends[word], piece_ends[word + 1]):
                ids[place] = pieces[piece]
                place += 1
        first += max(lines[line], 0)
        lengths[line] = place - start if lines[line] > 0 else BLANK
    return ids, lengths
