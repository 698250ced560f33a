"""Naive baselines: what one would write first, with nltk, dictionaries and Python loops; of some, the second thought too.

They are compared with the engine by tests/test_benchmark.py, and timed against it by benchmark_pcfg.py.
"""

import functools
import itertools
import random
from collections import defaultdict

import h5py
import numpy as np
from nltk.grammar import PCFG
from nltk.parse import ViterbiParser


class ProductionSampler:
    """Sentences from an nltk grammar: a production of the left side by `random.choices`, then of its children."""

    def __init__(self, grammar: PCFG):
        self._grammar = grammar

    def sentence(self) -> list[str]:
        return self._words(self._grammar.start())

    def _choices(self, symbol) -> tuple[list, list[float]]:
        """The productions of a symbol and their probabilities."""
        productions = self._grammar.productions(lhs=symbol)
        return productions, [production.prob() for production in productions]

    def _words(self, symbol) -> list[str]:
        [production] = random.choices(*self._choices(symbol))
        words = []
        for child in production.rhs():
            if isinstance(child, str):
                words.append(child)
            else:
                words.extend(self._words(child))
        return words


class PreparedSampler(ProductionSampler):
    """The second thought: each symbol's productions are looked up once."""

    def __init__(self, grammar: PCFG):
        super().__init__(grammar)
        self._choices = functools.cache(super()._choices)


def write_text(sampler: ProductionSampler, path, sentences: int, max_words: int) -> None:
    """A text shard: sentences of at most max_words words, one a line, an empty line between two."""
    with open(path, "w") as file:
        written = 0
        while written < sentences:
            words = sampler.sentence()
            if len(words) <= max_words:
                file.write("\n" if written else "")
                file.write(" ".join(words) + "\n")
                written += 1


class DictionaryChart:
    """The CYK algorithm of the textbooks, weighted: at each split all binary rules are tried. A cell is a dictionary."""

    def __init__(self, grammar: PCFG):
        self.start = grammar.start()
        self.words = sorted({rule.rhs()[0] for rule in grammar.productions() if rule.is_lexical()})
        self._rules = defaultdict(list)  # right side -> [(left side, probability)]
        for rule in grammar.productions():
            self._rules[rule.rhs()].append((rule.lhs(), rule.prob()))
        self._binary = [(rule.lhs(), *rule.rhs(), rule.prob()) for rule in grammar.productions() if len(rule.rhs()) == 2]

    def inside(self, words: list[str]) -> dict:
        """{(i, j): {A: P(A =>* words[i:j])}} for all i < j; symbols that derive nothing are left out."""
        chart = {}
        for width in range(1, len(words) + 1):
            for i in range(len(words) - width + 1):
                j = i + width
                cell = defaultdict(float)
                if width == 1:
                    for left, probability in self._rules.get((words[i],), ()):
                        cell[left] += probability
                for k in range(i + 1, j):
                    self._combine(cell, chart[i, k], chart[k, j])
                self._add_unary(cell)
                chart[i, j] = cell
        return chart

    def _combine(self, cell, first_cell, second_cell) -> None:
        for left, first, second, probability in self._binary:
            if first in first_cell and second in second_cell:
                cell[left] += probability * first_cell[first] * second_cell[second]

    def _add_unary(self, cell) -> None:
        """Add what derives the cell's symbols by chains of unary rules (without cycles), a rule more at a time."""
        added = dict(cell)
        while added:
            longer = defaultdict(float)
            for child, inside in added.items():
                for left, probability in self._rules.get((child,), ()):
                    longer[left] += probability * inside
            for left, inside in longer.items():
                cell[left] += inside
            added = longer

    def probability(self, words: list[str]) -> float:
        """P(sentence)."""
        return self.inside(words)[0, len(words)].get(self.start, 0.0)

    def label(self, words: list[str], symbols: list) -> int:
        """The index of the symbol with the largest inside probability over all of `words`; -1 if all are zero."""
        cell = self.inside(words)[0, len(words)]
        scores = [cell.get(symbol, 0.0) for symbol in symbols]
        return scores.index(max(scores)) if max(scores) > 0 else -1

    def conditional(self, words: list[str], position: int) -> list[float]:
        """P(x_position = w | the other words) for all of the grammar's words, by putting each of them there."""
        joint = [self.probability([*words[:position], word, *words[position + 1 :]]) for word in self.words]
        return [value / sum(joint) for value in joint]


class PairChart(DictionaryChart):
    """The second thought: only the rules of the pairs of symbols that the two cells hold, looked up by the pair."""

    def _combine(self, cell, first_cell, second_cell) -> None:
        for first, inside_first in first_cell.items():
            for second, inside_second in second_cell.items():
                for left, probability in self._rules.get((first, second), ()):
                    cell[left] += probability * inside_first * inside_second


def best_parse(parser: ViterbiParser, words: list[str]):
    """The most probable tree of a sentence; its probability is `.prob()`."""
    return next(iter(parser.parse(words)))


def write_masked_samples(text, tokenizer, path, max_tokens: int, max_masks: int, masked_share: float, sentences: int) -> None:
    """Masked samples of the first sentences of a text file, in the layout of `pretraining.data.samples`, by BERT's rule."""
    with open(text) as file:
        encoded = (tokenizer(line.strip())["input_ids"] for line in file if line.strip())
        write_masked(path, itertools.islice(encoded, sentences), tokenizer, max_tokens, max_masks, masked_share)


def packed_documents(lines, tokenizer, max_tokens: int):
    """The sentences of documents, an empty line between two, packed: lists of ids of at most `max_tokens`."""
    sample = []
    for line in itertools.chain(lines, [""]):
        ids = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(line.strip()))
        if sample and (not line.strip() or len(sample) + len(ids) > max_tokens - 2):
            yield [tokenizer.cls_token_id, *sample, tokenizer.sep_token_id]
            sample = []
        while len(ids) > max_tokens - 2:
            yield [tokenizer.cls_token_id, *ids[: max_tokens - 2], tokenizer.sep_token_id]
            ids = ids[max_tokens - 2 :]
        sample = sample + ids


def write_masked(path, sequences, tokenizer, max_tokens: int, max_masks: int, masked_share: float) -> None:
    """Masked samples of lists of ids, [CLS] and [SEP] among them."""
    rows = defaultdict(list)
    ordinary = [index for index in tokenizer.get_vocab().values() if index not in tokenizer.all_special_ids]
    for ids in sequences:
        positions = list(range(1, len(ids) - 1))
        random.shuffle(positions)
        wanted = min(max_masks, max(1, round(masked_share * len(ids))))
        positions = sorted(positions[:wanted])
        labels = [ids[position] for position in positions]
        for position in positions:
            chance = random.random()
            if chance < 0.8:
                ids[position] = tokenizer.mask_token_id
            elif chance < 0.9:
                ids[position] = random.choice(ordinary)
        padding = [0] * (max_tokens - len(ids))
        unused = [0] * (max_masks - len(positions))
        rows["input_ids"].append(ids + padding)
        rows["input_mask"].append([1] * len(ids) + padding)
        rows["segment_ids"].append([0] * max_tokens)
        rows["masked_lm_positions"].append(positions + unused)
        rows["masked_lm_ids"].append(labels + unused)
    with h5py.File(path, "w") as file:
        for name, values in rows.items():
            kind = np.int8 if name in ("input_mask", "segment_ids") else np.int32
            file.create_dataset(name, data=np.array(values, kind), compression="gzip")
