import itertools

import numpy as np
import pytest

from pcfg.chart import Chart
from pcfg.common.files import InputError
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
        result, offsets = Chart(grammar, dtype="float64").conditionals(*arrays)
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
        result, offsets = Chart(grammar, dtype="float64").conditionals(*as_arrays(sentences))
        for row, sentence in enumerate(sentences):
            expected = naive(grammar).conditionals(sentence)
            np.testing.assert_allclose(result[offsets[row] : offsets[row + 1]], expected, rtol=0, atol=1e-12)


def check_against_substitution(grammar, naive, number, words):
    """Sentences of `words` words, every word of the grammar put at every position."""
    tokens, lengths = Sampler(grammar, words).sample(number, np.random.default_rng(3), min_words=words)
    result, offsets = Chart(grammar, dtype="float64").conditionals(tokens, lengths)
    rounded, _ = Chart(grammar).conditionals(tokens, lengths)
    for row in range(number):
        expected = naive(grammar).conditionals(tokens[row])
        print(f"{words} words: largest difference {np.abs(result[offsets[row] : offsets[row + 1]] - expected).max():.1e}")
        np.testing.assert_allclose(result[offsets[row] : offsets[row + 1]], expected, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(result[offsets[row] : offsets[row + 1]] > 0, expected > 0)
        np.testing.assert_allclose(rounded[offsets[row] : offsets[row + 1]], expected, rtol=1e-5, atol=1e-30)


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
    assert chart.redone == 0
    rounded, _ = chart.conditionals(sentence, [64])
    assert chart.redone == 1 and rounded.dtype == np.float32
    result, _ = Chart(improbable, dtype="float64").conditionals(sentence, [64])
    for t in (0, 5, 63):
        columns = reference.columns(sentence[0])
        columns[t] = improbable.emission.astype(np.longdouble)
        expected = reference.table(columns)[0, 64][0]
        expected = (expected / expected.sum()).astype(float)
        np.testing.assert_allclose(result[t], expected, rtol=0, atol=1e-12)
        np.testing.assert_allclose(rounded[t], expected, rtol=1e-6, atol=0)


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
        chart.conditionals_and_reductions(tokens, lengths, "text.txt", 10)


def test_threads_and_padding_change_nothing(pruning_grammar):
    tokens, lengths = Sampler(pruning_grammar, 6).sample(500, np.random.default_rng(0))
    single, _ = Chart(pruning_grammar, threads=1).conditionals(tokens, lengths)
    wide = np.full((500, 20), 99)
    wide[:, : tokens.shape[1]] = np.where(tokens < 0, 99, tokens)
    double, offsets = Chart(pruning_grammar, threads=2).conditionals(wide, lengths)
    assert np.array_equal(single, double)
    assert offsets[-1] == lengths.sum() == len(single)


@pytest.mark.parametrize("span", [None, (0, 1), (0, 2), (0, 3), (1, 3), (2, None)])
def test_span_scores_are_the_cell_up_to_a_factor(random_grammars, span, naive):
    for grammar in random_grammars[:10]:
        sentences = some_sentences(naive(grammar), 10, 4, np.random.default_rng(4))
        chart = Chart(grammar)
        scores = {rule: chart.span_scores(*as_arrays(sentences), span, rule) for rule in ("likelihood", "posterior")}
        for row, sentence in enumerate(sentences):
            start, stop = span or (0, None)
            stop = stop or len(sentence)
            if not start < stop <= len(sentence):
                assert not scores["likelihood"][row].any() and not scores["posterior"][row].any()
                continue
            inside = chart.inside(sentence)[start, stop]
            expected = {"likelihood": inside, "posterior": inside * chart.outside(sentence)[start, stop]}
            for rule, values in expected.items():
                normalised = values / max(values.sum(), 1e-300)
                found = scores[rule][row] / max(scores[rule][row].sum(), 1e-300)
                np.testing.assert_allclose(found, normalised, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("span", [(0, 65), (2, 2), (3, 1), (-1, 2), (64, None)])
def test_a_span_of_no_words_is_refused(pruning_grammar, span):
    with pytest.raises(InputError, match=f"span: words {span[0]} to {span[1]}"):
        Chart(pruning_grammar).span_scores(np.zeros((1, 3), int), [3], span)


def test_posteriors_of_what_can_not_be_derived(pruning_grammar):
    with pytest.raises(InputError, match="can't derive sentence 1"):
        Chart(pruning_grammar).posteriors([0])
    assert Chart(pruning_grammar).parses(np.array([[0, 1], [0, 1]]), [1, 1]) == [None, None]
    assert Chart(pruning_grammar).labels(np.array([[0, 1, 1]]), [1], [0, 1]).tolist() == [-1]


def test_close_scores_are_compared_in_float64():
    """S1 and S2 differ by 1e-7, less than float32 can tell in a longer sentence; S3 equals S2 exactly."""
    rules = [("S", (f"S{i}",), p) for i, p in ((1, 0.25), (2, 0.25), (3, 0.5))]
    for name, share in (("S1", 0.3), ("S2", 0.3 + 3e-8), ("S3", 0.3 + 3e-8)):
        rules += [(name, ("A", name), share), (name, ("A", "A"), 1 - share)]
    grammar = Grammar.from_rules([*rules, ("A", ("a",), 0.5), ("A", ("b",), 0.5)])
    tokens, lengths = np.zeros((40, 12), int), np.full(40, 12)
    chart = Chart(grammar)
    symbols = [grammar.names.index(name) for name in ("S1", "S2", "S3")]
    assert chart.labels(tokens, lengths, symbols).tolist() == [1] * 40
    assert chart.labels(tokens, lengths, symbols[::-1]).tolist() == [0] * 40
    assert chart.redone == 80
    assert Chart(grammar, dtype="float64").labels(tokens, lengths, symbols).tolist() == [1] * 40


def test_blocks_of_all_sizes_and_lengths_agree_with_single_sentences():
    """Lanes that are left over, groups of several tasks, and the order of the sentences change nothing."""
    grammar = Grammar.read(SHIPPED[0])
    tokens, lengths = Sampler(grammar, 12).sample(2500, np.random.default_rng(1))
    chart = Chart(grammar, threads=2)
    rows, offsets = chart.conditionals(tokens, lengths)
    entropy, log_true, _ = chart.reductions(tokens, lengths)
    labels, trees = chart.labels(tokens, lengths, np.arange(9)), chart.parses(tokens, lengths)
    for row in range(0, 2500, 101):
        one = slice(row, row + 1)
        part = slice(offsets[row], offsets[row + 1])
        np.testing.assert_array_equal(chart.conditionals(tokens[one], lengths[one])[0], rows[part])
        np.testing.assert_array_equal(chart.reductions(tokens[one], lengths[one])[0], entropy[part])
        np.testing.assert_array_equal(chart.reductions(tokens[one], lengths[one])[1], log_true[part])
        assert chart.labels(tokens[one], lengths[one], np.arange(9)) == labels[row]
        assert chart.parses(tokens[one], lengths[one])[0] == trees[row]


def test_a_large_right_recursive_grammar():
    """An HMM-like grammar of 300 states and 2,000 words, at 64 words; a few conditionals by substitution."""
    rng = np.random.default_rng(0)
    states, words = 300, 2000
    rules = [("S", (f"q{state}",), 1 / states) for state in range(states)]
    for state in range(states):
        nexts, emitted = rng.choice(states, 5, replace=False), rng.choice(words, 40, replace=False)
        rules += [(f"q{state}", (f"W{state}", f"q{following}"), 0.19) for following in nexts]
        rules += [(f"q{state}", (f"W{state}",), 0.05)]
        rules += [(f"W{state}", (f"w{word}",), 1 / 40) for word in emitted]
    grammar = Grammar.from_rules(rules)
    chart = Chart(grammar)
    tokens, lengths = Sampler(grammar, 64).sample(20, rng, min_words=50)
    assert chart.conditionals(tokens, lengths)[0].shape == (lengths.sum(), len(grammar.words))
    conditionals, offsets = Chart(grammar, dtype="float64").conditionals(tokens[:1], lengths[:1])
    sentence, transition, emission = tokens[0, : lengths[0]], grammar.binary, grammar.emission
    # Plain forward and backward vectors over the states, with the masked position summed out.
    state_of = {name: index for index, name in enumerate(grammar.names)}
    q = np.array([state_of[f"q{state}"] for state in range(states)])
    emitted = emission[[state_of[f"W{state}"] for state in range(states)]]
    moves = np.zeros((states, states))
    place = {int(symbol): index for index, symbol in enumerate(q)}
    for (left, _, right), probability in zip(transition, grammar.binary_probability, strict=True):
        moves[place[int(left)], place[int(right)]] += probability
    forward, backward = [np.full(states, 1 / states)], [np.full(states, 0.05)]
    for word in sentence[:-1]:
        forward.append((forward[-1] * emitted[:, word]) @ moves)
    for word in sentence[:0:-1]:
        backward.append(moves @ (backward[-1] * emitted[:, word]))
    for t in (0, 17, len(sentence) - 1):
        joint = (forward[t] * backward[len(sentence) - 1 - t]) @ emitted
        np.testing.assert_allclose(conditionals[offsets[0] + t], joint / joint.sum(), rtol=1e-9, atol=1e-30)
