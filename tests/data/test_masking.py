"""Masking, against the rule written out for one sentence at a time and against the frequencies it must have."""

import collections
import itertools

import numpy as np
import pytest

from pcfg.common.files import InputError
from pretraining.data.masking import MaskingRule, check_lengths, mask_sentences
from pretraining.data.samples import DTYPES
from pretraining.data.vocabulary import SPECIAL_TOKENS, Vocabulary

VOCABULARY = Vocabulary([*SPECIAL_TOKENS, "[unused0]", *(f"w{i}" for i in range(20)), "##s"])


def sentences(number, longest, seed=0):
    """Word ids, sentence after sentence, and lengths."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, size=number).astype(np.int32)
    lengths[0] = longest
    return rng.choice(VOCABULARY.ordinary_ids(), size=lengths.sum()), lengths


def naive_number(words, probability, most):
    """The released rule, with the cap at the sentence's words."""
    return min(most, max(1, int(round((words + 2) * probability))), words)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.15, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("most", [1, 3, 40])
def test_count_masks(probability, most):
    lengths = np.arange(1, 63)
    rule = MaskingRule(masked_lm_prob=probability, max_predictions=most)
    assert rule.count_masks(lengths).tolist() == [naive_number(n, probability, most) for n in lengths.tolist()]


@pytest.mark.parametrize("rule", [MaskingRule(), MaskingRule(masked_lm_prob=1.0, max_predictions=20)])
def test_samples_undo_to_the_sentences(rule):
    """Putting the labels back gives [CLS] sentence [SEP]; everything else follows from the lengths."""
    flat, lengths = sentences(300, 14)
    samples = mask_sentences(flat, lengths, VOCABULARY, rule, 18, np.random.default_rng(1))
    assert samples.input_ids.shape == (300, 18) and samples.masked_lm_ids.shape == (300, rule.max_predictions)
    ends = np.cumsum(lengths)
    for row in range(len(samples)):
        length = int(lengths[row])
        number = naive_number(length, rule.masked_lm_prob, rule.max_predictions)
        positions = samples.masked_lm_positions[row, :number].tolist()
        assert positions == sorted(set(positions))
        assert all(1 <= position <= length for position in positions)
        restored = samples.input_ids[row].copy()
        restored[positions] = samples.masked_lm_ids[row, :number]
        sentence = [VOCABULARY.cls_id, *flat[ends[row] - length : ends[row]], VOCABULARY.sep_id]
        assert restored.tolist() == sentence + [VOCABULARY.pad_id] * (16 - length)
        assert samples.input_mask[row].tolist() == [1] * (length + 2) + [0] * (16 - length)
        assert not samples.masked_lm_positions[row, number:].any()
        assert not samples.masked_lm_ids[row, number:].any()
    assert not samples.segment_ids.any()


def positions_of(lengths, rule, seed=0):
    flat = np.full(lengths.sum(), VOCABULARY.ids["w3"], dtype=np.int32)
    rng = np.random.default_rng(seed)
    return mask_sentences(flat, lengths.astype(np.int32), VOCABULARY, rule, 12, rng).masked_lm_positions


def test_positions_are_uniform_without_replacement():
    drawn = positions_of(np.full(60_000, 5), MaskingRule(masked_lm_prob=3 / 7, max_predictions=3))
    counts = collections.Counter(map(tuple, drawn.tolist()))
    assert set(counts) == set(itertools.combinations(range(1, 6), 3))
    expected, error = 6000, np.sqrt(6000 * 0.9)
    assert all(abs(count - expected) < 5 * error for count in counts.values())


def test_short_rows_among_long_ones_are_uniform_too():
    drawn = positions_of(np.array([3, 8] * 30_000), MaskingRule(masked_lm_prob=0.22, max_predictions=4))
    assert (drawn[::2, 1:] == 0).all() and (drawn[1::2, 2:] == 0).all()
    for positions, length, share in ((drawn[::2, 0], 3, 1 / 3), (drawn[1::2, :2].ravel(), 8, 1 / 4)):
        counts = np.bincount(positions, minlength=length + 1)[1:]
        assert np.abs(counts - 30_000 * share).max() < 5 * np.sqrt(30_000 * share * (1 - share))


@pytest.mark.parametrize("rule", [MaskingRule(0.4, 4), MaskingRule(single_mask=True)])
def test_blocks_with_the_same_generator_give_what_all_at_once_gives(rule):
    flat, lengths = sentences(400, 9)
    ends = np.cumsum(lengths)
    whole = mask_sentences(flat, lengths, VOCABULARY, rule, 16, np.random.default_rng(5))
    rng, start = np.random.default_rng(5), 0
    for first, last in itertools.pairwise((0, 1, 3, 250, 400)):
        words = flat[start : ends[last - 1]]
        start = ends[last - 1]
        block = mask_sentences(words, lengths[first:last], VOCABULARY, rule, 16, rng)
        for name in DTYPES:
            assert np.array_equal(getattr(block, name), getattr(whole, name)[first:last])


@pytest.mark.parametrize(("mask", "random"), [(0.8, 0.1), (0.5, 0.5), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_replacements_have_the_asked_frequencies(mask, random):
    flat, lengths = sentences(40_000, 10)
    rule = MaskingRule(masked_lm_prob=0.3, max_predictions=4, mask_token_prob=mask, random_token_prob=random)
    samples = mask_sentences(flat, lengths, VOCABULARY, rule, 12, np.random.default_rng(2))
    row, column = np.nonzero(samples.masked_lm_positions)
    seen = samples.input_ids[row, samples.masked_lm_positions[row, column]]
    labels = samples.masked_lm_ids[row, column]

    def close(observed, share, number):
        return abs(observed - number * share) <= 5 * np.sqrt(number * share * (1 - share)) + 1e-9

    words = len(VOCABULARY.ordinary_ids())
    assert close((seen == VOCABULARY.mask_id).sum(), mask, len(seen))
    # a random word is the word itself once in `words` times
    assert close(((seen != labels) & (seen != VOCABULARY.mask_id)).sum(), random * (1 - 1 / words), len(seen))
    replaced = seen[(seen != labels) & (seen != VOCABULARY.mask_id)]
    assert set(replaced.tolist()) <= set(VOCABULARY.ordinary_ids().tolist())
    if random:
        counts = np.bincount(replaced, minlength=VOCABULARY.size)[VOCABULARY.ordinary_ids()]
        assert np.abs(counts - len(replaced) / words).max() < 6 * np.sqrt(len(replaced) / words)


def test_single_mask():
    flat, lengths = sentences(20_000, 6)
    rule = MaskingRule(masked_lm_prob=0.9, max_predictions=5, mask_token_prob=0.0, random_token_prob=1.0, single_mask=True)
    samples = mask_sentences(flat, lengths, VOCABULARY, rule, 8, np.random.default_rng(0))
    assert samples.masked_lm_positions.shape == (20_000, 1)
    positions = samples.masked_lm_positions[:, 0]
    assert (samples.input_ids == VOCABULARY.mask_id).sum() == 20_000
    assert (samples.input_ids[np.arange(20_000), positions] == VOCABULARY.mask_id).all()
    of_six = positions[lengths == 6]
    counts = np.bincount(of_six, minlength=7)[1:]
    assert counts.sum() == len(of_six)
    assert np.abs(counts - len(of_six) / 6).max() < 5 * np.sqrt(len(of_six) / 6)


def test_same_generator_same_samples():
    flat, lengths = sentences(50, 9)
    make = [mask_sentences(flat, lengths, VOCABULARY, MaskingRule(), 16, np.random.default_rng(s)) for s in (1, 1, 2)]
    assert np.array_equal(make[0].input_ids, make[1].input_ids)
    assert not np.array_equal(make[0].masked_lm_positions, make[2].masked_lm_positions)


def test_the_longest_sentence_that_fits():
    flat, lengths = sentences(20, 8)
    samples = mask_sentences(flat, lengths, VOCABULARY, MaskingRule(), 10, np.random.default_rng(0))
    assert samples.input_ids[0, -1] == VOCABULARY.sep_id
    with pytest.raises(InputError, match=r"a.txt: sentence 1 has 8 words.* --max_seq_length 10 or more, not 9"):
        mask_sentences(flat, lengths, VOCABULARY, MaskingRule(), 9, np.random.default_rng(0), source="a.txt")
    with pytest.raises(InputError, match="sentence 2 has 31 words"):
        check_lengths(np.array([2, 31, 30]), 32, "a.txt")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"masked_lm_prob": 1.5}, "--masked_lm_prob: 1.5"),
        ({"mask_token_prob": -0.1}, "--mask_token_prob: -0.1"),
        ({"random_token_prob": float("nan")}, "--random_token_prob: nan"),
        ({"mask_token_prob": 0.8, "random_token_prob": 0.3}, "their sum 1.1 is above 1"),
        ({"max_predictions": 0}, "--max_predictions_per_seq: 0"),
    ],
)
def test_rules_out_of_range_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        MaskingRule(**fields)
