"""Downstream labels: which nonterminal derives a sentence, or a part of it, best (tasks of arXiv 2210.14199).

With `inside` and `outside` as in `pcfg.chart`, the label of a sentence of T words is

    task A:      argmax over A in the unary children of the start symbol, in the order of the rules, of inside(0, T, A)
    task B:      argmax over all nonterminals A, sorted by name, of inside(0, 4, A)
    task C:      the same over the first 2 words
    task state:  argmax over the states A of a hidden Markov model (`pcfg.hmm`) of inside(t, T, A) outside(t, T, A), which is
                 proportional to P(the state at the position t + 1 is A | sentence); positions count from 1

The rule "likelihood" of A, B and C uses inside alone, with no prior and no context, as the code published with the paper
does; "posterior" uses inside(0, j, A) outside(0, j, A) over the same cell. The label's id is its place in the list; ties take
the lowest id. Other grammars may need other spans than 4 and 2 words.
"""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pcfg.chart import MAX_WORDS, Chart
from pcfg.common.files import InputError, keyed_rng
from pcfg.hmm import hidden_states

TASK_SPANS = {"A": None, "B": 4, "C": 2}  # words; None: the whole sentence
STATE_TASK = "state"
LABEL_RULES = ("likelihood", "posterior")
SENTENCES_PER_DRAW = 1 << 14


class Labeller:
    """The labels of one task.

    Args:
        grammar: a `pcfg.grammar.Grammar`.
        task: "A", "B", "C" or "state".
        span: words from the sentence's beginning, for B and C; None: 4 and 2.
        rule: "likelihood" or "posterior"; None: the posterior for states, else the likelihood.
        position: of the state, from 1; for the task "state" only.

    Attributes:
        names: the nonterminal, or the state, that each label id stands for.
        task: as given, the position of a state behind it ("state6").
        span, rule, position: as given, or what None means; `span` is None where the label is of the whole sentence or of a
            state.
        min_words: words of the shortest sentence that can have a label.

    Raises:
        InputError: a span of task A or of a state, or one of more than 64 words; task A of a grammar whose start symbol has
            no unary rules; a state without a position, by likelihood, or of a grammar that is no hidden Markov model; a
            position of another task.
    """

    def __init__(self, grammar, task: str, span: int | None = None, rule: str | None = None, position: int | None = None):
        if (position is not None) != (task == STATE_TASK):
            raise InputError(f"--position {position}: tasks other than {STATE_TASK!r} have none, and that task needs one")
        if span is not None and task in ("A", STATE_TASK):
            raise InputError(f"--span {span}: task {task} labels whole sentences; leave it out, or take task B or C")
        if span is not None and span > MAX_WORDS:
            raise InputError(f"--span {span}: must be {MAX_WORDS} or less")
        if task == STATE_TASK and rule == "likelihood":
            raise InputError(f"--label-rule {rule}: a state's label is by its posterior; leave the flag out")
        self.task = task if position is None else f"{task}{position}"
        self.span = TASK_SPANS[task] if span is None and task in TASK_SPANS else span
        self.rule = rule or ("posterior" if task == STATE_TASK else "likelihood")
        self.position = position
        if task == STATE_TASK:
            self._symbols, self._ids, self.names = hidden_states(grammar, position)
            self._cell = (position - 1, None)
        else:
            self._symbols = _start_children(grammar) if task == "A" else _by_name(grammar)
            self._ids = np.arange(len(self._symbols))
            self.names = [grammar.names[symbol] for symbol in self._symbols]
            self._cell = (0, self.span)
        self.min_words = position or self.span or 1
        self._chart = Chart(grammar)

    def label(self, tokens, lengths) -> np.ndarray:
        """Label ids of sentences, (n,) int64; -1 where no candidate derives the span (or the sentence is shorter).

        Args:
            tokens: (n, T) indices into `grammar.words`, anything beyond a sentence's end.
            lengths: (n,) words.
        """
        found = self._chart.labels(tokens, lengths, self._symbols, self._cell, self.rule)
        return np.where(found < 0, -1, self._ids[found])


def _start_children(grammar) -> np.ndarray:
    children = grammar.unary[grammar.unary[:, 0] == 0, 1]
    if not len(children):
        raise InputError(
            f"--task-type A: the start symbol {grammar.names[0]!r} has no unary rules, so there is "
            "nothing to tell apart; take task B or C, or a grammar with rules such as 'S S1 0.5'"
        )
    return children


def _by_name(grammar) -> np.ndarray:
    return np.array(sorted(range(len(grammar.names)), key=grammar.names.__getitem__))


class LabelledRows(NamedTuple):
    """The rows of a split, their text as blocks of UTF-8, a sentence a line: a Python string a row would be twice the memory.

    `labels`: (n,) int64; `distinct`: distinct sentences among the rows (by a hash of 64 bits); `dropped`: sentences that
    were drawn and left out because nothing derives their span.
    """

    blocks: list[bytes]
    labels: np.ndarray
    distinct: int
    dropped: int

    def texts(self) -> Iterator[str]:
        """The sentences, in the order of `labels`."""
        for block in self.blocks:
            yield from block.decode().split("\n")[:-1]


class LabelledSentences:
    """Labelled sentences of a grammar, dealt into two splits that share no sentence.

    A hash of the seed and the sentence says to which split a sentence belongs, so the same sentence never lands in both;
    within its split a sentence is as frequent as in the language (rows may repeat), and labels keep their frequencies.
    Each split has a random stream of its own.

    Args:
        sampler: a `pcfg.sampler.Sampler`.
        labeller: a `Labeller` of the same grammar.
        numbers: rows wanted of "training" and "validation"; a sentence is validation with probability
            validation / (training + validation).
        seed: of the streams and of the hash.
        min_words: shortest sentence.
    """

    def __init__(self, sampler, labeller: Labeller, numbers: dict[str, int], seed: int, min_words: int):
        self._sampler, self._labeller, self._numbers = sampler, labeller, numbers
        self._seed, self._min_words = seed, min_words
        digests = [hashlib.sha256(f"{seed} {word}".encode()).digest()[:8] for word in sampler.words]
        self._word_key = np.array([int.from_bytes(digest, "big") for digest in digests], dtype=np.uint64)  # (V,)
        self._validation_below = np.uint64(int(numbers["validation"] / sum(numbers.values()) * 2.0**64))

    def hashes(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """64 bits of each sentence, (n,) uint64, from the seed and the words alone: h <- mix(h + key(word)), from h = 0.

        `mix` is the finaliser of SplitMix64 (Steele, Lea and Flood 2014), a bijection, and key(word) the first 64 bits of
        the SHA-256 of seed and word.
        """
        found = np.zeros(len(lengths), dtype=np.uint64)
        for position in range(int(lengths.max(initial=0))):
            rows = np.flatnonzero(lengths > position)
            mixed = found[rows] + self._word_key[tokens[rows, position]]
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            found[rows] = mixed ^ (mixed >> np.uint64(31))
        return found

    def draw(self, split: str) -> LabelledRows:
        """The rows of a split.

        Raises:
            InputError: more than half of the sentences have no label, or the split's sentences do not suffice.
        """
        number = self._numbers[split]
        rng = keyed_rng(self._seed, f"downstream-{split}-{self._labeller.task}")
        blocks, labels, hashes, rows, dropped, drawn = [], [], [], 0, 0, 0
        # A split that holds a hundredth of its fair part of the language's probability still fills up.
        limit = 100_000 + 100 * sum(self._numbers.values())
        while rows < number:
            tokens, lengths = self._sampler.sample(SENTENCES_PER_DRAW, rng, self._min_words)
            drawn += len(lengths)
            hashed = self.hashes(tokens, lengths)
            ours = np.flatnonzero((hashed < self._validation_below) == (split == "validation"))
            found = self._labeller.label(tokens[ours], lengths[ours])
            kept = np.flatnonzero(found >= 0)[: number - rows]
            rows += len(kept)
            blocks.append(self._sampler.to_text(tokens[ours[kept]], lengths[ours[kept]], blank_line=False))
            labels.append(found[kept])
            hashes.append(hashed[ours[kept]])
            # What comes after the last row that is wanted was not dropped for want of a label.
            dropped += int((kept[-1] + 1 if rows == number else len(found)) - len(kept))
            if dropped > rows and (dropped >= 1000 or rows == number):
                raise InputError(
                    f"--span: no nonterminal derives the first {self._labeller.span} words of {dropped} of "
                    f"{dropped + rows} sentences; give a span that suits the grammar"
                )
            if drawn > limit and rows < number:
                raise InputError(
                    f"{split}: {rows} rows of {number} after {drawn} sentences were drawn: the grammar has not enough distinct "
                    f"sentences of these lengths ({len(np.unique(hashed))} were seen among the last {len(hashed)}, "
                    f"{len(np.unique(hashed[ours]))} of them belong here); ask for fewer rows or widen --min-words and "
                    "--length-limit"
                )
        distinct = len(np.unique(np.concatenate(hashes)))
        return LabelledRows(blocks, np.concatenate(labels), distinct, dropped)
