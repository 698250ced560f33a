"""Hidden Markov models as grammars, against forward-backward: text, states, conditionals, labels; the command line."""

import itertools
import re
import shlex

import numpy as np
import pytest
from scipy import stats

from pcfg import hmm
from pcfg.chart import Chart
from pcfg.common.files import InputError
from pcfg.grammar import RULES_FOLDER, Grammar
from pcfg.hmm import hmm_grammar
from pcfg.labels import Labeller, hidden_states
from pcfg.sampler import Sampler


class Model:
    """A hidden Markov model and the textbook recursions (Rabiner 1989), in float64 and without scaling."""

    def __init__(self, initial, transition, emission, end=None, length=None):
        self.initial, self.transition, self.emission = initial, transition, emission
        self.end, self.length = end, length

    def ending(self, position):
        """(K,) P(the sentence ends after the word at `position`, from 0 | it got there)."""
        if self.length is None:
            return np.broadcast_to(self.end, len(self.initial))
        tail = self.length[position:].sum()
        return np.full(len(self.initial), self.length[position] / tail if position + 1 < len(self.length) else 1.0)

    def predicted(self, sentence):
        """(T, K) P(x_1 .. x_t-1, z_t)."""
        rows = [self.initial]
        for position, word in enumerate(sentence[:-1]):
            rows.append((rows[-1] * self.emission[:, word] * (1 - self.ending(position))) @ self.transition)
        return np.array(rows)

    def backward(self, sentence):
        """(T, K) P(x_t+1 .. x_T, end | z_t)."""
        rows = [self.ending(len(sentence) - 1)]
        for position in reversed(range(len(sentence) - 1)):
            after = self.emission[:, sentence[position + 1]] * rows[0]
            rows.insert(0, (1 - self.ending(position)) * (self.transition @ after))
        return np.array(rows)

    def joint(self, sentence):
        """(T, K) P(sentence, z_t)."""
        return self.predicted(sentence) * self.emission.T[list(sentence)] * self.backward(sentence)

    def probability(self, sentence):
        return self.joint(sentence)[0].sum()

    def conditionals(self, sentence):
        rows = (self.predicted(sentence) * self.backward(sentence)) @ self.emission
        return rows / rows.sum(axis=1, keepdims=True)

    def grammar(self):
        """Every state and word is used in the models of `random_model`, so words are numbered as in the matrices."""
        words = [f"{word:02}" for word in range(self.emission.shape[1])]
        grammar = hmm_grammar(self.initial, self.transition, self.emission, end=self.end, length=self.length, words=words)
        assert grammar.words == words
        return grammar


def random_model(seed, indexed):
    """Some entries are zero, and some chances of ending; the chain of all states is possible, and ending after it."""
    rng = np.random.default_rng(seed)
    states, words = rng.integers(1, 7), rng.integers(2, 9)

    def rows(number, size):
        drawn = rng.gamma(0.5, size=(number, size)) * (rng.random((number, size)) < 0.7)
        drawn[np.arange(number), (np.arange(number) + 1) % size] += 0.3
        return drawn / drawn.sum(axis=1, keepdims=True)

    initial = rows(1, states)[0]
    transition, emission = rows(states, states), 0.9 * rows(states, words) + 0.1 / words
    if indexed:
        length = rows(1, rng.integers(2, 10))[0]
        return Model(initial, transition, emission, length=length)
    return Model(
        initial, transition, emission, end=np.where(rng.random(states) < 0.2, 0.0, rng.uniform(0.2, 0.6, states)) + 0.05
    )


MODELS = [(seed, indexed) for seed in range(12) for indexed in (False, True)]


@pytest.mark.parametrize(("seed", "indexed"), MODELS)
def test_a_model_as_a_grammar_agrees_with_forward_backward(seed, indexed):
    model = random_model(seed, indexed)
    grammar = model.grammar()
    chart = Chart(grammar, dtype="float64")
    tokens, lengths = Sampler(grammar, 12).sample(20, np.random.default_rng(seed))
    sentences = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
    expected = [model.probability(sentence) for sentence in sentences]
    np.testing.assert_allclose(np.exp(chart.log_probability(tokens, lengths)), expected, rtol=1e-10)
    conditionals, offsets = chart.conditionals(tokens, lengths)
    for sentence, start, stop in zip(sentences, offsets[:-1], offsets[1:], strict=True):
        np.testing.assert_allclose(conditionals[start:stop], model.conditionals(sentence), rtol=1e-10, atol=1e-14)
        posteriors = chart.posteriors(sentence)
        states = model.joint(sentence) / model.probability(sentence)
        for position in range(len(sentence)):
            symbols, ids, names = hidden_states(grammar, position + 1)
            found = np.zeros(len(model.initial))
            found[[int(names[number][1:]) for number in ids]] = posteriors[position, len(sentence), symbols]
            np.testing.assert_allclose(found, states[position], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("seed", "indexed"), MODELS)
def test_labels_are_the_most_likely_states(seed, indexed):
    model = random_model(seed, indexed)
    grammar = model.grammar()
    tokens, lengths = Sampler(grammar, 12).sample(100, np.random.default_rng(seed))
    for position in range(1, min(int(lengths.max()), 6) + 1):
        labeller = Labeller(grammar, "state", position=position)
        assert (labeller.task, labeller.rule, labeller.span) == (f"state{position}", "posterior", None)
        for row, length, label in zip(tokens, lengths, labeller.label(tokens, lengths), strict=True):
            if length < position:
                assert label == -1
                continue
            scores = model.joint(row[:length].tolist())[position - 1]
            chosen = int(labeller.names[label][1:])
            assert scores[chosen] >= scores.max() * (1 - 1e-9)


@pytest.mark.parametrize("law", [{"end": 0.4}, {"length": [0.5, 0.2, 0.3]}])
def test_text_has_the_probabilities_of_the_forward_recursion(law):
    rng = np.random.default_rng(3)
    law = {name: np.array(value) for name, value in law.items()}
    model = Model(*(rng.dirichlet(np.ones(size), number) for number, size in ((1, 3), (3, 3), (3, 2))), **law)
    model.initial = model.initial[0]
    sentences = [s for length in (1, 2, 3) for s in itertools.product(range(2), repeat=length)]
    expected = np.array([model.probability(sentence) for sentence in sentences])
    tokens, lengths = Sampler(model.grammar(), 3).sample(20_000, rng)
    drawn = [tuple(row[:length].tolist()) for row, length in zip(tokens, lengths, strict=True)]
    counts = [drawn.count(sentence) for sentence in sentences]
    assert sum(counts) == 20_000
    assert stats.chisquare(counts, 20_000 * expected / expected.sum()).pvalue > 1e-3


def test_length_laws(tmp_path):
    assert (
        hmm.main(shlex.split(f"--states 3 --words 6 --length-law geometric --mean-length 4 --save-path {tmp_path}/g.txt"))
        is None
    )
    lengths = np.arange(1, 65)
    found = Sampler(Grammar.read(tmp_path / "g.txt"), 64).length_probability[1:]
    np.testing.assert_allclose(found, 0.25 * 0.75 ** (lengths - 1), rtol=1e-6)
    hmm.main(shlex.split(f"--states 3 --words 6 --length-law fixed --max-words 7 --min-words 3 --save-path {tmp_path}/f.txt"))
    found = Sampler(Grammar.read(tmp_path / "f.txt"), 64).length_probability
    np.testing.assert_allclose(found, [0, 0, 0] + [0.2] * 5, rtol=1e-6)


def test_the_file_is_small_and_the_same_for_the_same_command(tmp_path, capsys):
    flags = "--states 4 --words 5 --length-law fixed --max-words 3 --seed 7 --save-path"
    hmm.main([*flags.split(), f"{tmp_path}/a.txt"])
    assert "a.txt: 17 nonterminals, 5 words, 68 rules" in capsys.readouterr().out
    content = (tmp_path / "a.txt").read_text()
    command = content.split("\n")[0].removeprefix("# command: python -m pcfg.hmm ")
    # 4 first states, 2 x 4 x 4 transitions, 3 x 4 endings, 4 x 5 words
    assert len(content.split("\n")) == 2 + 4 + 32 + 12 + 20 + 1
    assert {line.split()[0] for line in content.split("\n")[2:-1]} == {"S"} | {
        *(f"q{state}@{position}" for state in range(4) for position in (1, 2, 3)),
        *(f"W_q{state}" for state in range(4)),
    }
    (tmp_path / "a.txt").unlink()
    hmm.main(shlex.split(command))
    assert (tmp_path / "a.txt").read_text() == content
    hmm.main([*flags.split(), f"{tmp_path}/b.txt", "--seed", "8"])
    assert (tmp_path / "b.txt").read_text().split("\n")[2:] != content.split("\n")[2:]
    assert f"sha256 {Grammar.read(tmp_path / 'a.txt').sha256}" in content


def test_facts_in_the_header_are_those_of_the_states(tmp_path):
    flags = "--states 3 --words 6 --length-law fixed --max-words 4 --min-words 4 --seed 5 --fact-sentences 500"
    hmm.main([*flags.split(), "--save-path", f"{tmp_path}/a.txt"])
    facts = re.findall("# task state \\(position (.)\\): ([0-9]) classes, majority (.*)%", (tmp_path / "a.txt").read_text())
    assert [position for position, *_ in facts] == ["1", "2", "3", "4"]
    grammar = Grammar.read(tmp_path / "a.txt")
    tokens, lengths = Sampler(grammar, 4).sample(2000, np.random.default_rng(3))
    for position, classes, majority in facts:
        counts = np.bincount(Labeller(grammar, "state", position=int(position)).label(tokens, lengths))
        assert int(classes) <= np.count_nonzero(counts) <= 3
        assert abs(counts.max() / counts.sum() - float(majority) / 100) < 4 * (0.25 * (1 / 500 + 1 / 2000)) ** 0.5


def test_words_and_concentrations(tmp_path):
    def made(*flags):
        hmm.main(
            [*"--states 20 --words 50 --length-law geometric --mean-length 5 --save-path".split(), f"{tmp_path}/a.txt", *flags]
        )
        return Grammar.read(tmp_path / "a.txt")

    assert set(made("--words-file", str(RULES_FOLDER / "words.txt")).words) < set(
        (RULES_FOLDER / "words.txt").read_text().split()
    )
    assert made().words == sorted(f"w{number}" for number in range(50))
    flat = made("--transition-concentration", "100", "--emission-concentration", "100")
    peaked = made("--transition-concentration", "0.02", "--emission-concentration", "0.02")
    assert flat.emission.max() < 0.05 < 0.3 < np.median(peaked.emission[21:].max(axis=1))
    assert flat.binary_probability.max() < 0.1 < 0.3 < peaked.binary_probability.max()


def test_a_model_in_nltks_format_comes_back(tmp_path):
    grammar = hmm_grammar([0.5, 0.5], [[0.75, 0.25], [0.5, 0.5]], [[0.5, 0.25, 0.25], [0.125, 0.5, 0.375]], end=0.25)
    (tmp_path / "a.txt").write_text("\n".join(map(str, grammar.to_nltk().productions())))
    assert Grammar.read(tmp_path / "a.txt").sha256 == grammar.sha256


def test_states_that_are_never_reached_are_left_out(recwarn):
    transition = [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0.5, 0.5, 0, 0]]
    emission = np.full((4, 2), 0.5)
    grammar = hmm_grammar([1, 0, 0, 0], transition, emission, end=0.5)
    assert grammar.names == ["S", "q0", "q1", "W_q0", "W_q1"]
    # from q0 only q1, and from it only q0: a state at every position
    grammar = hmm_grammar([1, 0, 0, 0], transition, emission, length=[0, 0, 1, 0])
    assert grammar.names == ["S", "q0@1", "q1@2", "q0@3", "W_q0", "W_q1"] and grammar.longest[0] == 3
    assert not recwarn.list
    symbols, ids, names = hidden_states(grammar, 2)
    assert (symbols.tolist(), ids.tolist(), names) == ([2], [1], ["q0", "q1"])
    with pytest.raises(InputError, match="--position 4: the grammar's sentences have up to 3 words"):
        hidden_states(grammar, 4)


def test_names_that_only_look_like_positions_are_names():
    rules = [("S", ("a@1",), 0.5), ("S", ("b@1",), 0.5), ("W", ("w",), 1.0)]
    rules += [(state, ("W", other), 0.25) for state in ("a@1", "b@1") for other in ("a@1", "b@1")]
    rules += [("a@1", ("W",), 0.5), ("b@1", ("W",), 0.5)]
    symbols, ids, names = hidden_states(Grammar.from_rules(rules), 3)
    assert (symbols.tolist(), ids.tolist(), names) == ([2, 3], [0, 1], ["a@1", "b@1"])


HMM = [("S", ("q",), 1.0), ("q", ("W", "q"), 0.5), ("q", ("W",), 0.5), ("W", ("a",), 0.5), ("W", ("b",), 0.5)]


@pytest.mark.parametrize(
    "changed",
    [
        [("S", ("q",), 0.5), ("S", ("a",), 0.5), *HMM[1:]],  # the start has a word
        [("S", ("W",), 1.0), *HMM[1:]],  # the start is no state
        [("S", ("W", "q"), 1.0), *HMM[1:]],  # the start is a state
        [*HMM[:1], ("q", ("q", "W"), 0.5), *HMM[2:]],  # left-linear
        [*HMM[:1], ("q", ("W", "W"), 0.5), *HMM[2:]],  # ends in a word's symbol
        [*HMM[:1], ("q", ("W", "q"), 0.5), ("q", ("a",), 0.5), *HMM[3:]],  # a state with a word
        [*HMM[:2], ("q", ("X",), 0.5), *HMM[3:], ("X", ("a",), 1.0)],  # a state with two symbols for words
        [*HMM[:3], ("W", ("X",), 0.5), ("W", ("b",), 0.5), ("X", ("a",), 1.0)],  # words behind two symbols
    ],
)
@pytest.mark.filterwarnings("ignore:.*can't be reached")
def test_other_grammars_have_no_states(changed):
    assert hidden_states(Grammar.from_rules(HMM), 5)[2] == ["q"]
    with pytest.raises(InputError, match="--task-type state: the grammar is no hidden Markov model"):
        Labeller(Grammar.from_rules(changed), "state", position=1)


def test_what_the_task_takes():
    grammar = Grammar.from_rules(HMM)
    for arguments, message in (
        ({"task": "state"}, "--position None"),
        ({"task": "B", "position": 2}, "--position 2"),
        ({"task": "state", "position": 2, "span": 3}, "--span 3"),
        ({"task": "state", "position": 2, "rule": "likelihood"}, "--label-rule likelihood"),
    ):
        with pytest.raises(InputError, match=message):
            Labeller(grammar, **arguments)


FAIR = {"initial": [0.5, 0.5], "transition": np.full((2, 2), 0.5), "emission": np.full((2, 3), 1 / 3), "end": 0.5}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"initial": [0.5, 0.6]}, "initial, row 0: probabilities from 0.5 on that add up to 1.1"),
        ({"initial": [1.5, -0.5]}, "initial, row 0: probabilities from -0.5 on"),
        ({"transition": [[1, 0], [np.nan, 1]]}, "transition, row 1"),
        ({"emission": [[1.0], [0.0]]}, "emission, row 1"),
        ({"emission": np.zeros((2, 0))}, "emission, row 0"),
        ({"initial": [1.0]}, r"shapes \(1,\), \(2, 2\) and \(2, 3\)"),
        ({"emission": [0.5, 0.5]}, "shapes"),
        ({"end": None}, "one of `end` and `length`"),
        ({"length": [1.0]}, "one of `end` and `length`"),
        ({"end": 1.5}, "end 1.5: must be from 0 to 1"),
        ({"end": None, "length": [0.0, 0.0]}, "length, row 0"),
        ({"end": 0.0}, "derives no sentence"),
        ({"states": ["a"]}, "1 names of states"),
        ({"states": ["a", "a"]}, "the name 'a' stands for two things"),
        ({"states": ["a", "S"]}, "the name 'S' stands for two things"),
        ({"states": ["a", "#b"]}, "the name '#b'"),
        ({"states": ["a", "b c"]}, "the name 'b c'"),
        ({"states": ["a", "b@2"]}, "the state 'b@2'"),
        ({"words": ["a", "b", "q0"]}, "the name 'q0' stands for two things"),
        ({"words": ["a", "b", ""]}, "the name ''"),
    ],
)
def test_models_that_contradict_themselves_are_refused(changed, message):
    assert len(hmm_grammar(**FAIR).names) == 5
    with pytest.raises(InputError, match=message):
        hmm_grammar(**{**FAIR, **changed})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--length-law geometric", "--length-law geometric: give --mean-length as well"),
        ("--length-law fixed", "--length-law fixed: give --max-words as well"),
        ("--length-law geometric --mean-length 3 --max-words 5", "--max-words 5: has no meaning with --length-law geometric"),
        ("--length-law fixed --max-words 5 --mean-length 2", "--mean-length 2.0: has no meaning"),
        ("--length-law geometric --mean-length 0.5", "--mean-length 0.5: must be 1 or more"),
        ("--length-law geometric --mean-length nan", "--mean-length nan: must be 1 or more"),
        ("--length-law fixed --max-words 5 --min-words 6", "--min-words 6: must be --max-words 5 or less"),
        ("--length-law fixed --max-words 5 --words-file absent.txt", "absent.txt: no such file"),
        (f"--length-law fixed --max-words 5 --words 500 --words-file {RULES_FOLDER}/words.txt", "--words 500: .* has 400"),
    ],
)
def test_command_lines_that_contradict_themselves_are_refused(tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        hmm.main(["--states", "3", "--words", "6", *flags.split(), "--save-path", str(tmp_path / "a.txt")])
    assert not (tmp_path / "a.txt").exists()


def test_concentrations_are_above_0(tmp_path, capsys):
    with pytest.raises(SystemExit):
        hmm.main(["--length-law", "fixed", "--emission-concentration", "0", "--save-path", str(tmp_path / "a.txt")])
    assert "argument --emission-concentration: 0 is not a finite number above 0" in capsys.readouterr().err
