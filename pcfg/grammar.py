"""Probabilistic context-free grammars as index arrays: reading, checks, nltk in and out.

A rules file has a rule a line, `LHS RHS prob` or `LHS RHS1 RHS2 prob`. A right side of one symbol is a unary rule if the
symbol is a left side somewhere, else a word (terminal). The first left side is the start symbol. nltk's PCFG format (any
line with `->`) is read too.
"""

import hashlib
import math
import re
import typing
import warnings
from pathlib import Path

import numpy as np

from pcfg.artefacts import InputError
from pcfg.grammar_io import Rule, check_probability, parse_nltk, parse_rules
from pcfg.text import decoded

if typing.TYPE_CHECKING:
    import nltk

UNBOUNDED = 1 << 30
SUM_TOLERANCE = 1e-2
RULES_FOLDER = Path(__file__).parent / "rules"


class Grammar:
    """A grammar whose rules have been checked, merged and normalised. Make one with `read` or `from_rules`.

    Sizes: N nonterminals, V words, R binary and U unary rules (unary: nonterminal -> nonterminal).

    Attributes:
        names: N nonterminals by their first appearance as a left side; index 0 is the start symbol.
        words: V words, sorted.
        binary: (R, 3) int32, left side, left child, right child; sorted by (left child, right child, left side).
        binary_probability: (R,) float64.
        unary: (U, 2) int32, left side, child; without cycles; in the order of the file.
        unary_probability: (U,) float64.
        emission: (N, V) float64, P(A -> w).
        closure: (N, N) float64, closure[A, B] = sum over all unary chains from A to B, the empty one included, of their
            probability = (I - U)^-1.
        shortest, longest: (N,) int64, the least and the largest number of words that a nonterminal derives; `longest` is
            UNBOUNDED where it can come back to itself.
        sha256: hash of the merged, normalised and sorted rules: equal for files that mean the same grammar.
    """

    def __init__(self, rules: dict[tuple[str, tuple[str, ...]], float]):
        """Build the arrays from merged and normalised rules, checked by `from_rules` but for what the arrays tell."""
        self.names = list(dict.fromkeys(left for left, _ in rules))
        index = {name: number for number, name in enumerate(self.names)}
        self.words = sorted({right[0] for _, right in rules if len(right) == 1 and right[0] not in index})
        self._word_index = {word: number for number, word in enumerate(self.words)}

        binary, unary = [], []
        self.emission = np.zeros((len(self.names), len(self.words)))  # (N, V)
        for (left, right), probability in rules.items():
            if len(right) == 2:
                binary.append((index[right[0]], index[right[1]], index[left], probability))
            elif right[0] in index:
                unary.append((index[left], index[right[0]], probability))
            else:
                self.emission[index[left], self._word_index[right[0]]] = probability
        binary.sort()
        self.binary = np.array([(a, b, c) for b, c, a, _ in binary], dtype=np.int32).reshape(-1, 3)
        self.binary_probability = np.array([rule[-1] for rule in binary], dtype=np.float64)
        self.unary = np.array([rule[:2] for rule in unary], dtype=np.int32).reshape(-1, 2)
        self.unary_probability = np.array([rule[-1] for rule in unary], dtype=np.float64)

        lines = sorted(f"{left} {' '.join(right)} {probability!r}" for (left, right), probability in rules.items())
        self.sha256 = hashlib.sha256("\n".join([self.names[0], *lines]).encode()).hexdigest()

    @classmethod
    def read(cls, path) -> "Grammar":
        """The grammar in a file in the rules format, or in nltk's PCFG format if a line that is no comment has `->`.

        Raises:
            InputError: the file is missing, not UTF-8 or empty; or as `from_rules`, with file and line.
        """
        text, source = decoded(Path(path)), str(path)
        lines = (line for line in text.split("\n") if not line.lstrip().startswith("#"))
        parse = parse_nltk if any("->" in line for line in lines) else parse_rules
        return cls._from_parsed(parse(text, source), source)

    @classmethod
    def from_rules(cls, rules: list[tuple[str, tuple[str, ...], float]], source: str = "rules") -> "Grammar":
        """The grammar of a list of (left side, right side of one or two symbols, probability).

        Repeated rules add up; each left side is normalised to 1; rules of probability 0 are dropped.

        Args:
            source: how messages name the list; its first rule is line 1.

        Raises:
            InputError: no rules; a right side of other length; a probability that is not a number in [0, 1]; a binary rule
                with a word; a left side whose sum is off by more than 1e-2; a unary cycle; a nonterminal that derives
                no sentence.

        >>> grammar = Grammar.from_rules([("S", ("A", "A"), 1.0), ("A", ("a",), 0.5), ("A", ("b",), 0.5)])
        >>> grammar.names, grammar.words, grammar.emission[1].tolist(), int(grammar.longest[0])
        (['S', 'A'], ['a', 'b'], [0.5, 0.5], 2)
        """
        parsed = []
        for number, (left, right, probability) in enumerate(rules, 1):
            place = f"{source}:{number}"
            if len(right) not in (1, 2):
                raise InputError(f"{place}: {len(right)} symbols on the right of {left!r}; a rule has one or two")
            check_probability(probability, place)
            parsed.append(Rule(left, tuple(right), probability, place))
        return cls._from_parsed(parsed, source)

    @classmethod
    def _from_parsed(cls, rules: list[Rule], source: str) -> "Grammar":
        if not rules:
            raise InputError(f"{source}:1: no rules; the file is empty")
        first_place: dict[str, str] = {}
        for rule in rules:
            first_place.setdefault(rule.left, rule.place)
        for rule in rules:
            for symbol in rule.right if len(rule.right) == 2 else ():
                if symbol not in first_place:
                    raise InputError(
                        f"{rule.place}: {symbol!r} in a binary rule is a word (it is no left side); "
                        "give the word a nonterminal of its own"
                    )
        grammar = cls(_merged(rules, first_place))
        edges = grammar._children()
        grammar._refuse_unary_cycles(rules)
        grammar.closure = grammar._unary_closure()
        grammar.shortest = grammar._shortest(first_place)
        grammar.longest = grammar._longest(edges)
        unreachable = [name for name, found in zip(grammar.names, reachability(edges)[0], strict=True) if not found]
        if unreachable:
            warnings.warn(
                f"{first_place[unreachable[0]]}: {len(unreachable)} nonterminals can't be reached from the start symbol "
                f"{grammar.names[0]!r} and have no effect: {', '.join(unreachable[:10])}",
                stacklevel=3,
            )
        return grammar

    def _children(self) -> np.ndarray:
        """(N, N) bool: whether a rule of A has B on its right side."""
        edges = np.zeros((len(self.names), len(self.names)), dtype=bool)
        edges[self.binary[:, 0], self.binary[:, 1]] = True
        edges[self.binary[:, 0], self.binary[:, 2]] = True
        edges[self.unary[:, 0], self.unary[:, 1]] = True
        return edges

    def _unary_matrix(self) -> np.ndarray:
        matrix = np.zeros((len(self.names), len(self.names)))
        matrix[self.unary[:, 0], self.unary[:, 1]] = self.unary_probability
        return matrix

    def _refuse_unary_cycles(self, rules: list[Rule]) -> None:
        reach = reachability(self._unary_matrix() > 0)
        index = {name: number for number, name in enumerate(self.names)}
        for rule in rules:
            left, child = index[rule.left], index.get(rule.right[0])
            if len(rule.right) == 1 and child is not None and rule.probability > 0 and reach[child, left]:
                others = [name for number, name in enumerate(self.names) if reach[child, number] and reach[number, left]]
                raise InputError(
                    f"{rule.place}: the unary rule {rule.left} -> {rule.right[0]} is part of a cycle "
                    f"({', '.join(others)}); remove one of its rules"
                )

    def _unary_closure(self) -> np.ndarray:
        """I + U + U^2 + ...; the sum ends, as U has no cycles, and it is exactly 0 where there is no chain."""
        unary, power = self._unary_matrix(), np.eye(len(self.names))
        closure = power.copy()
        while power.any():
            power = power @ unary
            closure += power
        return closure

    def _shortest(self, first_place: dict[str, str]) -> np.ndarray:
        """Fixed point of shortest[A] = min over rules of A of the sum of its right side."""
        shortest = np.where(self.emission.any(axis=1), 1, UNBOUNDED).astype(np.int64)
        while True:
            before = shortest.copy()
            np.minimum.at(shortest, self.binary[:, 0], shortest[self.binary[:, 1]] + shortest[self.binary[:, 2]])
            np.minimum.at(shortest, self.unary[:, 0], shortest[self.unary[:, 1]])
            if np.array_equal(before, shortest):
                break
        for name, length in zip(self.names, shortest, strict=True):
            if length >= UNBOUNDED:
                raise InputError(
                    f"{first_place[name]}: the nonterminal {name!r} derives no sentence (each of its rules leads back "
                    "to it); give it a rule that ends in words"
                )
        return shortest

    def _longest(self, edges: np.ndarray) -> np.ndarray:
        """Longest yields; unbounded for what reaches a cycle, since a cycle (never all unary) adds words."""
        reach = reachability(edges)
        recursive = (edges & reach.T).any(axis=1)
        unbounded = reach[:, recursive].any(axis=1)
        longest = np.where(unbounded, UNBOUNDED, self.emission.any(axis=1)).astype(np.int64)
        while True:
            before = longest.copy()
            np.maximum.at(longest, self.binary[:, 0], longest[self.binary[:, 1]] + longest[self.binary[:, 2]])
            np.maximum.at(longest, self.unary[:, 0], longest[self.unary[:, 1]])
            longest = np.minimum(longest, UNBOUNDED)
            if np.array_equal(before, longest):
                return longest

    def to_nltk(self) -> "nltk.PCFG":
        """The same grammar as an `nltk.PCFG`."""
        # nltk takes a second to import, which scripts that don't need it should not pay.
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
            texts: n sentences, words separated by spaces.
            source: the file that they are from, for messages.

        Returns:
            tokens (n, T) int32, indices into `words`, -1 beyond the end of a sentence; T is the longest length.
            lengths (n,) int32, words.

        Raises:
            InputError: an empty sentence or a word that the grammar does not have, with the sentence's number from 1.

        >>> grammar = Grammar.from_rules([("S", ("S", "S"), 0.3), ("S", ("a",), 0.3), ("S", ("b",), 0.4)])
        >>> grammar.encode(["b a", "a"], "text")[0].tolist()
        [[1, 0], [0, -1]]
        """
        get = self._word_index.get
        rows = [[get(word, -1) for word in text.split()] for text in texts]
        lengths = np.fromiter(map(len, rows), dtype=np.int32, count=len(rows))  # (n,)
        flat = np.fromiter((word for row in rows for word in row), dtype=np.int32, count=int(lengths.sum()))
        sentences = np.repeat(np.arange(len(rows)), lengths)
        if (flat < 0).any():
            sentence = sentences[np.argmax(flat < 0)]
            word = texts[sentence].split()[rows[sentence].index(-1)]
            raise InputError(
                f"{source}: sentence {sentence + 1}: the word {word!r} is not in the grammar; "
                "use the grammar that the text was made from"
            )
        if (lengths == 0).any():
            raise InputError(f"{source}: sentence {np.argmin(lengths) + 1} has no words; remove it")
        tokens = np.full((len(rows), int(lengths.max(initial=0))), -1, dtype=np.int32)  # (n, T)
        tokens[np.arange(tokens.shape[1]) < lengths[:, None]] = flat
        return tokens, lengths


def _merged(rules: list[Rule], first_place: dict[str, str]) -> dict[tuple[str, tuple[str, ...]], float]:
    """Rules with repetitions added up, zeros dropped and left sides normalised. fsum: the order does not matter."""
    parts: dict[tuple[str, tuple[str, ...]], list[float]] = {}
    by_left: dict[str, list[float]] = {}
    for rule in rules:
        parts.setdefault((rule.left, rule.right), []).append(rule.probability)
        by_left.setdefault(rule.left, []).append(rule.probability)
    sums = {left: math.fsum(probabilities) for left, probabilities in by_left.items()}
    for left, total in sums.items():
        if abs(total - 1.0) > SUM_TOLERANCE:
            raise InputError(
                f"{first_place[left]}: the probabilities of {left!r} add up to {total:.6g}; they must add up to 1 (within 0.01)"
            )
    merged = {key: math.fsum(probabilities) / sums[key[0]] for key, probabilities in parts.items()}
    return {key: probability for key, probability in merged.items() if probability > 0.0}


def reachability(edges: np.ndarray) -> np.ndarray:
    """The reflexive and transitive closure of a relation, both (N, N) bool.

    >>> reachability(np.array([[0, 1, 0], [0, 0, 1], [0, 0, 0]], dtype=bool)).astype(int).tolist()
    [[1, 1, 1], [0, 1, 1], [0, 0, 1]]
    """
    reach = edges | np.eye(len(edges), dtype=bool)
    while True:
        # float32, because numpy multiplies integer and boolean matrices without BLAS.
        further = reach.astype(np.float32) @ reach.astype(np.float32) > 0
        if np.array_equal(further, reach):
            return reach
        reach = further


def find_rules(name) -> Path:
    """The rules file that `name` means: a path as it is; a bare name also in `pcfg/rules/`. Prints what was taken.

    A shipped grammar is announced as such, with the entropy that its header states.

    Raises:
        InputError: there is no such file; the message lists the shipped ones.
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
