"""Probabilistic context-free grammars as index arrays: reading, checks, nltk in and out.

A rules file has one rule per line, `LHS RHS prob` or `LHS RHS1 RHS2 prob`. A right side of one symbol is a unary rule if the
symbol is a left side somewhere, else a word (terminal). The first left side is the start symbol. nltk's PCFG format (any
line with `->`) is read too.
"""

import functools
import hashlib
import math
import re
import typing
import warnings
from pathlib import Path

import numpy as np

from pcfg.common.files import InputError
from pcfg.common.text import decoded, shown
from pcfg.common.words import WordIndex, padded
from pcfg.engine.rule_graph import longest_yields, reachable, shortest_yields, strong_components
from pcfg.grammar_io import RuleCollector, WeightedRules, parse_grammar

if typing.TYPE_CHECKING:
    import nltk

SUM_TOLERANCE = 1e-2
# Nonterminals times words: 1.6 GB of emissions.
MAX_EMISSIONS = 200_000_000
RULES_FOLDER = Path(__file__).parent / "rules"


class Grammar:
    """A grammar of checked, merged and normalised rules. Make one with `read` or `from_rules`.

    Sizes: N nonterminals, V words, R binary and U unary rules (unary: nonterminal -> nonterminal).

    Attributes:
        names: N nonterminals by their first appearance as a left side; index 0 is the start symbol.
        words: V words, sorted.
        binary: (R, 3) int32, left side, left child, right child; sorted by (left child, right child, left side).
        binary_probability: (R,) float64.
        unary: (U, 2) int32, left side, child; without cycles; in the order of the file.
        unary_probability: (U,) float64.
        unary_order: (U,) int64, the unary rules in an order in which all rules with the left side B come before A -> B.
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
        _refuse_words_in_binary_rules(rules, sides)

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

        component = strong_components(len(symbols), *self.unary.T.astype(np.int64))
        for rule in np.flatnonzero(component[self.unary[:, 0]] == component[self.unary[:, 1]])[:1]:
            left, child = self.unary[rule]
            place = rules.place(origin[is_unary][rule])
            raise InputError(
                f"{place}: the unary rule {shown(self.names[left])} -> {shown(self.names[child])} "
                f"is part of a cycle ({self.listed(component == component[left])}); remove one of its rules"
            )
        self.unary_order = np.argsort(component[self.unary[:, 0]], kind="stable")
        self._set_yields(rules, first_rule, np.bincount(sides[emits, 0], minlength=len(symbols)) > 0)

    def _set_emission(self, rules: WeightedRules, left: np.ndarray, symbol: np.ndarray, probability: np.ndarray) -> None:
        used = np.unique(symbol)
        self.words = sorted(rules.symbols[number] for number in used)
        word_index = {word: number for number, word in enumerate(self.words)}
        if len(self.names) * len(self.words) > MAX_EMISSIONS:
            raise InputError(
                f"{rules.source}: {len(self.names):,} nonterminals times {len(self.words):,} words are more than "
                f"{MAX_EMISSIONS:,}, the maximum; use fewer of them"
            )
        word = np.empty(len(rules.symbols), dtype=np.int64)
        word[used] = [word_index[rules.symbols[number]] for number in used]
        self.emission = np.zeros((len(self.names), len(self.words)))  # (N, V)
        self.emission[left, word[symbol]] = probability

    def _set_yields(self, rules: WeightedRules, first_rule: np.ndarray, emits: np.ndarray) -> None:
        """Set `shortest` and `longest`; refuse nonterminals that derive no sentence, and warn of unreachable ones."""
        left, first, second = np.concatenate([np.insert(self.unary, 2, -1, axis=1), self.binary]).T.astype(np.int64)
        self.shortest = shortest_yields(left, first, second, emits)
        for symbol in np.flatnonzero(self.shortest < 0)[:1]:
            raise InputError(
                f"{rules.place(first_rule[symbol])}: the nonterminal {shown(self.names[symbol])} derives no sentence (each of "
                "its rules leads back to it); give it a rule that ends in words"
            )
        parent = np.append(left, left[second >= 0])
        child = np.append(first, second[second >= 0])
        component = strong_components(len(self.names), parent, child)
        self.longest = longest_yields(left, first, second, emits, component)
        unused = ~reachable(component, parent, child, 0)
        if unused.any():
            warnings.warn(
                f"{rules.place(first_rule[np.argmax(unused)])}: {unused.sum()} nonterminals can't be reached from the "
                f"start symbol {shown(self.names[0])} and have no effect: {self.listed(unused)}",
                stacklevel=4,
            )

    @classmethod
    def read(cls, path: Path | str) -> "Grammar":
        """The grammar in a file in the rules format, or in nltk's PCFG format if a line that is no comment has `->`."""
        return cls(parse_grammar(decoded(Path(path)), str(path)))

    @classmethod
    def from_rules(cls, rules: list[tuple[str, tuple[str, ...], float]], source: str = "rules") -> "Grammar":
        """The grammar of a list of (left side, right side of one or two symbols, probability).

        Repeated rules add up; each left side is normalised to 1; rules of probability 0 are dropped.

        A right side has one or two symbols, and a binary rule has no word. The probabilities are in [0, 1] and sum to 1 per
        left side, within 0.01. Unary rules form no cycle, and every nonterminal derives a sentence.

        Args:
            source: how messages name the list; its first rule is line 1.

        >>> grammar = Grammar.from_rules([("S", ("A", "A"), 1.0), ("A", ("a",), 0.5), ("A", ("b",), 0.5)])
        >>> grammar.names, grammar.words, grammar.emission[1].tolist(), int(grammar.longest[0])
        (['S', 'A'], ['a', 'b'], [0.5, 0.5], 2)
        """
        for number, (left, right, _) in enumerate(rules, 1):
            if len(right) not in (1, 2):
                place = f"{source}:{number}"
                raise InputError(f"{place}: {len(right)} symbols on the right of {shown(left)}; a rule has one or two")
        collector = RuleCollector(source)
        collector.extend(
            [left for left, _, _ in rules],
            [right[0] for _, right, _ in rules],
            [right[1] if len(right) == 2 else None for _, right, _ in rules],
            [probability for _, _, probability in rules],
            list(range(1, len(rules) + 1)),
        )
        return cls(collector.collected())

    @functools.cached_property
    def sha256(self) -> str:
        names = self.names
        lines = [
            f"{names[a]} {names[b]} {names[c]} {probability!r}"
            for (a, b, c), probability in zip(self.binary.tolist(), self.binary_probability.tolist(), strict=True)
        ]
        lines += [
            f"{names[a]} {names[b]} {probability!r}"
            for (a, b), probability in zip(self.unary.tolist(), self.unary_probability.tolist(), strict=True)
        ]
        for name, row in zip(names, self.emission, strict=True):
            emitted = np.flatnonzero(row)
            lines += [
                f"{name} {self.words[word]} {probability!r}"
                for word, probability in zip(emitted.tolist(), row[emitted].tolist(), strict=True)
            ]
        return hashlib.sha256("\n".join([names[0], *sorted(lines)]).encode()).hexdigest()

    def listed(self, mask: np.ndarray) -> str:
        """The first ten of some nonterminals, `mask` (N,) bool, for a message."""
        names = [self.names[symbol] for symbol in np.flatnonzero(mask)]
        listed = ", ".join(name if len(name) <= 60 else shown(name) for name in names[:10])
        return listed if len(names) <= 10 else f"{listed} and {len(names) - 10:,} more"

    def to_nltk(self) -> "nltk.PCFG":
        """The same grammar as an `nltk.PCFG`."""
        # nltk takes a second to import, which only its users should pay.
        from nltk.grammar import PCFG, Nonterminal, ProbabilisticProduction

        symbols = [Nonterminal(name) for name in self.names]
        right_sides: list[list] = [[] for _ in self.names]
        for (left, child), probability in zip(self.unary, self.unary_probability, strict=True):
            right_sides[left].append(((symbols[child],), probability))
        for (left, *children), probability in zip(self.binary, self.binary_probability, strict=True):
            right_sides[left].append((tuple(symbols[child] for child in children), probability))
        for left, word in np.argwhere(self.emission > 0):
            right_sides[left].append(((self.words[word],), self.emission[left, word]))
        productions = [
            ProbabilisticProduction(symbols[left], right, prob=float(probability))
            for left, sides in enumerate(right_sides)
            for right, probability in sides
        ]
        return PCFG(symbols[0], productions)

    def encode(self, texts: list[str], source: str) -> tuple[np.ndarray, np.ndarray]:
        """Word indices of sentences.

        Args:
            texts: n sentences, words separated by spaces; an empty one or an unknown word is refused.
            source: their file, for messages.

        Returns:
            tokens (n, T) int32, indices into `words`, -1 beyond the end of a sentence; T is the longest length.
            lengths (n,) int32, words.

        >>> grammar = Grammar.from_rules([("S", ("S", "S"), 0.3), ("S", ("a",), 0.3), ("S", ("b",), 0.4)])
        >>> grammar.encode(["b a", "a"], "text")[0].tolist()
        [[1, 0], [0, -1]]
        """
        flat, lengths = WordIndex(self.words).encode_texts(texts, source)
        return padded(flat, lengths, -1), lengths


def _refuse_words_in_binary_rules(rules: WeightedRules, sides: np.ndarray) -> None:
    """`sides`, (R, 3): the nonterminals of the rules, -1 for a word or no symbol."""
    for rule in np.flatnonzero((rules.second >= 0) & (sides < 0).any(axis=1))[:1]:
        word = rules.symbols[(rules.first if sides[rule, 1] < 0 else rules.second)[rule]]
        raise InputError(
            f"{rules.place(rule)}: {shown(word)} in a binary rule is a word (it is no left side); "
            "give the word a nonterminal of its own"
        )


def _merged(rules: WeightedRules, left: np.ndarray, first_rule: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rules with repetitions added up, zeros dropped and left sides normalised. fsum: the order does not matter.

    Args:
        left: (R,), the number of each rule's left side.
        first_rule: (N,), the first rule of each left side.

    Returns:
        origin (K,) ascending, the first of the rules behind each merged rule; probability (K,) float64.
    """
    order = np.lexsort((rules.second, rules.first, left))
    keys = np.column_stack([left, rules.first, rules.second])[order]
    probability = rules.probability[order]
    starts = np.searchsorted(keys[:, 0], np.arange(len(first_rule) + 1))
    values = probability.tolist()
    sums = np.array([math.fsum(values[start:end]) for start, end in zip(starts[:-1], starts[1:], strict=True)])  # (N,)
    for symbol in np.flatnonzero(np.abs(sums - 1.0) > SUM_TOLERANCE)[:1]:
        name = shown(rules.symbols[rules.left[first_rule[symbol]]])
        raise InputError(
            f"{rules.place(first_rule[symbol])}: the probabilities of {name} add up to {sums[symbol]:.6g}; "
            "they must add up to 1 (within 0.01)"
        )
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
