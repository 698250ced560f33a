"""Dynamic masking: the masks that a naive loop gives, by the law of the rule, a function of (seed, shard, epoch, row)."""

import copy
import dataclasses
import itertools

import numpy as np
import pytest
from scipy.stats import chisquare

from pcfg.common.files import InputError, keyed_rng
from pretraining.data.masking import MaskingRule, mask_sentences, remask
from pretraining.data.samples import DTYPES, read_samples, write_samples
from pretraining.data.vocabulary import SPECIAL_TOKENS, Vocabulary
from pretraining.training import sample_stream as module
from pretraining.training.sample_stream import Shards

VOCABULARY = Vocabulary([*SPECIAL_TOKENS, "[unused0]", *(f"w{i}" for i in range(20)), "##s"])
WORDS = VOCABULARY.ordinary_ids()
RULES = [MaskingRule(), MaskingRule(0.4, 4, 0.5, 0.4), MaskingRule(1.0, 20), MaskingRule(single_mask=True)]


def make_samples(lengths, rule=RULES[0], width=14, seed=0):
    """Samples of random sentences of `lengths` words, as a file of them has them."""
    rng = np.random.default_rng(seed)
    lengths = np.asarray(lengths, dtype=np.int32)
    flat = rng.choice(WORDS, size=lengths.sum())
    samples = mask_sentences(flat, lengths, VOCABULARY, rule, width, rng)
    made_from = {"vocab_sha256": VOCABULARY.sha256, "vocab_size": VOCABULARY.size, "source": "a", "source_sha256": "0"}
    samples.attributes = {"max_seq_length": width, **made_from, **dataclasses.asdict(rule)}
    return samples


def rng_of(epoch, seed=0, shard=0):
    return keyed_rng(seed, "dynamic masking", shard, epoch)


def is_same(first, second):
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in DTYPES)


def sentences(samples):
    """The true ids of all rows, (n, T), by a loop."""
    restored = samples.input_ids.copy()
    for row in range(len(samples)):
        for position, word in zip(samples.masked_lm_positions[row], samples.masked_lm_ids[row], strict=True):
            if position:
                restored[row, position] = word
    return restored


def naive_remask(samples, rule, rng):
    """New masks sentence by sentence with Python's integers."""
    restored, most = sentences(samples), int(rule.count_masks(np.array([samples.input_ids.shape[1] - 2]))[0])
    positions, labels = (np.zeros((len(samples), rule.width), np.int32) for _ in range(2))
    for row in range(len(samples)):
        words = int(samples.input_mask[row].sum()) - 2
        draws, chosen = rng.integers(0, 2**64, size=(most, 2), dtype=np.uint64).tolist(), set()
        number = int(rule.count_masks(np.array([words]))[0])
        for draw, last in enumerate(range(words - number, words)):
            position = (draws[draw][0] >> 32) * (last + 1) >> 32
            chosen.add(last if position in chosen else position)
        for column, position in enumerate(sorted(chosen)):
            positions[row, column], labels[row, column] = position + 1, restored[row, position + 1]
            chance = (draws[column][0] & 0xFFFFFFFF) / 2**32
            if rule.single_mask or chance < rule.mask_token_prob:
                restored[row, position + 1] = VOCABULARY.mask_id
            elif chance < rule.mask_token_prob + rule.random_token_prob:
                restored[row, position + 1] = WORDS[(draws[column][1] >> 32) * len(WORDS) >> 32]
    return dataclasses.replace(samples, input_ids=restored, masked_lm_positions=positions, masked_lm_ids=labels)


@pytest.mark.parametrize("rule", RULES)
def test_masks_are_those_of_a_loop_and_the_old_ones_have_no_effect(rule):
    samples = make_samples(np.random.default_rng(1).integers(1, 13, size=300))
    before = copy.deepcopy(samples)
    masked = remask(samples, rule, VOCABULARY, rng_of(3))
    assert is_same(samples, before)
    assert is_same(masked, naive_remask(samples, rule, rng_of(3)))
    masked.check("a")
    masked.check_vocabulary(VOCABULARY, "a")
    assert np.array_equal(sentences(masked), sentences(samples))
    other = remask(samples, RULES[2], VOCABULARY, rng_of(9))
    assert is_same(remask(other, rule, VOCABULARY, rng_of(3)), masked)
    assert is_same(remask(other, rule, VOCABULARY, rng_of(3), in_place=True), masked)


def test_a_rows_masks_do_not_depend_on_other_rows():
    lengths = np.random.default_rng(1).integers(1, 13, size=9000)
    samples = make_samples(lengths)
    whole = remask(samples, RULES[0], VOCABULARY, rng_of(0))
    part = dataclasses.replace(samples, **{name: getattr(samples, name)[:4500] for name in DTYPES})
    part.input_ids[:4400], part.input_mask[:4400] = samples.input_ids[0], samples.input_mask[0]
    part.masked_lm_positions[:4400], part.masked_lm_ids[:4400] = samples.masked_lm_positions[0], samples.masked_lm_ids[0]
    masked = remask(part, RULES[0], VOCABULARY, rng_of(0))
    for name in DTYPES:
        assert np.array_equal(getattr(masked, name)[4400:], getattr(whole, name)[4400:4500])


@pytest.mark.parametrize("other", [{"epoch": 1}, {"epoch": 0, "seed": 1}, {"epoch": 0, "shard": 1}])
def test_another_epoch_seed_or_shard_gives_other_masks(other):
    samples = make_samples([8] * 1000, MaskingRule(single_mask=True))
    first = remask(samples, RULES[3], VOCABULARY, rng_of(0)).masked_lm_positions
    second = remask(samples, RULES[3], VOCABULARY, rng_of(**other)).masked_lm_positions
    assert (first == second).mean() == pytest.approx(1 / 8, abs=0.05)


def follows(counts, shares, wrong=0.2):
    """Chi-square test of counts; it must have the power to refuse the law in which one share is 20% higher."""
    counts, shares = np.asarray(counts).ravel(), np.asarray(shares, float).ravel()
    assert shares.sum() == pytest.approx(1)
    other = shares.copy()
    other[0] *= 1 + wrong
    p, p_of_other = (chisquare(counts, counts.sum() * each / each.sum()).pvalue for each in (shares, other))
    assert p_of_other < 1e-6
    return p > 1e-3


def test_sets_of_positions_are_equally_likely():
    masked = remask(make_samples([5] * 40_000), MaskingRule(3 / 7, 3), VOCABULARY, rng_of(0))
    sets, counts = np.unique(masked.masked_lm_positions, axis=0, return_counts=True)
    assert list(map(tuple, sets.tolist())) == list(itertools.combinations(range(1, 6), 3))
    assert follows(counts, np.full(10, 1 / 10))


def test_a_single_mask_is_uniform_and_independent_of_its_neighbours_and_of_the_last_epoch():
    samples = make_samples([5] * 100_000, RULES[3])
    first, second = (remask(samples, RULES[3], VOCABULARY, rng_of(epoch)) for epoch in (0, 1))
    at = [masked.masked_lm_positions[:, 0] - 1 for masked in (first, second)]
    assert (first.input_ids == VOCABULARY.mask_id).sum() == len(samples)
    assert follows(np.bincount(at[0]), np.full(5, 1 / 5))
    assert follows(np.bincount(5 * at[0] + at[1]), np.full(25, 1 / 25))
    assert follows(np.bincount(5 * at[0][::2] + at[0][1::2]), np.full(25, 1 / 25))


def test_replacements_and_random_words_have_the_asked_frequencies():
    rule = MaskingRule(0.3, 4, 0.7, 0.2)
    masked = remask(make_samples([8] * 100_000), rule, VOCABULARY, rng_of(0))
    row, column = np.nonzero(masked.masked_lm_positions)
    positions, labels = masked.masked_lm_positions[row, column], masked.masked_lm_ids[row, column]
    seen = masked.input_ids[row, positions]
    kinds = np.where(seen == VOCABULARY.mask_id, 0, np.where(seen == labels, 1, 2))
    shares = np.array([0.7, 0.1 + 0.2 / 20, 0.2 * 19 / 20])  # a random word is the word itself once in 20 times
    assert follows(np.bincount(kinds), shares)
    assert follows(np.bincount(8 * kinds + positions - 1), np.outer(shares, np.full(8, 1 / 8)))
    offsets = (np.searchsorted(WORDS, seen) - np.searchsorted(WORDS, labels))[kinds == 2] % 20
    assert set(seen[kinds == 2]) == set(WORDS.tolist())
    assert follows(np.bincount(offsets, minlength=20)[1:], np.full(19, 1 / 19))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masked_lm_prob": None}, "its attribute masked_lm_prob is missing, so that --dynamic_masking"),
        ({"single_mask": 1}, "its attribute single_mask is 1, so that"),
        ({"max_predictions": 2.0}, "its attribute max_predictions is 2.0, so that"),
        ({"mask_token_prob": True}, "its attribute mask_token_prob is True, so that"),
        ({"mask_token_prob": 0.95}, "no masking rule: .*their sum 1.05 is above 1"),
    ],
)
def test_files_that_do_not_say_how_to_mask_are_refused(tmp_path, change, message):
    samples = make_samples([8] * 10)
    samples.attributes = {name: value for name, value in (samples.attributes | change).items() if value is not None}
    write_samples(tmp_path / "train_shard_0.hdf5", [samples])
    with pytest.raises(InputError, match=f"train_shard_0.hdf5: .*{message}"):
        Shards(tmp_path, "train", VOCABULARY, dynamic=0)
    Shards(tmp_path, "train", VOCABULARY).read(0)


@pytest.mark.parametrize("numbers", [(0, 1, 7), (3,)])
def test_shards_are_masked_by_number_and_epoch_wherever_one_begins(tmp_path, monkeypatch, numbers):
    for number in numbers:
        write_samples(tmp_path / f"train_shard_{number}.hdf5", [make_samples([3, 8, 12] * 20, seed=number)])
    reads = []
    monkeypatch.setattr(module, "read_samples", lambda path, _: reads.append(path) or read_samples(path))
    with Shards(tmp_path, "train", VOCABULARY, dynamic=5) as shards:
        for epoch in range(6):
            number = numbers[epoch % len(numbers)]
            file = read_samples(tmp_path / f"train_shard_{number}.hdf5")
            expected = remask(file, RULES[0], VOCABULARY, rng_of(epoch, 5, number))
            assert is_same(shards.read(epoch), expected)
            assert is_same(shards.read(epoch), expected)
    assert len(reads) == (1 if len(numbers) == 1 else 7)
    with Shards(tmp_path, "train", VOCABULARY, dynamic=5) as shards:
        assert is_same(shards.read(5), expected)


def test_training_masks_anew_in_every_epoch(train, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "remask", lambda *a, **k: seen.append(remask(*a, **k)) or seen[-1])
    train("--dynamic_masking --max_steps 3 --max_steps_per_epoch 1")
    first, third = seen[0], seen[2]  # of two shards, the first one twice
    assert np.array_equal(sentences(first), sentences(third))
    assert (first.masked_lm_positions != third.masked_lm_positions).any()
