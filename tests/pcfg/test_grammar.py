"""Reading grammars: both formats, every error, the derived arrays."""

import itertools
from pathlib import Path

import nltk
import numpy as np
import pytest

from pcfg import grammar as grammar_module
from pcfg.chart import Chart
from pcfg.common.files import InputError
from pcfg.engine.rule_graph import UNBOUNDED
from pcfg.grammar import Grammar, find_rules

PUBLISHED_RULES = Path(__file__).parents[3] / "shared" / "data" / "rule_deep_mlm.txt"
SMALL = """\
# a comment
S X 0.5
S Y 0.5

X Y 0.25
X Z Z 0.75
Y Z X 0.1
Y b 0.9
Z a 0.6
Z b 0.4
"""


def read(tmp_path, text):
    path = tmp_path / "rules.txt"
    path.write_text(text)
    return Grammar.read(path)


def test_the_arrays_of_a_small_grammar(tmp_path):
    grammar = read(tmp_path, SMALL)
    assert grammar.names == ["S", "X", "Y", "Z"] and grammar.words == ["a", "b"]
    assert grammar.unary.tolist() == [[0, 1], [0, 2], [1, 2]]
    assert grammar.unary_probability.tolist() == [0.5, 0.5, 0.25]
    # sorted by (left child, right child, left side)
    assert grammar.binary.tolist() == [[2, 3, 1], [1, 3, 3]]
    np.testing.assert_allclose(grammar.binary_probability, [0.1, 0.75])
    np.testing.assert_allclose(grammar.emission, [[0, 0], [0, 0], [0, 0.9], [0.6, 0.4]])
    # closure[A, B] = sum over all unary chains from A to B of their probability, children's own rules first
    closure = np.eye(4)
    for (left, child), probability in zip(grammar.chains.steps, grammar.chains.probability, strict=True):
        closure[left] += probability * closure[child]
    # S =>* Y: directly, or by X
    assert closure[0].tolist() == [1, 0.5, 0.5 + 0.5 * 0.25, 0]
    unary = np.zeros((4, 4))
    unary[tuple(grammar.unary.T)] = grammar.unary_probability
    np.testing.assert_allclose(closure, np.linalg.inv(np.eye(4) - unary), atol=1e-15)
    assert grammar.shortest.tolist() == [1, 1, 1, 1]
    assert grammar.longest.tolist() == [UNBOUNDED, UNBOUNDED, UNBOUNDED, 1]
    assert [array.dtype.name for array in (grammar.binary, grammar.unary, grammar.shortest)] == ["int32", "int32", "int64"]


def test_yield_lengths_without_recursion(tiny_rules):
    grammar = Grammar.read(tiny_rules)
    lengths = dict(zip(grammar.names, zip(grammar.shortest.tolist(), grammar.longest.tolist(), strict=True), strict=True))
    expected = {"S": (4, 8), "S3": (4, 8), "A0": (3, 4), "A1": (1, 4), "A2": (2, 4), "B0": (1, 2), "B2": (2, 2), "C1": (1, 1)}
    assert {name: lengths[name] for name in expected} == expected


def test_repeated_rules_add_up_and_left_sides_are_normalised(tmp_path):
    grammar = read(tmp_path, "S A A 0.4\nS A B 0.2\nS A A 0.395\nA a 1\nB b 0.5\nB b 0.5\n")
    np.testing.assert_allclose(grammar.binary_probability, [0.795 / 0.995, 0.2 / 0.995], rtol=1e-15)
    assert grammar.emission.tolist() == [[0, 0], [1, 0], [0, 1]]


def test_the_hash_is_of_the_meaning_and_not_of_the_file(tmp_path):
    first = read(tmp_path, "S A A 0.5\nS A B 0.5\nA a 1\nB b 1\n").sha256
    assert read(tmp_path, "# other\nS A B 0.25\nB b 1\nS A A 0.5\nA a 1.0\nS A B 0.25\n").sha256 == first
    assert read(tmp_path, "S A A 0.6\nS A B 0.4\nA a 1\nB b 1\n").sha256 != first
    # the same rules with another start symbol are another language
    first, second = "S T T 0.1\nS a 0.9\n", "T S S 0.1\nT a 0.9\n"
    assert read(tmp_path, first + second).sha256 != read(tmp_path, second + first).sha256


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("", 1, "no rules"),
        ("# only a comment\n\n", 1, "no rules"),
        ("S a\n", 1, "2 fields in 'S a'; a rule is .*; if its right side is empty, an empty X .*, times p; then divide"),
        ("# c\nS A B C 1.0\n", 2, "5 fields"),
        ("S a 0.5\nS b half\n", 2, "'half' is not a number"),
        ("S a 0.5\nS b -0.5\n", 2, "probability -0.5"),
        ("S a nan\n", 1, "probability nan"),
        ("S a inf\n", 1, "probability inf"),
        ("S a 1.00000001\n", 1, "probability 1.00000001"),
        ("S A A 1\n\nA a 0.5\nA b 0.48\n", 3, "'A' add up to 0.98, which is 0.02"),
        ("S a 0.9\nS b 0.2\n", 1, "'S' add up to 1.1, which is 0.10000000000000009 from 1; at most 0.01 is allowed"),
        ("S a 0.33\nS b 0.33\nS c 0.33\n", 1, "'S' add up to 0.99, which is 0.010000000000000009 from 1; at most 0.01 is"),
        ("S a 0.9899999\n", 1, "'S' add up to 0.9899999, which is 0.010000099999999956 from 1"),
        ("S A a 1\nA a 1\n", 1, "'a' in a binary rule is a word"),
        (
            "S A 1\nA B 1\nB A 1\n",
            2,
            "the unary rules 'A' -> 'B', 'B' -> 'A' form a cycle that is never left .spectral radius 1,",
        ),
        ("S S 1.0\nS a 0.0\n", 1, "the unary rules 'S' -> 'S' form a cycle"),
        ("S a 0.5\nS X 0.5\nX X 0.9999999999999\nX x 1e-13\n", 3, "'X' -> 'X' form a cycle that is never left .*radius 1,"),
        ("S a 0.5\nS X 0.5\nX X X 1\n", 3, "'X' derives no sentence"),
        ("S X Y 1\nX a 1\nY X Z 1\nZ Y X 1\n", 1, "'S' derives no sentence"),
    ],
)
def test_faulty_grammars_are_refused_with_file_and_line(tmp_path, text, line, message):
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path}/rules.txt:{line}: ")


def test_probabilities_within_rounding_of_one_and_rules_of_probability_zero(tmp_path):
    grammar = read(tmp_path, "S A A 1.0000000005\nA a 1\nA never 0\nA S 0\n")
    assert grammar.words == ["a"] and grammar.unary.shape == (0, 2) and grammar.longest.tolist() == [2, 1]


def test_a_list_of_rules_is_checked_like_a_file():
    with pytest.raises(InputError, match="mine:2: 3 symbols"):
        Grammar.from_rules([("S", ("A", "A"), 1.0), ("A", ("a", "b", "c"), 1.0)], "mine")
    with pytest.raises(InputError, match="mine:1: probability 2.0"):
        Grammar.from_rules([("S", ("a",), 2.0)], "mine")


def test_unreachable_symbols_are_warned_of(tmp_path):
    with pytest.warns(UserWarning, match=r"rules.txt:3: 2 nonterminals can't be reached .* 'S' .*: X, Y"):
        grammar = read(tmp_path, "S A A 1\nA a 1\nX Y Y 1\nY a 1\n")
    assert grammar.names == ["S", "A", "X", "Y"]


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        Grammar.read(tmp_path / "absent.txt")
    (tmp_path / "rules.txt").write_bytes(b"S a 0.5\nS \xff 0.5\n")
    with pytest.raises(InputError, match="rules.txt:2: not UTF-8"):
        Grammar.read(tmp_path / "rules.txt")


def test_nltk_reads_what_we_give_it_and_we_read_what_it_prints(tmp_path, tiny_rules):
    grammar = Grammar.read(tiny_rules)
    converted = grammar.to_nltk()
    assert isinstance(converted, nltk.PCFG) and converted.start().symbol() == "S"
    assert len(converted.productions()) == len(grammar.binary) + len(grammar.unary) + np.count_nonzero(grammar.emission)
    again = read(tmp_path, "\n".join(map(str, converted.productions())))
    assert (again.names, again.words) == (grammar.names, grammar.words)
    for name in ("binary", "binary_probability", "unary", "unary_probability", "emission"):
        # nltk prints six digits
        np.testing.assert_allclose(getattr(again, name), getattr(grammar, name), rtol=1e-5)


def nltk_probability(productions, sentence):
    """The sum over all trees of `sentence`, by expanding every derivation: rules of any length, words among symbols."""
    by_left = {}
    for production in productions:
        by_left.setdefault(production.lhs(), []).append(production)

    def derive(symbols, words):
        if not symbols:
            return float(not words)
        if len(symbols) > len(words):
            return 0.0
        first, rest = symbols[0], symbols[1:]
        if isinstance(first, str):
            return derive(rest, words[1:]) if words[0] == first else 0.0
        return sum(rule.prob() * derive((*rule.rhs(), *rest), words) for rule in by_left[first])

    return derive((productions[0].lhs(),), tuple(sentence))


def test_rules_of_any_length_are_binarised_and_keep_the_probability_of_every_sentence(tmp_path):
    text = """
    # S is not the first left side
    NP -> 'the' N PP [0.2] | 'the' N [0.5] | N [0.3]
    %start S
    S -> NP V NP [0.5] | NP V NP 'now' [0.25] | \\
         NP 'the' N [0.25]
    PP -> 'on' 'the' N [1.0]
    N -> 'cat' [0.5] | 'mat' [0.5]
    V -> 'sees' [1.0]
    """
    grammar = read(tmp_path, text)
    assert grammar.names[0] == "S" and "now" in grammar.words and "word:the" in grammar.names
    productions = nltk.PCFG.fromstring(text.replace("# S is", "#")).productions()
    productions = sorted(productions, key=lambda production: production.lhs().symbol() != "S")
    words = sorted({symbol for production in productions for symbol in production.rhs() if isinstance(symbol, str)})
    sentences = [" ".join(s) for n in (3, 4, 5) for s in itertools.product(words, repeat=n)]
    rng = np.random.default_rng(0)
    chosen = ["the cat sees mat", "cat sees the mat on the cat now", "mat the cat", "the mat the cat", "cat sees mat"]
    chosen += rng.choice(sentences, 200).tolist()
    expected = [nltk_probability(productions, sentence.split()) for sentence in chosen]
    found = np.exp(Chart(grammar).log_probability(*grammar.encode(chosen, "here")))
    assert min(expected[:5]) > 0
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("S -> A [0.5]\nA - 'a' [1.0]\n", r"""rules.txt:2: "A - 'a' \[1.0\]" is no rule"""),
        ("S -> 'a [1.0]\n", r"""rules.txt:1: can't read "'a \[1.0\]";"""),
        ("S -> 'a' [1.5]\n", "rules.txt:1: probability 1.5"),
        ("S -> 'a' [half]\n", "rules.txt:1: probability 'half' is not a number"),
        ("S -> 'a' [0.5] | [0.5]\n", "rules.txt:1: a right side of .* is empty; an empty X .* split each rule with X"),
        ("S -> 'a' [0.5]\nA -> '' [1.0]\n", "rules.txt:2: a right side of .* is empty; an empty X .* split each rule with X"),
        ("S -> A A [1.0]\nA -> 'a' | 'b' [1.0]\n", r"rules.txt:2: the rule \"A -> 'a'\" has no probability; .*\[0.5\]"),
        ("S -> NP VP\nNP -> 'a'\n", "rules.txt:1: the rule 'S -> NP VP' has no probability"),
        ("S->A A [1.0]\nA -> 'a' [1.0]\n", "rules.txt:1: 'S->A A .1.0.' is no rule; .* with spaces around ->"),
        ("S -> A @B [1.0]\n", r"can't read '@B \[1.0\]'; there should be a symbol \(letters, digits, _ / \^ < > -\)"),
        ("S -> " + "'a' " * 65 + "[1.0]\n", "rules.txt:1: 65 symbols on the right"),
        ("S -> 'a' [1.0] |\\\n'b' [0.0] \\", "rules.txt:2: the file ends in a line that is to go on"),
        ("%stop S\nS -> 'a' [1.0]\n", "rules.txt:1: '%stop S' is no directive"),
        ("S -> A [1.0]\n", "rules.txt:1: 'A' has no rule"),
        ("S -> 'New York' [1.0]\n", "rules.txt:1: the word 'New York'"),
        ("S -> N [1.0]\nN -> 'S' [1.0]\n", "rules.txt:2: 'S' is a word and a nonterminal"),
        ("%start X\nS -> 'a' [1.0]\n", "the start symbol 'X' has no rule"),
        ("S -> A B [1.0]\nA -> 'a' [1.0]\n", "rules.txt:1: 'B' has no rule"),
        ("S -> A A [1.0]\n\nA -> 'a' [0.5] | 'b' [0.4]\n", "rules.txt:3: .*'A' add up to 0.9"),
    ],
)
def test_faulty_grammars_in_nltk_format_are_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, text)


def test_encoding_and_its_errors(tmp_path):
    grammar = read(tmp_path, SMALL)
    tokens, lengths = grammar.encode(["a b b", "b", " b  a "], "here.txt")
    assert tokens.tolist() == [[0, 1, 1], [1, -1, -1], [1, 0, -1]] and lengths.tolist() == [3, 1, 2]
    assert tokens.dtype == lengths.dtype == np.int32
    with pytest.raises(InputError, match="here.txt: sentence 2: word 'zebra' is not in the grammar"):
        grammar.encode(["a b", "b zebra", "lion"], "here.txt")
    with pytest.raises(InputError, match="here.txt: sentence 2: no words; remove it"):
        grammar.encode(["a b", " "], "here.txt")
    assert grammar.encode([], "here.txt")[0].shape == (0, 0)


def test_names_of_grammars_resolve_and_are_announced(tmp_path, monkeypatch, capsys):
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    (shipped / "rule_a.txt").write_text("# command: x\n# entropy: 1.234 nats (pairs), 1.200 nats (sentences)\nS a 1\n")
    monkeypatch.setattr(grammar_module, "RULES_FOLDER", shipped)
    monkeypatch.chdir(tmp_path)
    assert find_rules("rule_a.txt") == shipped / "rule_a.txt"
    announced = "rule_a.txt: shipped grammar, not the paper's; entropy 1.234 nats (pairs), 1.200 nats (sentences)\n"
    assert capsys.readouterr().out == announced
    assert find_rules("shipped/rule_a.txt").samefile(shipped / "rule_a.txt")
    assert capsys.readouterr().out == announced
    # a file in the working directory comes first
    (tmp_path / "rule_a.txt").write_text("S b 1\n")
    assert str(find_rules("rule_a.txt")) == "rule_a.txt"
    assert capsys.readouterr().out == "rule_a.txt: grammar file of 6 bytes\n"
    with pytest.raises(InputError, match=r"other/rule_a.txt: no such grammar file; shipped are: rule_a.txt"):
        find_rules("other/rule_a.txt")
    with pytest.raises(InputError, match="shipped are: rule_a.txt"):
        find_rules("rule_b.txt")


@pytest.mark.skipif(not PUBLISHED_RULES.exists(), reason="the published grammar is not at hand")
def test_the_published_grammar_is_read_with_its_repeated_rules_and_rounded_sums():
    with pytest.warns(UserWarning, match=":207: 1 nonterminals can't be reached .*: A1_9"):
        grammar = Grammar.read(PUBLISHED_RULES)
    assert (len(grammar.names), len(grammar.words), grammar.longest[0]) == (50, 200, 16)
    assert len(grammar.binary) + len(grammar.unary) + np.count_nonzero(grammar.emission) == 1407
    sums = grammar.emission.sum(axis=1)
    np.add.at(sums, grammar.binary[:, 0], grammar.binary_probability)
    np.add.at(sums, grammar.unary[:, 0], grammar.unary_probability)
    np.testing.assert_allclose(sums, 1, rtol=1e-14)
