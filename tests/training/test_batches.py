import itertools

import numpy as np
import pytest
import torch

from pcfg.common.files import InputError
from pretraining.data.samples import Samples
from pretraining.model.bert import MaskedLM
from pretraining.model.config import ModelConfig
from pretraining.training import batches
from pretraining.training.batches import count_masks, cuts, global_batches, masked_loss, micro_batch, rank_micro_batches

VOCABULARY, LENGTH, MASKS = 30, 12, 3


def random_samples(number, seed=0):
    """Sentences of 3..LENGTH tokens with 1..MASKS masks each."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, LENGTH + 1, number)
    mask = np.arange(LENGTH) < lengths[:, None]
    ids = np.where(mask, rng.integers(5, VOCABULARY, (number, LENGTH)), 0)
    positions, words = np.zeros((2, number, MASKS), np.int32)
    for row in range(number):
        chosen = np.sort(rng.choice(np.arange(1, lengths[row] - 1), rng.integers(1, MASKS + 1), replace=False))
        positions[row, : len(chosen)] = chosen
        words[row, : len(chosen)] = rng.integers(5, VOCABULARY, len(chosen))
    return Samples(ids.astype(np.int32), mask.astype(np.int8), 0 * mask.astype(np.int8), positions, words)


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
def test_grouping_leaves_loss_and_gradient_alone(naive_loss, dtype, tolerance, ranks):
    samples, rows = random_samples(100), np.random.default_rng(1).permutation(100)[:48]
    torch.manual_seed(0)
    config = ModelConfig(VOCABULARY, 16, 2, 2, 32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = MaskedLM(config).to(dtype)
    expected = naive_loss(model, samples, rows)
    gradient = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)

    total = torch.zeros((), dtype=torch.float64)
    for rank in range(ranks):
        for part in rank_micro_batches(samples, rows, 8, rank, ranks):
            share = masked_loss(model, micro_batch(samples, part if len(part) else rows[:1])) * (len(part) > 0)
            share = share / count_masks(samples, rows)
            share.backward()
            total += share.detach()
    torch.testing.assert_close(total, expected.double(), rtol=tolerance, atol=0)
    norm = torch.sqrt(sum((g.double() ** 2).sum() for g in gradient if g is not None))
    for parameter, wanted in zip(model.parameters(), gradient, strict=True):
        difference = parameter.grad if wanted is None else parameter.grad - wanted
        assert difference.norm() < tolerance * norm


@pytest.mark.parametrize(("number", "ranks", "size"), [(64, 4, 4), (61, 4, 7), (3, 5, 2), (1, 1, 1), (200, 3, 1000)])
def test_every_row_is_dealt_once_in_as_many_batches_a_rank(number, ranks, size):
    samples, rows = random_samples(number), np.arange(number)
    parts = [rank_micro_batches(samples, rows, size, rank, ranks) for rank in range(ranks)]
    assert len({len(of_rank) for of_rank in parts}) == 1
    assert sorted(row for of_rank in parts for part in of_rank for row in part) == list(range(number))
    assert max(len(part) for of_rank in parts for part in of_rank) <= size
    # Only a rank that has run out of sentences has an empty batch, and only as its last one.
    assert all(len(part) for of_rank in parts for part in of_rank[:-1])


def cost(lengths, parts, overhead):
    return sum(overhead + (end - start) * lengths[end - 1] for start, end in parts)


@pytest.mark.parametrize("overhead", [0, 3, 20, 1000])
def test_cuts_cost_least_of_all_ways_to_cut(overhead):
    rng = np.random.default_rng(overhead)
    for _ in range(30):
        lengths = np.sort(rng.integers(3, 9, rng.integers(1, 11)))
        inner = range(1, len(lengths))
        ways = [[*way, len(lengths)] for k in range(len(lengths)) for way in itertools.combinations(inner, k)]
        best = min(cost(lengths, itertools.pairwise([0, *way]), overhead) for way in ways)
        parts = cuts(lengths, size=100, overhead=overhead)
        assert cost(lengths, parts, overhead) == best
        assert [row for start, end in parts for row in range(start, end)] == list(range(len(lengths)))


def test_without_overhead_nothing_is_padded(monkeypatch):
    monkeypatch.setattr(batches, "OVERHEAD_TOKENS", 0)
    samples = random_samples(200)
    parts = [micro_batch(samples, part) for part in rank_micro_batches(samples, np.arange(200), 20)]
    assert all(part.input_mask is None for part in parts)
    assert sum(part.input_ids.numel() for part in parts) == samples.input_mask.sum()
    assert all(len(part.input_ids) <= 20 for part in parts)


def test_no_mask_where_nothing_is_padded():
    samples = random_samples(200)
    lengths = samples.input_mask.sum(1)
    assert micro_batch(samples, np.flatnonzero(lengths == 7)).input_mask is None
    padded = micro_batch(samples, np.array([lengths.argmin(), lengths.argmax()]))
    assert padded.input_mask.sum().item() == lengths.min() + lengths.max()


def test_flat_positions_point_at_the_masked_columns():
    samples = random_samples(10)
    rows = np.array([3, 7, 1])
    batch = micro_batch(samples, rows)
    width = batch.input_ids.shape[1]
    expected = [
        (i * width + position, word)
        for i, row in enumerate(rows)
        for position, word in zip(samples.masked_lm_positions[row], samples.masked_lm_ids[row], strict=True)
        if position
    ]
    assert list(zip(batch.flat_positions.tolist(), batch.labels.tolist(), strict=True)) == expected


def test_an_epoch_is_a_function_of_seed_and_number():
    first = global_batches(103, 10, seed=1, epoch=0, source="shard")
    assert first.shape == (10, 10) and len(np.unique(first)) == 100
    np.testing.assert_array_equal(first, global_batches(103, 10, seed=1, epoch=0, source="shard"))
    assert (first != global_batches(103, 10, seed=1, epoch=1, source="shard")).any()
    assert (first != global_batches(103, 10, seed=2, epoch=0, source="shard")).any()


def test_a_shard_smaller_than_a_batch_is_refused():
    with pytest.raises(InputError, match="train_shard_3.hdf5: has 9 samples, fewer than --train_batch_size 10"):
        global_batches(9, 10, seed=0, epoch=0, source="train_shard_3.hdf5")
