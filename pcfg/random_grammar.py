"""Random layered grammars of a wanted shape. The grammars in pcfg/rules/ come from here.

    python -m pcfg.random_grammar --levels 4 --symbols 10 --top-symbols 9 --words 200 --save-path my_rules.txt

A version that a laptop finishes in seconds:

    python -m pcfg.random_grammar --levels 3 --symbols 5 --top-symbols 5 --rules 3 --words 30 --words-per-symbol 10 \\
        --save-path my_rules.txt

The start symbol S has unary rules to S1..Sk; S_i has one rule, to a pair of symbols of level 1; a symbol of level l has rules
to pairs of symbols of level l + 1 and, with the chance --early-word-chance, one to a word; a symbol of the last level has
rules to words only. So a sentence has 2 to 2^levels words. Probabilities are Dirichlet; all pairs of a symbol are distinct;
every symbol can be reached and every word is used.

The header of the file gives the command that made it, and facts from a sample of its sentences: entropy of a word given all
others, unigram entropy, and the classes of the downstream tasks.
"""

import argparse

import numpy as np

from pcfg.chart import MAX_WORDS
from pcfg.common.cli import Parser, non_negative_int, positive_int, probability, run_main
from pcfg.common.files import InputError, keyed_rng
from pcfg.common.means import mean_by_pairs, mean_by_sentences
from pcfg.grammar import RULES_FOLDER, Grammar
from pcfg.grammar_io import WeightedRule, as_written, write_rules
from pcfg.labels import TASK_SPANS, Labeller
from pcfg.lookup import LookupTable
from pcfg.random_parts import check_concentrations, command_line, dirichlet, read_words
from pcfg.sampler import Sampler

# Shortest sentence of the downstream tasks, in words.
TASK_WORDS = 5


def random_rules(options: argparse.Namespace, vocabulary: list[str]) -> list[WeightedRule]:
    """The rules of a random layered grammar; `options` are those of `build_parser`, `vocabulary` what words are drawn from.

    Raises:
        InputError: the numbers contradict each other.
    """
    _check_shape(options, vocabulary)
    rng = keyed_rng(options.seed, "random-grammar")
    words = sorted(rng.choice(vocabulary, options.words, replace=False).tolist())
    levels = [[f"A{level}_{i}" for i in range(options.symbols)] for level in range(1, options.levels + 1)]
    tops = [f"S{i}" for i in range(1, options.top_symbols + 1)]

    top_probability = dirichlet(rng, options.top_symbols, options.top_concentration)
    rules: list[WeightedRule] = [("S", (top,), share) for top, share in zip(tops, top_probability, strict=True)]
    # The pairs of S1..Sk are distinct, as if they were one symbol's: two equal ones could not be told apart.
    pairs = _draw_pairs(rng, options.top_symbols, options.symbols, rng.permutation(options.symbols))
    rules += [(top, (levels[0][b], levels[0][c]), 1.0) for top, (b, c) in zip(tops, pairs, strict=True)]
    for above, below in zip(levels[:-1], levels[1:], strict=True):
        order = rng.permutation(len(below))
        for number, symbol in enumerate(above):
            pairs = _draw_pairs(rng, options.rules, len(below), order[number :: len(above)])
            early = rng.random() < options.early_word_chance
            share = 1.0 - options.early_word_share if early else 1.0
            shares = share * dirichlet(rng, options.rules, options.concentration)
            rules += [(symbol, (below[b], below[c]), p) for (b, c), p in zip(pairs, shares, strict=True)]
            if early:
                rules.append((symbol, (str(rng.choice(words)),), options.early_word_share))
    order = rng.permutation(len(words))
    for number, symbol in enumerate(levels[-1]):
        owed = order[number :: options.symbols]
        others = rng.permutation(np.setdiff1d(np.arange(len(words)), owed))
        chosen = np.concatenate([owed, others])[: options.words_per_symbol]
        shares = dirichlet(rng, len(chosen), options.word_concentration)
        rules += [(symbol, (words[word],), share) for word, share in zip(np.sort(chosen), shares, strict=True)]
    return rules


def _draw_pairs(rng: np.random.Generator, number: int, children: int, owed: np.ndarray) -> np.ndarray:
    """Distinct pairs of children, (number, 2), in which each of the `owed` children occurs."""
    if len(owed) % 2:
        owed = np.append(owed, rng.integers(children))
    first = owed.reshape(-1, 2)
    taken = first[:, 0] * children + first[:, 1]
    others = rng.permutation(np.setdiff1d(np.arange(children**2), taken))
    codes = rng.permutation(np.concatenate([taken, others[: number - len(taken)]]))
    return np.column_stack(np.divmod(codes, children))


def _check_shape(options: argparse.Namespace, vocabulary: list[str]) -> None:
    """Raise an `InputError` if there is no grammar of the wanted shape that uses all symbols and words."""
    symbols, pairs = options.symbols, options.symbols**2
    limits = (
        ("--words", options.words, "the words of the vocabulary", 1, len(vocabulary)),
        ("--rules", options.rules, "the pairs of symbols of a level", 1, pairs),
        ("--top-symbols", options.top_symbols, "half the symbols, and the pairs of symbols", (symbols + 1) // 2, pairs),
        ("--words-per-symbol", options.words_per_symbol, "words over symbols", -(-options.words // symbols), options.words),
        ("--levels", options.levels, "what a chart holds", 1, MAX_WORDS.bit_length() - 1),
    )
    for flag, value, what, least, most in limits:
        if not least <= value <= most:
            raise InputError(f"{flag} {value}: must be from {least} to {most} ({what}) with the other numbers given")


def entropy_line(table: LookupTable) -> str:
    """The conditional entropy of a word given all others, both means, in nats."""
    pairs, sentences = (mean(table.entropy, table.lengths) for mean in (mean_by_pairs, mean_by_sentences))
    return "entropy: {:.3f} +- {:.3f} nats (pairs), {:.3f} +- {:.3f} nats (sentences)".format(*pairs, *sentences)


def facts(grammar: Grammar, sentences: int) -> list[str]:
    """What a user wants to know of a grammar, a line a fact, from a sample of `sentences` of its sentences."""
    sampler = Sampler(grammar, MAX_WORDS)
    tokens, lengths = sampler.sample(sentences, keyed_rng(0, "grammar-facts"))
    texts = sampler.texts(tokens, lengths)
    counts = np.bincount(tokens[tokens >= 0], minlength=len(grammar.words))
    unigram = counts[counts > 0] / counts.sum()
    distinct = len(set(texts))
    lines = [
        entropy_line(LookupTable.compute(grammar, texts, "sample")),
        f"unigram entropy: {-(unigram * np.log(unigram)).sum():.3f} nats",
        f"words a sentence: {lengths.min()} to {lengths.max()}, mean {lengths.mean():.2f}; "
        f"{np.mean(lengths >= TASK_WORDS):.1%} have {TASK_WORDS} or more",
        f"sample: {sentences} sentences, {distinct} of them distinct",
    ]
    long_enough = lengths >= TASK_WORDS
    for task, span in TASK_SPANS.items():
        labels = Labeller(grammar, task).label(tokens[long_enough], lengths[long_enough])
        lines.append(f"task {task} ({'whole sentence' if span is None else f'span {span}'}): {_class_line(labels)}")
    return lines


def _class_line(labels: np.ndarray) -> str:
    """Number of classes and the share of the largest; without a label: -1."""
    counts = np.bincount(labels[labels >= 0])
    if not len(counts):
        return "no labels"
    unlabelled = f", {np.mean(labels < 0):.1%} of the sentences without a label" if (labels < 0).any() else ""
    return f"{np.count_nonzero(counts)} classes, majority {counts.max() / counts.sum():.1%}{unlabelled}"


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m pcfg.random_grammar", description=__doc__)
    shape = parser.add_argument_group("shape")
    shape.add_argument(
        "--levels", type=positive_int, default=4, help="levels of symbols; sentences have up to 2^levels words; default 4"
    )
    shape.add_argument("--symbols", type=positive_int, default=10, help="symbols a level; default 10")
    shape.add_argument("--top-symbols", type=positive_int, default=9, help="S1..Sk below the start symbol; default 9")
    shape.add_argument("--rules", type=positive_int, default=20, help="binary rules a symbol; default 20")
    shape.add_argument("--early-word-chance", type=probability, default=1.0, help="chance of a rule to a word; default 1")
    shape.add_argument("--early-word-share", type=probability, default=0.1, help="its probability; default 0.1")
    words = parser.add_argument_group("words")
    words.add_argument(
        "--words-file",
        default=str(RULES_FOLDER / "words.txt"),
        help="vocabulary file, one word a line, of which the lines of two or more letters a-z are used; default: "
        "400 ordinary English words",
    )
    words.add_argument("--words", type=positive_int, default=200, help="words of the grammar; default 200")
    words.add_argument(
        "--words-per-symbol", type=positive_int, default=100, help="words of a symbol of the last level; default 100"
    )
    chances = parser.add_argument_group("probabilities (concentrations of Dirichlet distributions)")
    chances.add_argument("--concentration", type=float, default=1.0, help="of binary rules; default 1")
    chances.add_argument("--top-concentration", type=float, default=5.0, help="of S1..Sk; default 5")
    chances.add_argument("--word-concentration", type=float, default=1.0, help="of words; default 1")
    chances.add_argument("--seed", type=non_negative_int, default=0, help="of all random numbers; default 0")
    output = parser.add_argument_group("output")
    output.add_argument("--save-path", required=True, help="rules file to write; an existing one is replaced")
    output.add_argument(
        "--fact-sentences",
        type=non_negative_int,
        default=10_000,
        help="sentences that the header's facts are computed from; 0: no facts; default 10000",
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = build_parser()
    options = parser.parse_args(arguments)
    check_concentrations(options, ("concentration", "top_concentration", "word_concentration"))
    if not 0.0 < options.early_word_share < 1.0:
        raise InputError(f"--early-word-share {options.early_word_share}: must be above 0 and below 1")
    rules = random_rules(options, read_words(options.words_file))
    rules = as_written(rules)
    grammar = Grammar.from_rules(rules, options.save_path)
    header = [command_line("pcfg.random_grammar", options)]
    if options.fact_sentences:
        header += facts(grammar, options.fact_sentences)
    header.append(f"{len(grammar.names)} nonterminals, {len(grammar.words)} words, {len(rules)} rules; sha256 {grammar.sha256}")
    write_rules(options.save_path, rules, header)
    print("\n".join(header[1:]))
    print(f"{options.save_path}: {len(rules)} rules")


if __name__ == "__main__":
    run_main(main)
