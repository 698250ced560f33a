"""Everything a chart computes, on some hundreds of random grammars, against the naive recursions and against enumeration."""

import math
import os

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pcfg.chart import Chart
from pcfg.grammar import RULES_FOLDER, Grammar
from pcfg.labels import Labeller
from pcfg.sampler import Sampler

GRAMMARS = 320 if os.environ.get("LONG_TESTS") else 160
TOLERANCE = {"float64": 1e-9, "float32": 1e-5}  # relative
seen = {"grammars": 0, "recursive": 0, "unary": 0, "chains": 0, "ambiguous": 0}


@pytest.fixture(scope="module")
def some_sentences(all_strings):
    """A few of the strings of 1 to 5 words that a grammar derives, as (tokens, lengths)."""

    def choose(reference, rng, number=3):
        found = [s for length in range(1, 6) for s in all_strings(reference, length)]
        chosen = [found[row] for row in rng.permutation(len(found))[:number]]
        tokens = np.full((len(chosen), 7), -1, np.int32)
        for row, sentence in enumerate(chosen):
            tokens[row, : len(sentence)] = sentence
        return tokens, np.array([len(sentence) for sentence in chosen])

    return choose


def check_chart(chart, reference, sentence):
    inside, outside, posteriors = chart.inside(sentence), chart.outside(sentence), chart.posteriors(sentence)
    grammar = chart.grammar
    total = reference.inside(sentence)[0, len(sentence)][0]
    for (i, j), values in reference.inside(sentence).items():
        possible = (grammar.shortest <= j - i) & (j - i <= grammar.longest)
        expected = np.where(possible, reference.outside(sentence, i, j), 0)
        np.testing.assert_allclose(inside[i, j], values, rtol=1e-9, atol=0)
        # Widths between the shortest and the longest that no yield has are left out too, where inside is zero.
        np.testing.assert_allclose(outside[i, j][values > 0], expected[values > 0], rtol=1e-9, atol=0)
        if (grammar.chains.visits == 1).all():
            np.testing.assert_allclose(posteriors[i, j], values * expected / total, rtol=1e-9, atol=0)
        else:
            columns = reference.columns(sentence)
            without = [reference.table(columns, (i, j, symbol))[0, len(sentence)][0, 0] for symbol in range(len(values))]
            np.testing.assert_allclose(posteriors[i, j], 1 - np.array(without) / total, rtol=1e-9, atol=1e-12)
        if j == i + 1:
            np.testing.assert_allclose(outside[i, j], expected, rtol=1e-9, atol=0)


def check_words(grammar, reference, tokens, lengths):
    for dtype, tolerance in TOLERANCE.items():
        chart = Chart(grammar, threads=1, dtype=dtype)
        conditionals, entropy, log_true, offsets = chart.conditionals_and_reductions(tokens, lengths)
        assert conditionals.dtype == dtype
        for row, length in enumerate(lengths):
            sentence, rows = tokens[row, :length], slice(offsets[row], offsets[row + 1])
            expected = reference.conditionals(sentence)
            np.testing.assert_allclose(conditionals[rows], expected, rtol=tolerance, atol=1e-30)
            logarithms = np.log(expected, out=np.zeros_like(expected), where=expected > 0)
            # An entropy near 0 is the sum of a term near 0 for the likely word, rounded to a unit of 1, and of small ones.
            unit = tolerance * 0.1
            np.testing.assert_allclose(entropy[rows], -(expected * logarithms).sum(axis=1), rtol=tolerance, atol=unit)
            np.testing.assert_allclose(log_true[rows], logarithms[np.arange(length), sentence], rtol=tolerance, atol=unit)
        for found, again in zip(chart.reductions(tokens, lengths), (entropy, log_true, offsets), strict=True):
            np.testing.assert_array_equal(found, again)


def naive_label(scores):
    best = scores.max()
    return -1 if best == 0 else int(np.flatnonzero(scores >= best * (1 - 1e-10))[0])


def check_labels(grammar, reference, tokens, lengths):
    symbols = np.arange(len(grammar.names))[::-1]
    charts = [Chart(grammar, threads=1, dtype=dtype) for dtype in TOLERANCE]
    for span in (None, (0, 1), (0, 2), (1, 3), (1, None)):
        start, stop = span or (0, None)
        for rule in ("likelihood", "posterior"):
            expected = []
            for row, length in enumerate(lengths):
                end = length if stop is None else stop
                if start >= end or end > length:
                    expected.append(-1)
                    continue
                sentence = tokens[row, :length]
                scores = reference.inside(sentence)[start, end]
                if rule == "posterior":
                    scores = scores * reference.outside(sentence, start, end) / grammar.chains.visits
                expected.append(naive_label(scores[symbols]))
            for chart in charts:
                assert chart.labels(tokens, lengths, symbols, span, rule).tolist() == expected, (span, rule, chart.dtype)


def probability_of(tree, grammar):
    """The product of the rules' probabilities in a tree."""
    parent = grammar.names.index(tree.label())
    if isinstance(tree[0], str):
        return grammar.emission[parent, grammar.words.index(tree[0])]
    children = [grammar.names.index(child.label()) for child in tree]
    table, weights = (grammar.unary, grammar.unary_probability)
    if len(children) == 2:
        table, weights = (grammar.binary, grammar.binary_probability)
    (rule,) = np.flatnonzero((table == [parent, *children]).all(axis=1))
    return weights[rule] * math.prod(probability_of(child, grammar) for child in tree)


def repeats_in_a_chain(tree):
    """Whether the chain of unary rules below a node comes back to its nonterminal."""
    child = tree
    while len(child) == 1 and not isinstance(child[0], str):
        child = child[0]
        if child.label() == tree.label():
            return True
    return False


def check_parses(grammar, reference, tokens, lengths):
    trees = Chart(grammar, threads=1).parses(tokens, lengths)
    for row, length in enumerate(lengths):
        sentence = tokens[row, :length]
        assert trees[row].leaves() == [grammar.words[word] for word in sentence]
        assert trees[row].label() == grammar.names[0]
        assert not any(repeats_in_a_chain(subtree) for subtree in trees[row].subtrees())
        best = reference.best(sentence)
        assert trees[row].prob() == pytest.approx(best, rel=1e-9)
        assert probability_of(trees[row], grammar) == pytest.approx(best, rel=1e-9)
        seen["ambiguous"] += bool(best < 0.999 * reference.inside(sentence)[0, length][0])


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=GRAMMARS, derandomize=True, deadline=None)
def check_grammar(random_grammar, naive, some_sentences, seed):
    check_one(random_grammar(seed), naive, some_sentences, seed)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=GRAMMARS // 8, derandomize=True, deadline=None)
def check_grammar_with_cycles(random_grammar, naive, some_sentences, seed):
    grammar = random_grammar(seed, cycles=True)
    assume(grammar is not None and (grammar.chains.visits > 1).any())
    check_one(grammar, naive, some_sentences, seed)


def check_one(grammar, naive, some_sentences, seed):
    assume(grammar is not None)
    reference = naive(grammar)
    tokens, lengths = some_sentences(reference, np.random.default_rng(seed))
    assume(len(lengths) > 0)
    check_chart(Chart(grammar, threads=1), reference, tokens[0, : lengths[0]])
    check_words(grammar, reference, tokens, lengths)
    check_labels(grammar, reference, tokens, lengths)
    check_parses(grammar, reference, tokens, lengths)
    seen["grammars"] += 1
    seen["recursive"] += bool((grammar.longest > 1000).any())
    seen["unary"] += bool(len(grammar.unary))
    seen["chains"] += bool(np.isin(grammar.unary[:, 1], grammar.unary[:, 0]).any())


def test_charts_of_random_grammars(random_grammar, naive, some_sentences):
    check_grammar(random_grammar, naive, some_sentences)
    assert seen["grammars"] >= GRAMMARS - 20
    assert all(count >= GRAMMARS * 3 // 32 for count in seen.values()), seen


def test_charts_of_random_grammars_with_cycles_of_unary_rules(random_grammar, naive, some_sentences):
    before = dict(seen)
    check_grammar_with_cycles(random_grammar, naive, some_sentences)
    assert all(seen[name] - before[name] > 1 for name in seen), (before, seen)


def test_float32_and_float64_give_the_same_labels():
    grammar = Grammar.read(RULES_FOLDER / "rule_deep_mlm.txt")
    tokens, lengths = Sampler(grammar, 31).sample(100_000, np.random.default_rng(5), min_words=5)
    for task in ("A", "B", "C"):
        labeller = Labeller(grammar, task)
        labels = {}
        for dtype in TOLERANCE:
            labeller._chart = Chart(grammar, dtype=dtype)
            labels[dtype] = labeller.label(tokens, lengths)
        assert (labels["float32"] == labels["float64"]).all()
        assert len(np.unique(labels["float64"])) >= 9
