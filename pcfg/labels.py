"""Downstream labels: which nonterminal derives a sentence, or a part of it, best (tasks of arXiv 2210.14199).

With `inside` and `outside` as in `pcfg.chart`, the label of a sentence of T words is

    task A:      argmax over A in the unary children of the start symbol, in the order of the rules, of inside(0, T, A)
    task B:      argmax over all nonterminals A, sorted by name, of inside(0, 4, A)
    task C:      the same over the first 2 words
    task span:   the same over the words i .. j - 1 that a slice `START:STOP` means, of inside(i, j, A)
    task state:  argmax over the states A of a hidden Markov model (`pcfg.hmm`) of inside(t, T, A) outside(t, T, A), which is
                 proportional to P(the state at the position t + 1 is A | sentence); positions count from 1
    task depth:  the number of rules from the root down to the deepest word of the most probable parse

The rule "likelihood" of A, B, C and span uses inside alone, with no prior and no context, as the code published with the
paper does. The rule "posterior" uses inside(i, j, A) outside(i, j, A) over the same cell. The label's id is its place in the
list, or the depth; ties take the lowest id and are counted. Slices are Python's: 2:5 is the third to the fifth word, -3: the
last three, 1:-1 all but the first and the last. So 0:4 is task B, and 0:2 is task C.
"""

import hashlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pcfg.chart import MAX_WORDS, Chart
from pcfg.common.files import InputError, keyed_rng
from pcfg.common.means import SentenceMeans
from pcfg.engine.rule_graph import strong_components
from pcfg.grammar import Grammar
from pcfg.sampler import Sampler

TASK_SPANS = {"A": None, "B": 4, "C": 2}  # words; None: the whole sentence
SPAN_TASK = "span"
STATE_TASK = "state"
DEPTH_TASK = "depth"
TASKS = (*TASK_SPANS, SPAN_TASK, STATE_TASK, DEPTH_TASK)
LABEL_RULES = ("likelihood", "posterior")
SENTENCES_PER_DRAW = 1 << 14
TASK_WORDS = 5  # of the shortest sentence of the downstream tasks, where the grammar has sentences that long


class Words(NamedTuple):
    """The words of a sentence that a Python slice means: start counts from 0, negative numbers from the sentence's end."""

    start: int
    stop: int | None  # None: to the end

    @classmethod
    def parse(cls, text: str) -> "Words":
        """`START:STOP`, each of which may be missing.

        >>> Words.parse("2:5"), Words.parse("-3:").cell(7), Words.parse("2:5").cell(4)
        (Words(start=2, stop=5), (4, 7), None)
        """
        match = re.fullmatch(r"(-?[0-9]{1,3})?:(-?[0-9]{1,3})?", text)
        if not match:
            raise InputError(f"--span {text}: task {SPAN_TASK} takes START:STOP, counted from 0, such as 2:5, 1:-1 or -3:")
        words = cls(int(match[1] or 0), None if match[2] is None else int(match[2]))
        if not words.shortest():
            raise InputError(f"--span {text}: no sentence of up to {MAX_WORDS} words has such words; START comes before STOP")
        return words

    def __str__(self) -> str:
        return f"{self.start}:{'' if self.stop is None else self.stop}"

    def cell(self, length: int) -> tuple[int, int] | None:
        """Start and stop in a sentence of `length` words, both from 0; None if it is too short for them."""
        start = self.start if self.start >= 0 else length + self.start
        stop = length if self.stop is None else self.stop if self.stop >= 0 else length + self.stop
        return (start, stop) if 0 <= start < stop <= length else None

    def shortest(self) -> int:
        """Length of the shortest sentence that has these words; 0 if none has."""
        return next((length for length in range(1, MAX_WORDS + 1) if self.cell(length)), 0)


class Labeller:
    """The labels of one task.

    Args:
        task: one of `TASKS`.
        span: for B and C, words from the sentence's beginning (None: 4 and 2); for the task "span", a slice `START:STOP`.
        rule: "likelihood" or "posterior"; None: the posterior for states, else the likelihood. The task "depth" has none.
        position: of the state, from 1; for the task "state" only.

    Attributes:
        names: the nonterminal, the state or the depth that each label id stands for.
        task: the argument, followed by the slice of a span ("span_2-5", "span_-3-end") or the position of a state ("state6").
        span, rule: the arguments, or what None means; `span` is None for labels of the whole sentence and of states.
        words: those that a label is about.
        min_words: of a sentence that has the words of the tasks "span" and "state"; 1 for other tasks.
    """

    def __init__(
        self, grammar: Grammar, task: str, span: int | str | None = None, rule: str | None = None, position: int | None = None
    ):
        _check_arguments(task, span, rule, position)
        self.task = task_name(task, span, position)
        self.span = TASK_SPANS.get(task) if span is None else span
        self.rule = rule or {STATE_TASK: "posterior", DEPTH_TASK: "most probable parse"}.get(task, "likelihood")
        self.words = Words(0, self.span if isinstance(self.span, int) else None)
        if task == SPAN_TASK:
            self.words = Words.parse(str(span))
            self.span = str(self.words)
        elif position is not None:
            self.words = Words(position - 1, None)
        self.min_words = self.words.shortest() if task in (SPAN_TASK, STATE_TASK) else 1
        self._symbols, self._ids, self.names = _candidates(grammar, task, position)
        self._chart = Chart(grammar)

    def label(self, tokens: np.ndarray, lengths: np.ndarray, tied: np.ndarray | None = None) -> np.ndarray:
        """Label ids of sentences, as `Chart` takes them: (n,) int64, -1 where nothing derives the span or it is too long.

        Marks those with several equal scores in `tied`, (n,) bool, if given; a depth is never marked.
        """
        if self.task == DEPTH_TASK:
            return self._chart.depths(tokens, lengths)
        if self.words.start >= 0 and (self.words.stop or 0) >= 0:  # the same cell at each length
            best = self._chart.labels(tokens, lengths, self._symbols, self.words, self.rule, tied)
            return np.where(best < 0, -1, self._ids[best])
        best = np.full(len(lengths), -1)
        for length in np.unique(lengths):
            rows = np.flatnonzero(lengths == length)
            if cell := self.words.cell(int(length)):
                equal = np.zeros(len(rows), dtype=bool)
                best[rows] = self._chart.labels(tokens[rows], lengths[rows], self._symbols, cell, self.rule, equal)
                if tied is not None:
                    tied[rows] = equal
        return np.where(best < 0, -1, self._ids[best])


def task_name(task: str, span: int | str | None, position: int | None) -> str:
    """A task in the names of files, see `Labeller.task`."""
    if task == SPAN_TASK:
        words = Words.parse(str(span))
        return f"{task}_{words.start}-{'end' if words.stop is None else words.stop}"
    return f"{task}{position}" if task == STATE_TASK else task


def _check_arguments(task: str, span: int | str | None, rule: str | None, position: int | None) -> None:
    """Refuse arguments of `Labeller` that its task does not have."""
    if (position is not None) != (task == STATE_TASK):
        raise InputError(f"--position {position}: tasks other than {STATE_TASK!r} have none, and that task needs one")
    if span is None:
        if task == SPAN_TASK:
            raise InputError(f"--task-type {task}: give the words as --span START:STOP, such as --span 2:5 or --span=-3:")
    elif task in ("A", STATE_TASK, DEPTH_TASK):
        raise InputError(f"--span {span}: task {task} labels whole sentences; leave it out, or take task B, C or {SPAN_TASK}")
    elif task != SPAN_TASK and isinstance(span, str):
        raise InputError(f"--span {span}: task {task} takes a number of words; take --task-type {SPAN_TASK}")
    elif isinstance(span, int) and span > MAX_WORDS:
        raise InputError(f"--span {span}: must be {MAX_WORDS} or less")
    if (task == STATE_TASK and rule == "likelihood") or (task == DEPTH_TASK and rule is not None):
        by = "its posterior" if task == STATE_TASK else "the most probable parse"
        raise InputError(f"--label-rule {rule}: the label of task {task} is by {by}; leave the flag out")


def _candidates(grammar: Grammar, task: str, position: int | None) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Nonterminals that may be labels, (S,), the label id of each, and the names of all ids."""
    if position is not None:
        return hidden_states(grammar, position)
    if task == DEPTH_TASK:
        # A path has at most one binary rule or emission per word, and a chain of unary rules before each.
        deepest = min(int(grammar.longest[0]), MAX_WORDS) * (1 + _longest_chain(grammar))
        return np.empty(0, np.int64), np.empty(0, np.int64), [str(depth) for depth in range(deepest + 1)]
    symbols = np.array(sorted(range(len(grammar.names)), key=grammar.names.__getitem__))
    if task == "A":
        symbols = grammar.unary[grammar.unary[:, 0] == 0, 1]
        if not len(symbols):
            raise InputError(
                f"--task-type A: the start symbol {grammar.names[0]!r} has no unary rules, so there are no classes; "
                "take --task-type span --span START:STOP, B or C, or write a grammar with rules such as 'S S1 0.5'"
            )
    return symbols, np.arange(len(symbols)), [grammar.names[symbol] for symbol in symbols]


def _longest_chain(grammar: Grammar) -> int:
    """A bound on the unary rules of a chain that passes no nonterminal twice; the longest chain, where there are no cycles."""
    component = strong_components(len(grammar.names), *grammar.unary.T.astype(np.int64))
    size = np.bincount(component)
    chain = size - 1  # rules within the component and below it
    for parent, child in sorted(component[grammar.unary].tolist()):  # children, with lower numbers, first
        if parent != child:
            chain[parent] = max(chain[parent], size[parent] + chain[child])
    return int(chain.max())


def hidden_states(grammar: Grammar, position: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The nonterminals that stand for the state at a position, from 1, of a hidden Markov model (`pcfg.hmm.hmm_rules`).

    Returns:
        symbols (S,) int64, nonterminals; ids (S,) int64, the index of each one's state in names; names, the states of all
        positions, without the positions that nonterminals carry.
    """
    emits = np.any(grammar.emission > 0, axis=1)
    start = np.arange(len(emits)) == 0
    state = ~emits & ~start
    left, first, second = grammar.binary.T
    parent, child = grammar.unary.T
    well_formed = (
        not emits[0]
        and (state[left] & emits[first] & state[second]).all()
        and np.where(start[parent], state[child], state[parent] & emits[child]).all()
    )
    to_words = parent != 0
    owners = np.unique(np.column_stack([np.append(left, parent[to_words]), np.append(first, child[to_words])]), axis=0)
    if not well_formed or len(owners) != np.count_nonzero(state):
        raise InputError(
            "--task-type state: the grammar is no hidden Markov model with rules of the form S -> q, q -> W_q r, q -> W_q and "
            "W_q -> word; make one with python -m pcfg.hmm, or take task A, B, C or span"
        )
    if position > grammar.longest[0]:
        raise InputError(f"--position {position}: the grammar's sentences have up to {grammar.longest[0]} words")
    states = np.flatnonzero(state)
    names = [grammar.names[symbol] for symbol in states]
    at = np.full(len(grammar.names), position)
    parts = [match.groups() for name in names if (match := re.fullmatch(r"(.+)@([1-9][0-9]{0,8})", name))]
    if len(parts) == len(names):
        carried = np.zeros(len(grammar.names), dtype=np.int64)
        carried[states] = [int(number) for _, number in parts]
        if (carried[second] == carried[left] + 1).all() and (carried[child[~to_words]] == 1).all():
            names = [name for name, _ in parts]
            at = carried
    number_of = {name: number for number, name in enumerate(dict.fromkeys(names))}
    here = at[states] == position
    return states[here], np.array([number_of[name] for name in names])[here], list(number_of)


def default_min_words(grammar: Grammar) -> int:
    """Words of the shortest sentence of the downstream tasks: 5, or the grammar's longest sentence if that is shorter."""
    return min(TASK_WORDS, int(grammar.longest[0]))


class LabelledRows(NamedTuple):
    """The rows of a split."""

    blocks: list[bytes]  # text in UTF-8, one sentence per line: one Python string per row would be twice the memory
    labels: np.ndarray  # (n,) int64
    distinct: int  # distinct sentences among the rows (by a hash of 64 bits)
    dropped: int  # sentences that were drawn and left out because nothing derives their span
    ties: int  # rows with the lowest of several labels whose scores are equal

    def texts(self) -> Iterator[str]:
        """The sentences, in the order of `labels`."""
        for block in self.blocks:
            yield from block.decode().split("\n")[:-1]


class LabelledSentences:
    """Labelled sentences of a grammar, dealt into splits that share no sentence.

    A hash of the seed and the sentence decides its split, so the same sentence never lands in both. Within its split a
    sentence is as frequent as in the language (rows may repeat), and labels keep their frequencies. Each split has a random
    stream of its own.

    Args:
        sampler, labeller: of the same grammar.
        numbers: rows of "training" and of other splits; a sentence belongs to a split with probability
            rows / (rows of all splits).
        seed: of the streams and of the hash.
        min_words: shortest sentence.
    """

    def __init__(self, sampler: Sampler, labeller: Labeller, numbers: dict[str, int], seed: int, min_words: int):
        self._sampler = sampler
        self._labeller = labeller
        self._numbers = numbers
        self._seed = seed
        self._min_words = min_words
        digests = b"".join(hashlib.sha256(f"{seed} {word}".encode()).digest()[:8] for word in sampler.words)
        self._word_key = np.frombuffer(digests, ">u8").astype(np.uint64)  # (V,)
        # Hashes below the first bound are the first split's, and so on; training has those above the last.
        self._splits = [*(split for split in numbers if split != "training"), "training"]
        shares = np.cumsum([numbers[split] for split in self._splits[:-1]]) / sum(numbers.values())
        self._bounds = np.array([int(share * 2.0**64) for share in shares], np.uint64)

    def hashes(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """64 bits of each sentence, (n,) uint64, from the seed and the words alone: h <- mix(h + key(word)), from h = 0.

        `mix` is the finaliser of SplitMix64 (Steele, Lea and Flood 2014), a bijection, and key(word) the first 64 bits of
        the SHA-256 of seed and word.
        """
        hashes = np.zeros(len(lengths), dtype=np.uint64)
        for position in range(int(lengths.max(initial=0))):
            rows = np.flatnonzero(lengths > position)
            mixed = hashes[rows] + self._word_key[tokens[rows, position]]
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            hashes[rows] = mixed ^ (mixed >> np.uint64(31))
        return hashes

    def draw(self, split: str, drop_unlabelled: bool = False) -> LabelledRows:
        """The rows of a split; an error if the sentences do not suffice, or without `drop_unlabelled` if most have no label."""
        number = self._numbers[split]
        rng = keyed_rng(self._seed, f"downstream-{split}-{self._labeller.task}")
        blocks: list[bytes] = []
        labels: list[np.ndarray] = []
        hashes: list[np.ndarray] = []
        rows = dropped = drawn = ties = 0
        # A split that holds a hundredth of its fair part of the language's probability still fills up.
        limit = 100_000 + 100 * sum(self._numbers.values())
        while rows < number:
            tokens, lengths = self._sampler.sample(SENTENCES_PER_DRAW, rng, self._min_words)
            drawn += len(lengths)
            hashed = self.hashes(tokens, lengths)
            ours = np.flatnonzero(np.searchsorted(self._bounds, hashed, "right") == self._splits.index(split))
            tied = np.zeros(len(ours), dtype=bool)
            ids = self._labeller.label(tokens[ours], lengths[ours], tied)
            labelled = np.flatnonzero(ids >= 0)[: number - rows]
            rows += len(labelled)
            ties += int(tied[labelled].sum())
            blocks.append(self._sampler.to_text(tokens[ours[labelled]], lengths[ours[labelled]]))
            labels.append(ids[labelled])
            hashes.append(hashed[ours[labelled]])
            # Sentences after the last row are not counted: they were not dropped for want of a label.
            dropped += int((labelled[-1] + 1 if rows == number else len(ids)) - len(labelled))
            if dropped > rows and (dropped >= 1000 or rows == number) and not drop_unlabelled:
                words = f"the words {self._labeller.words} of {dropped} of {dropped + rows} sentences"
                raise InputError(
                    f"task {self._labeller.task}: no nonterminal derives {words}; give a --span that suits the grammar, or "
                    "--drop-unlabelled to leave such sentences out"
                )
            if drawn > limit and rows < number:
                raise InputError(
                    f"{split}: {rows} rows of {number} after {drawn} sentences were drawn: the grammar has not enough distinct "
                    f"sentences of these lengths ({len(np.unique(hashed))} were seen among the last {len(hashed)}, "
                    f"{len(np.unique(hashed[ours]))} of them belong here); ask for fewer rows or widen --min-words and "
                    "--length-limit"
                )
        distinct = len(np.unique(np.concatenate(hashes)))
        return LabelledRows(blocks, np.concatenate(labels), distinct, dropped, ties)


def grammar_facts(grammar: Grammar, sentences: int, states: bool = False) -> list[str]:
    """Facts about a grammar from a sample of `sentences` sentences, one per line: entropies in nats, lengths, classes.

    Classes are those of the tasks A, B and C, or with `states`, of a hidden Markov model, those of the first positions.
    """
    sampler = Sampler(grammar, MAX_WORDS)
    tokens, lengths = sampler.sample(sentences, keyed_rng(0, "grammar-facts"))
    means = SentenceMeans().add(Chart(grammar).reductions(tokens, lengths)[0], lengths)
    entropies = "{:.3f} +- {:.3f} nats (pairs), {:.3f} +- {:.3f} nats (sentences)"
    counts = np.bincount(tokens[tokens >= 0], minlength=len(grammar.words))
    unigram = counts[counts > 0] / counts.sum()
    min_words = default_min_words(grammar)
    long_enough = lengths >= min_words
    lines = [
        f"entropy: {entropies.format(*means.by_pairs(), *means.by_sentences())}",
        f"unigram entropy: {-(unigram * np.log(unigram)).sum():.3f} nats",
        f"words a sentence: {lengths.min()} to {lengths.max()}, mean {lengths.mean():.2f}; "
        f"{np.mean(long_enough):.1%} have {min_words} or more",
        f"sample: {sentences} sentences, {len(set(sampler.texts(tokens, lengths)))} of them distinct",
    ]
    spans = {f"({'whole sentence' if span is None else f'span {span}'})": (task, None) for task, span in TASK_SPANS.items()}
    positions = {f"(position {position})": (STATE_TASK, position) for position in range(1, min_words + 1)}
    for where, (task, position) in (positions if states else spans).items():
        labels = Labeller(grammar, task, position=position).label(tokens[long_enough], lengths[long_enough])
        lines.append(f"task {task} {where}: {class_line(labels)}")
    return lines


def class_line(labels: np.ndarray) -> str:
    """Number of classes and the share of the largest; without a label: -1."""
    counts = np.bincount(labels[labels >= 0])
    if not len(counts):
        return "no labels"
    unlabelled = f", {np.mean(labels < 0):.1%} of the sentences without a label" if (labels < 0).any() else ""
    return f"{np.count_nonzero(counts)} classes, majority {counts.max() / counts.sum():.1%}{unlabelled}"
