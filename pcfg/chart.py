"""Inside and outside probabilities of sentences under a PCFG: the one dynamic program of the project.

With `i < j` positions between words (0..T) and A a nonterminal,

    inside(i, j, A)  = P(A =>* x_i .. x_{j-1})
    outside(i, j, A) = P(start =>* x_0 .. x_{i-1} A x_j .. x_{T-1})

(Baker 1979, "Trainable grammars for speech recognition"; Lari and Young 1990), both with all chains of unary rules,
which enter through the closure (I - U)^-1 once a cell. Labels, entropies and masked conditionals

    P(x_t = w | x_-t)  proportional to  sum_A outside(t, t+1, A) P(A -> w)

are folds of the same two sweeps: `outside(t, t+1, .)` does not depend on x_t, so one pass serves all positions.

Numbers are float64 and never logarithms. Before a sweep over T words each word's emission column is divided by its
maximum and multiplied by 2^(768 // T). This multiplies all values of a cell by the same factor, so conditionals and
labels need no correction; the values then lie between about 1e-308 and 1e+301 for any sentence whose probability, with
the columns divided by their maxima, is above 1e-539 (1e-8 a word at 64 words).
"""

import concurrent.futures
import os
from typing import NamedTuple

import numpy as np
from numba import njit

from pcfg.artefacts import InputError

MAX_WORDS = 64
# Values of a cell are at most 2^768 times the number of binary trees over 64 leaves (1e35), twice: below 1e308.
SCALED_BITS = 768
SENTENCES_PER_CHUNK = 128

# What a sweep leaves behind, see `_sweep`.
INSIDE, POSTERIOR, WORDS = 0, 1, 2


class RuleTables(NamedTuple):
    """A grammar as the kernels read it. R binary rules, P pairs (left, right), C entries of the closure.

    Rules are grouped by pair and pairs by left child, as in compressed sparse rows: the pairs of left child B are
    `left_start[B] .. left_start[B + 1]`, the rules of pair p are `pair_start[p] .. pair_start[p + 1]`. The closure is
    stored by child (`up_*`: which A have A =>* B) and by parent (`down_*`).
    """

    left_start: np.ndarray  # (N + 1,) int64
    pair_left: np.ndarray  # (P,) int32
    pair_right: np.ndarray  # (P,) int32
    pair_start: np.ndarray  # (P + 1,) int64
    lhs: np.ndarray  # (R,) int32
    probability: np.ndarray  # (R,) float64
    up_start: np.ndarray  # (N + 1,) int64
    up_symbol: np.ndarray  # (C,) int32
    up_weight: np.ndarray  # (C,) float64
    down_start: np.ndarray  # (N + 1,) int64
    down_symbol: np.ndarray  # (C,) int32
    down_weight: np.ndarray  # (C,) float64
    shortest: np.ndarray  # (N,) int64, words
    longest: np.ndarray  # (N,) int64, words


def _group_starts(keys, number: int) -> np.ndarray:
    """Where each of the groups 0 .. number - 1 begins in the sorted `keys`, and the end: (number + 1,) int64."""
    return np.searchsorted(keys, np.arange(number + 1)).astype(np.int64)


def _sparse_rows(matrix):
    """(start, column, value) of a dense matrix's nonzero entries, by row."""
    row, column = np.nonzero(matrix)
    return _group_starts(row, matrix.shape[0]), column.astype(np.int32), matrix[row, column].astype(np.float64)


def _rule_tables(grammar) -> RuleTables:
    number = len(grammar.names)
    # The rules come sorted by (left, right, lhs), which is the order of `unique` too.
    pairs, pair_of_rule = np.unique(grammar.binary[:, 1:], axis=0, return_inverse=True)
    pairs = np.ascontiguousarray(pairs.astype(np.int32))
    return RuleTables(
        _group_starts(pairs[:, 0], number),
        np.ascontiguousarray(pairs[:, 0]),
        np.ascontiguousarray(pairs[:, 1]),
        _group_starts(pair_of_rule.reshape(-1), len(pairs)),
        np.ascontiguousarray(grammar.binary[:, 0].astype(np.int32)),
        np.ascontiguousarray(grammar.binary_probability.astype(np.float64)),
        *_sparse_rows(grammar.closure.T),
        *_sparse_rows(grammar.closure),
        grammar.shortest.astype(np.int64),
        grammar.longest.astype(np.int64),
    )


@njit(nogil=True, cache=True)
def _close(entry, start, symbol, weight, width, rules, cell):
    """cell[A] += sum_B weight[B, A] entry[B] over the A that can have a yield of `width` words."""
    for source in range(entry.size):
        if entry[source] != 0.0:
            for position in range(start[source], start[source + 1]):
                target = symbol[position]
                if rules.shortest[target] <= width <= rules.longest[target]:
                    cell[target] += weight[position] * entry[source]


@njit(nogil=True, cache=True)
def _combine(inside, i, j, rules, products, entry):
    """entry[A] = sum over splits k and rules A -> B C of P(rule) inside(i, k, B) inside(k, j, C)."""
    products[:] = 0.0
    for k in range(i + 1, j):
        for left in range(entry.size):
            value = inside[i, k, left]
            if value != 0.0:
                for pair in range(rules.left_start[left], rules.left_start[left + 1]):
                    products[pair] += value * inside[k, j, rules.pair_right[pair]]
    for pair in range(products.size):
        if products[pair] != 0.0:
            for rule in range(rules.pair_start[pair], rules.pair_start[pair + 1]):
                entry[rules.lhs[rule]] += rules.probability[rule] * products[pair]


@njit(nogil=True, cache=True)
def _inside(words, columns, factor, rules, inside):
    """Fill inside[i, j, A] for 0 <= i < j <= T: columns (V, N) holds the emissions of a word, times `factor`."""
    length, number = words.size, columns.shape[1]
    entry, products = np.empty(number), np.empty(rules.pair_left.size)
    inside[:length, : length + 1] = 0.0
    for width in range(1, length + 1):
        if not np.any((rules.shortest <= width) & (width <= rules.longest)):
            continue
        for i in range(length - width + 1):
            if width == 1:
                entry[:] = factor * columns[words[i]]
            else:
                entry[:] = 0.0
                _combine(inside, i, i + width, rules, products, entry)
            _close(entry, rules.up_start, rules.up_symbol, rules.up_weight, width, rules, inside[i, i + width])


@njit(nogil=True, cache=True)
def _split(inside, outside, i, j, rules, pairs, weights):
    """Hand outside(i, j, .) down to the children of all binary rules, over all splits.

    A child's outside value must not depend on its own words, so a child is left out only where its yield can't have the
    width, never because its own inside value is zero.
    """
    alive = 0
    for pair in range(rules.pair_left.size):
        weight = 0.0
        for rule in range(rules.pair_start[pair], rules.pair_start[pair + 1]):
            weight += rules.probability[rule] * outside[i, j, rules.lhs[rule]]
        if weight != 0.0:
            pairs[alive], weights[alive] = pair, weight
            alive += 1
    for position in range(alive):
        left, right = rules.pair_left[pairs[position]], rules.pair_right[pairs[position]]
        # k - i words on the left and j - k on the right: both within what the two symbols can have
        first = max(i + rules.shortest[left], j - rules.longest[right])
        last = min(i + rules.longest[left], j - rules.shortest[right])
        for k in range(first, last + 1):
            outside[i, k, left] += weights[position] * inside[k, j, right]
            outside[k, j, right] += weights[position] * inside[i, k, left]


@njit(nogil=True, cache=True)
def _outside(length, narrowest, rules, inside, outside):
    """Fill outside[i, j, A] for the cells of `narrowest` words and more, from a filled `inside`."""
    number = inside.shape[2]
    entry = np.empty(number)
    pairs, weights = np.empty(rules.pair_left.size, np.int64), np.empty(rules.pair_left.size)
    outside[:length, : length + 1] = 0.0
    outside[0, length, 0] = 1.0
    for width in range(length, narrowest - 1, -1):
        for i in range(length - width + 1):
            cell = outside[i, i + width]
            entry[:] = cell
            if not np.any(entry):
                continue
            cell[:] = 0.0
            _close(entry, rules.down_start, rules.down_symbol, rules.down_weight, width, rules, cell)
            if width > narrowest:
                _split(inside, outside, i, i + width, rules, pairs, weights)


@njit(nogil=True, cache=True)
def _sweep(tokens, lengths, span, want, columns, bits, rules, cells, rows):
    """One sentence after the other; the cell of a sentence is (0, span), or (0, T) where span is 0.

    want INSIDE: cells[s] = inside of the cell, for which the words beyond it are not read; POSTERIOR: inside times
    outside of the cell; WORDS: inside of the cell, and rows gets outside(t, t + 1, .) of all sentences' positions, one
    below the other. Sentences shorter than the span get zeros.
    """
    longest, number, row = tokens.shape[1], columns.shape[1], 0
    inside = np.empty((longest, longest + 1, number))
    outside = np.empty((longest, longest + 1, number) if want != INSIDE else (0, 0, number))
    for sentence in range(lengths.size):
        length = lengths[sentence]
        width = length if span == 0 else span
        if width > length:
            cells[sentence] = 0.0
            continue
        used = width if want == INSIDE else length
        _inside(tokens[sentence, :used], columns, 2.0 ** (bits // used), rules, inside)
        cells[sentence] = inside[0, width]
        if want != INSIDE:
            _outside(length, 1 if want == WORDS else width, rules, inside, outside)
        if want == POSTERIOR:
            cells[sentence] *= outside[0, width]
        if want == WORDS:
            for t in range(length):
                rows[row + t] = outside[t, t + 1]
            row += length


class Chart:
    """The charts of a grammar's sentences; see the module docstring for the equations.

    Args:
        grammar: a `pcfg.grammar.Grammar`; N nonterminals, V words.
        threads: over chunks of sentences (the kernels release the GIL); default: the cores this process may use.
            Results do not depend on it.

    Sentences are given as `tokens`, (n, T) integers, indices into `grammar.words`, anything beyond a sentence's end,
    and `lengths`, (n,), in words. All methods raise InputError for a sentence of no word or of more than 64.
    """

    def __init__(self, grammar, threads: int | None = None):
        self.grammar = grammar
        self.threads = threads or len(os.sched_getaffinity(0))
        self._rules = _rule_tables(grammar)
        self._emission = np.ascontiguousarray(grammar.emission, np.float64)
        self._column_scale = self._emission.max(axis=0)  # (V,), positive: a grammar has only words that it emits
        self._columns = np.ascontiguousarray((self._emission / self._column_scale).T)  # (V, N)

    def inside(self, sentence) -> np.ndarray:
        """inside(i, j, A) of one sentence (T,): (T, T + 1, N) float64 probabilities, not scaled; zeros where j <= i."""
        return self._unscaled(sentence)[0]

    def outside(self, sentence) -> np.ndarray:
        """outside(i, j, A) of one sentence (T,): (T, T + 1, N) float64 probabilities, not scaled.

        Zero, too, where A can't have a yield of j - i words, whatever the words.
        """
        return self._unscaled(sentence)[1]

    def log_probability(self, tokens, lengths) -> np.ndarray:
        """log P(sentence), (n,) float64, in nats; -inf for a sentence that the grammar can't derive."""
        tokens, lengths = self._checked(tokens, lengths)
        total = self._cells(tokens, lengths, 0, INSIDE)[:, 0]
        inside_sentence = np.arange(tokens.shape[1]) < lengths[:, None]
        scale = np.log(self._column_scale)[np.where(inside_sentence, tokens, 0)]
        with np.errstate(divide="ignore"):
            log_total = np.log(total)
        bits = lengths * (SCALED_BITS // lengths)
        return log_total + np.where(inside_sentence, scale, 0.0).sum(axis=1) - bits * np.log(2.0)

    def conditionals(self, tokens, lengths, source="sentences", first_sentence: int = 0):
        """P(x_t = w | x_-t) for every position of every sentence.

        Args:
            source: what the sentences are called in an error.
            first_sentence: the index there of the first of them.

        Returns:
            (sum of lengths, V) float64 probabilities, each row summing to 1, and offsets, (n + 1,) int64: the rows of
            sentence s are offsets[s] .. offsets[s + 1].

        Raises:
            InputError: the grammar can't derive a sentence; its number is named, counting from 1.
        """
        tokens, lengths = self._checked(tokens, lengths, source, first_sentence)
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        result = np.empty((offsets[-1], self._emission.shape[1]))

        def fill(chunk: slice):
            cells = np.empty((chunk.stop - chunk.start, self._emission.shape[0]))
            block = result[offsets[chunk.start] : offsets[chunk.stop]]
            rows = np.empty((len(block), self._emission.shape[0]))
            self._run(tokens[chunk], lengths[chunk], 0, WORDS, cells, rows)
            for bad in np.flatnonzero(cells[:, 0] == 0)[:1]:
                number = first_sentence + chunk.start + int(bad) + 1
                sentence = tokens[chunk][bad, : lengths[chunk][bad]]
                text = " ".join(self.grammar.words[word] for word in sentence)
                raise InputError(
                    f"{source}: the grammar can't derive sentence {number} ({text!r}); "
                    "give the grammar that the text was made from, or remove the sentence"
                )
            np.matmul(rows, self._emission, out=block)
            block /= block.sum(axis=1, keepdims=True)

        self._over_chunks(fill, len(lengths))
        return result, offsets

    def span_scores(self, tokens, lengths, span: int | None, rule: str = "likelihood") -> np.ndarray:
        """Scores of all nonterminals over the first `span` words of each sentence (None: over the whole sentence).

        Args:
            rule: "likelihood": inside(0, span, A); "posterior": inside(0, span, A) outside(0, span, A).

        Returns:
            (n, N) float64, each row up to a positive factor of its own. Zeros where nothing derives the span, and for a
            sentence of fewer words than the span.
        """
        if span is not None and not 1 <= span <= MAX_WORDS:
            raise InputError(f"span: {span} words; must be between 1 and {MAX_WORDS}")
        tokens, lengths = self._checked(tokens, lengths)
        return self._cells(tokens, lengths, span or 0, {"likelihood": INSIDE, "posterior": POSTERIOR}[rule])

    def _checked(self, tokens, lengths, source="sentences", first_sentence=0):
        tokens, lengths = np.ascontiguousarray(tokens, np.int32), np.asarray(lengths, np.int64)
        for bad in np.flatnonzero((lengths > MAX_WORDS) | (lengths < 1))[:1]:
            raise InputError(
                f"{source}: sentence {first_sentence + bad + 1} has {lengths[bad]} words; "
                f"charts take 1 to {MAX_WORDS}; remove it"
            )
        return tokens, lengths

    def _run(self, tokens, lengths, span, want, cells, rows):
        _sweep(tokens, lengths, span, want, self._columns, SCALED_BITS, self._rules, cells, rows)

    def _cells(self, tokens, lengths, span: int, want: int) -> np.ndarray:
        cells = np.empty((len(lengths), self._emission.shape[0]))
        no_rows = np.empty((0, self._emission.shape[0]))
        self._over_chunks(
            lambda chunk: self._run(tokens[chunk], lengths[chunk], span, want, cells[chunk], no_rows), len(lengths)
        )
        return cells

    def _over_chunks(self, function, number: int) -> None:
        """Call function(slice) on chunks of the sentences, in threads; the first chunk's exception is raised first."""
        starts = range(0, number, SENTENCES_PER_CHUNK)
        chunks = [slice(start, min(start + SENTENCES_PER_CHUNK, number)) for start in starts]
        with concurrent.futures.ThreadPoolExecutor(max(1, min(self.threads, len(chunks)))) as executor:
            for _ in executor.map(function, chunks):
                pass

    def _unscaled(self, sentence):
        tokens, lengths = self._checked(np.asarray(sentence)[None], [len(sentence)])
        length, number = int(lengths[0]), self._emission.shape[0]
        inside, outside = np.zeros((2, length, length + 1, number))
        _inside(tokens[0], np.ascontiguousarray(self._emission.T), 1.0, self._rules, inside)
        _outside(length, 1, self._rules, inside, outside)
        return inside, outside
