import functools
import hashlib
import itertools

import numpy as np
import pytest
from scipy import stats

from pcfg.chart import Chart
from pcfg.common.files import InputError
from pcfg.grammar import RULES_FOLDER, Grammar
from pcfg.labels import LabelledSentences, Labeller, default_min_words
from pcfg.sampler import Sampler

SHIPPED = sorted(RULES_FOLDER.glob("rule_*.txt"))
TASKS = {"A": None, "B": 4, "C": 2}
SLICES = {span: span for span in ("1:3", "-3:", "1:-1", "-4:3")}


def cyk_labels(grammar, words, spans):
    """Labels by CYK over dictionaries of symbol names, the definition word for word: {task: id or -1}."""
    names = grammar.names
    emission, unary, binary = {}, [], {}
    for symbol, word in np.argwhere(grammar.emission > 0):
        emission.setdefault(grammar.words[word], []).append((names[symbol], grammar.emission[symbol, word]))
    for (parent, child), probability in zip(grammar.unary.tolist(), grammar.unary_probability, strict=True):
        unary.append((names[parent], names[child], probability))
    for (parent, left, right), probability in zip(grammar.binary.tolist(), grammar.binary_probability, strict=True):
        binary.setdefault((names[left], names[right]), []).append((names[parent], probability))

    def with_chains(cell):
        added = dict(cell)
        while added:
            fresh = {}
            for parent, child, probability in unary:
                if child in added:
                    fresh[parent] = fresh.get(parent, 0.0) + probability * added[child]
            for symbol, value in fresh.items():
                cell[symbol] = cell.get(symbol, 0.0) + value
            added = fresh
        return cell

    chart = {(i, i + 1): with_chains(dict(emission.get(word, []))) for i, word in enumerate(words)}
    for width in range(2, len(words) + 1):
        for i in range(len(words) - width + 1):
            cell = {}
            for k in range(i + 1, i + width):
                for left, left_value in chart[i, k].items():
                    for right, right_value in chart[k, i + width].items():
                        for parent, probability in binary.get((left, right), []):
                            cell[parent] = cell.get(parent, 0.0) + probability * left_value * right_value
            chart[i, i + width] = with_chains(cell)

    labels = {}
    for task, span in spans.items():
        candidates = [child for parent, child, _ in unary if parent == names[0]] if task == "A" else sorted(names)
        cell = chart.get(cell_of(span, len(words)), {})
        best = max((cell.get(name, 0.0) for name in candidates), default=0.0)
        labels[task] = next((i for i, name in enumerate(candidates) if best and cell.get(name, 0) >= best * (1 - 1e-9)), -1)
    return labels


def cell_of(span, length):
    """Start and stop of a number of words, or of the task span's slice by Python's own slicing; None where it is cut short."""
    if not isinstance(span, str):
        return 0, span or length
    start, stop = (int(part) if part else None for part in span.split(":"))
    places = range(length)[start:stop]
    complete = all(bound is None or -length <= bound <= length for bound in (start, stop))
    return (places[0], places[-1] + 1) if len(places) and complete else None


def check_labels(grammar, tokens, lengths, spans=TASKS):
    """Compare the labels of every sentence with those of CYK; returns them by task."""
    texts = [[grammar.words[word] for word in row[:length]] for row, length in zip(tokens, lengths, strict=True)]
    expected = [cyk_labels(grammar, text, spans) for text in texts]
    labellers = {task: Labeller(grammar, "span" if ":" in task else task, span) for task, span in spans.items()}
    found = {task: labeller.label(tokens, lengths).tolist() for task, labeller in labellers.items()}
    assert found == {task: [labels[task] for labels in expected] for task in spans}
    return found


def sentences(grammar, max_words):
    return Sampler(grammar, max_words).sample(200, np.random.default_rng(5), default_min_words(grammar))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_labels_of_shipped_grammars_equal_cyk(path):
    grammar = Grammar.read(path)
    found = check_labels(grammar, *sentences(grammar, 31))
    assert all(len(labels) == 200 and len(set(labels)) > 3 for labels in found.values())


def test_labels_of_the_published_grammar_equal_cyk(published_rules):
    grammar = Grammar.read(published_rules)
    assert all(len(set(labels)) > 3 for labels in check_labels(grammar, *sentences(grammar, 31)).values())


def test_labels_of_random_grammars_equal_cyk(random_grammars):
    """On random strings, since many of these grammars have sentences of infinite expected length; some strings are none."""
    rng = np.random.default_rng(5)
    found = []
    for grammar in random_grammars:
        lengths = rng.integers(2, 9, size=200)
        tokens = rng.integers(len(grammar.words), size=(200, 8))
        spans = SLICES | (TASKS if (grammar.unary[:, 0] == 0).any() else {"B": 4, "C": 2})
        found.append(check_labels(grammar, tokens, lengths, spans))
    for task in TASKS | SLICES:
        labels = [set(labels[task]) for labels in found if task in labels]
        assert sum(len(names - {-1}) > 1 for names in labels) >= 5  # there was something to tell apart
        assert sum(-1 in names for names in labels) >= 3


@pytest.fixture(scope="module")
def recursive():
    """Recursive, with chains of two unary rules, and names that sort in another order than they appear."""
    return Grammar.from_rules(
        [
            ("S", ("T2",), 0.3),
            ("S", ("T1",), 0.7),
            ("T2", ("X", "X"), 0.6),
            ("T2", ("A", "T1"), 0.4),
            ("T1", ("X", "A"), 0.7),
            ("T1", ("S", "A"), 0.3),
            ("X", ("A",), 0.5),
            ("X", ("x",), 0.2),
            ("X", ("X", "X"), 0.3),
            ("A", ("B",), 0.5),
            ("A", ("y",), 0.5),
            ("B", ("x",), 0.6),
            ("B", ("z",), 0.4),
        ]
    )


def test_labels_of_a_recursive_grammar_equal_cyk(recursive):
    found = check_labels(recursive, *sentences(recursive, 12), {"A": None, "B": 3, "C": 1})
    assert all(len(set(labels)) > 1 for labels in found.values())


def all_parses(grammar, sentence):
    """(probability, rules from the root to the deepest word) of every parse of a sentence, rule by rule."""
    unary = list(zip(grammar.unary.tolist(), grammar.unary_probability, strict=True))
    binary = list(zip(grammar.binary.tolist(), grammar.binary_probability, strict=True))

    @functools.cache
    def parses(symbol, i, j):
        ways = []
        if j == i + 1 and grammar.emission[symbol, sentence[i]] > 0:
            ways.append((grammar.emission[symbol, sentence[i]], 1))
        for (parent, child), probability in unary:
            if parent == symbol:
                ways += [(probability * value, 1 + depth) for value, depth in parses(child, i, j)]
        for (parent, left, right), probability in binary:
            for k in range(i + 1, j) if parent == symbol else ():
                pairs = itertools.product(parses(left, i, k), parses(right, k, j))
                ways += [(probability * first * second, 1 + max(a, b)) for (first, a), (second, b) in pairs]
        return ways

    return parses(0, 0, len(sentence))


def check_depths(grammar, tokens, lengths):
    """Compare the depth of the best parse with enumeration; returns depths, and the mean number of parses of a sentence."""
    labeller = Labeller(grammar, "depth")
    depths = labeller.label(tokens, lengths)
    parses = [all_parses(grammar, row[:length].tolist()) for row, length in zip(tokens, lengths, strict=True)]
    for depth, ways in zip(depths.tolist(), parses, strict=True):
        best = max((probability for probability, _ in ways), default=0.0)
        # Several parses may be equally probable.
        assert depth in ({deep for probability, deep in ways if probability >= best * (1 - 1e-9)} or {-1})
        assert all(labeller.names[deep] == str(deep) for _, deep in ways)
    return depths, np.mean([len(ways) for ways in parses])


def test_depths_of_best_parses_equal_enumeration(random_grammars, recursive):
    rng = np.random.default_rng(8)
    kinds = []
    for grammar in random_grammars:
        depths, _ = check_depths(grammar, rng.integers(len(grammar.words), size=(20, 3)), rng.integers(1, 4, size=20))
        kinds.append(set(depths.tolist()))
    assert sum(-1 in depths for depths in kinds) >= 3 and sum(len(depths - {-1}) > 1 for depths in kinds) >= 5
    tokens, lengths = Sampler(recursive, 5).sample(30, np.random.default_rng(9))
    depths, ways = check_depths(recursive, tokens, lengths)
    assert (depths > 0).all() and len(set(depths.tolist())) > 3 and ways > 5


def test_depths_equal_the_heights_of_nltk_trees(recursive):
    tokens, lengths = Sampler(recursive, 12).sample(200, np.random.default_rng(10))
    heights = [tree.height() - 1 for tree in Chart(recursive).parses(tokens, lengths)]
    assert Labeller(recursive, "depth").label(tokens, lengths).tolist() == heights and len(set(heights)) > 5


@pytest.mark.parametrize(("task", "span"), [("A", None), ("B", 3), ("C", None), ("span", "1:-1"), ("span", "-2:")])
def test_posterior_labels_equal_naive_inside_times_outside(recursive, naive, task, span):
    tokens, lengths = Sampler(recursive, 7).sample(60, np.random.default_rng(6), min_words=5)
    labeller = Labeller(recursive, task, span, "posterior")
    found = labeller.label(tokens, lengths)
    order = [recursive.names.index(name) for name in labeller.names]
    reference, expected = naive(recursive), []
    for row, length in zip(tokens, lengths, strict=True):
        sentence = row[:length]
        cell = cell_of({"A": None, "B": 3, "C": 2, "span": span}[task], int(length))
        score = (reference.inside(sentence)[cell] * reference.outside(sentence, *cell))[order]
        expected.append(int(np.argmax(score >= score.max() * (1 - 1e-9))))
    assert found.tolist() == expected
    assert found.tolist() != Labeller(recursive, task, span).label(tokens, lengths).tolist()


def test_names_and_ids(recursive):
    assert Labeller(recursive, "A").names == ["T2", "T1"]
    assert Labeller(recursive, "B").names == ["A", "B", "S", "T1", "T2", "X"]
    assert (Labeller(recursive, "B").span, Labeller(recursive, "C").span) == (4, 2)


def test_ties_take_the_lowest_id_even_when_sums_round_differently():
    """Y derives two words with 0.3, Z with 0.1 + 0.2, which is 0.30000000000000004 in binary."""
    grammar = Grammar.from_rules(
        [("S", ("Y",), 0.5), ("S", ("Z",), 0.5), ("Y", ("A", "A"), 0.3), ("Y", ("C", "C"), 0.7)]
        + [("Z", ("A", "A"), 0.1), ("Z", ("A", "B"), 0.2), ("Z", ("C", "C"), 0.7)]
        + [(name, (word,), 0.5) for name in "AB" for word in "ab"]
        + [("C", ("c",), 1.0)]
    )
    labeller = Labeller(grammar, "A")
    tokens, lengths = np.array([[0, 0], [0, 1]]), np.array([2, 2])
    scores = Chart(grammar).span_scores(tokens, lengths, None)
    assert (scores[:, grammar.names.index("Z")] > scores[:, grammar.names.index("Y")]).all()
    assert labeller.names == ["Y", "Z"]
    assert labeller.label(tokens, lengths).tolist() == [0, 0]
    # sorted by name, S (0.5 x 0.3 + 0.5 x 0.3) ties too, and comes before Y and Z
    assert Labeller(grammar, "C").label(tokens, lengths).tolist() == [3, 3]


def test_a_span_that_nothing_derives_has_no_label(recursive):
    tokens, lengths = Sampler(recursive, 6).sample(5, np.random.default_rng(0), min_words=5)
    assert Labeller(recursive, "B", 20).label(tokens, lengths).tolist() == [-1] * 5


def test_what_task_a_cannot_do(recursive):
    with pytest.raises(InputError, match="--span 3: task A labels whole sentences"):
        Labeller(recursive, "A", 3)
    flat = Grammar.from_rules([("S", ("A", "A"), 1.0), ("A", ("a",), 1.0)])
    with pytest.raises(InputError, match="start symbol 'S' has no unary rules"):
        Labeller(flat, "A")
    with pytest.raises(InputError, match="--span 65: must be 64 or less"):
        Labeller(recursive, "B", 65)
    assert Labeller(flat, "span", ":").names == ["A", "S"]  # the way out that the message names


def naive_hash(seed, text):
    """SplitMix64's finaliser over the words, on Python's integers."""
    value, mask = 0, 2**64 - 1
    for word in text.split():
        value = (value + int.from_bytes(hashlib.sha256(f"{seed} {word}".encode()).digest()[:8], "big")) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        value ^= value >> 31
    return value


def test_splits_share_no_sentence_and_keep_frequencies(recursive):
    labeller, sampler = Labeller(recursive, "C", 1), Sampler(recursive, 8)
    numbers = {"training": 3000, "validation": 1000}
    drawn = LabelledSentences(sampler, labeller, numbers, 0, 5)
    rows = {split: drawn.draw(split) for split in numbers}
    texts = {split: list(found.texts()) for split, found in rows.items()}
    assert not set(texts["training"]) & set(texts["validation"])
    for split, number in numbers.items():
        assert len(texts[split]) == len(rows[split].labels) == number and rows[split].dropped == 0
        assert rows[split].distinct == len(set(texts[split])) < number
        assert all(5 <= len(text.split()) <= 8 for text in texts[split])
        assert all((naive_hash(0, text) < 2**62) == (split == "validation") for text in texts[split])
        assert rows[split].labels.tolist() == labeller.label(*recursive.encode(texts[split], "here")).tolist()
    assert list(LabelledSentences(sampler, labeller, numbers, 0, 5).draw("validation").texts()) == texts["validation"]
    assert list(LabelledSentences(sampler, labeller, numbers, 1, 5).draw("validation").texts()) != texts["validation"]


def test_a_third_split_shares_no_sentence_with_the_others(recursive):
    labeller, sampler = Labeller(recursive, "C", 1), Sampler(recursive, 8)
    numbers = {"training": 2000, "validation": 1000, "adversarial": 1000}
    drawn = LabelledSentences(sampler, labeller, numbers, 0, 5)
    rows = {split: list(drawn.draw(split).texts()) for split in numbers}
    bounds = {"validation": (0, 2**62), "adversarial": (2**62, 2**63), "training": (2**63, 2**64)}
    for split, texts in rows.items():
        least, beyond = bounds[split]
        assert len(texts) == numbers[split] and all(least <= naive_hash(0, text) < beyond for text in texts)


def test_hashes_tell_sentences_apart_and_divide_them_evenly():
    grammar = Grammar.read(RULES_FOLDER / "rule_deep_mlm.txt")
    sampler = Sampler(grammar, 16)
    tokens, lengths = sampler.sample(50_000, np.random.default_rng(1))
    found = LabelledSentences(sampler, Labeller(grammar, "C"), {"training": 1, "validation": 1}, 5, 1).hashes(tokens, lengths)
    texts = sampler.texts(tokens, lengths)
    assert found[:100].tolist() == [naive_hash(5, text) for text in texts[:100]]
    distinct = np.unique(found)
    assert len(distinct) == len(set(texts)) == len(set(zip(texts, found.tolist(), strict=True)))
    counts = np.bincount((distinct >> np.uint64(60)).astype(int), minlength=16)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_published_class_counts_and_majorities(published_rules):
    """9, 29 and 39 classes with majorities of 20.3, 21.2 and 14.3% at 5 words and more.

    How many of the rare classes turn up depends on the number of sentences.
    """
    grammar = Grammar.read(published_rules)
    tokens, lengths = Sampler(grammar, 31).sample(20_000, np.random.default_rng(7), min_words=5)
    for task, (least, most), majority in (("A", (9, 9), 0.203), ("B", (24, 30), 0.212), ("C", (36, 40), 0.143)):
        labels = Labeller(grammar, task).label(tokens, lengths)
        counts = np.bincount(labels[labels >= 0])
        share = counts.max() / len(labels)
        assert (labels >= 0).all()
        assert least <= np.count_nonzero(counts) <= most
        # 4 standard errors of ours, and as much for the rounded figures that we compare with
        assert abs(share - majority) < 4 * np.sqrt(share * (1 - share) / len(labels)) + 0.005
