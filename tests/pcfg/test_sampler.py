"""Sentences drawn from grammars against exact probabilities, limits of length, text; more laws are in test_sampler_laws.py."""

import concurrent.futures

import numpy as np
import pytest

from pcfg.chart import Chart
from pcfg.common.files import InputError, keyed_rng
from pcfg.grammar import Grammar
from pcfg.sampler import Sampler, _alias_table

# Recursive, with a unary chain, unequal probabilities and repeated words.
RECURSIVE = [
    ("S", ("X",), 0.3),
    ("S", ("S", "X"), 0.35),
    ("S", ("a",), 0.35),
    ("X", ("Y", "Y"), 0.2),
    ("X", ("Y",), 0.8),
    ("Y", ("a",), 0.1),
    ("Y", ("b",), 0.6),
    ("Y", ("c",), 0.3),
]
DRAWS = 400_000


def chi_square(observed, expected):
    """Pearson's statistic in standard deviations from its mean, for many degrees of freedom approximately normal."""
    freedom = len(observed) - 1
    return (np.sum((observed - expected) ** 2 / expected) - freedom) / np.sqrt(2 * freedom)


def statistic_of_sentences(grammar, tokens):
    """Chi-square of sampled sentences of at most tokens.shape[1] words against the grammar's exact probabilities."""
    distinct, counts = np.unique(tokens, axis=0, return_counts=True)
    probability = np.exp(Chart(grammar).log_probability(distinct, (distinct >= 0).sum(axis=1)))
    expected = len(tokens) * probability / Sampler(grammar, tokens.shape[1]).length_probability.sum()
    common = expected > 20
    assert common.sum() > 100
    observed = np.append(counts[common], counts[~common].sum())
    return chi_square(observed, np.append(expected[common], len(tokens) - expected[common].sum()))


def test_frequencies_of_sentences_are_their_probabilities():
    grammar = Grammar.from_rules(RECURSIVE)
    tokens, lengths = Sampler(grammar, 6).sample(DRAWS, keyed_rng(0, "test"))
    assert abs(statistic_of_sentences(grammar, tokens)) < 4
    assert (lengths == (tokens >= 0).sum(axis=1)).all()
    # the statistic is sharp enough to tell a slightly different grammar
    shares = {("a",): 0.12, ("b",): 0.58}
    other = [(left, right, shares.get(right, share) if left == "Y" else share) for left, right, share in RECURSIVE]
    assert statistic_of_sentences(Grammar.from_rules(other), tokens) > 4


def test_length_probabilities_are_sums_over_sentences():
    sampler = Sampler(Grammar.from_rules([("S", ("S", "S"), 0.25), ("S", ("a",), 0.75)]), 4)
    # Catalan numbers of trees
    exact = [0, 0.75, 0.25 * 0.75**2, 2 * 0.25**2 * 0.75**3, 5 * 0.25**3 * 0.75**4]
    np.testing.assert_allclose(sampler.length_probability, exact, rtol=1e-14)


def test_limits_of_length_hold_and_condition_the_distribution(tiny_rules):
    grammar = Grammar.read(tiny_rules)
    sampler = Sampler(grammar, 6)
    tokens, lengths = sampler.sample(DRAWS, keyed_rng(2, "test"), min_words=5)
    assert tokens.shape == (DRAWS, 6) and tokens.dtype == lengths.dtype == np.int32
    assert set(lengths.tolist()) == {5, 6}
    share = sampler.length_probability[6] / sampler.length_probability[5:].sum()
    assert np.mean(lengths == 6) == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / DRAWS))
    assert Sampler(grammar, 31).width == 8


def test_the_same_generator_state_gives_the_same_sentences(tiny_rules):
    sampler = Sampler(Grammar.read(tiny_rules), 8)
    first, again, other = (sampler.sample(100, keyed_rng(seed, "test"))[0] for seed in (5, 5, 6))
    assert (first == again).all() and (first != other).any()
    rng = keyed_rng(5, "test")
    assert (sampler.sample(100, rng)[0] == first).all() and (sampler.sample(100, rng)[0] != first).any()


def test_alias_tables_hold_their_probabilities():
    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 100):
        probability = rng.dirichlet(np.full(size, 0.3))
        kept, other = _alias_table(probability)
        assert (kept >= 0).all() and (kept <= 1 + 1e-12).all()
        implied = kept.copy()
        np.add.at(implied, other, 1 - kept)
        np.testing.assert_allclose(implied / size, probability, atol=1e-12)


def test_text_has_the_words_and_an_empty_line_between_sentences():
    grammar = Grammar.from_rules([("S", ("a",), 0.5), ("S", ("S", "S"), 0.25), ("S", ("größe",), 0.25)])
    sampler = Sampler(grammar, 3)
    tokens = np.array([[0, 1, -1], [1, -1, -1], [0, 0, 0]], dtype=np.int32)
    lengths = np.array([2, 1, 3], dtype=np.int32)
    assert sampler.to_text(tokens, lengths).decode() == "a größe\ngröße\na a a\n"
    assert sampler.texts(tokens, lengths) == ["a größe", "größe", "a a a"]
    assert sampler.to_text(tokens[:0], lengths[:0]) == b"" and sampler.texts(tokens[:0], lengths[:0]) == []


# Around the 16 bytes that are moved at once, and beyond, with letters of two and three bytes.
LONG_WORDS = ["a", "b" * 14, "c" * 15, "d" * 16, "e" * 17, "f" * 31, "g" * 32, "h" * 100, "ü" * 8, "語" * 21]


@pytest.mark.parametrize("buffer", [1, 100, 1 << 18])
def test_drawn_text_is_the_text_of_the_drawn_sentences(monkeypatch, buffer):
    """Drawing and spelling at once, in blocks of any size, against drawing first and joining strings."""
    monkeypatch.setattr("pcfg.sampler.TEXT_BUFFER", buffer)
    rules = [("S", ("S", "S"), 0.4), *(("S", (word,), 0.6 / len(LONG_WORDS)) for word in LONG_WORDS)]
    sampler = Sampler(Grammar.from_rules(rules), 20)
    tokens, lengths = sampler.sample(500, keyed_rng(4, "test"))
    assert set(tokens[tokens >= 0].tolist()) == set(range(len(LONG_WORDS)))
    naive = [" ".join(sampler.words[i] for i in row[:n]) for row, n in zip(tokens, lengths, strict=True)]
    assert sampler.texts(tokens, lengths) == naive
    blocks = [(bytes(text), words) for text, words in sampler.draw_text(500, keyed_rng(4, "test"))]
    assert b"\n".join(text for text, _ in blocks).decode() == "\n\n".join(naive) + "\n"
    assert [words for _, words in blocks] == [len(text.split()) for text, _ in blocks]
    assert (
        len(blocks) == {1: 500, 1 << 18: 1}.get(buffer, len(blocks)) and list(sampler.draw_text(0, keyed_rng(4, "test"))) == []
    )


def test_threads_that_share_a_sampler_do_not_disturb_each_other(tiny_rules):
    sampler = Sampler(Grammar.read(tiny_rules), 8)

    def text(seed):
        return b"".join(bytes(block) for block, _ in sampler.draw_text(50_000, keyed_rng(seed, "test")))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(text, range(8))) == [text(seed) for seed in range(8)]


def test_text_encodes_back(tiny_rules):
    grammar = Grammar.read(tiny_rules)
    sampler = Sampler(grammar, 8)
    tokens, lengths = sampler.sample(500, keyed_rng(3, "test"))
    encoded = grammar.encode(sampler.texts(tokens, lengths), "here")
    assert (encoded[0] == tokens).all() and (encoded[1] == lengths).all()


@pytest.mark.parametrize("share", [0.5, 0.6])
def test_an_infinite_expected_length_is_refused(share):
    grammar = Grammar.from_rules([("S", ("S", "S"), share), ("S", ("a",), 1 - share)])
    with pytest.raises(InputError, match=f"nonterminals S produce .*spectral radius {2 * share:.4g}.* infinite"):
        Sampler(grammar, 10)


def test_recursion_through_other_symbols_and_unreachable_recursion():
    rules = [("S", ("X", "a1"), 0.9), ("S", ("a",), 0.1), ("X", ("S", "S"), 1.0), ("a1", ("a",), 1.0)]
    with pytest.raises(InputError, match=r"nonterminals S, X produce"):
        Sampler(Grammar.from_rules(rules), 10)
    with pytest.warns(UserWarning, match="can't be reached"):
        harmless = Grammar.from_rules([("S", ("a",), 1.0), ("U", ("U", "U"), 0.9), ("U", ("a",), 0.1)])
    assert Sampler(harmless, 10).sample(3, keyed_rng(0, "test"))[1].tolist() == [1, 1, 1]
    # a long chain without recursion: its matrix is nilpotent, its eigenvalues as computed are not
    chain = [(f"N{i}", (f"N{i + 1}", f"N{i + 1}"), 1.0) for i in range(5)] + [("N5", ("a",), 1.0)]
    assert Sampler(Grammar.from_rules(chain), 40).sample(1, keyed_rng(0, "test"))[1].tolist() == [32]


def test_hopeless_limits_are_refused(tiny_rules):
    grammar = Grammar.read(tiny_rules)
    with pytest.raises(InputError, match="0 of the grammar's sentences have 1 to 3 words"):
        Sampler(grammar, 3)
    with pytest.raises(InputError, match="0 of the grammar's sentences have 9 to 8 words"):
        Sampler(grammar, 31).sample(1, keyed_rng(0, "test"), min_words=9)
    rare = Grammar.from_rules([("S", ("A", "A"), 1.0), ("A", ("A", "A"), 1e-5), ("A", ("a",), 1 - 1e-5)])
    with pytest.raises(InputError, match="2e-05 of the grammar's sentences have 3 to 10 words"):
        Sampler(rare, 10).sample(1, keyed_rng(0, "test"), min_words=3)
