"""Downstream labels: which nonterminal derives a sentence, or its first words, best (tasks of arXiv 2210.14199).

With `inside` and `outside` as in `pcfg.chart`, the label of a sentence of T words is

    task A:  argmax over A in the unary children of the start symbol, in the order of the rules, of inside(0, T, A)
    task B:  argmax over all nonterminals A, sorted by name, of inside(0, 4, A)
    task C:  the same over the first 2 words

The rule "likelihood" uses inside alone, with no prior and no context, as the code published with the paper does;
"posterior" uses inside(0, j, A) outside(0, j, A) over the same cell. The label's id is its place in the list; ties take
the lowest id. Other grammars may need other spans than 4 and 2 words.
"""

import hashlib

import numpy as np

from pcfg.artefacts import InputError, keyed_rng
from pcfg.chart import Chart

TASK_SPANS = {"A": None, "B": 4, "C": 2}  # words; None: the whole sentence
LABEL_RULES = ("likelihood", "posterior")
# Scores that are equal in exact arithmetic differ by rounding (1e-16 a sum); they must tie all the same.
TIE = 1e-12
SENTENCES_PER_DRAW = 4096


class Labeller:
    """The labels of one task.

    Args:
        grammar: a `pcfg.grammar.Grammar`.
        task: "A", "B" or "C".
        span: words from the sentence's beginning, for B and C; None: 4 and 2.
        rule: "likelihood" or "posterior".

    Attributes:
        names: the nonterminal that each label id stands for.
        task, span, rule: as given; `span` is None where the label is of the whole sentence.

    Raises:
        InputError: task A with a span, or of a grammar whose start symbol has no unary rules.
    """

    def __init__(self, grammar, task: str, span: int | None = None, rule: str = "likelihood"):
        if task == "A":
            if span is not None:
                raise InputError(f"--span {span}: task A labels whole sentences; leave it out, or take task B or C")
            self._symbols = grammar.unary[grammar.unary[:, 0] == 0, 1]
            if not len(self._symbols):
                raise InputError(
                    f"--task-type A: the start symbol {grammar.names[0]!r} has no unary rules, so there is "
                    "nothing to tell apart; take task B or C, or a grammar with rules such as 'S S1 0.5'"
                )
        else:
            self._symbols = np.array(sorted(range(len(grammar.names)), key=grammar.names.__getitem__))
        self.names = [grammar.names[symbol] for symbol in self._symbols]
        self.task = task
        self.span = TASK_SPANS[task] if span is None else span
        self.rule = rule
        self._chart = Chart(grammar)

    def label(self, tokens, lengths) -> np.ndarray:
        """Label ids of sentences, (n,) int64; -1 where no candidate derives the span (or the sentence is shorter).

        Args:
            tokens: (n, T) indices into `grammar.words`, anything beyond a sentence's end.
            lengths: (n,) words.
        """
        scores = self._chart.span_scores(tokens, lengths, self.span, self.rule)[:, self._symbols]  # (n, labels)
        best = scores.max(axis=1)
        labels = np.argmax(scores >= (best * (1 - TIE))[:, None], axis=1)
        return np.where(best > 0, labels, -1)


class LabelledSentences:
    """Labelled sentences of a grammar, dealt into two splits that share no sentence.

    A hash of the seed and the sentence says to which split a sentence belongs, so the same sentence never lands in both;
    within its split a sentence is as frequent as in the language (rows may repeat), and labels keep their frequencies.
    Each split has a random stream of its own.

    Args:
        sampler: a `pcfg.sampler.Sampler`.
        labeller: a `Labeller`.
        numbers: rows wanted of "training" and "validation"; a sentence is validation with probability
            validation / (training + validation).
        seed: of the streams and of the hash.
        min_words: shortest sentence.
    """

    def __init__(self, sampler, labeller: Labeller, numbers: dict[str, int], seed: int, min_words: int):
        self._sampler, self._labeller, self._numbers = sampler, labeller, numbers
        self._seed, self._min_words = seed, min_words
        self._share = numbers["validation"] / (numbers["training"] + numbers["validation"])

    def split_of(self, text: str) -> str:
        """The split that sentence `text` belongs to: "training" or "validation"."""
        digest = hashlib.sha256(f"{self._seed} {text}".encode()).digest()
        return "validation" if int.from_bytes(digest[:8], "big") < self._share * 2.0**64 else "training"

    def draw(self, split: str) -> tuple[list[str], list[int], int]:
        """The rows of a split: texts, labels, and the number of sentences dropped because nothing derives their span.

        Raises:
            InputError: more than half of the sentences have no label, or the split's sentences do not suffice.
        """
        number = self._numbers[split]
        rng = keyed_rng(self._seed, f"downstream-{split}-{self._labeller.task}")
        texts, labels, dropped, drawn, seen = [], [], 0, 0, set()
        # A split that holds a hundredth of its fair part of the language's probability still fills up.
        limit = 100_000 + 100 * sum(self._numbers.values())
        while len(texts) < number:
            tokens, lengths = self._sampler.sample(SENTENCES_PER_DRAW, rng, self._min_words)
            drawn += len(lengths)
            sentences = self._sampler.texts(tokens, lengths)
            seen.update(sentences)
            rows = [row for row, text in enumerate(sentences) if self.split_of(text) == split]
            found = self._labeller.label(tokens[rows], lengths[rows])
            kept = np.flatnonzero(found >= 0)[: number - len(texts)]
            texts += [sentences[rows[row]] for row in kept]
            labels += found[kept].tolist()
            # What comes after the last row that is wanted was not dropped for want of a label.
            dropped += (kept[-1] + 1 if len(texts) == number else len(found)) - len(kept)
            if dropped > len(texts) and (dropped >= 1000 or len(texts) == number):
                raise InputError(
                    f"--span: no nonterminal derives the first {self._labeller.span} words of {dropped} of "
                    f"{dropped + len(texts)} sentences; give a span that suits the grammar"
                )
            if drawn > limit and len(texts) < number:
                raise InputError(
                    f"{split}: {len(texts)} rows of {number} after {drawn} sentences were drawn: the grammar has not "
                    f"enough distinct sentences of these lengths ({len(seen)} were seen, "
                    f"{sum(self.split_of(text) == split for text in seen)} of them belong here); ask for fewer rows or widen "
                    "--min-words and --length-limit"
                )
        return texts, labels, int(dropped)
