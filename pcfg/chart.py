"""Inside and outside probabilities of sentences under a PCFG: the one dynamic program of the project.

With `i < j` positions between words (0..T) and A a nonterminal,

    inside(i, j, A)  = P(A =>* x_i .. x_{j-1})
    outside(i, j, A) = P(start =>* x_0 .. x_{i-1} A x_j .. x_{T-1})

(Baker 1979, "Trainable grammars for speech recognition"; Lari and Young 1990), both with all chains of unary rules, which
are followed within a cell, children first (inside) or parents first (outside), as in `pcfg.engine.rule_graph.unary_chains`.
Where unary rules form a cycle, a derivation can pass A several times in one cell, and its probability counts each time in
outside(i, j, A). Posteriors are divided by the expected number of passes. Labels, entropies and masked conditionals

    P(x_t = w | x_-t)  proportional to  sum_A outside(t, t+1, A) P(A -> w)

are folds of the same two sweeps: `outside(t, t+1, .)` does not depend on x_t, so one pass serves all positions. The best
parse is the inside sweep with maxima in place of sums.

Numbers are probabilities and never logarithms. Each word's emission column is divided by its maximum and multiplied by a factor
c(T) = 2^(RANGE / T). That multiplies all values of a cell by the same number, so conditionals and labels need no correction.
An inside value over w words is then at most c^w, an outside value at most c^(T - w), and nothing overflows. Underflow loses at
most 2^-149 per term in float32, which counts at most c^(T - 1) <= 2^96 times in a total. Where the total is 1 or more (one unit
for each of the 2^29 terms of a large chart included), the loss is below 2^-24 of it. Other sentences are repeated in float64,
which is exact enough down to totals of 2^-1036 before scaling (1e-5 per word at 64 words). Cycles of unary rules multiply
outside values, and so the loss, by up to the passes of a cell; the total must be as much, or with more than 2^20 passes,
all is repeated in float64.
"""

import collections
import concurrent.futures
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from pcfg.common.files import InputError, available_cores
from pcfg.engine.chart_plan import MAX_WORDS, ChartPlans, offsets
from pcfg.engine.sweeps import best_sweep, chart_sweep, score_sweep, word_sweep
from pcfg.grammar import Grammar

# The exponent of c(T)^T: values of a whole sentence are at most 2^RANGE. The factor is never above 2^64 per word.
RANGE = {"float32": 96, "float64": 960}
# Sentences of one length per task of a thread: long enough to pay for the call, short enough to share the work.
SENTENCES_PER_TASK = 1024
# float32 sums of a chart differ from exact ones by less than this; closer scores are compared in float64.
NEAR_TIE = 1e-4
# Scores that are equal in exact arithmetic differ by rounding (1e-16 per sum); they must tie all the same.
TIE = 1e-12
# Expected passes of a cell's nonterminal, by cycles of unary rules, up to which values stay in the range of float32.
MAX_VISITS = 2.0**20
# The words start .. stop - 1, counted from 0; stop None: to the sentence's end. None: the whole sentence.
Span = tuple[int, int | None] | None


class Chart:
    """The charts of a grammar's sentences; see the module docstring for the equations. N nonterminals, V words.

    Args:
        threads: over groups of sentences (the kernels release the GIL); default: the cores this process may use.
            Results do not depend on it.
        dtype: float32, with sentences beyond its range repeated in float64 (`redone` counts them), or float64 for everything.

    Sentences are `tokens`, (n, T) integers, indices into `grammar.words`, anything beyond a sentence's end, and `lengths`,
    (n,), in words. All methods refuse a sentence of no word or of more than 64.
    """

    def __init__(self, grammar: Grammar, threads: int | None = None, dtype: str = "float32"):
        self.grammar = grammar
        self.threads = threads or available_cores()
        self.dtype = np.dtype(dtype).name
        self.redone = 0
        # Expected passes of A in a cell, (N,), once there is one: None without cycles of unary rules.
        self._visits = grammar.chains.visits if (grammar.chains.visits > 1).any() else None
        most = grammar.chains.visits.max()
        self._least_total = most if most <= MAX_VISITS else np.inf
        self._plans = ChartPlans(grammar)
        emission = np.asarray(grammar.emission, np.float64)
        self._column_scale = emission.max(axis=0)  # (V,), positive: a grammar has only words that it emits
        columns = np.ascontiguousarray((emission / self._column_scale).T)  # (V, N)
        word, symbol = np.nonzero(emission.T)
        word_start = np.searchsorted(word, np.arange(emission.shape[1] + 1))
        self._columns = {name: columns.astype(name) for name in RANGE}
        self._emission = {name: (word_start, symbol, emission[symbol, word].astype(name)) for name in RANGE}

    def inside(self, sentence: np.ndarray) -> np.ndarray:
        """inside(i, j, A) of one sentence (T,): (T, T + 1, N) float64 probabilities, not scaled; zeros where j <= i."""
        return self._whole_chart(sentence)[0]

    def outside(self, sentence: np.ndarray) -> np.ndarray:
        """As `inside`, of outside(i, j, A); also zero where A cannot have a yield of j - i words."""
        return self._whole_chart(sentence)[1]

    def posteriors(self, sentence: np.ndarray) -> np.ndarray:
        """P(A derives x_i .. x_{j-1} | x) = inside(i, j, A) outside(i, j, A) / inside(0, T, start): (T, T + 1, N) float64.

        Divided by the expected passes of A in a cell, where unary rules form cycles.
        """
        inside, outside = self._whole_chart(sentence)
        total = inside[0, -1, 0]
        if total == 0:
            raise self._underivable(np.asarray(sentence), "sentence", 1)
        return inside * outside / (total if self._visits is None else total * self._visits)

    def log_probability(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """log P(sentence), (n,) float64, in nats; -inf for a sentence that the grammar cannot derive."""
        tokens, lengths = self._checked(tokens, lengths)
        scores, _ = self._scores(tokens, lengths, np.arange(1), None, False, "float64")
        words = np.arange(tokens.shape[1]) < lengths[:, None]
        scale = np.where(words, np.log(self._column_scale)[np.where(words, tokens, 0)], 0.0).sum(axis=1)
        factor = np.array([np.log(_factor(length, "float64")) for length in range(1, MAX_WORDS + 1)])
        with np.errstate(divide="ignore"):
            return np.log(scores[:, 0]) + scale - lengths * factor[lengths - 1]

    def conditionals(self, tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """P(x_t = w | x_-t) for every position of every sentence; one that the grammar cannot derive is refused.

        Returns:
            (sum of lengths, V) probabilities in the chart's dtype, each row summing to 1, and offsets, (n + 1,) int64: the
            rows of sentence s are offsets[s] .. offsets[s + 1].
        """
        results = self.conditionals_and_reductions(tokens, lengths, reductions=False)
        return results[0], results[-1]

    def reductions(self, tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The conditionals reduced to two numbers per position.

        Returns:
            entropy -sum_w P(w | x_-t) log P(w | x_-t) and log P(x_t | x_-t), (sum of lengths,) float64, nats, and offsets.
        """
        return self.conditionals_and_reductions(tokens, lengths, distributions=False)[1:]

    def conditionals_and_reductions(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        source: Any = "sentences",
        first_sentence: int = 0,
        distributions: bool = True,
        reductions: bool = True,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """All of `conditionals` and `reductions` in one sweep: conditionals, entropy, log P(x_t | x_-t), offsets.

        Args:
            source: the name of the sentences in an error.
            first_sentence: how many sentences of the source come before; an error counts from 1.
            distributions, reductions: whether to compute the conditionals, and the other two; else these have no rows.
        """
        tokens, lengths = self._checked(tokens, lengths, source, first_sentence)
        first_row = offsets(lengths)
        positions = int(first_row[-1])
        conditionals = np.empty((positions if distributions else 0, len(self.grammar.words)), self.dtype)
        entropy, log_true = np.empty((2, positions if reductions else 0))
        totals = np.zeros(len(lengths))

        def sweep(dtype: str, rows: np.ndarray) -> None:
            def fill(length: int, group: np.ndarray) -> None:
                plan = self._plans.of(length, (0,), dtype)
                if plan is not None:
                    factor = _factor(length, dtype)
                    emission = self._emission[dtype]
                    results = (conditionals, entropy, log_true, totals)
                    word_sweep(tokens, group, first_row, plan, self._columns[dtype], factor, emission, *results)

            self._in_groups(fill, lengths, rows)

        sweep(self.dtype, np.arange(len(lengths)))
        if self.dtype == "float32":
            doubtful = np.flatnonzero(~((totals >= self._least_total) & np.isfinite(totals)))
            self.redone += len(doubtful)
            sweep("float64", doubtful)
        for bad in np.flatnonzero(totals == 0)[:1]:
            raise self._underivable(tokens[bad, : lengths[bad]], source, first_sentence + int(bad) + 1)
        return conditionals, entropy, log_true, first_row

    def span_scores(self, tokens: np.ndarray, lengths: np.ndarray, span: Span = None, rule: str = "likelihood") -> np.ndarray:
        """Scores of all nonterminals over a span of each sentence: (n, N) float64, each row up to a factor of its own.

        The rule "likelihood" is inside(start, stop, A), "posterior" is P(A derives the span | x).
        Zeros where nothing derives the span, and for a sentence that ends before the span does.
        """
        tokens, lengths = self._checked(tokens, lengths)
        symbols = np.arange(len(self.grammar.names))
        return self._scores(tokens, lengths, symbols, span, rule == "posterior", "float64")[0]

    def labels(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        symbols: np.ndarray,
        span: Span = None,
        rule: str = "likelihood",
        tied: np.ndarray | None = None,
    ) -> np.ndarray:
        """The best of the nonterminals `symbols`, (S,), over a span of each sentence, by `span_scores`.

        Returns:
            (n,) int64, index into `symbols`; ties (to 1e-12, relative, in float64) take the lowest, and are marked in `tied`,
            (n,) bool, if given; -1 where no candidate derives the span, or the sentence ends before it does.
        """
        tokens, lengths = self._checked(tokens, lengths)
        symbols = np.asarray(symbols)
        posterior = rule == "posterior"
        if tied is None:
            tied = np.zeros(len(lengths), dtype=bool)
        if self.dtype == "float64":
            labels, tied[:] = _best(self._scores(tokens, lengths, symbols, span, posterior, "float64")[0])
            return labels
        scores, covered = self._scores(tokens, lengths, symbols, span, posterior, "float32")
        labels = scores.argmax(axis=1)
        best = scores[np.arange(len(scores)), labels]
        near = np.count_nonzero(scores >= (best * np.float32(1 - NEAR_TIE))[:, None], axis=1)
        sure = (best >= self._least_total) & np.isfinite(best) & (near == 1)
        labels[~covered] = -1
        doubtful = np.flatnonzero(covered & ~sure)
        self.redone += len(doubtful)
        if len(doubtful):
            again = self._scores(tokens[doubtful], lengths[doubtful], symbols, span, posterior, "float64")[0]
            labels[doubtful], tied[doubtful] = _best(again)
        return labels

    def parses(self, tokens: np.ndarray, lengths: np.ndarray) -> list:
        """The best parse of each sentence as an `nltk.Tree` whose root has its probability (`prob()`, `logprob()`).

        Ties take the rule and the split that come first. None for a sentence that the grammar cannot derive.
        """
        # nltk takes a second to import, which only trees are worth.
        from nltk.tree import ProbabilisticTree, Tree

        tokens, lengths = self._checked(tokens, lengths)
        trees: list = [None] * len(lengths)
        names = self.grammar.names
        scale = np.log2(self._column_scale)

        def build(row: int, nodes: list, value: float, factor: float) -> None:
            sentence = tokens[row, : lengths[row]]
            leaves = [self.grammar.words[word] for word in sentence]
            # Backwards through the pre-order, the children of a node are the last trees that were finished, the first on top.
            finished: list[Tree] = []
            for symbol, children in reversed(nodes):
                parts = [finished.pop() for _ in range(children)] if children else [leaves.pop()]
                finished.append(Tree(names[symbol], parts))
            probability = float(np.log2(value) - lengths[row] * np.log2(factor) + scale[sentence].sum())
            trees[row] = ProbabilisticTree(names[nodes[0][0]], list(finished[0]), logprob=probability)

        self._for_each_parse(tokens, lengths, build)
        return trees

    def depths(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Rules from the root down to the deepest word of each sentence's best parse, that of `parses`: (n,) int64.

        S -> A B, A -> a, B -> b has the depth 2. -1 for a sentence that the grammar cannot derive.
        """
        tokens, lengths = self._checked(tokens, lengths)
        depths = np.full(len(lengths), -1)

        def measure(row: int, nodes: list, *_: float) -> None:
            finished: list[int] = []  # depths of subtrees, as in `parses`
            for _symbol, children in reversed(nodes):
                finished.append(1 + max((finished.pop() for _ in range(children)), default=0))
            depths[row] = finished[0]

        self._for_each_parse(tokens, lengths, measure)
        return depths

    def _for_each_parse(self, tokens: np.ndarray, lengths: np.ndarray, use: Callable[[int, list, float, float], None]) -> None:
        """Call use(sentence, nodes, value, factor) for the best parse of each sentence that has one.

        `nodes` are in pre-order, [nonterminal, number of children]. `value` is the probability times factor^T, with emission
        columns divided by their maxima.
        """

        def parse(length: int, rows: np.ndarray) -> None:
            plan = self._plans.of(length, (0,), "float64", best=True)
            if plan is None:
                return
            factor = _factor(length, "float64")
            nodes, ends, values = best_sweep(tokens, rows, plan, self._columns["float64"], factor)
            starts = ends - np.diff(ends, prepend=0)
            nodes = nodes.tolist()
            for row, start, end, value in zip(rows, starts, ends, values, strict=True):
                if value > 0:
                    use(row, nodes[start:end], value, factor)

        self._in_groups(parse, lengths, np.arange(len(lengths)))

    def _checked(
        self, tokens: Any, lengths: Any, source: Any = "sentences", first_sentence: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.ascontiguousarray(tokens, np.int32)
        lengths = np.asarray(lengths, np.int64)
        for bad in np.flatnonzero((lengths > MAX_WORDS) | (lengths < 1))[:1]:
            place = f"{source}: sentence {first_sentence + bad + 1}"
            raise InputError(f"{place} has {lengths[bad]} words; charts take 1 to {MAX_WORDS}; remove it")
        return tokens, lengths

    def _underivable(self, sentence: Iterable[int], source: Any, number: int) -> InputError:
        wrong = f"the grammar can't derive sentence {number} ({' '.join(self.grammar.words[word] for word in sentence)!r})"
        return InputError(f"{source}: {wrong}; give the grammar that the text was made from, or remove the sentence")

    def _in_groups(self, function: Callable[[int, np.ndarray], None], lengths: np.ndarray, rows: np.ndarray) -> None:
        """Call function(length, rows) on groups of `rows` of one length, in threads; raises the first group's exception."""
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        bounds = offsets(np.bincount(lengths[rows], minlength=MAX_WORDS + 1))
        groups = [
            (length, rows[start : min(start + SENTENCES_PER_TASK, bounds[length + 1])])
            for length in range(MAX_WORDS + 1)
            for start in range(bounds[length], bounds[length + 1], SENTENCES_PER_TASK)
        ]
        if min(self.threads, len(groups)) <= 1:
            for group in groups:
                function(*group)
            return
        with concurrent.futures.ThreadPoolExecutor(min(self.threads, len(groups))) as executor:
            collections.deque(executor.map(function, *zip(*groups, strict=True)), maxlen=0)

    def _scores(
        self, tokens: np.ndarray, lengths: np.ndarray, symbols: np.ndarray, span: Span, with_outside: bool, dtype: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores (n, S) of a span in `dtype`, and which sentences reach to its end, (n,) bool."""
        start, stop = span or (0, None)
        if not 0 <= start < (MAX_WORDS if stop is None else stop) <= MAX_WORDS:
            raise InputError(f"span: words {start} to {stop}; must be between 0 and {MAX_WORDS}")
        covered = lengths > start if stop is None else lengths >= stop
        scores = np.zeros((len(lengths), len(symbols)), dtype)
        # Without the outside, nothing beyond the span is read.
        used = lengths if with_outside else (lengths if stop is None else np.full_like(lengths, stop)) - start

        def score(length: int, rows: np.ndarray) -> None:
            plan = self._plans.of(length, (0,) if with_outside else symbols, dtype)
            if plan is None:
                return
            cell = plan.cell_of[start, length if stop is None else stop] if with_outside else len(plan.cell_begin) - 1
            if cell < 0:
                return
            kind = plan.cell_kind[cell]
            living = plan.symbols[plan.symbol_start[kind] : plan.symbol_start[kind + 1]]
            places = np.flatnonzero(np.isin(symbols, living))
            score_sweep(
                tokens[:, 0 if with_outside else start :],
                *(rows, plan, self._columns[dtype], _factor(length, dtype), cell, with_outside),
                *(symbols[places], places, scores),
            )

        self._in_groups(score, used, np.flatnonzero(covered))
        if with_outside and self._visits is not None:
            scores /= self._visits[symbols].astype(dtype)
        return scores, covered

    def _whole_chart(self, sentence: np.ndarray) -> np.ndarray:
        """inside and outside of all cells of a sentence, reachable or not, (T, T + 1, N) each."""
        tokens, _ = self._checked(np.asarray(sentence)[None], [len(sentence)])
        length = len(sentence)
        number = len(self.grammar.names)
        result = np.zeros((2, length, length + 1, number))
        plan = self._plans.of(length, None, "float64")
        if plan is not None:
            columns = np.ascontiguousarray(self.grammar.emission.T, np.float64)
            for values, chart in zip(chart_sweep(tokens[0], plan, columns), result, strict=True):
                chart[plan.cell_begin, plan.cell_begin + plan.cell_width] = values[:, 0].reshape(-1, number)
        return result


def _factor(length: int, dtype: str) -> Any:
    """c(T), in the chart's dtype."""
    return np.dtype(dtype).type(2.0 ** (RANGE[dtype] / length))


def _best(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first of the best scores of each row, up to rounding, -1 where all are 0, and which rows have several best ones."""
    best = scores.max(axis=1, initial=0)
    equal = scores >= (best * (1 - TIE))[:, None]
    return np.where(best > 0, np.argmax(equal, axis=1), -1), (best > 0) & (np.count_nonzero(equal, axis=1) > 1)
