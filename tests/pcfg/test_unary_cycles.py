"""Grammars whose unary rules form cycles, as those of treebanks do: sums, best parses, lengths, sentences and their exports.

`test_properties` compares all that a chart computes, on random grammars with cycles, with naive recursions.
"""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from nltk.parse import ViterbiParser
from scipy import stats

from pcfg.chart import Chart
from pcfg.common.files import InputError
from pcfg.engine.rule_graph import UNBOUNDED
from pcfg.grammar import Grammar
from pcfg.labels import Labeller
from pcfg.sampler import Sampler

# Two cycles that share A, one nonterminal that comes back to itself, recursion through a binary rule, a chain between.
RULES = [
    *[("S", ("A", "B"), 0.5), ("S", ("A",), 0.3), ("S", ("D",), 0.2)],
    *[("A", ("C",), 0.4), ("A", ("D",), 0.2), ("A", ("x",), 0.4)],
    *[("C", ("A",), 0.7), ("C", ("y",), 0.1), ("C", ("B", "E"), 0.2)],
    *[("D", ("A",), 0.5), ("D", ("D",), 0.3), ("D", ("x",), 0.1), ("D", ("z",), 0.1)],
    *[("E", ("A",), 0.25), ("E", ("z",), 0.75)],
    *[("B", ("u",), 0.5), ("B", ("v",), 0.5)],
]


@pytest.fixture
def grammar():
    return Grammar.from_rules(RULES)


def applied(chains, start, add):
    values = start.copy()
    for (parent, child), probability in zip(chains.steps.tolist(), chains.probability.tolist(), strict=True):
        values[parent] = add(values[parent], probability * values[child])
    return values


def matrix(grammar):
    unary = np.zeros((len(grammar.names), len(grammar.names)))
    unary[tuple(grammar.unary.T)] = grammar.unary_probability
    return unary


def test_steps_apply_the_closure_in_sums_and_in_maxima(grammar, random_grammar):
    grammars = [grammar, *(g for seed in range(60) if (g := random_grammar(seed, cycles=True)) is not None)]
    assert sum((g.chains.visits > 1).any() for g in grammars) > 20
    for g in grammars:
        unary, identity = matrix(g), np.eye(len(g.names))
        inverse = np.linalg.inv(identity - unary)
        np.testing.assert_allclose(applied(g.chains, identity, np.add), inverse, rtol=1e-10, atol=1e-300)
        np.testing.assert_allclose(g.chains.visits, np.diag(inverse), rtol=1e-10)
        # Outside values follow the steps backwards.
        back = g.chains._replace(steps=g.chains.steps[::-1, ::-1], probability=g.chains.probability[::-1])
        np.testing.assert_allclose(applied(back, identity, np.add), inverse.T, rtol=1e-10, atol=1e-300)
        # The best chain by enumeration: all chains of up to twice as many rules as there are nonterminals.
        best = chain = identity
        for _ in range(2 * len(unary)):
            chain = (chain[:, :, None] * unary[None]).max(axis=1)
            best = np.maximum(best, chain)
        np.testing.assert_allclose(applied(g.best_chains, identity, np.maximum), best, rtol=1e-12, atol=1e-300)


def test_sums_are_exact_up_to_rounding_however_close_to_one_the_radius_is():
    """Against fractions; the inverse by floating point loses as many digits as the radius has nines."""
    leaves = 1e-11
    rules = [("S", ("A", "A"), 1.0), ("A", ("C",), 0.5), ("A", ("A",), 0.5 - leaves), ("A", ("x",), leaves)]
    grammar = Grammar.from_rules([*rules, ("C", ("A",), 1 - leaves), ("C", ("y",), leaves)])
    table = {}
    for (left, child), p in zip(grammar.unary.tolist(), grammar.unary_probability, strict=True):
        table[grammar.names[left], grammar.names[child]] = Fraction(p)
    by_x, by_y = (Fraction(p) for p in (grammar.emission[1, 0], grammar.emission[2, 1]))
    # A = x + AA A + AC (y + CA A), with 1 - AA - AC CA from the rules that leave
    leaving = by_x + table["A", "C"] * by_y
    values = applied(grammar.chains, grammar.emission.copy(), np.add)
    assert values[1] == pytest.approx([float(by_x / leaving), float(table["A", "C"] * by_y / leaving)], rel=1e-14)
    # so many passes are beyond float32, and too many to draw
    chart = Chart(grammar)
    tokens, lengths = grammar.encode(["x y", "y y"], "here")
    conditionals, _ = chart.conditionals(tokens, lengths)
    np.testing.assert_allclose(conditionals, np.tile(values[1] / values[1].sum(), (4, 1)), rtol=1e-6)
    assert chart.redone == 2
    with pytest.raises(InputError, match=r"'A': its unary rules lead back to it 6.67e\+10 times on average, too often to draw"):
        Sampler(grammar, 10)


def test_yield_lengths(grammar):
    lengths = dict(zip(grammar.names, zip(grammar.shortest.tolist(), grammar.longest.tolist(), strict=True), strict=True))
    # C -> B E leads back to C and adds a word; without that rule a cycle adds none
    assert lengths == {name: (1, 1 if name == "B" else UNBOUNDED) for name in "SACDEB"}
    finite = Grammar.from_rules([rule if rule[1] != ("B", "E") else ("C", ("B", "B"), 0.2) for rule in RULES if rule[0] != "E"])
    assert dict(zip(finite.names, finite.longest.tolist(), strict=True)) == {"S": 3, "A": 2, "C": 2, "D": 2, "B": 1}
    found = Sampler(finite, 10)
    assert found.width == 3 and found.length_probability.sum() == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("seed", [None, 3, 4])
def test_sentences_are_drawn_by_their_probabilities(grammar, naive, random_grammar, seed):
    """Chi-square against the sum over all derivations, each sentence a class; a wrong expectation is rejected."""
    seeds = itertools.count(1000 * (seed or 0))
    while seed is not None:
        grammar = random_grammar(next(seeds), cycles=True)
        if grammar is not None and (grammar.chains.visits > 1.2).sum() > 1 and grammar.longest[0] > 3:
            try:
                Sampler(grammar, 4)
            except InputError:
                continue
            break
    reference, limit, number = naive(grammar), 4, 100_000
    probability = {}
    for length in range(1, limit + 1):
        for sentence in itertools.product(range(len(grammar.words)), repeat=length):
            probability[sentence] = reference.inside(sentence)[0, length][0]
    sampler = Sampler(grammar, limit)
    by_length = [sum(p for sentence, p in probability.items() if len(sentence) == length) for length in range(limit + 1)]
    np.testing.assert_allclose(sampler.length_probability, by_length[: sampler.width + 1], rtol=1e-12)
    tokens, lengths = sampler.sample(number, np.random.default_rng(7))
    counts = dict.fromkeys(probability, 0)
    for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True):
        counts[tuple(row[:length])] += 1
    assert all(probability[sentence] > 0 for sentence, count in counts.items() if count)

    def p_value(weights):
        expected = number * np.array([weights[sentence] for sentence in probability]) / sum(weights.values())
        common = expected >= 50
        observed = np.array(list(counts.values()))
        return stats.chisquare(
            np.append(observed[common], observed[~common].sum()), np.append(expected[common], expected[~common].sum() + 1e-9)
        ).pvalue

    assert p_value(probability) > 1e-3
    # what a sampler would draw that follows each cycle once at most
    once = np.eye(len(grammar.names)) + matrix(grammar)
    short = {}
    for sentence in probability:
        short[sentence] = (once @ grammar.emission[:, sentence[0]])[0] if len(sentence) == 1 else probability[sentence]
    assert p_value(short) < 1e-6


def test_nltk_has_the_same_rules_and_finds_the_same_best_parses(tmp_path, grammar):
    converted = grammar.to_nltk()
    path = tmp_path / "printed.pcfg"
    path.write_text("\n".join(map(str, converted.productions())))
    again = Grammar.read(path)
    assert again.names == grammar.names and again.unary.tolist() == grammar.unary.tolist()
    np.testing.assert_allclose(again.chains.visits, grammar.chains.visits, rtol=1e-5)
    texts = Sampler(grammar, 4).texts(*Sampler(grammar, 4).sample(12, np.random.default_rng(2)))
    tokens, lengths = grammar.encode(texts, "here")
    parser = ViterbiParser(converted)
    for text, tree in zip(texts, Chart(grammar).parses(tokens, lengths), strict=True):
        (expected,) = parser.parse(text.split())
        assert tree.prob() == pytest.approx(expected.prob(), rel=1e-9)


def test_depths_are_those_of_the_best_parses(grammar):
    labeller = Labeller(grammar, "depth")
    tokens, lengths = Sampler(grammar, 12).sample(50, np.random.default_rng(0))
    depths = labeller.label(tokens, lengths)
    assert depths.tolist() == [tree.height() - 1 for tree in Chart(grammar).parses(tokens, lengths)]
    # a chain has at most three rules: S, and two among A, C and D
    assert int(labeller.names[-1]) == 64 * (1 + 3) and depths.max() > 4


def test_labels_that_tie_are_counted_and_take_the_lowest():
    rules = [("S", ("P",), 0.5), ("S", ("Q",), 0.5), ("P", ("Q",), 0.5), ("Q", ("P",), 0.5)]
    rules += [(left, (word,), p) for left, word, p in [("P", "a", 0.3), ("P", "b", 0.2), ("Q", "a", 0.3), ("Q", "c", 0.2)]]
    grammar = Grammar.from_rules(rules)
    tokens, lengths = grammar.encode(["a", "b", "c", "a"], "here")
    for dtype in ("float32", "float64"):
        tied = np.zeros(4, bool)
        labels = Chart(grammar, dtype=dtype).labels(tokens, lengths, np.array([2, 1]), tied=tied)
        # the two are as likely for "a": 0.3 (1 + 0.5 + ...)
        assert labels.tolist() == [0, 1, 0, 0] and tied.tolist() == [True, False, False, True]
