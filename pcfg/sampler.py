"""Sentences drawn from a grammar, and their text, at millions per second.

Each nonterminal has an alias table (Walker 1977, Vose 1991) over its rules, so that a rewriting step costs one 64-bit
random number: the high half chooses a column of the table, the low half one of the column's two rules. Text is spelled word
by word into a buffer, in moves of 16 bytes; no word is ever a Python object.
"""

from collections.abc import Iterator

import numba
import numpy as np

from pcfg import PLAIN_LANES
from pcfg.common.files import InputError
from pcfg.common.text import shown
from pcfg.engine.plain_lanes import CHUNK
from pcfg.engine.rule_graph import cycle_matrix, reachable, strong_components
from pcfg.grammar import Grammar

if PLAIN_LANES:
    from pcfg.engine.plain_lanes import move_chunk
else:
    from pcfg.engine.lanes import move_chunk

# Part of a text's origin: another number whenever the same random generator would give other sentences.
DRAWING = 2
# Fewer sentences than this share within the limits of length: a mistake in the limits, not a wish to wait.
LEAST_ACCEPTED = 1e-4
# Times that a cycle of unary rules comes back on average: each takes a random number, of 32 bits for a rule's probability.
MAX_VISITS = 1e5
# Bytes per block of text: it stays in a core's cache until it is hashed and written.
TEXT_BUFFER = 1 << 18


class Sampler:
    """Draws sentences of a grammar that have at most `max_words` words: P(x | number of words <= max_words).

    A longer sentence is dropped and drawn again, and its derivation ends as soon as it must be longer, so recursion needs no
    depth limit. A sampler can be used by several threads at once.

    A grammar is refused if less than 1e-4 of its sentences are short enough, or if their expected length is infinite: the
    expected children of a recursive set of nonterminals have a spectral radius of 1 or more. So is one whose cycles of unary
    rules come back more than 100,000 times on average.

    Attributes:
        width: the columns of `sample`'s tokens: max_words, or the longest sentence if that is shorter.
        length_probability: (width + 1,) float64, P(number of words = l) in the grammar.

    >>> sampler = Sampler(Grammar.from_rules([("S", ("S", "S"), 0.4), ("S", ("a",), 0.6)]), 3)
    >>> tokens, lengths = sampler.sample(5, np.random.default_rng(0))
    >>> tokens.shape, bool((lengths <= 3).all()), sampler.length_probability.round(4).tolist()
    ((5, 3), True, [0.0, 0.6, 0.144, 0.0691])
    """

    def __init__(self, grammar: Grammar, max_words: int):
        _refuse_infinite_length(grammar)
        for symbol in np.flatnonzero(grammar.chains.visits > MAX_VISITS)[:1]:
            often = f"its unary rules lead back to it {grammar.chains.visits[symbol]:.3g} times on average"
            raise InputError(
                f"the nonterminal {shown(grammar.names[symbol])}: {often}, too often to draw; lower their probabilities"
            )
        self.words = grammar.words
        self.width = int(min(max_words, grammar.longest[0]))
        lengths = np.zeros((self.width + 1, len(grammar.names)))  # (words, nonterminals)
        lengths[1] = grammar.emission.sum(axis=1)
        chains = grammar.chains[:2]
        _fill_lengths(lengths, grammar.binary, grammar.binary_probability, *chains, grammar.shortest, grammar.longest)
        self.length_probability = lengths[:, 0].copy()
        self._refuse_hopeless(1)
        self._shortest = int(grammar.shortest[0])
        self._rules = _rule_tables(grammar)
        self._spelling, self._letters = _spelling_tables(grammar.words)
        self._longest_word = int(self._spelling[:, 1].max())

    def _refuse_hopeless(self, min_words: int) -> None:
        accepted = self.length_probability[min_words:].sum()
        if accepted < LEAST_ACCEPTED:
            share = f"{accepted:.2g} of the grammar's sentences have {min_words} to {self.width} words"
            raise InputError(f"{share}, too few to wait for; choose other limits")

    def sample(self, number: int, rng: np.random.Generator, min_words: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Draw `number` sentences of min_words to max_words words; `rng` gives the 256 bits that seed the draws.

        Returns:
            tokens (number, width) int32, indices into `words`, -1 beyond the end; lengths (number,) int32, words.
        """
        self._refuse_hopeless(min_words)
        tokens = np.full((number, self.width), -1, dtype=np.int32)
        lengths = np.empty(number, dtype=np.int32)
        state = rng.integers(0, 2**64, size=4, dtype=np.uint64)  # of xoshiro256++
        _draw(state, *self._rules, self._shortest, min_words, tokens, lengths)
        return tokens, lengths

    def draw_text(self, number: int, rng: np.random.Generator) -> Iterator[tuple[memoryview, int]]:
        """Draw the sentences of `sample` as UTF-8 text, one per line with an empty line between two, block by block.

        Yields:
            the text of the next sentences, some 256 KB, valid until the next block, without the empty line between two
            blocks; the number of its words.
        """
        state = rng.integers(0, 2**64, size=4, dtype=np.uint64)
        sentences = 0
        spelling = (self._shortest, self.width, self._spelling, self._letters)
        # Room for the longest sentence, its two line feeds and the excess of the last move after a full buffer.
        text = np.empty(TEXT_BUFFER + self.width * self._longest_word + 2 + CHUNK, dtype=np.uint8)
        while sentences < number:
            drawn, words, size = _draw_text(state, *self._rules, *spelling, number - sentences, text, TEXT_BUFFER)
            sentences += drawn
            # The empty line stands between two sentences, so the last one has none.
            yield text.data[: size - 1], words

    def to_text(self, tokens: np.ndarray, lengths: np.ndarray) -> bytes:
        """The sentences as UTF-8 text, one per line."""
        size = int(self._spelling[tokens[tokens >= 0], 1].sum())
        text = np.empty(size + CHUNK, dtype=np.uint8)
        _spell_all(tokens, lengths, self._spelling, self._letters, text)
        return text[:size].tobytes()

    def texts(self, tokens: np.ndarray, lengths: np.ndarray) -> list[str]:
        """The sentences as strings, words separated by spaces."""
        return self.to_text(tokens, lengths).decode().split("\n")[:-1]


def _refuse_infinite_length(grammar: Grammar) -> None:
    """Refuse a grammar whose derivations have an infinite expected number of nonterminals.

    It is finite if and only if the matrix M[A, B] = expected number of B on the right of A has a spectral radius below 1;
    M is block triangular, and only a block of nonterminals that can reach each other has eigenvalues other than 0. Taking
    the blocks one by one avoids the large rounding errors of eigenvalues of nilpotent matrices.
    """
    size = len(grammar.names)
    edges = np.concatenate([grammar.binary[:, [0, 1]], grammar.binary[:, [0, 2]], grammar.unary])
    parent, child = edges.T.astype(np.int64)
    probability = np.concatenate([grammar.binary_probability, grammar.binary_probability, grammar.unary_probability])
    component = strong_components(size, parent, child)
    within = (component[parent] == component[child]) & reachable(component, parent, child, 0)[parent]
    for block in np.unique(component[parent[within]]):
        members = np.flatnonzero(component == block)
        inside = within & (component[parent] == block)
        radius = np.abs(np.linalg.eigvals(cycle_matrix(members, edges[inside], probability[inside]))).max()
        if radius >= 1.0 - 1e-12:
            raise InputError(
                f"the nonterminals {grammar.listed(component == block)} produce themselves too often (spectral radius "
                f"{radius:.4g}, it must be below 1): the expected length of a sentence is infinite; lower the probabilities of "
                "their recursive rules"
            )


def _rule_tables(grammar: Grammar) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rules of all nonterminals as the alias tables that `_derive` draws from.

    Returns:
        columns (N, 2) int64: the first column of each nonterminal's table, and how many it has.
        threshold (columns,) uint32: the first outcome's probability in units of 2^-32. 1 is one unit less: no harm, as the
            second outcome is the same rule then.
        outcomes (2 * columns, 3) int32: two rules per column, each the left child (word w as -1 - w), the right child or -1,
            and by how many words the rule raises the least length of the sentence.
    """
    size = len(grammar.names)
    left, word = np.nonzero(grammar.emission)
    short = np.concatenate([grammar.unary, np.column_stack([left, -1 - word])])
    rules = np.concatenate([grammar.binary, np.insert(short, 2, -1, axis=1)])
    probability = np.concatenate([grammar.binary_probability, grammar.unary_probability, grammar.emission[left, word]])
    order = np.argsort(rules[:, 0], kind="stable")
    rules = rules[order]
    probability = probability[order]
    first = np.searchsorted(rules[:, 0], np.arange(size + 1))
    own_share = np.empty(len(rules))
    other = np.empty(len(rules), dtype=np.int64)
    for start, end in zip(first[:-1], first[1:], strict=True):
        own_share[start:end], other[start:end] = _alias_table(probability[start:end])
        other[start:end] += start
    threshold = np.minimum(np.rint(own_share * 2.0**32), 2.0**32 - 1).astype(np.uint32)

    left_words = np.where(rules[:, 1] < 0, 1, grammar.shortest[np.maximum(rules[:, 1], 0)])
    right_words = np.where(rules[:, 2] < 0, 0, grammar.shortest[np.maximum(rules[:, 2], 0)])
    growth = left_words + right_words - grammar.shortest[rules[:, 0]]
    outcome = np.column_stack([rules[:, 1:], growth]).astype(np.int32)  # (columns, 3)
    outcomes = np.stack([outcome, outcome[other]], axis=1).reshape(-1, 3)
    return np.column_stack([first[:-1], np.diff(first)]), threshold, outcomes


def _spelling_tables(words: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The words in UTF-8, each followed by a space and filled up to whole chunks, so that it is moved without a remainder.

    Returns:
        spelling (V, 2) int64: where a word begins, and its bytes with the space; letters (bytes,) uint8.
    """
    encoded = [word.encode() + b" " for word in words]
    filled = [word.ljust(-(-len(word) // CHUNK) * CHUNK) for word in encoded]
    begin = np.cumsum([0, *map(len, filled[:-1])])
    return np.column_stack([begin, list(map(len, encoded))]), np.frombuffer(b"".join(filled), dtype=np.uint8)


@numba.njit(cache=True)
def _alias_table(probability):
    """Vose's construction: column i gives i with probability own_share[i], else other[i]; columns are uniform."""
    size = len(probability)
    scaled = probability.copy()
    total = probability.sum()
    own_share = np.ones(size)
    other = np.arange(size)
    # One stack from each end: columns below 1 from the front, the others from the back.
    waiting = np.empty(size, dtype=np.int64)
    small = 0
    large = size
    for i in range(size):
        scaled[i] *= size / total
        if scaled[i] < 1.0:
            waiting[small] = i
            small += 1
        else:
            large -= 1
            waiting[large] = i
    while small > 0 and large < size:
        small -= 1
        poor = waiting[small]
        rich = waiting[large]
        own_share[poor] = scaled[poor]
        other[poor] = rich
        scaled[rich] -= 1.0 - scaled[poor]
        if scaled[rich] < 1.0:
            large += 1
            waiting[small] = rich
            small += 1
    return own_share, other


@numba.njit(cache=True)
def _fill_lengths(lengths, binary, binary_probability, steps, step_probability, shortest, longest):
    """lengths[l, A] = P(A derives l words), by the inside recursion over lengths alone.

    Row 1 has the words' rules already; `steps` are `Grammar.chains`.
    """
    for words in range(1, len(lengths)):
        once = lengths[words]
        for rule in range(len(binary)):
            parent, left, right = binary[rule]
            total = 0.0
            for k in range(max(shortest[left], words - longest[right]), min(longest[left], words - shortest[right]) + 1):
                total += lengths[k, left] * lengths[words - k, right]
            once[parent] += binary_probability[rule] * total
        for step in range(len(steps)):
            once[steps[step, 0]] += step_probability[step] * once[steps[step, 1]]


@numba.njit(inline="always")
def _rotate(value, bits):
    return (value << np.uint64(bits)) | (value >> np.uint64(64 - bits))


@numba.njit(inline="always")
def _derive(state, columns, threshold, outcomes, least, width, stack, row):
    """Fill `row` with the words of a leftmost derivation and return their number; 0 if they would be more than `width`.

    Random numbers: xoshiro256++ (Blackman and Vigna 2021). `least` is the fewest words that the start symbol derives. Each
    symbol on the stack, (width + 1,) int32, is at least one word to come.
    """
    s0, s1, s2, s3 = state
    symbol = depth = words = 0
    while True:
        bits = _rotate(s0 + s3, 23) + s0
        shifted = s1 << np.uint64(17)
        s2 ^= s0
        s3 ^= s1
        s1 ^= s2
        s0 ^= s3
        s2 ^= shifted
        s3 = _rotate(s3, 45)
        column = columns[symbol, 0] + np.int64(((bits >> np.uint64(32)) * np.uint64(columns[symbol, 1])) >> np.uint64(32))
        outcome = 2 * column + np.int64((bits & np.uint64(0xFFFFFFFF)) >= threshold[column])
        left = outcomes[outcome, 0]
        right = outcomes[outcome, 1]
        # The words so far and the fewest that the stack can still become.
        least += outcomes[outcome, 2]
        if least > width:
            words = 0
            break
        if right >= 0:
            stack[depth] = right
            depth += 1
            symbol = left
        elif left >= 0:
            symbol = left
        else:
            row[words] = -1 - left
            words += 1
            if depth == 0:
                break
            depth -= 1
            symbol = stack[depth]
    state[:] = (s0, s1, s2, s3)
    return words


@numba.njit(inline="always")
def _spell(row, words, spelling, letters, text, place):
    """Put a sentence and its line feed into `text` at `place`; returns its end; up to CHUNK bytes more are written."""
    for position in range(words):
        begin = spelling[row[position], 0]
        size = spelling[row[position], 1]
        for offset in range(0, size, CHUNK):
            move_chunk(text, place + offset, letters, begin + offset)
        place += size
    text[place - 1] = 10
    return place


@numba.njit(cache=True, nogil=True)
def _draw(state, columns, threshold, outcomes, least, min_words, tokens, lengths):
    """Fill `tokens` and `lengths` with sentences of min_words words or more."""
    width = tokens.shape[1]
    stack = np.empty(width + 1, dtype=np.int32)
    row = np.empty(width, dtype=np.int32)
    sentence = 0
    while sentence < len(lengths):
        words = _derive(state, columns, threshold, outcomes, least, width, stack, row)
        if words >= max(min_words, 1):
            tokens[sentence, :words] = row[:words]
            lengths[sentence] = words
            sentence += 1


@numba.njit(cache=True, nogil=True)
def _draw_text(state, columns, threshold, outcomes, least, width, spelling, letters, number, text, size):
    """Spell `number` sentences, an empty line after each, or fewer once they are `size` bytes.

    Returns sentences, words and bytes.
    """
    stack = np.empty(width + 1, dtype=np.int32)
    row = np.empty(width, dtype=np.int32)
    sentence = total = place = 0
    while sentence < number and place < size:
        words = _derive(state, columns, threshold, outcomes, least, width, stack, row)
        if words > 0:
            place = _spell(row, words, spelling, letters, text, place)
            text[place] = 10
            place += 1
            total += words
            sentence += 1
    return sentence, total, place


@numba.njit(cache=True)
def _spell_all(tokens, lengths, spelling, letters, text):
    """Spell sentences one after the other."""
    place = 0
    for sentence in range(len(lengths)):
        place = _spell(tokens[sentence], lengths[sentence], spelling, letters, text, place)
