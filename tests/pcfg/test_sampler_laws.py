"""What is drawn follows the grammar: lengths, words and rules against exact values, on three kinds of grammars.

The exact values come from a naive recursion over lengths next to the tests. The rules of a sentence are counted by a plain
reimplementation of the drawing, which must give the sampler's sentences.
"""

import numpy as np
import pytest
from scipy.stats import chi2

from pcfg.common.files import keyed_rng
from pcfg.grammar import RULES_FOLDER, Grammar
from pcfg.sampler import DRAWING, Sampler

# A right sampler fails a test of this size once in a thousand seeds; the seeds are fixed.
LEAST_P = 1e-3
# A wrong expected value must be rejected as clearly as this.
POWER_P = 1e-6
# Counts with a smaller expectation are added up: the chi-square law is one of large numbers.
LEAST_EXPECTED = 50
SENTENCES = 200_000
# Sentences that are drawn a second time, in plain Python.
COUNTED = 10_000

# Left- and right-recursive, with chains of unary rules and words on several levels.
RECURSIVE = [
    *[("S", ("X",), 0.3), ("S", ("S", "X"), 0.2), ("S", ("Y", "S"), 0.15), ("S", ("a",), 0.35)],
    *[("X", ("Y", "Y"), 0.2), ("X", ("Z",), 0.5), ("X", ("c",), 0.3)],
    *[("Z", ("Y",), 0.6), ("Z", ("d",), 0.4)],
    *[("Y", ("a",), 0.1), ("Y", ("b",), 0.6), ("Y", ("e",), 0.3)],
]


def hidden_markov_rules(states, words, stop, seed):
    """State i emits a word and goes on to state j, or stops: X_i -> E_i X_j | E_i."""
    rng = np.random.default_rng(seed)
    rules = [("S", (f"X{i}",), share) for i, share in enumerate(rng.dirichlet(np.ones(states)))]
    for i in range(states):
        rules += [(f"X{i}", (f"E{i}", f"X{j}"), (1 - stop) * p) for j, p in enumerate(rng.dirichlet(np.full(states, 0.5)))]
        rules += [(f"X{i}", (f"E{i}",), stop)]
        rules += [(f"E{i}", (f"w{w:02}",), p) for w, p in enumerate(rng.dirichlet(np.full(words, 0.3)))]
    return rules


def listed_rules(grammar):
    """[(left, left child or -1 - word, right child or -1, probability)], children of unary rules before their parents."""
    rules = [(*rule, p) for rule, p in zip(grammar.binary.tolist(), grammar.binary_probability, strict=True)]
    rules += [(a, b, -1, p) for (a, b), p in zip(grammar.unary.tolist(), grammar.unary_probability, strict=True)]
    rules += [(int(a), -1 - int(w), -1, grammar.emission[a, w]) for a, w in np.argwhere(grammar.emission > 0)]
    unary = np.zeros((len(grammar.names), len(grammar.names)))
    unary[tuple(grammar.unary.T)] = grammar.unary_probability
    closure = np.linalg.matrix_power(np.eye(len(unary)) + unary, len(unary))  # positive where a unary chain leads
    below = (closure > 0).sum(axis=1)  # a child by a unary rule has fewer nonterminals below it
    return sorted(rules, key=lambda rule: below[rule[0]])


class Exact:
    """Law of the length and expected number of uses of each rule in a sentence of at most `limit` words.

    uses[l, A, r] = sum over derivations of l words from A of P(derivation) * (how often it uses rule r).
    """

    def __init__(self, grammar, limit):
        self.grammar, self.rules = grammar, listed_rules(grammar)
        size = len(grammar.names)
        total, uses = np.zeros((limit + 1, size)), np.zeros((limit + 1, size, len(self.rules)))
        for length in range(1, limit + 1):
            for number, (left, first, second, p) in enumerate(self.rules):
                for k in range(1, length) if second >= 0 else ():
                    both = p * total[k, first] * total[length - k, second]
                    total[length, left] += both
                    uses[length, left] += p * uses[k, first] * total[length - k, second]
                    uses[length, left] += p * total[k, first] * uses[length - k, second]
                    uses[length, left, number] += both
                if second < 0 and (first >= 0 or length == 1):
                    one = p * (total[length, first] if first >= 0 else 1.0)
                    total[length, left] += one
                    uses[length, left] += p * uses[length, first] if first >= 0 else 0.0
                    uses[length, left, number] += one
        self.length_probability = total[:, 0]
        self.rule_counts = uses[:, 0].sum(axis=0) / total[:, 0].sum()
        self.word_counts = np.zeros(len(grammar.words))
        for (_, first, _, _), count in zip(self.rules, self.rule_counts, strict=True):
            if first < 0:
                self.word_counts[-1 - first] += count


def distorted(grammar):
    """The same grammar with the last rule of each nonterminal, if it has several, a fifth more likely."""
    rules = listed_rules(grammar)
    last = {left: number for number, (left, *_) in enumerate(rules)}
    weights = [rule[3] * (1.2 if number in last.values() else 1.0) for number, rule in enumerate(rules)]
    sums = np.bincount([left for left, *_ in rules], weights)
    named = []
    for (left, first, second, _), weight in sorted(zip(rules, weights, strict=True)):  # the start symbol comes first
        child = grammar.words[-1 - first] if first < 0 else grammar.names[first]
        right = (child,) if second < 0 else (child, grammar.names[second])
        named.append((grammar.names[left], right, weight / sums[left]))
    return Grammar.from_rules(named)


def plain_draws(grammar, sampler, rng, number):
    """The sentences of `Sampler.sample` and the rules they were made by, one step at a time with Python's integers."""
    state = [int(part) for part in rng.integers(0, 2**64, size=4, dtype=np.uint64)]
    columns, threshold, outcomes = (table.tolist() for table in sampler._rules)
    shortest, mask = grammar.shortest.tolist(), 2**64 - 1

    def rotate(value, bits):
        return ((value << bits) | (value >> (64 - bits))) & mask

    def random_bits():
        """xoshiro256++ as its authors print it."""
        result = (rotate((state[0] + state[3]) & mask, 23) + state[0]) & mask
        shifted = (state[1] << 17) & mask
        state[2] ^= state[0]
        state[3] ^= state[1]
        state[1] ^= state[2]
        state[0] ^= state[3]
        state[2] ^= shifted
        state[3] = rotate(state[3], 45)
        return result

    def derivation():
        """Words and rules; None once the sentence must be too long."""
        stack, words, used = [0], [], []
        while stack:
            symbol = stack.pop()
            if symbol < 0:
                words.append(-1 - symbol)
                continue
            bits = random_bits()
            first, size = columns[symbol]
            column = first + ((bits >> 32) * size >> 32)
            left, right, _ = outcomes[2 * column + (bits % 2**32 >= threshold[column])]
            used.append((symbol, left, right))
            stack += [left] if right < 0 else [right, left]
            if len(words) + sum(1 if waiting < 0 else shortest[waiting] for waiting in stack) > sampler.width:
                return None
        return words, used

    drawn = []
    while len(drawn) < number:
        found = derivation()
        if found is not None:
            drawn.append(found)
    return drawn


def p_value_of_lengths(lengths, probability):
    """Pearson's chi-square of independent lengths against P(length | it is within the limit)."""
    expected = len(lengths) * probability / probability.sum()
    observed = np.bincount(lengths, minlength=len(expected))
    assert (observed[expected == 0] == 0).all()
    common = expected >= LEAST_EXPECTED
    expected, observed = (np.append(x[common], x[~common].sum()) for x in (expected, observed))
    expected, observed = expected[expected > 0], observed[expected > 0]
    return chi2.sf(np.sum((observed - expected) ** 2 / expected), len(expected) - 1)


def p_value_of_counts(counts, expected):
    """Chi-square of mean counts a sentence against their exact values, with the covariance of counts in a sentence.

    Counts of words or rules in one sentence depend on each other, so Pearson's statistic would have another law; this is
    n (mean - expected)^T C^+ (mean - expected), C being the covariance of the counts (n, d). Directions without variance are
    relations between the counts that sentences obey, and that the expected values must obey too.
    """
    number = len(counts)
    assert (counts[:, expected == 0] == 0).all()
    common = number * expected >= LEAST_EXPECTED
    counts = np.column_stack([counts[:, common], counts[:, ~common].sum(axis=1)])
    expected = np.append(expected[common], expected[~common].sum())
    variances, directions = np.linalg.eigh(np.cov(counts, rowvar=False))
    deviation = directions.T @ (counts.mean(axis=0) - expected)
    free = number * variances > LEAST_EXPECTED / 5
    if np.abs(number * deviation[~free]).max(initial=0.0) > LEAST_EXPECTED:
        return 0.0
    return chi2.sf(number * np.sum(deviation[free] ** 2 / variances[free]), free.sum())


def counts_by_sentence(rows, size):
    """(sentences, size): how often each number occurs in each of the lists `rows`."""
    sentence = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    flat = np.concatenate(rows)
    return np.bincount(sentence * size + flat, minlength=len(rows) * size).reshape(len(rows), size)


GRAMMARS = {
    # the shipped mini grammar: layers, 4 to 8 words, once with all lengths and once with a limit
    "layered": (lambda: Grammar.read(RULES_FOLDER / "rule_mini_mlm.txt"), 31),
    "layered, limited": (lambda: Grammar.read(RULES_FOLDER / "rule_mini_mlm.txt"), 7),
    "recursive": (lambda: Grammar.from_rules(RECURSIVE), 9),
    "hidden Markov": (lambda: Grammar.from_rules(hidden_markov_rules(6, 30, 0.1, 0)), 20),
}


@pytest.fixture(scope="module", params=GRAMMARS)
def case(request):
    """Grammar, sampler, exact values, and exact values of a slightly wrong grammar."""
    read, limit = GRAMMARS[request.param]
    grammar = read()
    sampler = Sampler(grammar, limit)
    return grammar, sampler, Exact(grammar, sampler.width), Exact(distorted(grammar), sampler.width)


@pytest.fixture(scope="module")
def drawn(case):
    """200,000 sentences: tokens and lengths."""
    return case[1].sample(SENTENCES, keyed_rng(0, "laws"))


def test_the_law_of_lengths_is_exact(case):
    _, sampler, exact, _ = case
    np.testing.assert_allclose(sampler.length_probability, exact.length_probability, rtol=1e-12, atol=0)
    # what the naive recursion says of the words adds up to what it says of the lengths
    law = exact.length_probability / exact.length_probability.sum()
    assert exact.word_counts.sum() == pytest.approx(law @ np.arange(len(law)), rel=1e-12)


def test_lengths(case, drawn):
    _, _, exact, wrong = case
    assert p_value_of_lengths(drawn[1], exact.length_probability) > LEAST_P
    assert p_value_of_lengths(drawn[1], wrong.length_probability) < POWER_P


def test_words(case, drawn):
    grammar, _, exact, wrong = case
    tokens, lengths = drawn
    rows = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
    counts = counts_by_sentence(rows, len(grammar.words))
    assert p_value_of_counts(counts, exact.word_counts) > LEAST_P
    assert p_value_of_counts(counts, wrong.word_counts) < POWER_P


def test_rules(case):
    grammar, sampler, exact, wrong = case
    found = plain_draws(grammar, sampler, keyed_rng(0, "laws"), COUNTED)
    tokens, lengths = sampler.sample(COUNTED, keyed_rng(0, "laws"))
    assert [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)] == [words for words, _ in found]
    numbers = {rule[:3]: number for number, rule in enumerate(exact.rules)}
    counts = counts_by_sentence([[numbers[rule] for rule in used] for _, used in found], len(numbers))
    assert p_value_of_counts(counts, exact.rule_counts) > LEAST_P
    in_wrong_order = {rule[:3]: count for rule, count in zip(wrong.rules, wrong.rule_counts, strict=True)}
    assert p_value_of_counts(counts, np.array([in_wrong_order[rule] for rule in numbers])) < POWER_P


def test_a_right_linear_grammar_of_hundreds_of_symbols_has_the_geometric_law_of_its_stops():
    stop = 0.05
    grammar = Grammar.from_rules(hidden_markov_rules(150, 2000, stop, 1))
    sampler = Sampler(grammar, 64)
    expected = stop * (1 - stop) ** np.arange(64)
    np.testing.assert_allclose(sampler.length_probability[1:], expected, rtol=1e-12)
    assert sampler.length_probability.sum() == pytest.approx(1 - (1 - stop) ** 64, rel=1e-12)
    assert p_value_of_lengths(sampler.sample(SENTENCES, keyed_rng(1, "laws"))[1], sampler.length_probability) > LEAST_P


def test_the_numbers_of_a_key_never_change():
    """Text that exists must come out the same: with these sentences `DRAWING`, which manifests state, has to change."""
    sampler = Sampler(Grammar.from_rules(RECURSIVE), 9)
    assert sampler.texts(*sampler.sample(5, keyed_rng(0, "laws"))) == ["d b a e", "a", "a", "a b", "a"]
    assert DRAWING == 2
