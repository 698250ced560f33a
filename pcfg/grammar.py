"""Probabilistic context-free grammars: their files, read, checked and written, as index arrays; nltk in and out.

A rules file has one rule per line, `LHS RHS prob` or `LHS RHS1 RHS2 prob`. A right side of one symbol is a unary rule if the
symbol is a left side somewhere, else a word (terminal). The first left side is the start symbol. nltk's PCFG format (any
line with `->`) is read too.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import math
import operator
import re
import warnings
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pcfg.common.files import InputError, atomic_open
from pcfg.common.text import decoded, shown
from pcfg.common.words import WordIndex, padded
from pcfg.engine import rule_graph

if TYPE_CHECKING:
    import nltk

RULES_FOLDER = Path(__file__).parent / "rules"
SUM_TOLERANCE = 1e-2
# Nonterminals times words: 1.6 GB of emissions.
MAX_EMISSIONS = 200_000_000
# Nonterminals that derive each other by unary rules: the square of them are the steps of each cell of a chart.
MAX_CYCLE = 1_000
# A spectral radius above is 1 but for rounding.
MAX_RADIUS = 1.0 - 1e-12
# Symbols on the right of a rule in nltk's format: a rule of more derives no sentence that a chart can hold.
MAX_RIGHT_SIDE = 64
# Lines of the rules format that are split into fields at a time: all at once would be ten times the file in memory.
LINES_PER_BLOCK = 1 << 12
# What no text has; most likely the file is no text, or UTF-16. Characters that count as white space are none of them.
CONTROL_CHARACTER = re.compile(r"[\x00-\x08\x0e-\x1b\x7f]")
# nltk's own definitions of a nonterminal and of a quoted word; in brackets any number, as nltk itself prints [1e-05].
NONTERMINAL = re.compile(r"([\w/][\w/^<>-]*)\s*")
ARROW = re.compile(r"\s*->\s*")
START = re.compile(r"%\s*start\s+([\w/][\w/^<>-]*)\s*")
RIGHT_SIDE = re.compile(
    r"""(?: \[ (?P<probability>[^\[\]]*) \] | (?P<word>"[^"]*"|'[^']*') | (?P<bar>\|) | (?P<symbol>[\w/][\w/^<>-]*) )\s*""",
    re.VERBOSE,
)

# How to write a grammar in which X -> (nothing) has the probability p.
EPSILON = (
    "an empty X (an epsilon rule) of probability p has to be rewritten: split each rule with X on its right in two, one with X,"
    " times 1 - p, and one without, times p; then divide the other probabilities of X by 1 - p"
)
# Left side, right side of one or two symbols, probability.
WeightedRule = tuple[str, tuple[str, ...], float]
Names = Sequence[str | None]
# Left side, first and second symbol of the right side, probability, line.
RuleLine = tuple[str, str, str | None, float, int]


@dataclasses.dataclass(frozen=True)
class WeightedRules:
    """R rules as they stand in a file, symbols as numbers."""

    source: str  # how messages name the file
    symbols: list[str]  # the symbol of each number, by first appearance
    # left, first, second: (R,) int32, left side and right side; `second` is -1 where the right side has one symbol
    left: np.ndarray
    first: np.ndarray
    second: np.ndarray
    probability: np.ndarray  # (R,) float64 in [0, 1 + 1e-9]
    line: np.ndarray  # (R,) int32, from 1

    def place(self, rule: int) -> str:
        """ "SOURCE:LINE" of a rule, for messages."""
        return f"{self.source}:{self.line[rule]}"


class RuleCollector:
    """Collects rules from the blocks of a file; `collected` returns them as `WeightedRules`."""

    def __init__(self, source: str):
        self.source = source
        self._number: dict[str | None, int] = defaultdict(itertools.count().__next__, {None: -1})
        self._columns: list[list[np.ndarray]] = [[], [], []]
        self._probability = array("d")
        self._line = array("i")

    def extend(self, left: Names, first: Names, second: Names, probability: Sequence[float], line: Sequence[int]) -> None:
        """Add rules by columns, twice as fast as by rows; `second` is None where the right side has one symbol."""
        for column, symbols in zip(self._columns, (left, first, second), strict=True):
            column.append(np.fromiter(map(self._number.__getitem__, symbols), np.int32, len(symbols)))
        self._probability.extend(probability)
        self._line.extend(line)

    def collected(self) -> WeightedRules:
        """All rules so far; refuses a probability that is not a number in [0, 1 + 1e-9]."""
        left, first, second = (np.concatenate([np.empty(0, np.int32), *column]) for column in self._columns)
        probability = np.array(self._probability, np.float64)
        line = np.array(self._line, np.int32)
        symbols = [symbol for symbol in self._number if symbol is not None]
        rules = WeightedRules(self.source, symbols, left, first, second, probability, line)
        # A comparison with nan is false.
        for rule in np.flatnonzero(~((probability >= 0.0) & (probability <= 1.0 + 1e-9)))[:1]:
            raise InputError(f"{rules.place(rule)}: probability {probability[rule]}; it must be a number from 0 to 1")
        return rules


class Grammar:
    """A grammar of checked, merged and normalised rules. Make one with `read` or `from_rules`.

    Sizes: N nonterminals, V words, R binary and U unary rules (unary: nonterminal -> nonterminal).

    Attributes:
        names: N nonterminals by their first appearance as a left side; index 0 is the start symbol.
        words: V words, sorted.
        binary: (R, 3) int32, left side, left child, right child; sorted by (left child, right child, left side).
        binary_probability: (R,) float64.
        unary: (U, 2) int32, left side, child; in the order of the file.
        unary_probability: (U,) float64.
        chains, best_chains: how values of a chart's cell follow all chains of unary rules, in sums and in maxima.
        emission: (N, V) float64, P(A -> w).
        shortest, longest: (N,) int64, the least and the largest number of words that a nonterminal derives, UNBOUNDED (2^30)
            where it is that or more; `longest` is UNBOUNDED also where a nonterminal can come back to itself.
        sha256: hash of the merged, normalised and sorted rules: equal for files that mean the same grammar.
    """

    def __init__(self, rules: WeightedRules):
        """Check, merge and normalise the rules of a file, as `from_rules` describes."""
        if not len(rules.left):
            raise InputError(f"{rules.source}:1: no rules; the file is empty")
        symbols, first_rule = np.unique(rules.left, return_index=True)
        symbols = symbols[np.argsort(first_rule)]
        first_rule = np.sort(first_rule)  # (N,), by first appearance
        self.names = [rules.symbols[symbol] for symbol in symbols]
        # symbol -> nonterminal; -1 for words, and at the end for -1, no symbol
        number = np.full(len(rules.symbols) + 1, -1)
        number[symbols] = np.arange(len(symbols))
        sides = np.column_stack([number[rules.left], number[rules.first], number[rules.second]])  # (R, 3)
        for rule in np.flatnonzero((rules.second >= 0) & (sides < 0).any(axis=1))[:1]:
            word = shown(rules.symbols[(rules.first if sides[rule, 1] < 0 else rules.second)[rule]])
            wrong = f"{word} in a binary rule is a word (it is no left side)"
            raise InputError(f"{rules.place(rule)}: {wrong}; give the word a nonterminal of its own")

        origin, probability = _merged(rules, sides[:, 0], first_rule)
        sides = sides[origin]
        is_binary = rules.second[origin] >= 0
        is_unary = ~is_binary & (sides[:, 1] >= 0)
        emits = ~is_binary & (sides[:, 1] < 0)
        self.unary = sides[is_unary, :2].astype(np.int32)
        self.unary_probability = probability[is_unary]
        by_children = np.flatnonzero(is_binary)[np.lexsort(sides[is_binary].T[[0, 2, 1]])]
        self.binary = sides[by_children].astype(np.int32)
        self.binary_probability = probability[by_children]
        self._set_emission(rules, sides[emits, 0], rules.first[origin[emits]], probability[emits])

        self._set_chains(rules, origin[is_unary])
        self._set_yields(rules, first_rule, np.bincount(sides[emits, 0], minlength=len(symbols)) > 0)

    def _set_emission(self, rules: WeightedRules, left: np.ndarray, symbol: np.ndarray, probability: np.ndarray) -> None:
        used = np.unique(symbol)
        self.words = sorted(rules.symbols[number] for number in used)
        word_index = {word: number for number, word in enumerate(self.words)}
        if len(self.names) * len(self.words) > MAX_EMISSIONS:
            sizes = f"{len(self.names):,} nonterminals times {len(self.words):,} words"
            raise InputError(f"{rules.source}: {sizes} are more than {MAX_EMISSIONS:,}, the maximum; use fewer of them")
        word = np.empty(len(rules.symbols), dtype=np.int64)
        word[used] = [word_index[rules.symbols[number]] for number in used]
        self.emission = np.zeros((len(self.names), len(self.words)))  # (N, V)
        self.emission[left, word[symbol]] = probability

    def _set_chains(self, rules: WeightedRules, origin: np.ndarray) -> None:
        """Set `chains` and `best_chains`; refuse cycles of unary rules that are never left, or too large.

        `origin`, (U,): the place of each unary rule in `rules`.
        """
        component = rule_graph.strong_components(len(self.names), *self.unary.T.astype(np.int64))
        leaves = component[self.unary[:, 0]] != component[self.unary[:, 1]]
        leaving = self.emission.sum(axis=1)
        np.add.at(leaving, self.binary[:, 0], self.binary_probability)
        np.add.at(leaving, self.unary[leaves, 0], self.unary_probability[leaves])
        for members, cycle in rule_graph.unary_cycles(self.unary, component):
            place = rules.place(origin[cycle[0]])
            names = [f"{shown(self.names[left])} -> {shown(self.names[child])}" for left, child in self.unary[cycle[:3]]]
            listed = ", ".join(names) + (f" and {len(cycle) - 3:,} more" if len(cycle) > 3 else "")
            never_left = not leaving[members].any()
            if len(members) > MAX_CYCLE and not never_left:
                wrong = f"{len(members):,} nonterminals derive each other by unary rules ({listed}); {MAX_CYCLE:,} are the most"
                raise InputError(f"{place}: {wrong}; remove some of the rules")
            radius = 1.0
            if not never_left:
                within = rule_graph.cycle_matrix(members, self.unary[cycle], self.unary_probability[cycle])
                radius = np.abs(np.linalg.eigvals(within)).max()
            if radius >= MAX_RADIUS:
                raise InputError(
                    f"{place}: the unary rules {listed} form a cycle that is never left (spectral radius {radius:.6g}, it must "
                    "be below 1); lower their probabilities in favour of other rules"
                )
        self.chains, self.best_chains = rule_graph.unary_chains(self.unary, self.unary_probability, component, leaving)

    def _set_yields(self, rules: WeightedRules, first_rule: np.ndarray, emits: np.ndarray) -> None:
        """Set `shortest` and `longest`; refuse nonterminals that derive no sentence, and warn of unreachable ones."""
        left, first, second = np.concatenate([np.insert(self.unary, 2, -1, axis=1), self.binary]).T.astype(np.int64)
        self.shortest = rule_graph.shortest_yields(left, first, second, emits)
        for symbol in np.flatnonzero(self.shortest < 0)[:1]:
            raise InputError(
                f"{rules.place(first_rule[symbol])}: the nonterminal {shown(self.names[symbol])} derives no sentence (each of "
                "its rules leads back to it); give it a rule that ends in words"
            )
        parent = np.append(left, left[second >= 0])
        child = np.append(first, second[second >= 0])
        component = rule_graph.strong_components(len(self.names), parent, child)
        self.longest = rule_graph.longest_yields(left, first, second, emits, component)
        unused = ~rule_graph.reachable(component, parent, child, 0)
        if unused.any():
            warnings.warn(
                f"{rules.place(first_rule[np.argmax(unused)])}: {unused.sum()} nonterminals can't be reached from the "
                f"start symbol {shown(self.names[0])} (the first left side, unless %start names another) and have no effect: "
                f"{self.listed(unused)}",
                stacklevel=4,
            )

    @classmethod
    def read(cls, path: Path | str) -> "Grammar":
        """The grammar in a file in the rules format, or in nltk's PCFG format if a line that is no comment has `->`."""
        source = str(path)
        text = decoded(Path(path))
        if control := CONTROL_CHARACTER.search(text):
            line = text.count("\n", 0, control.start()) + 1
            raise InputError(f"{source}:{line}: the control character {control[0]!r}; a grammar is plain text in UTF-8")
        lines = text.split("\n")
        is_nltk = "->" in text and any("->" in line for line in lines if not line.lstrip().startswith("#"))
        return cls(parse_nltk(lines, source) if is_nltk else parse_rules(lines, source))

    @classmethod
    def from_rules(cls, rules: list[tuple[str, tuple[str, ...], float]], source: str = "rules") -> "Grammar":
        """The grammar of a list of (left side, right side of one or two symbols, probability).

        Repeated rules add up; each left side is normalised to 1; rules of probability 0 are dropped. A binary rule has no
        word. The probabilities are in [0, 1] and sum to 1 per left side, within 0.01. Cycles of unary rules can be left,
        and every nonterminal derives a sentence. Messages name the list `source`; its first rule is line 1.

        >>> grammar = Grammar.from_rules([("S", ("A", "A"), 1.0), ("A", ("a",), 0.5), ("A", ("b",), 0.5)])
        >>> grammar.names, grammar.words, grammar.emission[1].tolist(), int(grammar.longest[0])
        (['S', 'A'], ['a', 'b'], [0.5, 0.5], 2)
        """
        for number, (left, right, _) in enumerate(rules, 1):
            if len(right) not in (1, 2):
                wrong = f"{len(right)} symbols on the right of {shown(left)}"
                raise InputError(f"{source}:{number}: {wrong}; a rule has one or two")
        collector = RuleCollector(source)
        collector.extend(
            [left for left, _, _ in rules],
            [right[0] for _, right, _ in rules],
            [right[1] if len(right) == 2 else None for _, right, _ in rules],
            [probability for _, _, probability in rules],
            range(1, len(rules) + 1),
        )
        return cls(collector.collected())

    def rules(self) -> Iterator[tuple[int, tuple[str, ...], float, bool]]:
        """Left side, names on the right side, probability, and whether they are a word: unary rules, binary ones, words."""
        for sides, probabilities in ((self.unary, self.unary_probability), (self.binary, self.binary_probability)):
            for (left, *children), probability in zip(sides.tolist(), probabilities.tolist(), strict=True):
                yield left, tuple([self.names[child] for child in children]), probability, False
        lefts, words = np.nonzero(self.emission)
        for left, word, probability in zip(lefts.tolist(), words.tolist(), self.emission[lefts, words].tolist(), strict=True):
            yield left, (self.words[word],), probability, True

    @functools.cached_property
    def sha256(self) -> str:
        lines = [f"{self.names[left]} {' '.join(right)} {probability!r}" for left, right, probability, _ in self.rules()]
        return hashlib.sha256("\n".join([self.names[0], *sorted(lines)]).encode()).hexdigest()

    def listed(self, mask: np.ndarray) -> str:
        """The first ten of some nonterminals, `mask` (N,) bool, for a message."""
        names = [self.names[symbol] for symbol in np.flatnonzero(mask)]
        listed = ", ".join(name if len(name) <= 60 else shown(name) for name in names[:10])
        return listed if len(names) <= 10 else f"{listed} and {len(names) - 10:,} more"

    def to_nltk(self) -> "nltk.PCFG":
        """The same grammar as an `nltk.PCFG`."""
        # nltk takes a second to import, which only its users should pay.
        from nltk.grammar import PCFG, Nonterminal, ProbabilisticProduction

        symbols = {name: Nonterminal(name) for name in self.names}
        productions = [
            ProbabilisticProduction(
                symbols[self.names[left]], right if is_word else tuple(symbols[name] for name in right), prob=probability
            )
            for left, right, probability, is_word in sorted(self.rules(), key=operator.itemgetter(0))
        ]
        return PCFG(symbols[self.names[0]], productions)

    def encode(self, texts: list[str], source: str) -> tuple[np.ndarray, np.ndarray]:
        """Word indices of n sentences, words separated by spaces; `source` is their file, for messages.

        Returns:
            tokens (n, T) int32, indices into `words`, -1 beyond the end of a sentence; lengths (n,) int32, words.

        >>> grammar = Grammar.from_rules([("S", ("S", "S"), 0.3), ("S", ("a",), 0.3), ("S", ("b",), 0.4)])
        >>> grammar.encode(["b a", "a"], "text")[0].tolist()
        [[1, 0], [0, -1]]
        """
        flat, lengths = WordIndex(self.words).encode_texts(texts, source)
        return padded(flat, lengths, -1), lengths


def _merged(rules: WeightedRules, left: np.ndarray, first_rule: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rules with repetitions added up, zeros dropped and left sides normalised. fsum: the order does not matter.

    `left`, (R,), has the number of each rule's left side, and `first_rule`, (N,), the first rule of each left side. Returns
    origin (K,) ascending, the first of the rules behind each merged rule, and probability (K,) float64.
    """
    order = np.lexsort((rules.second, rules.first, left))
    keys = np.column_stack([left, rules.first, rules.second])[order]
    probability = rules.probability[order]
    starts = np.searchsorted(keys[:, 0], np.arange(len(first_rule) + 1))
    values = probability.tolist()
    sums = np.array([math.fsum(values[start:end]) for start, end in zip(starts[:-1], starts[1:], strict=True)])  # (N,)
    for symbol in np.flatnonzero(np.abs(sums - 1.0) > SUM_TOLERANCE)[:1]:
        wrong = f"the probabilities of {shown(rules.symbols[rules.left[first_rule[symbol]]])} add up to {sums[symbol]}"
        limit = f"{abs(sums[symbol] - 1.0)} from 1; at most {SUM_TOLERANCE} is allowed"
        raise InputError(f"{rules.place(first_rule[symbol])}: {wrong}, which is {limit}")
    new = np.append(True, (keys[1:] != keys[:-1]).any(axis=1))
    starts = np.append(np.flatnonzero(new), len(keys))
    merged = probability[new]
    for rule in np.flatnonzero(np.diff(starts) > 1):
        merged[rule] = math.fsum(values[starts[rule] : starts[rule + 1]])
    merged = merged / sums[keys[new, 0]]
    origin = order[new]
    by_file = np.argsort(origin)
    by_file = by_file[merged[by_file] > 0.0]
    return origin[by_file], merged[by_file]


def parse_probabilities(texts: list[str], source: str, lines: list[int]) -> list[float]:
    """The numbers in `texts`, of `lines`; Python's underscores and digits of other scripts are no numbers here."""
    together = "".join(texts)
    if together.isascii() and "_" not in together:
        # The usual case, at the speed of `map`; the loop below finds the error.
        with contextlib.suppress(ValueError):
            return list(map(float, texts))
    numbers = []
    for text, line in zip(texts, lines, strict=True):
        try:
            numbers.append(float(text if text.isascii() and "_" not in text else "no number"))
        except ValueError:
            raise InputError(f"{source}:{line}: probability {shown(text)} is not a number") from None
    return numbers


def parse_rules(lines: list[str], source: str) -> WeightedRules:
    """The rules of lines in the rules format: `LHS RHS prob` or `LHS RHS1 RHS2 prob` per line, `#` opens a comment line.

    >>> rules = parse_rules(["# toy", "S A A 1.0", "A word 1.0"], "toy.txt")
    >>> rules.symbols, rules.left.tolist(), rules.second.tolist(), rules.place(1)
    (['S', 'A', 'word'], [0, 1], [1, -1], 'toy.txt:3')
    """
    collector = RuleCollector(source)
    for begin in range(0, len(lines), LINES_PER_BLOCK):
        block = lines[begin : begin + LINES_PER_BLOCK]
        if not any(map(str.strip, block)):
            continue
        fields = [line.split() for line in block]
        numbers = [begin + row for row, line in enumerate(fields, 1) if line and line[0][0] != "#"]
        fields = [line for line in fields if line and line[0][0] != "#"]
        if not {len(line) for line in fields} <= {3, 4}:
            line, number = next((line, number) for line, number in zip(fields, numbers, strict=True) if len(line) not in (3, 4))
            wrong = f"{len(line):,} fields in {shown(lines[number - 1].strip())}"
            advice = "a rule is `LHS RHS prob` or `LHS RHS1 RHS2 prob`, with nothing after it"
            if len(line) == 2:
                advice += f"; if its right side is empty, {EPSILON}"
            raise InputError(f"{source}:{number}: {wrong}; {advice}")
        collector.extend(
            [line[0] for line in fields],
            [line[1] for line in fields],
            [line[2] if len(line) == 4 else None for line in fields],
            parse_probabilities([line[-1] for line in fields], source, numbers),
            numbers,
        )
    return collector.collected()


def parse_nltk(lines: list[str], source: str) -> WeightedRules:
    """The rules of lines in nltk's PCFG format (`S -> NP VP [0.6] | 'word' [0.4]`), binarised; the start's rules first.

    Binarising is done here, as nltk's own `CFG.binarize` forgets the probabilities and gives `A -> B C D` and `A -> B E F`
    the same new symbol, which would change the language. A new symbol is named by the symbols it stands for, so its one
    rule has probability 1 and every sentence keeps its probability.
    """
    start = None
    productions: list[_Production] = []
    pending: list[str] = []
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not pending and (not line or line.startswith("#")):
            continue
        if line.endswith("\\"):
            pending.append(line[:-1].rstrip() + " ")
            continue
        line = "".join([*pending, line])
        pending = []
        if line.startswith("%"):
            directive = START.fullmatch(line)
            if not directive:
                raise InputError(f"{source}:{number}: {shown(line)} is no directive of nltk's format; it has `%start S` alone")
            start = directive[1]
        else:
            productions += _productions(line, source, number)
    if pending:
        raise InputError(f"{source}:{len(lines)}: the file ends in a line that is to go on; remove its last \\, or complete it")
    if start is not None and not any(production.left == start for production in productions):
        raise InputError(f"{source}: the start symbol {shown(start)} has no rule")
    productions.sort(key=lambda production: production.left != start)  # without a start all as they are
    return _binarised(productions, source)


class _Production(NamedTuple):
    """One alternative of a line in nltk's format."""

    left: str
    right: list[tuple[str, bool]]  # names, and whether each is a word
    probability: float
    line: int


def _productions(line: str, source: str, number: int) -> list[_Production]:
    """The alternatives of one line, read as nltk does: the last number of an alternative is its probability.

    nltk takes an alternative without a number as one of probability 0, which would be dropped without a word.
    """
    place = f"{source}:{number}"
    left = NONTERMINAL.match(line)
    arrow = left and ARROW.match(line, left.end())
    if not left or not arrow:
        like = "a rule is like `S -> NP VP [0.6] | 'word' [0.4]`, with spaces around ->"
        raise InputError(f"{place}: {shown(line)} is no rule; {like}")
    right_sides: list[list[tuple[str, bool]]] = [[]]
    probabilities = [""]
    begins = [arrow.end()]
    position = arrow.end()
    while position < len(line):
        part = RIGHT_SIDE.match(line, position)
        if not part:
            expected = "there should be a symbol (letters, digits, _ / ^ < > -), a word in quotes, a number in brackets or |"
            raise InputError(f"{place}: can't read {shown(line[position:])}; {expected}")
        position = part.end()
        if part["bar"]:
            right_sides.append([])
            probabilities.append("")
            begins.append(position)
        elif part["probability"] is not None:
            probabilities[-1] = part["probability"]
        elif part["symbol"]:
            right_sides[-1].append((part["symbol"], False))
        else:
            right_sides[-1].append((part["word"][1:-1], True))
    for right, probability, begin in zip(right_sides, probabilities, begins, strict=True):
        if not right or ("", True) in right:
            raise InputError(f"{place}: a right side of {shown(line)} is empty; {EPSILON}")
        if not probability:
            rule = shown(f"{left[1]} -> {line[begin:].split('|')[0].strip()}")
            raise InputError(f"{place}: the rule {rule} has no probability; write it behind in brackets, such as [0.5]")
        if len(right) > MAX_RIGHT_SIDE:
            raise InputError(f"{place}: {len(right):,} symbols on the right of a rule; {MAX_RIGHT_SIDE} are the most")
        for name, is_word in right:
            if is_word and len(name.split()) != 1:
                raise InputError(f"{place}: the word {shown(name)}; a word has no spaces")
    numbers = parse_probabilities(probabilities, source, [number] * len(probabilities))
    return [_Production(left[1], right, value, number) for right, value in zip(right_sides, numbers, strict=True)]


def _binarised(productions: list[_Production], source: str) -> WeightedRules:
    """Rules of at most two symbols: those of the productions, then those, of probability 1, of the symbols they introduce.

    A word in a longer rule gets the symbol `word:...`, the symbols after the first get their names joined by `+`; neither
    `:` nor `+` can be in the name of a nonterminal in nltk's format.
    """
    rules: list[RuleLine] = []
    introduced: dict[str, RuleLine] = {}
    for left, right, probability, line in productions:
        if len(right) == 1:
            rules.append((left, right[0][0], None, probability, line))
            continue
        names = [f"word:{name}" if is_word else name for name, is_word in right]
        pairs = [(left, names[0], "+".join(names[1:]))]
        pairs += [("+".join(names[i:]), names[i], "+".join(names[i + 1 :])) for i in range(1, len(names) - 1)]
        rules.append((*pairs[0], probability, line))
        for pair in pairs[1:]:
            introduced.setdefault(pair[0], (*pair, 1.0, line))
        for name, (word, is_word) in zip(names, right, strict=True):
            if is_word:
                introduced.setdefault(name, (name, word, None, 1.0, line))
    rules += introduced.values()

    lefts = {left for left, *_ in rules}
    for production in productions:
        for name, is_word in production.right:
            if is_word and name in lefts:
                raise InputError(f"{source}:{production.line}: {shown(name)} is a word and a nonterminal; rename one of them")
            if not is_word and name not in lefts:
                raise InputError(f"{source}:{production.line}: {shown(name)} has no rule; a word would stand in quotes")
    collector = RuleCollector(source)
    if rules:
        collector.extend(*zip(*rules, strict=True))
    return collector.collected()


def write_rules(path: Path | str, rules: list[WeightedRule], header: list[str]) -> None:
    """Write a rules file with `header` as comment lines, atomically."""
    with atomic_open(path) as file:
        file.writelines(f"# {line}\n" for line in header)
        file.writelines(f"{left} {' '.join(right)} {probability:.9g}\n" for left, right, probability in rules)


def find_rules(name: Path | str) -> Path:
    """The rules file that `name` means: a path as it is; a bare name also in `pcfg/rules/`.

    Prints the file, with the entropy that the header of a shipped grammar states.
    """
    path = Path(name)
    if not path.is_file() and path.name == str(name) and (RULES_FOLDER / name).is_file():
        path = RULES_FOLDER / name
    if not path.is_file():
        shipped = ", ".join(sorted(file.name for file in RULES_FOLDER.glob("rule_*.txt")))
        raise InputError(f"{name}: no such grammar file; shipped are: {shipped}")
    if path.resolve().parent == RULES_FOLDER.resolve():
        entropy = re.search(r"^# entropy: (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        stated = f"entropy {entropy[1]}" if entropy else "its header states no entropy"
        print(f"{path.name}: shipped grammar, not the paper's; {stated}")
    else:
        print(f"{path}: grammar file of {path.stat().st_size:,} bytes")
    return path
