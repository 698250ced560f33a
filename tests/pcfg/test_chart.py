import itertools

import numpy as np
import pytest

from pcfg.artefacts import InputError
from pcfg.chart import Chart
from pcfg.grammar import RULES_FOLDER, Grammar
from pcfg.sampler import Sampler

SHIPPED = sorted(RULES_FOLDER.glob("rule_*.txt"))


def as_arrays(sentences):
    lengths = np.array([len(sentence) for sentence in sentences])
    tokens = np.full((len(sentences), lengths.max()), -1)
    for row, sentence in enumerate(sentences):
        tokens[row, : len(sentence)] = sentence
    return tokens, lengths


def some_sentences(reference, number, max_words, rng):
    """Random ones among all strings of 1 to max_words words that the naive parser derives."""
    found = []
    for length in range(1, max_words + 1):
        strings = np.array(list(itertools.product(range(len(reference.grammar.words)), repeat=length)))
        columns = [reference.grammar.emission[:, strings[:, t]] for t in range(length)]
        found += [tuple(string) for string in strings[reference.table(columns)[0, length][0] > 0]]
    return [found[row] for row in rng.permutation(len(found))[:number]]


@pytest.fixture(scope="module")
def pruning_grammar():
    """B spans one word only, C two or three: most of the chart is dead."""
    return Grammar.from_rules(
        [
            ("S", ("S1",), 0.5),
            ("S", ("B", "C"), 0.5),
            ("S1", ("C", "C"), 1.0),
            ("C", ("B", "B"), 0.7),
            ("C", ("D", "B"), 0.3),
            ("D", ("B", "B"), 1.0),
            ("B", ("a",), 0.2),
            ("B", ("b",), 0.8),
        ]
    )


def test_inside_and_outside_equal_the_naive_recursion(random_grammars, pruning_grammar, naive):
    rng = np.random.default_rng(0)
    for grammar in [*random_grammars, pruning_grammar]:
        chart, reference = Chart(grammar), naive(grammar)
        for sentence in some_sentences(reference, 3, 5, rng):
            inside, outside = chart.inside(sentence), chart.outside(sentence)
            expected = reference.inside(sentence)
            for (i, j), values in expected.items():
                np.testing.assert_allclose(inside[i, j], values, rtol=1e-12, atol=0)
                possible = (grammar.shortest <= j - i) & (j - i <= grammar.longest)
                np.testing.assert_allclose(
                    outside[i, j], np.where(possible, reference.outside(sentence, i, j), 0), rtol=1e-12, atol=0
                )


def test_probabilities_and_conditionals_equal_enumeration(random_grammars, enumerated):
    for grammar in random_grammars[:12]:
        found = enumerated(grammar, 3)
        sentences = list(found)
        chart, arrays = Chart(grammar), as_arrays(sentences)
        expected = np.log([found[sentence] for sentence in sentences])
        np.testing.assert_allclose(chart.log_probability(*arrays), expected, rtol=0, atol=1e-11)
        result, offsets = chart.conditionals(*arrays)
        for row, sentence in enumerate(sentences):
            for t in range(len(sentence)):
                variants = [(*sentence[:t], word, *sentence[t + 1 :]) for word in range(len(grammar.words))]
                weights = np.array([found.get(variant, 0.0) for variant in variants])
                np.testing.assert_allclose(result[offsets[row] + t], weights / weights.sum(), rtol=0, atol=1e-12)


def test_log_probability_of_longer_sentences_equals_the_naive_one(random_grammars, naive):
    strings = np.random.default_rng(9).integers(0, 2, size=(20, 11))
    for grammar in [grammar for grammar in random_grammars if len(grammar.words) > 1][:8]:
        reference, chart = naive(grammar), Chart(grammar)
        for length in (5, 7, 9, 10, 11):
            columns = [grammar.emission[:, strings[:, t]] for t in range(length)]
            with np.errstate(divide="ignore"):
                expected = np.log(reference.table(columns)[0, length][0])
            found = chart.log_probability(strings[:, :length], np.full(20, length))
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=0)


def test_conditionals_equal_substitution_of_every_word(random_grammars, pruning_grammar, naive):
    rng = np.random.default_rng(2)
    for grammar in [*random_grammars, pruning_grammar]:
        sentences = some_sentences(naive(grammar), 3, 5, rng)
        result, offsets = Chart(grammar).conditionals(*as_arrays(sentences))
        for row, sentence in enumerate(sentences):
            expected = naive(grammar).conditionals(sentence)
            np.testing.assert_allclose(result[offsets[row] : offsets[row + 1]], expected, rtol=0, atol=1e-12)


def check_against_substitution(grammar, naive, number, words):
    """Sentences of `words` words, every word of the grammar put at every position."""
    tokens, lengths = Sampler(grammar, words).sample(number, np.random.default_rng(3), min_words=words)
    result, offsets = Chart(grammar).conditionals(tokens, lengths)
    for row in range(number):
        expected = naive(grammar).conditionals(tokens[row])
        print(f"{words} words: largest difference {np.abs(result[offsets[row] : offsets[row + 1]] - expected).max():.1e}")
        np.testing.assert_allclose(result[offsets[row] : offsets[row + 1]], expected, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(result[offsets[row] : offsets[row + 1]] > 0, expected > 0)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_conditionals_of_the_longest_sentences_of_shipped_grammars_equal_substitution(path, naive):
    grammar = Grammar.read(path)
    check_against_substitution(grammar, naive, 3, int(grammar.longest[0]))


def test_conditionals_of_the_published_grammar_equal_substitution(published_rules, naive):
    grammar = Grammar.read(published_rules)
    check_against_substitution(grammar, naive, 3, int(grammar.longest[0]))


@pytest.fixture(scope="module")
def improbable():
    """Sentences of 64 words with probability below 1e-400, far below the least float64."""
    return Grammar.from_rules(
        [
            ("S", ("A", "S"), 1e-6),
            ("S", ("B", "S"), 2e-6),
            ("S", ("x",), 1 - 3e-6),
            ("A", ("x",), 1e-3),
            ("A", ("y",), 1 - 1e-3),
            ("B", ("x",), 2e-3),
            ("B", ("S", "A"), 1e-6),
            ("B", ("z",), 1 - 2.001e-3),
        ]
    )


def test_64_words_do_not_underflow(improbable, naive):
    sentence = np.zeros((1, 64), np.int64)
    sentence[0, 5::7] = 1
    chart, reference = Chart(improbable), naive(improbable, np.longdouble)
    total = reference.inside(sentence[0])[0, 64][0]
    assert 0 < total < 1e-320
    assert chart.log_probability(sentence, [64])[0] == pytest.approx(float(np.log(total)), rel=1e-12)
    result, _ = chart.conditionals(sentence, [64])
    for t in (0, 5, 63):
        columns = reference.columns(sentence[0])
        columns[t] = improbable.emission.astype(np.longdouble)
        expected = reference.table(columns)[0, 64][0]
        np.testing.assert_allclose(result[t], (expected / expected.sum()).astype(float), rtol=0, atol=1e-12)


def test_more_than_64_words_are_refused(improbable):
    with pytest.raises(InputError, match="sentence 2 has 65 words"):
        Chart(improbable).log_probability(np.zeros((2, 65), int), [3, 65])
    with pytest.raises(InputError, match="sentence 1 has 0 words"):
        Chart(improbable).conditionals(np.zeros((1, 4), int), [0])


def test_a_sentence_that_cannot_be_derived_is_named(pruning_grammar):
    chart = Chart(pruning_grammar)
    tokens, lengths = as_arrays([(0, 1, 1), (0, 1, 1, 1), (0,)])
    assert np.isneginf(chart.log_probability(tokens, lengths)[2])
    with pytest.raises(InputError, match=r"text.txt: .* sentence 13 \('a'\)"):
        chart.conditionals(tokens, lengths, "text.txt", 10)


def test_threads_and_padding_change_nothing(pruning_grammar):
    tokens, lengths = Sampler(pruning_grammar, 6).sample(500, np.random.default_rng(0))
    single, _ = Chart(pruning_grammar, threads=1).conditionals(tokens, lengths)
    wide = np.full((500, 20), 99)
    wide[:, : tokens.shape[1]] = np.where(tokens < 0, 99, tokens)
    double, offsets = Chart(pruning_grammar, threads=2).conditionals(wide, lengths)
    assert np.array_equal(single, double)
    assert offsets[-1] == lengths.sum() == len(single)


@pytest.mark.parametrize("span", [None, 1, 2, 3])
def test_span_scores_are_the_cell_up_to_a_factor(random_grammars, span, naive):
    for grammar in random_grammars[:10]:
        sentences = some_sentences(naive(grammar), 10, 4, np.random.default_rng(4))
        chart = Chart(grammar)
        scores = {rule: chart.span_scores(*as_arrays(sentences), span, rule) for rule in ("likelihood", "posterior")}
        for row, sentence in enumerate(sentences):
            width = span or len(sentence)
            if width > len(sentence):
                assert not scores["likelihood"][row].any() and not scores["posterior"][row].any()
                continue
            inside = chart.inside(sentence)[0, width]
            expected = {"likelihood": inside, "posterior": inside * chart.outside(sentence)[0, width]}
            for rule, values in expected.items():
                normalised = values / max(values.sum(), 1e-300)
                found = scores[rule][row] / max(scores[rule][row].sum(), 1e-300)
                np.testing.assert_allclose(found, normalised, rtol=1e-12, atol=1e-15)


def test_a_span_of_no_words_is_refused(pruning_grammar):
    with pytest.raises(InputError, match="span: 65 words"):
        Chart(pruning_grammar).span_scores(np.zeros((1, 3), int), [3], 65)
