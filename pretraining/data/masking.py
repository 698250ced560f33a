"""Masked-LM corruption of sentences, for whole arrays at once.

BERT's rule (Devlin et al., arXiv 1810.04805, section 3.1) as academic-budget-bert applies it: a sentence of `words` words
gets min(max_predictions, max(1, round(masked_lm_prob * (words + 2)))) masks, [CLS] and [SEP] counted, but never more than
it has words. The masked positions are drawn uniformly without replacement; each becomes [MASK] with probability
`mask_token_prob`, a uniformly drawn word with probability `random_token_prob`, and stays as it is otherwise.

With `single_mask` one position, uniform over the words, is replaced by [MASK]: the objective of Liu et al. (arXiv
2210.14199), whose optimum is the conditional entropy, since no other word of the context is disturbed.
"""

import dataclasses

import numpy as np

from pcfg.artefacts import InputError
from pretraining.data.samples import Samples
from pretraining.data.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class MaskingRule:
    """How many words are masked and by what.

    Attributes:
        masked_lm_prob: share of the tokens of a sentence that is masked.
        max_predictions: most masks a sentence.
        mask_token_prob: probability that a masked word becomes [MASK].
        random_token_prob: probability that it becomes a word drawn uniformly from the vocabulary.
        single_mask: one mask a sentence, always [MASK]; the other fields count for nothing then.

    Raises:
        InputError: a number is out of its range.
    """

    masked_lm_prob: float = 0.15
    max_predictions: int = 5
    mask_token_prob: float = 0.8
    random_token_prob: float = 0.1
    single_mask: bool = False

    def __post_init__(self):
        for name in ("masked_lm_prob", "mask_token_prob", "random_token_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"--{name}: {getattr(self, name)} is not in [0, 1]; give a probability")
        total = self.mask_token_prob + self.random_token_prob
        if total > 1 + 1e-9:  # room for the rounding of sums like 0.7 + 0.2 + 0.1
            raise InputError(f"--mask_token_prob and --random_token_prob: their sum {total:g} is above 1; lower one")
        if self.max_predictions < 1:
            raise InputError(f"--max_predictions_per_seq: {self.max_predictions} is not 1 or more; give at least 1")

    @property
    def width(self) -> int:
        """Most masks a sentence: the columns of masked_lm_positions."""
        return 1 if self.single_mask else self.max_predictions

    def number_of_masks(self, lengths: np.ndarray) -> np.ndarray:
        """Masks of sentences of `lengths` (n,) words, (n,) int64.

        >>> MaskingRule(masked_lm_prob=0.15, max_predictions=3).number_of_masks(np.array([1, 8, 9, 30])).tolist()
        [1, 2, 2, 3]
        """
        if self.single_mask:
            return np.ones(len(lengths), dtype=np.int64)
        wanted = np.rint(self.masked_lm_prob * (lengths + 2)).astype(np.int64)
        return np.minimum(np.clip(wanted, 1, self.max_predictions), lengths)


def draw_positions(lengths: np.ndarray, numbers: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each sentence `numbers` of its word indices 0..lengths-1, uniform without replacement.

    The first steps of a Fisher-Yates shuffle, all sentences at once: the loop is over masks, not over tokens.

    Args:
        lengths: (n,) words of each sentence, 1 or more.
        numbers: (n,) indices wanted of each, at most its length.

    Returns:
        (n, max of numbers) int32, ascending in each row; -1 at the end of rows with fewer.

    >>> draw_positions(np.array([1, 3]), np.array([1, 3]), np.random.default_rng(0)).tolist()
    [[0, -1, -1], [0, 1, 2]]
    """
    rows, most = np.arange(len(lengths)), int(numbers.max(initial=0))
    longest = int(lengths.max(initial=0))
    order = np.tile(np.arange(longest, dtype=np.int32), (len(lengths), 1))  # (n, longest)
    for step in range(most):
        other = rng.integers(step, np.maximum(lengths, step + 1))
        picked = order[rows, other]
        order[rows, other] = order[:, step]
        order[:, step] = picked
    drawn = order[:, :most]
    drawn[np.arange(most) >= numbers[:, None]] = longest  # sorts behind every index
    drawn = np.sort(drawn, axis=1)
    drawn[drawn == longest] = -1
    return drawn


def check_lengths(lengths: np.ndarray, max_seq_length: int, source) -> None:
    """Check that every sentence fits between [CLS] and [SEP].

    Raises:
        InputError: a sentence has more than `max_seq_length` - 2 words; sentences are never cut.
    """
    longest = int(lengths.max(initial=0))
    if longest + 2 > max_seq_length:
        raise InputError(
            f"{source}: sentence {int(lengths.argmax()) + 1}: {longest} words, with [CLS] and [SEP] {longest + 2} tokens; "
            f"--max_seq_length is {max_seq_length}, give {longest + 2} or more (sentences are never cut)"
        )


def mask_sentences(
    tokens: np.ndarray,
    lengths: np.ndarray,
    vocabulary: Vocabulary,
    rule: MaskingRule,
    max_seq_length: int,
    rng: np.random.Generator,
    source="sentences",
) -> Samples:
    """Masked samples of sentences, one each, in the same order.

    Args:
        tokens: (n, T) int32 word ids padded at the end, without [CLS] and [SEP], as `Vocabulary.encode` gives them.
        lengths: (n,) words of each sentence, 1 or more.
        max_seq_length: tokens of a sample, [CLS], [SEP] and padding included.
        source: named in errors.

    Returns:
        Samples with `max_seq_length` and `rule.width` columns and no attributes.

    Raises:
        InputError: a sentence is too long.
    """
    check_lengths(lengths, max_seq_length, source)
    number, longest = tokens.shape
    rows = np.arange(number)
    input_ids = np.full((number, max_seq_length), vocabulary.pad_id, dtype=np.int32)
    input_ids[:, 0] = vocabulary.cls_id
    input_ids[:, 1 : longest + 1] = tokens
    input_ids[rows, lengths + 1] = vocabulary.sep_id

    drawn = draw_positions(lengths, rule.number_of_masks(lengths), rng) + 1  # (n, masks), after [CLS]; 0: no mask
    positions = np.zeros((number, rule.width), dtype=np.int32)
    positions[:, : drawn.shape[1]] = drawn
    row, column = np.nonzero(positions)
    masked = positions[row, column]
    labels = np.zeros_like(positions)
    labels[row, column] = input_ids[row, masked]
    input_ids[row, masked] = _replacements(labels[row, column], vocabulary, rule, rng)

    return Samples(
        input_ids=input_ids,
        input_mask=(np.arange(max_seq_length) < lengths[:, None] + 2).astype(np.int8),
        segment_ids=np.zeros((number, max_seq_length), dtype=np.int8),
        masked_lm_positions=positions,
        masked_lm_ids=labels,
    )


def _replacements(labels: np.ndarray, vocabulary: Vocabulary, rule: MaskingRule, rng: np.random.Generator):
    """What stands in the input at masked words: [MASK], a uniformly drawn word, or the word itself; (masks,) int32."""
    if rule.single_mask:
        return np.full_like(labels, vocabulary.mask_id)
    words = vocabulary.ordinary_ids()
    chance = rng.random(len(labels))
    random_words = words[rng.integers(len(words), size=len(labels))]
    kept_or_random = np.where(chance < rule.mask_token_prob + rule.random_token_prob, random_words, labels)
    return np.where(chance < rule.mask_token_prob, vocabulary.mask_id, kept_or_random)
