"""Masked-LM corruption of sentences, for whole arrays at once.

BERT's rule (Devlin et al., arXiv 1810.04805, section 3.1) as in academic-budget-bert: a sentence of `words` words gets
min(max_predictions, max(1, round(masked_lm_prob * (words + 2)))) masks, [CLS] and [SEP] counted, but at most one per word. The
masked positions are drawn uniformly without replacement; each becomes [MASK] with probability `mask_token_prob`, a uniformly
drawn word with probability `random_token_prob`, and stays as it is otherwise.

`mask_sentences` turns text into samples, `remask` gives samples new masks (dynamic masking, Liu et al., arXiv 1907.11692,
section 4.1).

With `single_mask` one position, uniform over the words, is replaced by [MASK]: the objective of Liu et al. (arXiv
2210.14199), whose optimum is the conditional entropy, since no other word of the context is disturbed.
"""

import dataclasses
from typing import Any

import numba
import numpy as np

from pcfg import say_when_compiling
from pcfg.common.files import InputError
from pretraining.data.samples import ROWS_PER_CHUNK, Samples
from pretraining.data.vocabulary import Vocabulary

say_when_compiling()


@dataclasses.dataclass(frozen=True)
class MaskingRule:
    """How many words are masked, and what replaces them."""

    masked_lm_prob: float = 0.15  # share of the tokens of a sentence that is masked
    max_predictions: int = 5  # maximum number of masks per sentence
    mask_token_prob: float = 0.8  # probability that a masked word becomes [MASK]
    random_token_prob: float = 0.1  # probability that it becomes a word drawn uniformly from the vocabulary
    single_mask: bool = False  # one mask per sentence, always [MASK]; the other fields then have no effect
    pieces: bool = False  # whether a random word may be a ##piece: natural text consists of them

    def __post_init__(self):
        for name in ("masked_lm_prob", "mask_token_prob", "random_token_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"--{name}: {getattr(self, name)} is not in [0, 1]; give a probability")
        total = self.mask_token_prob + self.random_token_prob
        if total > 1 + 1e-9:  # room for the rounding of sums like 0.7 + 0.2 + 0.1
            raise InputError(f"--mask_token_prob and --random_token_prob: their sum {total:g} is above 1; lower one")
        if self.max_predictions < 1:
            raise InputError(f"--max_predictions_per_seq: {self.max_predictions} is not 1 or more; give at least 1")

    @classmethod
    def from_attributes(cls, attributes: dict[str, Any], source: object) -> "MaskingRule":
        """The rule in the attributes of a file of samples."""
        fields: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            value = attributes.get(field.name, False if field.name == "pieces" else None)
            kinds: Any = int | float if field.type is float else field.type
            if not isinstance(value, kinds) or isinstance(value, bool) != (field.type is bool):
                raise InputError(
                    f"{source}: its attribute {field.name} is {'missing' if value is None else repr(value)}, so that "
                    "--dynamic_masking doesn't know how to mask; make the samples with generate_samples.py, or leave "
                    "--dynamic_masking out"
                )
            fields[field.name] = value
        try:
            return cls(**fields)
        except InputError as error:
            raise InputError(f"{source}: attributes that are no masking rule: {error}") from None

    def facts(self) -> dict[str, Any]:
        """The rule as plain values, for files; a false `pieces` is left out, as in files from before it existed."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "pieces" or value}

    @property
    def width(self) -> int:
        """Maximum number of masks per sentence: the columns of masked_lm_positions."""
        return 1 if self.single_mask else self.max_predictions

    def count_masks(self, lengths: np.ndarray) -> np.ndarray:
        """Masks of sentences of `lengths` (n,) words, (n,) int64.

        >>> MaskingRule(masked_lm_prob=0.15, max_predictions=3).count_masks(np.array([1, 8, 9, 30])).tolist()
        [1, 2, 2, 3]
        """
        if self.single_mask:
            return np.ones(len(lengths), dtype=np.int64)
        share = np.rint(self.masked_lm_prob * (lengths + 2)).astype(np.int64)
        return np.minimum(np.clip(share, 1, self.max_predictions), lengths)

    def thresholds(self) -> np.ndarray:
        """(2,) uint64: a masked word becomes [MASK] if a uniform 32-bit number is below the first, else a random word if it is
        below the second."""
        sums = (1.0, 1.0) if self.single_mask else np.cumsum([self.mask_token_prob, self.random_token_prob])
        return np.rint(np.minimum(sums, 1.0) * 2.0**32).astype(np.uint64)


def check_lengths(words: np.ndarray, max_tokens: int, source: object, limit: str = "--max_seq_length") -> None:
    """Refuse sentences, of `words` (n,) words, that need more than `max_tokens` tokens with [CLS] and [SEP] (flag `limit`)."""
    longest = int(words.max(initial=0))
    if longest + 2 > max_tokens:
        raise InputError(
            f"{source}: sentence {int(words.argmax()) + 1} has {longest} words; with [CLS] and [SEP] it needs {limit} "
            f"{longest + 2} or more, not {max_tokens} (sentences are never cut)"
        )


def mask_sentences(
    flat: np.ndarray,
    lengths: np.ndarray,
    vocabulary: Vocabulary,
    rule: MaskingRule,
    max_seq_length: int,
    rng: np.random.Generator,
    source: object = "sentences",
) -> Samples:
    """Masked samples of sentences, one each, in the same order, with `rule.width` columns of masks and no attributes.

    Blocks of sentences with the same generator give the same samples as all sentences in one call.

    Args:
        flat: (M,) int32 word ids, sentence after sentence, without [CLS] and [SEP], as from `Vocabulary.encode_text`.
        lengths: (n,) int32 words per sentence, 1 or more.
        max_seq_length: tokens per sample, [CLS], [SEP] and padding included.
    """
    check_lengths(lengths, max_seq_length, source)
    rows = len(lengths)
    columns = np.arange(max_seq_length, dtype=np.int32)  # of the type of `lengths`: comparing takes half the time
    is_word = columns <= lengths[:, None]  # (n, T)
    is_word[:, 0] = False
    input_ids = np.full((rows, max_seq_length), vocabulary.pad_id, dtype=np.int32)  # (n, T)
    input_ids[:, 0] = vocabulary.cls_id
    input_ids[is_word] = flat  # row by row
    input_ids[np.arange(rows), lengths + 1] = vocabulary.sep_id
    input_mask = (columns < lengths[:, None] + 2).view(np.int8)

    numbers = rule.count_masks(lengths)
    # Two 64-bit numbers per mask; of full width, so that no rest of one block's draws is left for the next.
    bits = rng.integers(0, 2**64, size=(int(numbers.sum()), 2), dtype=np.uint64)
    positions, true_ids = np.empty((2, rows, rule.width), dtype=np.int32)
    words = vocabulary.ordinary_ids(rule.pieces)
    places = np.cumsum(numbers) - numbers
    _mask(lengths, numbers, places, bits, rule.thresholds(), words, vocabulary.mask_id, input_ids, positions, true_ids)
    return Samples(input_ids, input_mask, np.zeros_like(input_mask), positions, true_ids)


def remask(
    samples: Samples, rule: MaskingRule, vocabulary: Vocabulary, rng: np.random.Generator, in_place: bool = False
) -> Samples:
    """The same sentences with new masks, in `rule.width` columns; the old masks are undone first and have no effect.

    Row r takes the numbers of `rng` from 2 * m * r on, with m the maximum number of masks of a sentence of T - 2 words: its
    masks are a function of the generator's key, r and the sentence, whatever the other rows are.

    Args:
        samples: accepted by `Samples.check`; the result shares its `input_mask`, `segment_ids` and `attributes`.
        rng: a new generator.
        in_place: whether the result may reuse the array `samples.input_ids`; else `samples` is not changed.
    """
    rows, width = samples.input_ids.shape
    input_ids = samples.input_ids if in_place else samples.input_ids.copy()
    positions, true_ids = np.empty((2, rows, rule.width), dtype=np.int32)
    mask_counts = rule.count_masks(np.arange(1, width - 1))
    max_masks = int(mask_counts.max())
    thresholds = rule.thresholds()
    words = vocabulary.ordinary_ids(rule.pieces)
    for first in range(0, rows, ROWS_PER_CHUNK):  # blocks that fit into the caches
        block = slice(first, first + ROWS_PER_CHUNK)
        ids = input_ids[block]
        # Position 0, [CLS], means that there is no mask.
        ids[np.arange(len(ids))[:, None], samples.masked_lm_positions[block]] = samples.masked_lm_ids[block]
        ids[:, 0] = vocabulary.cls_id
        lengths = samples.input_mask[block].sum(axis=1, dtype=np.int32) - 2
        places = np.arange(0, max_masks * len(ids), max_masks)
        bits = rng.integers(0, 2**64, size=(max_masks * len(ids), 2), dtype=np.uint64)
        numbers = mask_counts[lengths - 1]
        arrays = (ids, positions[block], true_ids[block])
        _mask(lengths, numbers, places, bits, thresholds, words, vocabulary.mask_id, *arrays)
    return Samples(input_ids, samples.input_mask, samples.segment_ids, positions, true_ids, samples.attributes)


@numba.njit(cache=True, nogil=True)
def _mask(lengths, numbers, places, bits, thresholds, words, mask_id, input_ids, masked_lm_positions, masked_lm_ids):
    """Replace `numbers` words of each row of `input_ids` and fill `masked_lm_positions` and `masked_lm_ids`.

    The positions are drawn by Floyd's algorithm (Bentley and Floyd 1987): each set of them is equally likely. A row's masks
    take the rows of `bits` from `places` on: the high halves of bits[m] for the position and for the random word, the low
    half of bits[m, 0] for the kind of replacement.
    """
    half = np.uint64(32)
    low = np.uint64(0xFFFFFFFF)
    is_masked = np.zeros(input_ids.shape[1], dtype=np.bool_)
    for row in range(len(lengths)):
        first = places[row]
        length = lengths[row]
        mask = first
        for last in range(length - numbers[row], length):
            drawn = np.int64(((bits[mask, 0] >> half) * np.uint64(last + 1)) >> half)  # 0..last
            is_masked[1 + (last if is_masked[1 + drawn] else drawn)] = True
            mask += 1
        masked_lm_positions[row] = 0
        masked_lm_ids[row] = 0
        column = 0
        for position in range(1, length + 1):
            if not is_masked[position]:
                continue
            is_masked[position] = False
            masked_lm_positions[row, column] = position
            masked_lm_ids[row, column] = input_ids[row, position]
            chance = bits[first + column, 0] & low
            if chance < thresholds[0]:
                input_ids[row, position] = mask_id
            elif chance < thresholds[1]:
                input_ids[row, position] = words[((bits[first + column, 1] >> half) * np.uint64(len(words))) >> half]
            column += 1
