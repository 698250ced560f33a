"""Damaged grammar files: each loads, and then means what a naive reader makes of it, or is refused in one clear line."""

import codecs
import math
import re

import numpy as np
import pytest
from nltk.grammar import read_grammar, standard_nonterm_parser

from pcfg.common.files import InputError
from pcfg.engine.rule_graph import UNBOUNDED
from pcfg.grammar import RULES_FOLDER, Grammar
from pcfg.hmm import hmm_rules

LAYERED = """# a comment
S S1 0.4
S S2 0.6

S1 A B 1.0
S2 B A 0.75
S2 A A 0.25
A C C 0.5
A dog 0.5
B C A 0.25
B C C 0.5
B dog 0.25
C dog 0.1
C cat 0.9
"""
RECURSIVE = """S S S 0.3
S T 0.3
S a 0.4
T U 0.5
T S U 0.25
T b 0.25
U a 0.125
U b 0.875
"""
NLTK = """# nltk's format
%start S
S -> NP VP [0.75] | NP VP PP 'now' [0.25]
NP -> 'Ann' [0.5] | Det N [0.25] | NP PP [0.25]
VP -> V NP [0.5] | V [0.5]
V -> 'sees' [0.5] | \\
     "hears" [0.5]
PP -> P NP [1.0]
P -> 'with' [1.0]
Det -> 'the' [1.0]
N -> 'cat' [.5] | 'owl' [.5]
"""
NUMBERS = (
    "nan inf -inf 1e400 1e-400 1e-320 0x1p-1 1_0 0.5_0 -0.5 -0.0 1e308 +.5 5 1. 0.5e0 .25 half ½ ٠.٥ 1,0 [0.5] 1e 0 1".split()
)
PIECES = [
    "\0",
    "\x07",
    "\u00a0",
    "\u2028",
    "\ufeff",
    "\r\n",
    "\r",
    "\t",
    "->",
    " -> ",
    "|",
    "[",
    "]",
    "'",
    '"',
    "#",
    "%start ",
    "\\",
    "@",
]
NON_TEXT = [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xff\xfe", codecs.BOM_UTF8]


class Refused(Exception):
    """The naive reader finds fault with the file."""


class Extension(Exception):
    """We read more than nltk here: numbers that are not digits and points alone."""


def naive_rules(text):
    """[(left, right as (symbol, is word), probability)] and the start symbol, from a text in the rules format."""
    rows = []
    for line in text.split("\n"):
        if not line.strip() or line.strip()[0] == "#":
            continue
        fields = line.split()
        if len(fields) not in (3, 4) or not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", fields[-1]):
            raise Refused
        rows.append((fields[0], fields[1:-1], float(fields[-1])))
    lefts = {left for left, _, _ in rows}
    rules = [(left, tuple((symbol, symbol not in lefts) for symbol in right), p) for left, right, p in rows]
    if any(len(right) == 2 and is_word for _, right, _ in rules for _, is_word in right):
        raise Refused
    return rules, rows[0][0] if rows else None


def naive_nltk(text):
    """The same from a text in nltk's format, read by nltk itself, which forgets a last line that is to go on."""
    lines = [line.strip() for line in text.split("\n")]
    written = [line for line in lines if line and not line.startswith("#")]
    if written and written[-1].endswith("\\"):
        raise Refused
    quoted = r"\"[^\"]*\"|'[^']*'"
    for line in re.sub(r"\\\n", " ", "\n".join(written)).split("\n"):
        if not line.startswith("%") and not all("[" in right for right in re.sub(quoted, "", line).split("|")):
            raise Refused
    outside_quotes = re.sub(quoted, "", " ".join(written))
    if re.search(r"\[(?![0-9.]+\])", outside_quotes):
        raise Extension
    try:
        start, productions = read_grammar(lines, standard_nonterm_parser, probabilistic=True)
    except ValueError:
        raise Refused from None
    rules = []
    for production in productions:
        right = tuple((str(symbol), isinstance(symbol, str)) for symbol in production.rhs())
        rules.append((production.lhs().symbol(), right, production.prob()))
    lefts = {left for left, _, _ in rules}
    for _, right, _ in rules:
        if not 1 <= len(right) <= 64:
            raise Refused
        for symbol, is_word in right:
            if is_word == (symbol in lefts) or (is_word and len(symbol.split()) != 1):
                raise Refused
    return rules, start.symbol()


def naive_grammar(content):
    """{(left, right): probability} and the start symbol of a file, by the letter of the format."""
    try:
        text = content.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError:
        raise Refused from None
    if any((ord(c) < 32 and not c.isspace()) or c == "\x7f" for c in text):
        raise Refused
    in_nltk = any("->" in line for line in text.split("\n") if not line.strip().startswith("#"))
    rules, start = naive_nltk(text) if in_nltk else naive_rules(text)
    lefts = {left for left, _, _ in rules}
    if start not in lefts or not all(0 <= p <= 1 + 1e-9 for _, _, p in rules):
        raise Refused
    totals = {left: math.fsum(p for other, _, p in rules if other == left) for left in lefts}
    if any(abs(total - 1) > 0.01 for total in totals.values()):
        raise Refused
    merged = {}
    for left, right, p in rules:
        if p > 0:
            merged[left, right] = merged.get((left, right), 0.0) + p / totals[left]
    derives = set()
    while more := {left for left, right in merged if all(word or symbol in derives for symbol, word in right)} - derives:
        derives |= more
    if lefts - derives:
        raise Refused
    place = {left: number for number, left in enumerate(lefts)}
    unary = np.zeros((len(lefts), len(lefts)))
    for (left, right), p in merged.items():
        if len(right) == 1 and not right[0][1]:
            unary[place[left], place[right[0][0]]] = p
    # Powers of a matrix of spectral radius 1 never vanish, those of a radius of 1 - 1e-11 have by then.
    if np.linalg.matrix_power(unary, 2**40).max() > 1e-3:
        raise Refused
    return merged, start


def meaning(grammar, in_nltk):
    """The rules of a grammar as the naive reader gives them; the symbols of binarised nltk rules replaced by what they are."""
    rules = {}
    for (left, *right), p in zip(grammar.binary.tolist(), grammar.binary_probability.tolist(), strict=True):
        rules[grammar.names[left], tuple((grammar.names[child], False) for child in right)] = p
    for (left, child), p in zip(grammar.unary.tolist(), grammar.unary_probability.tolist(), strict=True):
        rules[grammar.names[left], ((grammar.names[child], False),)] = p
    for left, word in np.argwhere(grammar.emission).tolist():
        rules[grammar.names[left], ((grammar.words[word], True),)] = float(grammar.emission[left, word])
    totals = {}
    for (left, _), p in rules.items():
        totals[left] = totals.get(left, 0.0) + p
    assert totals.keys() == set(grammar.names) and all(abs(total - 1) < 1e-9 for total in totals.values())
    if not in_nltk:
        return rules

    def written(symbol, is_word):
        if is_word or not ("+" in symbol or symbol.startswith("word:")):
            return ((symbol, is_word),)
        (right,) = (right for left, right in rules if left == symbol)
        return tuple(part for child in right for part in written(*child))

    expanded = {}
    for (left, right), p in rules.items():
        if "+" not in left and not left.startswith("word:"):
            expanded[left, tuple(part for symbol in right for part in written(*symbol))] = p
    return expanded


def check(path, content):
    """Compare our reader with the naive one; whether the file was accepted. Anything but an `InputError` fails the test."""
    path.write_bytes(content)
    try:
        expected = naive_grammar(content)
    except (Refused, Extension) as error:
        expected = error
    try:
        grammar = Grammar.read(path)
    except InputError as error:
        assert not isinstance(expected, tuple), error
        assert str(error).startswith(str(path)) and "\n" not in str(error) and len(str(error)) < len(str(path)) + 500
        return False
    assert not isinstance(expected, Refused)
    if not isinstance(expected, Extension):
        found = meaning(grammar, b"->" in content)
        assert grammar.names[0] == expected[1] and found.keys() == expected[0].keys()
        for rule, probability in found.items():
            assert probability == pytest.approx(expected[0][rule], rel=1e-12)
    return True


def mutated(text, rng):
    """One more damage to a text; bytes, once it is no text any more."""
    if isinstance(text, bytes):
        return text
    lines = text.split("\n")
    row, place, kind = int(rng.integers(len(lines))), int(rng.integers(len(text) + 1)), int(rng.integers(15))
    fields = re.split(r"(\s+)", lines[row])
    field = 2 * int(rng.integers((len(fields) + 1) // 2))
    others = [symbol for line in lines for symbol in line.split()] or ["x"]
    if kind == 0:
        return text[:place]
    if kind == 1:
        rng.shuffle(lines)
    elif kind == 2:
        fields[::2] = rng.permutation(fields[::2]).tolist()
        lines[row] = "".join(fields)
    elif kind in (3, 4):
        # 3: the number of a line, 4: any field
        number = str(rng.choice(NUMBERS))
        fields[-1 if kind == 3 else field] = f"[{number}]" if "[" in lines[row] and rng.random() < 0.8 else number
        lines[row] = "".join(fields)
    elif kind in (5, 6):
        fields[field] = str(rng.choice(others))
        lines[row] = "".join(fields)
    elif kind == 7:
        lines[row : row + 1] = [lines[row]] * int(rng.integers(0, 4))
    elif kind == 8:
        lines.insert(row, lines.pop(int(rng.integers(len(lines)))))
    elif kind == 9:
        piece = str(rng.choice(PIECES))
        return text[:place] + piece + text[place:]
    elif kind == 10:
        return text[:place].encode() + NON_TEXT[rng.integers(len(NON_TEXT))] + text[place:].encode()
    elif kind == 11:
        return text[:place] + chr(int(rng.integers(32, 127))) + text[place + 1 :]
    elif kind == 12:
        # a symbol of the file at the end of a new chain of unary rules
        length = int(rng.integers(1, 60))
        names = [*(f"Z{link}" for link in range(length)), str(rng.choice(others))]
        chain = [f"{a} -> {b} [1.0]" if "->" in text else f"{a} {b} 1.0" for a, b in zip(names, names[1:], strict=False)]
        lines[row:row] = chain if rng.random() < 0.5 else chain[::-1]
    elif kind == 13:
        # a rule too many, so rare that its left side's sum stays within the tolerance
        fields[field] = str(rng.choice(others))
        number = str(rng.choice(["0.001", "0.005", "0.000", "0.00000001"]))
        fields[-1] = f"[{number}]" if "[" in lines[row] else number
        lines.insert(row + 1, "".join(fields))
    else:
        # a rule in two: its sum stays
        value = fields[-1].strip("[]")
        if re.fullmatch(r"[0-9]*\.[0-9]+", value):
            half = fields[-1].replace(value, f"{float(value) / 2:f}")
            lines[row : row + 1] = ["".join([*fields[:-1], half])] * 2
    return "\n".join(lines)


@pytest.mark.filterwarnings("ignore:.*can't be reached")
@pytest.mark.parametrize("part", range(4))
def test_two_thousand_damaged_files_are_read_rightly_or_refused(tmp_path, part):
    rng = np.random.default_rng(part)
    uniform = np.full((2, 2), 0.5)
    models = [hmm_rules([0.5, 0.5], uniform, uniform, **law) for law in ({"end": 0.25}, {"length": [0.25, 0.25, 0.5]})]
    texts = [LAYERED, RECURSIVE, NLTK, (RULES_FOLDER / "rule_mini_mlm.txt").read_text()]
    texts += ["\n".join(f"{left} {' '.join(right)} {p}" for left, right, p in rules) for rules in models]
    accepted = 0
    for number in range(500):
        text = texts[number % len(texts)]
        for _ in range(rng.integers(1, 4)):
            text = mutated(text, rng)
        accepted += check(tmp_path / "rules.txt", text if isinstance(text, bytes) else text.encode())
    # both outcomes are common
    assert 100 < accepted < 400


def chain(length, step="{} {} 1.0\n", last="a"):
    names = [*(f"A{link}" for link in range(length)), last]
    return "".join(step.format(a, b) for a, b in zip(names, names[1:], strict=False))


MEGABYTES = 10_000_000
LARGE = {
    # text, and the yield lengths of the start symbol or the error
    "unary chain": (chain(10_000), (1, 1)),
    "unary chain from its end": ("S A0 1.0\n" + "".join(chain(50_000).splitlines(True)[::-1]), (1, 1)),
    "unary chain of two branches a link": (
        "".join(f"A{i} A{i + 1} 0.5\nA{i} A{i + 2} 0.5\n" for i in range(10_000)) + "A10000 a 1\nA10001 a 1\n",
        (1, 1),
    ),
    "unary cycle": (
        chain(10_000, last="A0") + "A5 a 0.0\n",
        r":1: the unary rules 'A0' -> 'A1', 'A1' -> 'A2', 'A2' -> 'A3' and 9,997 more form a cycle that is never left",
    ),
    "unary cycle with a way out": (
        chain(10_000, "{0} {1} 0.5\n{0} a 0.5\n", "A0"),
        r":1: 10,000 nonterminals derive each other by unary rules .*; 1,000 are the most",
    ),
    "many unary cycles": (
        "".join(f"A{i} A{i ^ 1} 0.5\nA{i} A{i + 2} 0.4\nA{i} a 0.1\n" for i in range(10_000)) + "A10000 a 1\nA10001 a 1\n",
        (1, 1),
    ),
    "a large unary cycle": (chain(200, "{0} {1} 0.5\n{0} a 0.5\n", "A0"), (1, 1)),
    "binary chain": (chain(10_000, "{0} {1} {1} 1.0\n", "A10000") + "A10000 a 1.0\n", (UNBOUNDED, UNBOUNDED)),
    "right-linear chain": (chain(10_000, "{0} W {1} 1.0\n", "W") + "W a 1.0\n", (10_001, 10_001)),
    "right-linear cycle": (
        chain(10_000, "{0} W {1} 0.5\n{0} a 0.5\n", "A0") + "W a 1.0\n",
        (1, UNBOUNDED),
    ),
    "nothing but a cycle": (
        chain(10_000, "{0} W {1} 1.0\n", "A0") + "W a 1.0\n",
        r":1: the nonterminal 'A0' derives no sentence",
    ),
    "many rules": ("".join(f"S w{i} 0.00001\n" for i in range(100_000)), (1, 1)),
    "one rule many times": ("S a 0.00001\n" * 100_000, (1, 1)),
    "too many nonterminals and words": (
        "".join(f"S A{i} 0.00005\n" for i in range(20_000)) + "".join(f"A{i} w{i} 1\n" for i in range(20_000)),
        r"20,001 nonterminals times 20,000 words are more than",
    ),
    "a long word": ("S " + "a" * MEGABYTES + " 1.0\n", (1, 1)),
    "a long nonterminal": (
        "S {0} {0} 1.0\n{0} a 0.5\n".format("A" * (MEGABYTES // 3)),
        r":2: the probabilities of 'AAA.* add up to 0.5",
    ),
    "a long number": ("S a 0." + "1" * MEGABYTES + "\n", r":1: the probabilities of 'S' add up to 0.111"),
    "a long wrong number": ("S a 0.x" + "1" * MEGABYTES + "\n", r":1: probability '0.x111.* is not a number"),
    "a long comment": ("# " + "a" * MEGABYTES + "\nS a 1.0\n", (1, 1)),
    "many fields": ("S " + "a " * (MEGABYTES // 2) + "1.0\n", r":1: 5,000,002 fields in 'S a a.* characters more; a rule is"),
    "zeros": ("\0" * MEGABYTES, r":1: the control character '.x00'"),
    "empty lines": ("\n" * MEGABYTES, r":1: no rules"),
    "nltk: unary chain": ("S -> A0 [1.0]\n" + chain(10_000, "{} -> {} [1.0]\n", "'a'"), (1, 1)),
    "nltk: many alternatives": ("S -> " + " | ".join(f"'w{i}' [0.00001]" for i in range(100_000)), (1, 1)),
    "nltk: many symbols": ("S -> " + "'a' " * (MEGABYTES // 10) + "[1.0]\n", r":1: 1,000,000 symbols on the right of a rule"),
    "nltk: a long word": ("S -> '" + "a" * MEGABYTES + "' [1.0]\n", (1, 1)),
    "nltk: no end of a quote": ("S -> '" + "a" * MEGABYTES + " [1.0]\n", r":1: can't read .* characters more; there should be"),
    "nltk: no arrow": ("S -> 'a' [1.0]\n" + "A" * MEGABYTES + "\n", r":2: 'AAA.* characters more is no rule"),
    "nltk: many lines to go on": ("S -> 'a' [1.0] | \\\n" * 100_000, r"can't read|the file ends in a line"),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_files_are_read_or_refused(tmp_path, name):
    """Each takes a second or less; with quadratic time or memory they would take minutes, or what there is."""
    text, outcome = LARGE[name]
    path = tmp_path / "rules.txt"
    path.write_text(text)
    if isinstance(outcome, tuple):
        grammar = Grammar.read(path)
        assert (grammar.shortest[0], grammar.longest[0]) == outcome
        parents = np.concatenate([grammar.unary[:, 0], grammar.binary[:, 0]])
        sums = grammar.emission.sum(axis=1)
        np.add.at(sums, parents, np.concatenate([grammar.unary_probability, grammar.binary_probability]))
        np.testing.assert_allclose(sums, 1, rtol=1e-9)
    else:
        with pytest.raises(InputError, match=outcome) as caught:
            Grammar.read(path)
        assert len(str(caught.value)) < len(str(path)) + 500
