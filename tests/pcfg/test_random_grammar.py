"""Random layered grammars: shape, coverage, the header, and the shipped files made again."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from pcfg import hmm, labels, random_grammar
from pcfg.common.files import InputError
from pcfg.grammar import RULES_FOLDER, Grammar
from pcfg.sampler import Sampler

BERT_VOCABULARY = Path(__file__).parents[3] / "shared" / "data" / "vocab.txt"
SHIPPED = [path.name for path in sorted(RULES_FOLDER.glob("rule_*.txt"))]
SMALL = "--levels 3 --symbols 4 --top-symbols 3 --rules 3 --words 20 --words-per-symbol 6 --fact-sentences 0".split()


def make(path, *flags):
    random_grammar.main([*SMALL, "--save-path", str(path), *map(str, flags)])
    return Grammar.read(path)


def header(path):
    return [line[2:] for line in path.read_text().split("\n") if line.startswith("# ")]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_grammars_are_what_their_command_makes(name, tmp_path, monkeypatch):
    (tmp_path / "pcfg" / "rules").mkdir(parents=True)
    shutil.copy(RULES_FOLDER / "words.txt", tmp_path / "pcfg" / "rules")
    monkeypatch.chdir(tmp_path)
    program, module, target, *arguments = shlex.split(header(RULES_FOLDER / name)[0].removeprefix("command: "))
    assert (program, module) == ("python", "-m")
    {"pcfg.random_grammar": random_grammar, "pcfg.hmm": hmm}[target].main(arguments)
    assert (tmp_path / "pcfg" / "rules" / name).read_bytes() == (RULES_FOLDER / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "levels", "nonterminals", "words"),
    [
        ("rule_deep_mlm.txt", 4, 50, 200),
        ("rule_deeper_mlm.txt", 5, 50, 200),
        ("rule_mini_headroom.txt", 2, 15, 16),
        ("rule_mini_mlm.txt", 3, 21, 20),
        ("rule_second_headroom.txt", 2, 15, 16),
    ],
)
def test_shipped_grammars_have_the_shape_that_they_are_to_have(name, levels, nonterminals, words, recwarn):
    grammar = Grammar.read(RULES_FOLDER / name)
    assert not recwarn.list
    assert (len(grammar.names), len(grammar.words)) == (nonterminals, words)
    assert grammar.longest[0] == 2**levels
    assert set(grammar.words) <= set(random_grammar.read_words(RULES_FOLDER / "words.txt"))
    assert f"sha256 {grammar.sha256}" in header(RULES_FOLDER / name)[-1]


def test_the_mini_grammar_is_no_toy():
    facts = "\n".join(header(RULES_FOLDER / "rule_mini_mlm.txt"))
    entropies = [float(value) for value in re.findall(r"([0-9.]+) \+- [0-9.]+ nats", facts)]
    unigram = float(re.search(r"unigram entropy: ([0-9.]+) nats", facts)[1])
    assert len(entropies) == 2 and unigram - max(entropies) >= 0.5
    tasks = re.findall(r"task [ABC] .*: ([0-9]+) classes, majority ([0-9.]+)%", facts)
    assert len(tasks) == 3 and all(int(classes) >= 4 and float(majority) < 60 for classes, majority in tasks)
    sampled, distinct = map(int, re.search(r"sample: ([0-9]+) sentences, ([0-9]+) of them distinct", facts).groups())
    assert distinct > 0.9 * sampled
    probability = Sampler(Grammar.read(RULES_FOLDER / "rule_mini_mlm.txt"), 8).length_probability
    assert probability[5:].sum() > 0.9 and (probability[5:] > 0).all()


def test_facts_are_those_of_a_naive_count():
    """Two of the facts from their definitions, on a grammar whose sentences can be listed."""
    grammar = Grammar.from_rules(
        [("S", ("S1",), 0.5), ("S", ("S2",), 0.5), ("S1", ("A", "A"), 1.0), ("S2", ("B", "A"), 1.0)]
        + [("A", ("a",), 0.5), ("A", ("b",), 0.5), ("B", ("b",), 1.0)]
    )
    lines = labels.grammar_facts(grammar, 4000)
    # aa ab with 1/8 each, ba bb with 1/8 + 1/4 each: the first word is b with 3/4, the second a or b with 1/2
    first = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    exact = (first + np.log(2)) / 2
    found = [float(value) for value in re.findall(r"([0-9.]+) \+- [0-9.]+ nats", lines[0])]
    np.testing.assert_allclose(found, [exact, exact], atol=1e-3)
    unigram = -(0.625 * np.log(0.625) + 0.375 * np.log(0.375))
    assert float(lines[1].split()[2]) == pytest.approx(unigram, abs=0.01)
    assert lines[2].startswith("words a sentence: 2 to 2, mean 2.00; 100.0% have 2 or more")
    assert lines[3] == "sample: 4000 sentences, 4 of them distinct"
    # S1 -> A A and S2 -> B A with 1/2 each: aa and ab are S1's; ba and bb are S2's, as P(b | B) = 1 is more than P(b | A)
    assert re.fullmatch(r"task A \(whole sentence\): 2 classes, majority 7[45]\.[0-9]%", lines[4])
    assert lines[5] == "task B (span 4): no labels"


def test_the_layers_and_their_numbers(tmp_path):
    grammar = make(tmp_path / "rules.txt", "--early-word-chance", 0.5, "--early-word-share", 0.25, "--seed", 3)
    layer = {"S": 0} | {f"S{i}": 1 for i in (1, 2, 3)} | {f"A{n}_{i}": n + 1 for n in (1, 2, 3) for i in range(4)}
    assert layer.keys() == set(grammar.names)
    depth = np.array([layer[name] for name in grammar.names])
    for children in (1, 2):
        assert (depth[grammar.binary[:, children]] == depth[grammar.binary[:, 0]] + 1).all()
    assert grammar.unary[:, 0].tolist() == [0, 0, 0] and (depth[grammar.unary[:, 1]] == 1).all()
    rules = np.bincount(grammar.binary[:, 0], minlength=len(depth))
    emitted = np.count_nonzero(grammar.emission, axis=1)
    assert (rules[depth == 1] == 1).all() and (emitted[depth == 1] == 0).all()
    assert (rules[depth == 2] == 3).all() and (rules[depth == 4] == 0).all() and (emitted[depth == 4] == 6).all()
    early = emitted[(depth == 2) | (depth == 3)]
    assert set(early) == {0, 1}
    np.testing.assert_allclose(grammar.emission[(depth == 2) | (depth == 3)].sum(axis=1), 0.25 * early, rtol=1e-6)
    pairs = grammar.binary[depth[grammar.binary[:, 0]] == 1, 1:]
    assert len(np.unique(pairs, axis=0)) == 3


@pytest.mark.parametrize("chance", [0, 1])
def test_the_chance_of_an_early_word(tmp_path, chance):
    grammar = make(tmp_path / "rules.txt", "--early-word-chance", chance)
    inner = [i for i, name in enumerate(grammar.names) if name.startswith(("A1", "A2"))]
    assert (np.count_nonzero(grammar.emission[inner], axis=1) == chance).all()


@pytest.mark.parametrize("seed", range(5))
def test_every_symbol_is_reached_and_every_word_used_at_the_least_numbers(tmp_path, seed, recwarn):
    flags = "--symbols 6 --top-symbols 3 --rules 1 --words 12 --words-per-symbol 2 --concentration 0.01 --seed".split()
    grammar = make(tmp_path / "rules.txt", *flags, seed)
    assert len(grammar.names) == 1 + 3 + 18 and len(grammar.words) == 12 and not recwarn.list


def test_low_concentrations_make_unequal_probabilities(tmp_path):
    def largest(concentration):
        grammar = make(tmp_path / "rules.txt", "--words-per-symbol", 15, "--word-concentration", concentration)
        return grammar.emission[-4:].max(axis=1).mean()

    assert largest(0.1) > 0.4 > largest(1) > largest(100) > 1 / 15


def test_the_same_command_gives_the_same_bytes_and_another_seed_others(tmp_path, capsys):
    make(tmp_path / "a.txt", "--fact-sentences", 50)
    first = (tmp_path / "a.txt").read_bytes()
    assert "entropy: " in capsys.readouterr().out
    make(tmp_path / "a.txt", "--fact-sentences", 50)
    assert (tmp_path / "a.txt").read_bytes() == first
    make(tmp_path / "a.txt", "--fact-sentences", 50, "--seed", 1)
    assert (tmp_path / "a.txt").read_bytes() != first


def test_the_command_in_the_header_names_no_folder_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make("rules.txt", "--seed", 4)
    command = header(tmp_path / "rules.txt")[0]
    assert str(RULES_FOLDER.parent) not in command and "--words-file" not in command and command.endswith(" 0")
    first = (tmp_path / "rules.txt").read_bytes()
    random_grammar.main(shlex.split(command)[4:])
    assert (tmp_path / "rules.txt").read_bytes() == first


def test_words_come_from_the_ordinary_words_of_a_vocabulary(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[unused1]\n!\na\n##ing\nhouse\n2nd\nriver\ncafé\nhouse\nstone\n")
    assert random_grammar.read_words(tmp_path / "vocab.txt") == ["house", "river", "stone"]
    flags = ["--words-file", tmp_path / "vocab.txt", "--words", 3, "--words-per-symbol", 2]
    assert make(tmp_path / "rules.txt", *flags).words == ["house", "river", "stone"]
    with pytest.raises(InputError, match="--words 4: must be from 1 to 3"):
        make(tmp_path / "rules.txt", *flags, "--words", 4)
    (tmp_path / "vocab.txt").write_text("[PAD]\n")
    with pytest.raises(InputError, match="no word of two or more letters"):
        make(tmp_path / "rules.txt", *flags)


def test_the_shipped_words_are_ordinary_and_many():
    words = random_grammar.read_words(RULES_FOLDER / "words.txt")
    lines = (RULES_FOLDER / "words.txt").read_text().split("\n")
    assert len(words) == 400 and len(lines) == 402 and words == sorted(set(words))


@pytest.mark.skipif(not BERT_VOCABULARY.exists(), reason="BERT's vocabulary is not at hand")
def test_the_shipped_words_are_single_tokens_of_bert():
    words = random_grammar.read_words(RULES_FOLDER / "words.txt")
    assert set(words) <= set(BERT_VOCABULARY.read_text(encoding="utf-8").split("\n"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--rules 17", "--rules 17: must be from 1 to 16"),
        ("--top-symbols 1", "--top-symbols 1: must be from 2 to 16"),
        ("--words-per-symbol 4", "--words-per-symbol 4: must be from 5 to 20"),
        ("--words-per-symbol 21", "--words-per-symbol 21"),
        ("--levels 7", "--levels 7: must be from 1 to 6"),
        ("--words-file absent.txt", "absent.txt: no such file"),
    ],
)
def test_shapes_that_contradict_themselves_are_refused(tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        make(tmp_path / "rules.txt", *flags.split())
    assert not (tmp_path / "rules.txt").exists()


@pytest.mark.parametrize(
    "flag", ["--concentration 0", "--word-concentration nan", "--top-concentration inf", "--early-word-share 1"]
)
def test_wrong_numbers_are_refused(tmp_path, capsys, flag):
    with pytest.raises(SystemExit):
        make(tmp_path / "rules.txt", *flag.split())
    name, value = flag.split()
    allowed = "above 0 and below 1" if value == "1" else "a finite number above 0"
    assert f"argument {name}: {value} is not {allowed}" in capsys.readouterr().err
