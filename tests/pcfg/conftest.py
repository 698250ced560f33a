"""A naive parser and random grammars, the reference for charts, labels and lookup tables."""

import functools
import itertools
from pathlib import Path

import numpy as np
import pytest

from pcfg.common.files import InputError
from pcfg.grammar import Grammar

PUBLISHED_RULES = Path(__file__).parents[3] / "shared" / "data" / "rule_deep_mlm.txt"


class Naive:
    """The textbook recursions over dense rule lists, without scaling: long double never underflows here.

    Nothing is left out but rules with a child that is zero in its cell, which add zero.
    """

    def __init__(self, grammar, kind=np.float64):
        self.grammar, self.kind = grammar, kind
        number = len(grammar.names)
        self.unary = np.zeros((number, number), kind)
        for (parent, child), probability in zip(grammar.unary, grammar.unary_probability, strict=True):
            self.unary[parent, child] += probability
        self.binary = np.zeros((number, len(grammar.binary)), kind)  # (N, rules): P(rule) at its left side
        self.binary[grammar.binary[:, 0], np.arange(len(grammar.binary))] = grammar.binary_probability

    def table(self, columns, without=None):
        """inside of a sentence given as T columns, each (N, 1), or (N, W) for W variants of it at once.

        {(i, j): (N, W)}, and (N, 1) where the words i .. j - 1 are the same in all variants. Chains of unary rules, of any
        length where they form cycles, are followed until nothing changes. `without`, (i, j, A), leaves out all derivations in
        which A derives the words i .. j - 1.
        """
        left, right = self.grammar.binary[:, 1:].T
        table, nonzero, length = {}, {}, len(columns)
        for width in range(1, length + 1):
            for i in range(length - width + 1):
                j = i + width
                cell = np.zeros(np.broadcast_shapes(*(column.shape for column in columns[i:j])), self.kind)
                if width == 1:
                    cell += columns[i]
                for k in range(i + 1, j):
                    rules = np.flatnonzero(nonzero[i, k][left] & nonzero[k, j][right])
                    if len(rules):
                        cell += self.binary[:, rules] @ (table[i, k][left[rules]] * table[k, j][right[rules]])
                allowed = np.array([without != (i, j, symbol) for symbol in range(len(cell))])[:, None]
                chain = cell = cell * allowed
                while (cell + chain != cell).any():
                    chain = (self.unary @ chain) * allowed
                    cell = cell + chain
                table[i, j], nonzero[i, j] = cell, cell.any(axis=1)
        return table

    def columns(self, sentence):
        return [self.grammar.emission[:, [word]].astype(self.kind) for word in sentence]

    def inside(self, sentence):
        return {cell: values[:, 0] for cell, values in self.table(self.columns(sentence)).items()}

    def outside(self, sentence, i, j):
        """P(start =>* x_<i A x_>=j) for all A: the span becomes one symbol that A and nothing else derives."""
        columns = self.columns(sentence)
        columns[i:j] = [np.eye(len(self.grammar.names), dtype=self.kind)]
        return self.table(columns)[0, len(columns)][0]

    def best(self, sentence):
        """The largest probability of a derivation of the sentence, rule by rule.

        Of all derivations whose chains of unary rules have up to one rule more than there are nonterminals.
        """
        grammar = self.grammar
        longest = len(grammar.names) + 1

        @functools.cache
        def value(symbol, i, j, rules=longest):
            best = grammar.emission[symbol, sentence[i]] if j == i + 1 else 0.0
            for (parent, left, right), probability in zip(grammar.binary, grammar.binary_probability, strict=True):
                if parent == symbol:
                    best = max([best, *(probability * value(left, i, k) * value(right, k, j) for k in range(i + 1, j))])
            for (parent, child), probability in zip(grammar.unary, grammar.unary_probability, strict=True):
                if parent == symbol and rules > 0:
                    best = max(best, probability * value(child, i, j, rules - 1))
            return best

        return value(0, 0, len(sentence))

    def conditionals(self, sentence):
        """P(x_t = w | x_-t), (T, V), from the probabilities of the sentences with every word put at every place."""
        rows = []
        for position in range(len(sentence)):
            columns = self.columns(sentence)
            columns[position] = self.grammar.emission.astype(self.kind)
            total = self.table(columns)[0, len(sentence)][0]
            rows.append(total / total.sum())
        return np.array(rows)


def enumerate_sentences(grammar, max_words):
    """{sentence (tuple of word indices): probability} of all sentences up to max_words, derivation by derivation."""
    rules = [[] for _ in grammar.names]
    for (parent, left, right), probability in zip(grammar.binary, grammar.binary_probability, strict=True):
        rules[parent].append(((left, right), probability))
    for (parent, child), probability in zip(grammar.unary, grammar.unary_probability, strict=True):
        rules[parent].append(((child,), probability))
    found = {}

    def expand(words, stack, probability):
        if len(words) + len(stack) > max_words:
            return
        if not stack:
            found[words] = found.get(words, 0.0) + probability
            return
        symbol, rest = stack[0], stack[1:]
        for word in np.flatnonzero(grammar.emission[symbol]):
            expand((*words, int(word)), rest, probability * grammar.emission[symbol, word])
        for children, factor in rules[symbol]:
            expand(words, (*children, *rest), probability * factor)

    expand((), (0,), 1.0)
    return found


def random_grammar(seed, cycles=False):
    """A small grammar with recursion, unary chains and words that several nonterminals emit; some words are rare.

    Unary rules form cycles only if `cycles`.
    """
    rng = np.random.default_rng(seed)
    names = ["S"] + [f"N{i}" for i in rng.permutation(rng.integers(1, 5))]
    rules = []
    for index, name in enumerate(names):
        options = [(word,) for word in "abcd" if rng.random() < 0.4]
        options += [(child,) for child in names[0 if cycles else index + 1 :] if rng.random() < 0.4]
        options += [pair for pair in itertools.product(names, repeat=2) if rng.random() < 0.25]
        options = options or [("a",)]
        weights = rng.gamma(0.5, size=len(options)) + 1e-6
        rules += [(name, option, weight) for option, weight in zip(options, weights / weights.sum(), strict=True)]
    used = {symbol for _, right, _ in rules for symbol in right}
    try:
        return Grammar.from_rules([rule for rule in rules if rule[0] == "S" or rule[0] in used])
    except InputError:
        return None


@pytest.fixture(scope="session")
def naive():
    return Naive


@pytest.fixture(scope="session")
def enumerated():
    return enumerate_sentences


@pytest.fixture(scope="session", name="random_grammar")
def random_grammar_fixture():
    return random_grammar


@pytest.fixture(scope="session")
def all_strings():
    """All strings of `length` words that a naive parser derives."""

    def strings(reference, length):
        candidates = np.array(list(itertools.product(range(len(reference.grammar.words)), repeat=length)))
        columns = [reference.grammar.emission[:, candidates[:, t]] for t in range(length)]
        return [tuple(string) for string in candidates[reference.table(columns)[0, length][0] > 0]]

    return strings


@pytest.fixture(scope="session")
def random_grammars():
    """Thirty random grammars, recursive ones, ones with unary chains and ones with neither among them."""
    grammars = [grammar for seed in range(200) if (grammar := random_grammar(seed)) is not None][:30]
    assert len(grammars) == 30
    assert any((grammar.longest > 1000).any() for grammar in grammars)
    assert any(len(grammar.unary) > 1 for grammar in grammars)
    return grammars


@pytest.fixture
def published_rules():
    if not PUBLISHED_RULES.exists():
        pytest.skip(f"the published grammar is not there ({PUBLISHED_RULES})")
    return PUBLISHED_RULES
