"""Grammar files as text: the rules format, read and written, and nltk's PCFG format, parsed into rules with their places."""

import contextlib
import dataclasses
import itertools
import re
from array import array
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pcfg.common.files import InputError, atomic_open
from pcfg.common.text import shown

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


# Left side, right side of one or two symbols, probability.
WeightedRule = tuple[str, tuple[str, ...], float]


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

    def extend(
        self,
        left: Sequence[str],
        first: Sequence[str],
        second: Sequence[str | None],
        probability: Sequence[float],
        line: Sequence[int],
    ) -> None:
        """Add rules by columns; `second` is None where the right side has one symbol."""
        sides: tuple[Sequence[str | None], ...] = (left, first, second)
        for column, symbols in zip(self._columns, sides, strict=True):
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


def parse_probabilities(texts: list[str], source: str, lines: list[int]) -> list[float]:
    """The numbers in `texts`, of `lines`; Python's underscores and digits of other scripts are no numbers here."""
    together = "".join(texts)
    if together.isascii() and "_" not in together:
        # The usual case, at the speed of `map`; the loop below finds the error.
        with contextlib.suppress(ValueError):
            return list(map(float, texts))
    for text, line in zip(texts, lines, strict=True):
        if "_" in text or not text.isascii() or not _is_float(text):
            raise InputError(f"{source}:{line}: probability {shown(text)} is not a number")
    raise AssertionError("all are numbers")


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def parse_grammar(text: str, source: str) -> WeightedRules:
    """The rules of a text in nltk's PCFG format if a line that is no comment has `->`, else in the rules format."""
    control = CONTROL_CHARACTER.search(text)
    if control:
        line = text.count("\n", 0, control.start()) + 1
        raise InputError(f"{source}:{line}: the control character {control[0]!r}; a grammar is plain text in UTF-8")
    lines = text.split("\n")
    if "->" in text and any("->" in line for line in lines if not line.lstrip().startswith("#")):
        return parse_nltk(lines, source)
    return parse_rules(lines, source)


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
            raise InputError(
                f"{source}:{number}: {len(line):,} fields in {shown(lines[number - 1].strip())}; "
                "a rule is `LHS RHS prob` or `LHS RHS1 RHS2 prob`"
            )
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
    if start is not None:
        productions.sort(key=lambda production: production.left != start)
    return _binarised(productions, source)


class _Production(NamedTuple):
    """One alternative of a line in nltk's format; a symbol on the right is (name, whether it is a word)."""

    left: str
    right: list[tuple[str, bool]]
    probability: float
    line: int


def _productions(line: str, source: str, number: int) -> list[_Production]:
    """The alternatives of one line, read as nltk does: the last number of an alternative is its probability, 0 without."""
    left = NONTERMINAL.match(line)
    arrow = left and ARROW.match(line, left.end())
    if not left or not arrow:
        raise InputError(f"{source}:{number}: {shown(line)} is no rule; a rule is like `S -> NP VP [0.6] | 'word' [0.4]`")
    right_sides: list[list[tuple[str, bool]]] = [[]]
    probabilities = ["0"]
    position = arrow.end()
    while position < len(line):
        part = RIGHT_SIDE.match(line, position)
        if not part:
            raise InputError(
                f"{source}:{number}: can't read {shown(line[position:])}; there should be a symbol, a word in quotes, "
                "a number in brackets or |"
            )
        position = part.end()
        if part["bar"]:
            right_sides.append([])
            probabilities.append("0")
        elif part["probability"] is not None:
            probabilities[-1] = part["probability"]
        elif part["symbol"]:
            right_sides[-1].append((part["symbol"], False))
        else:
            right_sides[-1].append((part["word"][1:-1], True))
    numbers = parse_probabilities(probabilities, source, [number] * len(probabilities))
    productions = [_Production(left[1], right, value, number) for right, value in zip(right_sides, numbers, strict=True)]
    for right in right_sides:
        if not right:
            raise InputError(f"{source}:{number}: a right side of {shown(line)} is empty, which is not supported")
        if len(right) > MAX_RIGHT_SIDE:
            raise InputError(f"{source}:{number}: {len(right):,} symbols on the right of a rule; {MAX_RIGHT_SIDE} are the most")
        for name, is_word in right:
            if is_word and len(name.split()) != 1:
                raise InputError(f"{source}:{number}: the word {shown(name)}; a word has no spaces and is not empty")
    return productions


def _binarised(productions: list[_Production], source: str) -> WeightedRules:
    """Rules of at most two symbols: those of the productions, then those, of probability 1, of the symbols they introduce.

    A word in a longer rule gets the symbol `word:...`, the symbols after the first get their names joined by `+`; neither
    `:` nor `+` can be in the name of a nonterminal in nltk's format.
    """
    rules: list[tuple[str, str, str | None, float, int]] = []
    introduced: dict[str, tuple[str, str, str | None, float, int]] = {}
    for production in productions:
        left = production.left
        probability = production.probability
        line = production.line
        if len(production.right) == 1:
            rules.append((left, production.right[0][0], None, probability, line))
            continue
        names = [f"word:{name}" if is_word else name for name, is_word in production.right]
        pairs = [(left, names[0], "+".join(names[1:]))]
        pairs += [("+".join(names[i:]), names[i], "+".join(names[i + 1 :])) for i in range(1, len(names) - 1)]
        rules.append((*pairs[0], probability, line))
        for pair in pairs[1:]:
            introduced.setdefault(pair[0], (*pair, 1.0, line))
        for name, (word, is_word) in zip(names, production.right, strict=True):
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
        lefts_column, firsts, seconds, probabilities, numbers = map(list, zip(*rules, strict=True))
        collector.extend(lefts_column, firsts, seconds, probabilities, numbers)
    return collector.collected()


def as_written(rules: list[WeightedRule]) -> list[WeightedRule]:
    """The rules with the probabilities that `write_rules` writes.

    Nine digits: more would depend on how the machine's logarithm rounds.
    """
    return [(left, right, float(f"{probability:.9g}")) for left, right, probability in rules]


def write_rules(path: Path | str, rules: list[WeightedRule], header: list[str]) -> None:
    """Write a rules file with `header` as comment lines, atomically."""
    with atomic_open(path) as file:
        file.writelines(f"# {line}\n" for line in header)
        file.writelines(f"{left} {' '.join(right)} {probability:.9g}\n" for left, right, probability in rules)
