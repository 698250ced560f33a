"""Text as word indices, straight from its bytes: a hash table over the words, and no Python object per word.

The table is an open one: `slots` has the numbers of words, -1 where it is free, and word v is at the first slot at or after its
hash that was free. `pretraining.data.piece_encoder` has another reader of text on the same table.
"""

from collections.abc import Callable

import numba
import numpy as np

from pcfg import say_when_compiling
from pcfg.common.files import InputError
from pcfg.common.text import decode_block, shown

say_when_compiling()

# The white space of `str.split` beyond ASCII: its two or three bytes of UTF-8, as a number.
WIDE_SPACES = tuple(int.from_bytes(chr(code).encode()) for code in range(128, 0x3001) if chr(code).isspace())


class WordIndex:
    """Finds words of a text in a list of words.

    Args:
        words: distinct words, none with white space in it; the position is the index.
        why_unknown: gives the end of the error that names an unknown word; None: that it is not in the grammar.

    >>> index = WordIndex(["a", "dog", "runs"])
    >>> flat, lengths = index.encode(b"a dog\\n\\nruns\\n", "example")
    >>> flat.tolist(), lengths.tolist()
    ([0, 1, 2], [2, 1])
    """

    def __init__(self, words: list[str], why_unknown: Callable[[str], str] | None = None):
        if len(set(words)) != len(words):
            raise ValueError("the words are not distinct")
        self._why_unknown = why_unknown
        encoded = [word.encode() for word in words]
        # A copy, since numba compiles once more for the read-only array of frombuffer.
        letters = np.frombuffer(b"".join(encoded), dtype=np.uint8).copy()
        ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)  # (V + 1,)
        hashes = np.empty(len(words), dtype=np.uint64)
        # A quarter full at most, so that a look-up seldom meets a second word.
        slots = np.full(1 << (4 * len(words)).bit_length(), -1, dtype=np.int32)
        _hash_words(letters, ends, hashes)
        fill_slots(hashes, slots)
        self._table = letters, ends, hashes, slots

    def encode(self, text: bytes, source: object, first_sentence: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Word indices (M,) int32 of a text, sentence after sentence, and the words of each sentence, (n,) int32.

        Args:
            text: UTF-8, one sentence per line, words separated by the white space of `str.split` (Unicode's included); lines
                without words are skipped.
            first_sentence: number of sentences of the file before this text, for messages.
        """
        flat = np.empty((len(text) + 1) // 2, dtype=np.int32)
        lengths = np.empty_like(flat)
        letters = np.frombuffer(text, dtype=np.uint8)
        words, sentences, start, end = _encode(letters, *self._table, flat, lengths)
        if end:
            # No word of the list holds bytes that are not UTF-8, so a text with such bytes always comes here.
            decode_block(text, source)
            word = text[start:end].decode()
            number = first_sentence + sentences + 1
            of_grammar = "is not in the grammar; use the grammar that the text was made from"
            why = self._why_unknown(word) if self._why_unknown else of_grammar
            raise InputError(f"{source}: sentence {number}: word {shown(word)} {why}")
        return flat[:words].copy(), lengths[:sentences].copy()

    def encode_texts(self, texts: list[str], source: object) -> tuple[np.ndarray, np.ndarray]:
        """As `encode`, for a list of sentences, each of which must have a word."""
        # A line end inside a sentence is white space between words like any other.
        flat, lengths = self.encode("\n".join(text.replace("\n", " ") for text in texts).encode(), source)
        if len(lengths) != len(texts):
            number = next(number for number, text in enumerate(texts, 1) if not text.strip())
            raise InputError(f"{source}: sentence {number}: no words; remove it")
        return flat, lengths


def padded(flat: np.ndarray, lengths: np.ndarray, padding: int) -> np.ndarray:
    """The sentences of `flat` (M,) as rows, (n, T) int32 with T the longest length, `padding` beyond a sentence's end.

    >>> padded(np.array([4, 7, 5]), np.array([1, 2]), -1).tolist()
    [[4, -1], [7, 5]]
    """
    longest = int(lengths.max(initial=0))
    tokens = np.full((len(lengths), longest), padding, dtype=np.int32)
    tokens[np.arange(longest) < lengths[:, None]] = flat  # (n, T), filled row by row
    return tokens


@numba.njit
def mixed(hashed, eight):
    """A hash with eight more bytes; for the same `hashed`, two values of `eight` never give the same result."""
    product = (hashed ^ eight) * np.uint64(0x9E3779B97F4A7C15)  # odd, so that the product can be undone
    return product ^ (product >> np.uint64(32))


@numba.njit(cache=True, nogil=True)
def _hash_words(letters, ends, hashes):
    """Fill `hashes`; word v is letters[ends[v]:ends[v + 1]]."""
    for word in range(len(ends) - 1):
        _, hashes[word] = _scan(letters[: ends[word + 1]], ends[word])


@numba.njit(cache=True, nogil=True)
def fill_slots(hashes, slots):
    """Put all words into a table that is free."""
    for word in range(len(hashes)):
        slot = np.int64(hashes[word] & np.uint64(len(slots) - 1))
        while slots[slot] >= 0:
            slot = (slot + 1) & (len(slots) - 1)
        slots[slot] = word


@numba.njit
def find_slot(text, start, end, hashed, letters, ends, hashes, slots):
    """The slot of the word text[start:end] with the hash `hashed`, or, for an unknown word, the free slot where it belongs."""
    slot = np.int64(hashed & np.uint64(len(slots) - 1))
    while slots[slot] >= 0 and not _is_word(text, start, end, hashed, slots[slot], letters, ends, hashes):
        slot = (slot + 1) & (len(slots) - 1)
    return slot


@numba.njit
def _is_word(text, start, end, hashed, word, letters, ends, hashes):
    """Whether text[start:end] is the word with the number `word`."""
    if hashes[word] != hashed or ends[word + 1] - ends[word] != end - start:
        return False
    if end - start > 8:  # up to eight bytes the hash can be undone, so that nothing remains to be compared
        for offset in range(end - start):
            if text[start + offset] != letters[ends[word] + offset]:
                return False
    return True


@numba.njit
def _scan(text, place):
    """The end of the word that begins at `place`, and its hash."""
    hashed = np.uint64(0)
    eight = np.uint64(0)
    shift = np.uint64(0)
    while place < len(text):
        byte = text[place]
        if (byte <= 32 and _is_ascii_space(byte)) or (byte >= 0xC2 and _wide_space(text, place) > 0):
            break
        eight |= np.uint64(byte) << shift
        shift += np.uint64(8)
        if shift == np.uint64(64):
            hashed = mixed(hashed, eight)
            eight = np.uint64(0)
            shift = np.uint64(0)
        place += 1
    return place, mixed(hashed, eight) if shift > np.uint64(0) else hashed


@numba.njit
def _is_ascii_space(byte):
    return byte == 32 or 9 <= byte <= 13 or 28 <= byte <= 31


@numba.njit
def _wide_space(text, place):
    """Bytes of the white space character beyond ASCII that begins at `place`, 0 if none does."""
    first = text[place]
    if first != 0xC2 and not 0xE1 <= first <= 0xE3:  # most letters
        return 0
    length = 2 if first == 0xC2 else 3
    code = 0
    for byte in text[place : place + length]:
        code = code << 8 | byte
    return length if code in WIDE_SPACES else 0


@numba.njit(cache=True, nogil=True)
def _encode(text, letters, ends, hashes, slots, flat, lengths):
    """Fill `flat` and `lengths`; returns the numbers of words and of sentences, and 0, 0.

    At the first unknown word: the numbers of words and of whole sentences before it, its first byte and the one after its last.
    """
    place = 0
    words = 0
    sentences = 0
    first_word = 0
    while place < len(text):
        byte = text[place]
        space = 1 if byte <= 32 and _is_ascii_space(byte) else (_wide_space(text, place) if byte >= 0xC2 else 0)
        if space > 0:
            if byte == 10 and words > first_word:
                lengths[sentences] = words - first_word
                sentences += 1
                first_word = words
            place += space
            continue
        start = place
        place, hashed = _scan(text, start)
        word = slots[find_slot(text, start, place, hashed, letters, ends, hashes, slots)]
        if word < 0:
            return words, sentences, start, place
        flat[words] = word
        words += 1
    if words > first_word:
        lengths[sentences] = words - first_word
        sentences += 1
    return words, sentences, 0, 0
