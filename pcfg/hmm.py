"""Hidden Markov models as grammars: right-linear rules from the matrices of a model, or from a seed.

    python -m pcfg.hmm --states 100 --words 200 --length-law fixed --max-words 16 --save-path rule_hmm.txt

A version that a laptop finishes in a second:

    python -m pcfg.hmm --states 5 --words 20 --length-law geometric --mean-length 8 --save-path rule_hmm.txt

With states z_t, words x_t, an initial distribution, transitions, emissions and a chance of ending at each position,

    P(x, z) = initial[z_1] prod_{t <= T} emission[z_t, x_t] prod_{t < T} (1 - end_t) transition[z_t, z_{t+1}] end_T

becomes, with a nonterminal W_q for the words of state q,

    S -> q [initial[q]]     q -> W_q r [(1 - end) transition[q, r]]     q -> W_q [end]     W_q -> w [emission[q, w]]

so that the nonterminal over the words t .. T - 1 is the state at the position t + 1. The length law "geometric" ends with the
same chance everywhere; the mean length is 1 / end. The law "fixed" has a maximum: states carry their position,
q@1, q@2, .., the chance of ending depends on it, and each length from --min-words to --max-words is equally likely.
"""

if __name__ == "__main__":
    import pcfg.common.start  # noqa: F401  before libraries, whose import takes seconds

import argparse
import collections
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pcfg.common.cli import Parser, file_name, non_negative_int, positive, positive_int, run_main
from pcfg.common.files import InputError, keyed_rng
from pcfg.common.text import shown
from pcfg.grammar import Grammar, WeightedRule
from pcfg.random_grammar import add_words_file, dirichlet, read_words, save_grammar

LENGTH_LAWS = ("geometric", "fixed")
START = "S"
ROW_TOLERANCE = 1e-6


def hmm_rules(
    initial: npt.ArrayLike,
    transition: npt.ArrayLike,
    emission: npt.ArrayLike,
    *,
    end: float | np.ndarray | None = None,
    length: npt.ArrayLike | None = None,
    states: Sequence[str] | None = None,
    words: Sequence[str] | None = None,
) -> list[WeightedRule]:
    """The rules of a hidden Markov model of K states and V words; the module docstring has the equations.

    Probabilities add up to 1 (within 1e-6); names are distinct and fit into a rules file.

    Args:
        initial: (K,) P(first state).
        transition: (K, K) P(next state | state), if the sentence goes on.
        emission: (K, V) P(word | state).
        end: the chance that a sentence ends after a word, a number or (K,), by state; exclusive with `length`.
        length: (L,) P(a sentence has 1 .. L words); states carry their position then.
        states: names of the states; None: q0, q1, ...
        words: the words; None: w0, w1, ...

    Returns:
        rules without probabilities of 0 and without unreachable states, the start symbol's first.

    >>> hmm_rules([1.0], [[1.0]], [[0.5, 0.5]], length=[0.25, 0.75])
    ... # doctest: +NORMALIZE_WHITESPACE
    [('S', ('q0@1',), 1.0), ('q0@1', ('W_q0', 'q0@2'), 0.75), ('q0@1', ('W_q0',), 0.25), ('q0@2', ('W_q0',), 1.0),
     ('W_q0', ('w0',), 0.5), ('W_q0', ('w1',), 0.5)]
    """
    first, following, emitted = (np.asarray(array, np.float64) for array in (initial, transition, emission))
    number = len(first)
    if following.shape != (number, number) or emitted.ndim != 2 or len(emitted) != number:
        raise InputError(f"shapes {first.shape}, {following.shape} and {emitted.shape}; should be (K,), (K, K) and (K, V)")
    for what, rows in (("initial", first[None]), ("transition", following), ("emission", emitted)):
        _check_distributions(what, rows)
    if (end is None) == (length is None):
        raise InputError("give one of `end` and `length`")
    ends = _chances_of_ending(end, length, number)
    states = [f"q{state}" for state in range(number)] if states is None else list(states)
    words = [f"w{word}" for word in range(emitted.shape[1])] if words is None else list(words)
    if (len(states), len(words)) != emitted.shape:
        raise InputError(f"{len(states)} names of states and {len(words)} words for emissions of shape {emitted.shape}")
    # by position; with one position, the rules lead back to it
    names = [states]
    if length is not None:
        names = [[f"{state}@{position}" for state in states] for position in range(1, len(ends) + 1)]
    emitters = [f"W_{state}" for state in states]
    _check_names(states, words, [START, *itertools.chain(*names), *emitters, *words])

    rules: list[WeightedRule] = [(START, (names[0][state],), float(first[state])) for state in np.flatnonzero(first)]
    reached = first > 0
    position = 0
    done = np.zeros((len(names), number), dtype=bool)
    while reached.any():
        next_position = min(position + 1, len(names) - 1)
        going_on = (1.0 - ends[position])[:, None] * following  # (K, K)
        for state in np.flatnonzero(reached):
            left = names[position][state]
            for other in np.flatnonzero(going_on[state]):
                rules.append((left, (emitters[state], names[next_position][other]), float(going_on[state, other])))
            if ends[position, state] > 0:
                rules.append((left, (emitters[state],), float(ends[position, state])))
        done[position] |= reached
        reached = (going_on[reached] > 0).any(axis=0) & ~done[next_position]
        position = next_position
    for state in np.flatnonzero(done.any(axis=0)):
        rules += [(emitters[state], (words[word],), float(emitted[state, word])) for word in np.flatnonzero(emitted[state])]
    return rules


def _chances_of_ending(end: float | np.ndarray | None, length: npt.ArrayLike | None, number: int) -> np.ndarray:
    """(1, K) if they do not depend on the position, else (L, K)."""
    if length is None:
        ends = np.broadcast_to(np.asarray(end, np.float64), number)[None]
        if not ((ends >= 0) & (ends <= 1)).all():
            raise InputError(f"end {end}: must be from 0 to 1")
        return ends
    lengths = np.asarray(length, np.float64)
    _check_distributions("length", lengths[None])
    lengths = np.trim_zeros(lengths, "b")
    # P(T = t) / P(T >= t); exactly 1 at the last position
    return np.broadcast_to((lengths / np.cumsum(lengths[::-1])[::-1])[:, None], (len(lengths), number))


def hmm_grammar(initial: npt.ArrayLike, transition: npt.ArrayLike, emission: npt.ArrayLike, **options: Any) -> Grammar:
    """The grammar of a hidden Markov model; the arguments are those of `hmm_rules`.

    >>> hmm_grammar([0.5, 0.5], [[0.9, 0.1], [0.2, 0.8]], [[1.0, 0.0], [0.0, 1.0]], end=0.25).names
    ['S', 'q0', 'q1', 'W_q0', 'W_q1']
    """
    return Grammar.from_rules(hmm_rules(initial, transition, emission, **options), "HMM")


def _check_distributions(what: str, rows: np.ndarray) -> None:
    wrong = ~((rows >= 0).all(axis=1) & (np.abs(rows.sum(axis=1) - 1.0) <= ROW_TOLERANCE))
    for row in np.flatnonzero(wrong)[:1]:
        sizes = f"probabilities from {rows[row].min(initial=1.0):.6g} on that add up to {rows[row].sum():.9g}"
        raise InputError(f"{what}, row {row}: {sizes}; they must not be negative, and add up to 1")


def _check_names(states: list[str], words: list[str], symbols: list[str]) -> None:
    """`symbols`: all names that the rules have."""
    for name in (*states, *words):
        if len(name.split()) != 1 or name.startswith("#"):
            raise InputError(f"the name {shown(name)}: names are without spaces, not empty, and do not begin with #")
    for state in states:
        if "@" in state:
            raise InputError(f"the state {shown(state)}: @ is what a position is written with; choose another name")
    for name, times in collections.Counter(symbols).items():
        if times > 1:
            raise InputError(f"the name {shown(name)} stands for two things (the start symbol is {START}, words of q are W_q)")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m pcfg.hmm", description=__doc__)
    shape = parser.add_argument_group("shape")
    shape.add_argument("--states", type=positive_int, default=100, help="hidden states; default 100")
    shape.add_argument("--words", type=positive_int, default=200, help="words; default 200")
    add_words_file(shape, "words w0, w1, ...")
    lengths = parser.add_argument_group("lengths")
    lengths.add_argument("--length-law", choices=LENGTH_LAWS, required=True, help="see above")
    lengths.add_argument("--mean-length", type=float, help="words, of the geometric law; required with it")
    lengths.add_argument("--max-words", type=positive_int, help="longest sentence of the fixed law, in words; required with it")
    lengths.add_argument("--min-words", type=positive_int, help="shortest sentence of the fixed law, in words; default 1")
    chances = parser.add_argument_group("probabilities (concentrations of Dirichlet distributions)")
    chances.add_argument("--transition-concentration", type=positive, default=0.1, help="of next and first states; default 0.1")
    chances.add_argument("--emission-concentration", type=positive, default=0.1, help="of words; default 0.1")
    chances.add_argument("--seed", type=non_negative_int, default=0, help="of all random numbers; default 0")
    output = parser.add_argument_group("output")
    output.add_argument("--save-path", type=file_name, required=True, help="rules file to write; an existing one is replaced")
    facts = "sentences in the sample for the header's facts; default: no facts"
    output.add_argument("--fact-sentences", type=non_negative_int, help=facts)
    return parser


def _length_law(options: argparse.Namespace) -> dict:
    """The chance of ending, or the lengths' probabilities, as arguments of `hmm_rules`."""
    geometric = options.length_law == "geometric"
    required = "mean_length" if geometric else "max_words"
    if getattr(options, required) is None:
        raise InputError(f"--length-law {options.length_law}: give --{required.replace('_', '-')} as well")
    for name in ("max_words", "min_words") if geometric else ("mean_length",):
        if getattr(options, name) is not None:
            flag = f"--{name.replace('_', '-')} {getattr(options, name)}"
            raise InputError(f"{flag}: has no meaning with --length-law {options.length_law}; leave it out")
    if geometric:
        if not 1.0 <= options.mean_length < float("inf"):
            raise InputError(f"--mean-length {options.mean_length}: must be 1 or more")
        return {"end": 1.0 / options.mean_length}
    least = options.min_words or 1
    if least > options.max_words:
        raise InputError(f"--min-words {least}: must be --max-words {options.max_words} or less")
    lengths = np.arange(1, options.max_words + 1)
    return {"length": (lengths >= least) / np.count_nonzero(lengths >= least)}


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    law = _length_law(options)
    rng = keyed_rng(options.seed, "hmm")
    words = None
    if options.words_file is not None:
        vocabulary = read_words(options.words_file)
        if options.words > len(vocabulary):
            raise InputError(f"--words {options.words}: {options.words_file} has {len(vocabulary)}; ask for fewer")
        words = sorted(rng.choice(vocabulary, options.words, replace=False).tolist())
    initial = dirichlet(rng, options.states, options.transition_concentration)
    transition = [dirichlet(rng, options.states, options.transition_concentration) for _ in range(options.states)]
    emission = [dirichlet(rng, options.words, options.emission_concentration) for _ in range(options.states)]
    save_grammar("pcfg.hmm", options, hmm_rules(initial, transition, emission, words=words, **law), states=True)


if __name__ == "__main__":
    run_main(main)
