"""Random layered grammars of a given shape: the source of the grammars in pcfg/rules/.

    python -m pcfg.random_grammar --levels 4 --symbols 10 --top-symbols 9 --words 200 --save-path my_rules.txt

A version that a laptop finishes in seconds:

    python -m pcfg.random_grammar --levels 3 --symbols 5 --top-symbols 5 --rules 3 --words 30 --words-per-symbol 10 \\
        --save-path my_rules.txt

The start symbol S has unary rules to S1..Sk; S_i has one rule, to a pair of symbols of level 1; a symbol of level l has rules
to pairs of symbols of level l + 1 and, with the chance --early-word-chance, one to a word; a symbol of the last level has
rules to words only. So a sentence has 2 to 2^levels words. Probabilities are Dirichlet; all pairs of a symbol are distinct;
every symbol can be reached and every word is used.

The header of the file states its command and facts from a sample of its sentences: the entropy of a word given all others,
the unigram entropy, and the classes of the downstream tasks.
"""

if __name__ == "__main__":
    import pcfg.common.start  # noqa: F401  before libraries, whose import takes seconds

import argparse
import re
import shlex
from pathlib import Path

import numpy as np

from pcfg.common.cli import Parser, file_name, fraction, non_negative_int, positive, positive_int, probability, run_main
from pcfg.common.files import InputError, keyed_rng
from pcfg.common.text import decoded
from pcfg.engine.chart_plan import MAX_WORDS
from pcfg.grammar import RULES_FOLDER, Grammar, WeightedRule, write_rules

# Below this a Dirichlet draw of low concentration is as good as no rule at all; symbols and words must stay in use.
LEAST_PROBABILITY = 1e-6


def random_rules(options: argparse.Namespace, vocabulary: list[str]) -> list[WeightedRule]:
    """The rules of a random layered grammar; `options` are those of `build_parser`, its words are drawn from `vocabulary`."""
    _check_shape(options, vocabulary)
    rng = keyed_rng(options.seed, "random-grammar")
    words = sorted(rng.choice(vocabulary, options.words, replace=False).tolist())
    levels = [[f"A{level}_{i}" for i in range(options.symbols)] for level in range(1, options.levels + 1)]
    tops = [f"S{i}" for i in range(1, options.top_symbols + 1)]

    top_probability = dirichlet(rng, options.top_symbols, options.top_concentration)
    rules: list[WeightedRule] = [("S", (top,), share) for top, share in zip(tops, top_probability, strict=True)]
    # The pairs of S1..Sk are distinct, as if they were those of one symbol: two equal ones would be indistinguishable.
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
        required = order[number :: options.symbols]
        others = rng.permutation(np.setdiff1d(np.arange(len(words)), required))
        emitted = np.concatenate([required, others])[: options.words_per_symbol]
        shares = dirichlet(rng, len(emitted), options.word_concentration)
        rules += [(symbol, (words[word],), share) for word, share in zip(np.sort(emitted), shares, strict=True)]
    return rules


def _draw_pairs(rng: np.random.Generator, number: int, children: int, required: np.ndarray) -> np.ndarray:
    """Distinct pairs of children, (number, 2), in which each of the `required` children occurs."""
    if len(required) % 2:
        required = np.append(required, rng.integers(children))
    first = required.reshape(-1, 2)
    required_codes = first[:, 0] * children + first[:, 1]
    others = rng.permutation(np.setdiff1d(np.arange(children**2), required_codes))
    codes = rng.permutation(np.concatenate([required_codes, others[: number - len(required_codes)]]))
    return np.column_stack(np.divmod(codes, children))


def _check_shape(options: argparse.Namespace, vocabulary: list[str]) -> None:
    """Refuse numbers for which no grammar uses all symbols and words."""
    symbols = options.symbols
    pairs = symbols**2
    limits = (
        ("--words", options.words, "the words of the vocabulary", 1, len(vocabulary)),
        ("--rules", options.rules, "the pairs of symbols of a level", 1, pairs),
        ("--top-symbols", options.top_symbols, "half the symbols, and the pairs of symbols", (symbols + 1) // 2, pairs),
        ("--words-per-symbol", options.words_per_symbol, "words over symbols", -(-options.words // symbols), options.words),
        ("--levels", options.levels, "what a chart holds", 1, MAX_WORDS.bit_length() - 1),
    )
    for flag, value, what, least, most in limits:
        if not least <= value <= most:
            raise InputError(f"{flag} {value}: must be from {least} to {most} ({what}) with these other numbers")


def read_words(path: Path | str) -> list[str]:
    """The words of two or more letters a-z in a vocabulary file, one per line; no comments, special tokens and pieces."""
    words = [word for line in decoded(Path(path)).split("\n") if re.fullmatch(r"[a-z]{2,}", word := line.strip())]
    if not words:
        raise InputError(f"{path}: no word of two or more letters a-z; give a vocabulary file with one word per line")
    return list(dict.fromkeys(words))


def dirichlet(rng: np.random.Generator, size: int, concentration: float) -> np.ndarray:
    """Probabilities of a symmetric Dirichlet distribution, none below 1e-6; (size,) float64."""
    drawn = np.maximum(rng.dirichlet(np.full(size, concentration)), LEAST_PROBABILITY)
    return drawn / drawn.sum()


def save_grammar(module: str, options: argparse.Namespace, rules: list[WeightedRule], states: bool = False) -> None:
    """Write the rules file of a command line, whose header has the command and facts, and print the facts.

    Probabilities have nine digits: more would depend on how the machine's logarithm rounds. `states`: whether the grammar is a
    hidden Markov model, for the facts.
    """
    rules = [(left, right, float(f"{share:.9g}")) for left, right, share in rules]
    grammar = Grammar.from_rules(rules, options.save_path)
    flags = [(f"--{name.replace('_', '-')}", value) for name, value in vars(options).items() if value is not None]
    header = [f"command: python -m {module} " + shlex.join(str(part) for flag in flags for part in flag)]
    if options.fact_sentences:
        # Drawing rules needs no chart; only the facts do.
        from pcfg.labels import grammar_facts

        header += grammar_facts(grammar, options.fact_sentences, states)
    header.append(f"{len(grammar.names)} nonterminals, {len(grammar.words)} words, {len(rules)} rules; sha256 {grammar.sha256}")
    write_rules(options.save_path, rules, header)
    print(*header[1:-1], f"{options.save_path}: {header[-1]}", sep="\n")


def add_words_file(parser: argparse._ActionsContainer, words: str) -> None:
    """Add --words-file; without it, the words are `words`."""
    text = f"vocabulary file, one word per line; lines of two or more letters a-z are used; default: {words}"
    parser.add_argument("--words-file", help=text)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m pcfg.random_grammar", description=__doc__)
    shape = parser.add_argument_group("shape")
    shape.add_argument("--levels", type=positive_int, default=4, help="levels; sentences have up to 2^levels words; default 4")
    shape.add_argument("--symbols", type=positive_int, default=10, help="symbols per level; default 10")
    shape.add_argument("--top-symbols", type=positive_int, default=9, help="S1..Sk below the start symbol; default 9")
    shape.add_argument("--rules", type=positive_int, default=20, help="binary rules per symbol; default 20")
    shape.add_argument("--early-word-chance", type=probability, default=1.0, help="chance of a rule to a word; default 1")
    shape.add_argument("--early-word-share", type=fraction, default=0.1, help="its probability; default 0.1")
    words = parser.add_argument_group("words")
    add_words_file(words, "400 English words")
    words.add_argument("--words", type=positive_int, default=200, help="words of the grammar; default 200")
    words.add_argument("--words-per-symbol", type=positive_int, default=100, help="per symbol of the last level; default 100")
    chances = parser.add_argument_group("probabilities (concentrations of Dirichlet distributions)")
    chances.add_argument("--concentration", type=positive, default=1.0, help="of binary rules; default 1")
    chances.add_argument("--top-concentration", type=positive, default=5.0, help="of S1..Sk; default 5")
    chances.add_argument("--word-concentration", type=positive, default=1.0, help="of words; default 1")
    chances.add_argument("--seed", type=non_negative_int, default=0, help="of all random numbers; default 0")
    output = parser.add_argument_group("output")
    output.add_argument("--save-path", type=file_name, required=True, help="rules file to write; an existing one is replaced")
    facts = "sentences in the sample for the header's facts; 0: no facts; default 10000"
    output.add_argument("--fact-sentences", type=non_negative_int, default=10_000, help=facts)
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    rules = random_rules(options, read_words(options.words_file or RULES_FOLDER / "words.txt"))
    save_grammar("pcfg.random_grammar", options, rules)


if __name__ == "__main__":
    run_main(main)
