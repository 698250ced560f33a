"""Sentences drawn from a grammar, and their text, at millions a second.

Each nonterminal has an alias table (Walker 1977, Vose 1991) over its rules, so that a rewriting step costs one 64-bit
random number: the high half chooses a column of the table, the low half one of the column's two rules.
"""

import numba
import numpy as np

from pcfg.artefacts import InputError
from pcfg.grammar import Grammar, reachability

# Fewer sentences than this share within the wanted lengths: a mistake in the limits, not a wish to wait.
LEAST_ACCEPTED = 1e-4


class Sampler:
    """Draws sentences of a grammar that have at most `max_words` words: P(x | number of words <= max_words).

    A longer sentence is dropped and drawn again, and its derivation is left as soon as it must be longer, so recursion
    needs no depth limit.

    Args:
        grammar: the grammar.
        max_words: words, 1 or more.

    Attributes:
        width: the columns of `sample`'s tokens: the least of max_words and the longest sentence.
        length_probability: (width + 1,) float64, P(number of words = l) in the grammar.

    Raises:
        InputError: the expected length is infinite (the expected children of a recursive set of nonterminals have a
            spectral radius of 1 or more), or less than 1e-4 of the sentences are short enough.

    >>> sampler = Sampler(Grammar.from_rules([("S", ("S", "S"), 0.4), ("S", ("a",), 0.6)]), 3)
    >>> tokens, lengths = sampler.sample(5, np.random.default_rng(0))
    >>> tokens.shape, bool((lengths <= 3).all()), sampler.length_probability.round(4).tolist()
    ((5, 3), True, [0.0, 0.6, 0.144, 0.0691])
    """

    def __init__(self, grammar: Grammar, max_words: int):
        _refuse_infinite_length(grammar)
        self.words = grammar.words
        self.width = int(min(max_words, grammar.longest[0]))
        self.length_probability = _length_probability(grammar, self.width)
        self._refuse_hopeless(1)
        self._shortest = np.append(grammar.shortest, np.ones(len(self.words), dtype=np.int64)).astype(np.int32)
        self._first, self._children, self._threshold, self._alias = _alias_tables(grammar)
        encoded = [word.encode() + b" " for word in self.words]
        self._letters = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._letters_end = np.cumsum([0, *map(len, encoded)])  # (V + 1,)

    def _refuse_hopeless(self, min_words: int) -> None:
        accepted = self.length_probability[min_words:].sum()
        if accepted < LEAST_ACCEPTED:
            raise InputError(
                f"{accepted:.2g} of the grammar's sentences have {min_words} to {self.width} words, too few to wait for; "
                "choose other limits"
            )

    def sample(self, number: int, rng: np.random.Generator, min_words: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Draw `number` sentences of min_words to max_words words.

        Args:
            rng: gives the 256 bits that seed the draws; the same generator state gives the same sentences.

        Returns:
            tokens (number, width) int32, indices into `words`, -1 beyond the end; lengths (number,) int32, words.

        Raises:
            InputError: less than 1e-4 of the sentences have such a length.
        """
        self._refuse_hopeless(min_words)
        state = rng.integers(0, 2**64, size=4, dtype=np.uint64)
        tokens = np.full((number, self.width), -1, dtype=np.int32)
        lengths = np.empty(number, dtype=np.int32)
        _draw(state, min_words, self._shortest, self._first, self._children, self._threshold, self._alias, tokens, lengths)
        return tokens, lengths

    def to_text(self, tokens: np.ndarray, lengths: np.ndarray, blank_line: bool) -> bytes:
        """The sentences as UTF-8 text, one a line, with an empty line between two if `blank_line`."""
        return _spell(tokens, lengths, self._letters, self._letters_end, blank_line).tobytes()

    def texts(self, tokens: np.ndarray, lengths: np.ndarray) -> list[str]:
        """The sentences as strings, words separated by spaces."""
        return self.to_text(tokens, lengths, blank_line=False).decode().split("\n")[:-1]


def _refuse_infinite_length(grammar: Grammar) -> None:
    """Raise an `InputError` unless the expected number of nonterminals in a derivation is finite.

    It is finite if and only if the matrix M[A, B] = expected number of B on the right of A has a spectral radius below 1;
    M is block triangular, and only a block of nonterminals that can reach each other has eigenvalues other than 0. Taking
    the blocks one by one avoids the large rounding errors of eigenvalues of nilpotent matrices.
    """
    size = len(grammar.names)
    expected = np.zeros((size, size))
    for column in (1, 2):
        np.add.at(expected, (grammar.binary[:, 0], grammar.binary[:, column]), grammar.binary_probability)
    np.add.at(expected, (grammar.unary[:, 0], grammar.unary[:, 1]), grammar.unary_probability)
    reach = reachability(expected > 0)
    mutual = reach & reach.T & reach[0]
    for block in np.unique(mutual[reach[0]], axis=0):
        radius = np.abs(np.linalg.eigvals(expected[np.ix_(block, block)])).max()
        if radius >= 1.0 - 1e-12:
            names = ", ".join(name for name, member in zip(grammar.names, block, strict=True) if member)
            raise InputError(
                f"the nonterminals {names} produce themselves too often (spectral radius {radius:.4g}, it must be below 1): "
                "the expected length of a sentence is infinite; lower the probabilities of their recursive rules"
            )


def _length_probability(grammar: Grammar, width: int) -> np.ndarray:
    """P(the start derives l words), l = 0..width, by the inside recursion over lengths alone; (width + 1,) float64."""
    left, first, second = grammar.binary.T
    lengths = np.zeros((len(grammar.names), width + 1))  # (nonterminals, words)
    for words in range(1, width + 1):
        once = np.zeros(len(grammar.names))
        if words == 1:
            once += grammar.emission.sum(axis=1)
        splits = (lengths[first, 1:words] * lengths[second, words - 1 : 0 : -1]).sum(axis=1)  # (rules,)
        np.add.at(once, left, grammar.binary_probability * splits)
        lengths[:, words] = grammar.closure @ once
    return lengths[0]


def _alias_tables(grammar: Grammar) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The rules of all nonterminals, in one list by left side, with their alias tables.

    Returns:
        first (N + 1,) int64, the first rule of each nonterminal; children (rules, 2) int32, nonterminal A as A, word w as
        N + w, no second child as -1; threshold (rules,) uint64 in units of 2^-32; alias (rules,) int64.
    """
    size = len(grammar.names)
    left, word = np.nonzero(grammar.emission)
    rules = np.concatenate(
        [
            grammar.binary,
            np.column_stack([grammar.unary, np.full(len(grammar.unary), -1)]),
            np.column_stack([left, size + word, np.full(len(left), -1)]),
        ]
    )
    probability = np.concatenate([grammar.binary_probability, grammar.unary_probability, grammar.emission[left, word]])
    order = np.argsort(rules[:, 0], kind="stable")
    rules, probability = rules[order], probability[order]
    first = np.searchsorted(rules[:, 0], np.arange(size + 1))
    threshold, alias = np.empty(len(rules), dtype=np.uint64), np.empty(len(rules), dtype=np.int64)
    for start, end in zip(first[:-1], first[1:], strict=True):
        kept, other = _alias_table(probability[start:end])
        threshold[start:end] = np.rint(kept * 2.0**32).astype(np.uint64)
        alias[start:end] = start + other
    return first, np.ascontiguousarray(rules[:, 1:], dtype=np.int32), threshold, alias


def _alias_table(probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vose's construction: column i keeps i with probability kept[i] and gives other[i] else, columns being uniform."""
    scaled = probability / probability.sum() * len(probability)
    kept, other = np.ones(len(scaled)), np.arange(len(scaled))
    small = [i for i, value in enumerate(scaled) if value < 1.0]
    large = [i for i, value in enumerate(scaled) if value >= 1.0]
    while small and large:
        poor, rich = small.pop(), large.pop()
        kept[poor], other[poor] = scaled[poor], rich
        scaled[rich] -= 1.0 - scaled[poor]
        (small if scaled[rich] < 1.0 else large).append(rich)
    return kept, other


@numba.njit(inline="always")
def _rotate(value, bits):
    return (value << np.uint64(bits)) | (value >> np.uint64(64 - bits))


@numba.njit(inline="always")
def _next(state):
    """xoshiro256++ (Blackman and Vigna 2021): the next 64 random bits."""
    result = _rotate(state[0] + state[3], 23) + state[0]
    shifted = state[1] << np.uint64(17)
    state[2] ^= state[0]
    state[3] ^= state[1]
    state[1] ^= state[2]
    state[0] ^= state[3]
    state[2] ^= shifted
    state[3] = _rotate(state[3], 45)
    return result


@numba.njit(cache=True, nogil=True)
def _draw(state, min_words, shortest, first, children, threshold, alias, tokens, lengths):
    """Fill `tokens` and `lengths` with leftmost derivations; `shortest` has a word's length, 1, after the nonterminals'."""
    nonterminals, width = len(first) - 1, tokens.shape[1]
    # Each symbol on the stack is at least one word to come, so a stack deeper than the width is never needed.
    stack = np.empty(width + 2, dtype=np.int32)
    sentence = 0
    while sentence < len(lengths):
        stack[0], depth, words, least = 0, 1, 0, shortest[0]
        while depth > 0 and least <= width:
            depth -= 1
            symbol = stack[depth]
            if symbol >= nonterminals:
                tokens[sentence, words] = symbol - nonterminals
                words += 1
                continue
            bits = _next(state)
            columns = np.uint64(first[symbol + 1] - first[symbol])
            rule = first[symbol] + np.int64(((bits >> np.uint64(32)) * columns) >> np.uint64(32))
            if (bits & np.uint64(0xFFFFFFFF)) >= threshold[rule]:
                rule = alias[rule]
            # `least`: the words so far and the fewest that the stack can still become.
            least += shortest[children[rule, 0]] - shortest[symbol]
            if children[rule, 1] >= 0:
                stack[depth] = children[rule, 1]
                depth += 1
                least += shortest[children[rule, 1]]
            stack[depth] = children[rule, 0]
            depth += 1
        if least <= width and words >= min_words:
            tokens[sentence, words:] = -1
            lengths[sentence] = words
            sentence += 1


@numba.njit(cache=True, nogil=True)
def _spell(tokens, lengths, letters, letters_end, blank_line):
    """The text: each word with its space, a sentence's last space made a line feed, an empty line between sentences."""
    size = len(lengths) if blank_line else 0
    for sentence in range(len(lengths)):
        for position in range(lengths[sentence]):
            word = tokens[sentence, position]
            size += letters_end[word + 1] - letters_end[word]
    text = np.empty(size, dtype=np.uint8)
    place = 0
    for sentence in range(len(lengths)):
        for position in range(lengths[sentence]):
            word = tokens[sentence, position]
            for letter in range(letters_end[word], letters_end[word + 1]):
                text[place] = letters[letter]
                place += 1
        text[place - 1] = 10
        if blank_line:
            text[place] = 10
            place += 1
    # The empty line stands between two sentences, so the last one has none.
    return text[: max(size - 1, 0)] if blank_line else text
