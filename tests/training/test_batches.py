import itertools
import math

import numpy as np
import pytest
import torch

from pcfg.common.files import InputError
from pretraining.data.samples import Samples
from pretraining.model.bert import MaskedLM
from pretraining.model.config import ModelConfig
from pretraining.training.batches import (
    IGNORED,
    Packing,
    count_masks,
    cuts,
    global_batches,
    masked_loss,
    micro_batch,
    portions,
    rank_micro_batches,
    rounded,
)

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


@pytest.mark.parametrize("packing", [Packing(), Packing(0, 60), Packing(10), Packing(1e6, has_few_shapes=True)])
@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
def test_packing_leaves_loss_and_gradient_alone(naive_loss, dtype, tolerance, ranks, packing):
    samples, rows = random_samples(100), np.random.default_rng(1).permutation(100)[:48]
    torch.manual_seed(0)
    config = ModelConfig(VOCABULARY, 16, 2, 2, 32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = MaskedLM(config).to(dtype)
    expected = naive_loss(model, samples, rows)
    gradient = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)

    total = torch.zeros((), dtype=torch.float64)
    for rank in range(ranks):
        for part in rank_micro_batches(samples, rows, 8, packing, rank, ranks):
            share = masked_loss(model, micro_batch(samples, part if len(part) else rows[:1], packing)) * (len(part) > 0)
            share = share / count_masks(samples, rows)
            share.backward()
            total += share.detach()
    torch.testing.assert_close(total, expected.double(), rtol=tolerance, atol=0)
    norm = torch.sqrt(sum((g.double() ** 2).sum() for g in gradient if g is not None))
    for parameter, wanted in zip(model.parameters(), gradient, strict=True):
        difference = parameter.grad if wanted is None else parameter.grad - wanted
        assert difference.norm() < tolerance * norm


@pytest.mark.parametrize("most_tokens", [1, 100, 1000])
@pytest.mark.parametrize(("number", "ranks", "size"), [(64, 4, 4), (61, 4, 7), (3, 5, 2), (1, 1, 1), (200, 3, 1000)])
def test_every_row_is_dealt_once_in_as_many_batches_a_rank(number, ranks, size, most_tokens):
    samples, rows = random_samples(number), np.arange(number)
    packing = Packing(most_tokens=most_tokens)
    parts = [rank_micro_batches(samples, rows, size, packing, rank, ranks) for rank in range(ranks)]
    assert len({len(of_rank) for of_rank in parts}) == 1
    assert sorted(row for of_rank in parts for part in of_rank for row in part) == list(range(number))
    assert max(len(part) for of_rank in parts for part in of_rank) <= size
    # Only a rank that has run out of sentences has an empty batch, and only as its last one.
    assert all(len(part) for of_rank in parts for part in of_rank[:-1])


def test_a_micro_batch_has_about_as_many_tokens_as_are_allowed():
    lengths = np.sort(np.random.default_rng(0).integers(3, 500, 1000))
    for most in (1000, 5000, 10**6):
        sums = [lengths[start:end].sum() for start, end in portions(lengths, 10**6, most)]
        assert len(sums) <= math.ceil(lengths.sum() / most) and max(sums) < most + 1000
    assert max(end - start for start, end in portions(lengths, 7, 10**6)) == 7


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
        parts = cuts(lengths, overhead=overhead)
        assert cost(lengths, parts, overhead) == best
        assert [row for start, end in parts for row in range(start, end)] == list(range(len(lengths)))


def test_without_overhead_nothing_is_padded():
    samples = random_samples(200)
    batch = micro_batch(samples, np.arange(200), Packing(overhead=0))
    assert batch.input_mask is None
    assert len(batch.input_ids) == samples.input_mask.sum()
    assert [length for _, length, _ in batch.blocks] == list(range(5, LENGTH + 1))


def test_only_blocks_with_padding_have_a_mask():
    samples = random_samples(200)
    lengths = samples.input_mask.sum(1)
    assert micro_batch(samples, np.flatnonzero(lengths == 7), Packing(1e6)).blocks == [((lengths == 7).sum(), 7, False)]
    padded = micro_batch(samples, np.array([lengths.argmin(), lengths.argmax()]), Packing(1e6))
    assert padded.blocks == [(2, lengths.max(), True)]
    assert padded.input_mask.sum().item() == lengths.min() + lengths.max()


def inputs(batch):
    return batch.input_ids, batch.labels


def test_a_run_has_few_shapes_where_its_backend_prepares_each_one_anew():
    """Numbers of tokens and of masks in 16 batches: a linear layer has a shape for each."""
    samples = random_samples(4096)
    shapes = []
    for has_few_shapes in (False, True):
        packing = Packing(overhead=0, has_few_shapes=has_few_shapes)
        parts = [micro_batch(samples, rows, packing) for rows in np.arange(4096).reshape(16, 256)]
        shapes.append([len({len(tensor) for tensor in tensors}) for tensors in zip(*map(inputs, parts), strict=True)])
    assert min(shapes[0]) > 10 and max(shapes[1]) <= 3
    for number in range(1, 20_000, 7):
        assert 0 <= rounded(number) - number <= min(255, number / 16)


@pytest.mark.parametrize("packing", [Packing(0), Packing(20), Packing(1e6, has_few_shapes=True)])
def test_positions_point_at_the_masked_tokens(packing):
    samples = random_samples(10)
    rows = np.array([3, 7, 1, 5])
    batch = micro_batch(samples, rows, packing)
    words = samples.input_ids.copy()
    found, starts = [], np.cumsum([0, *(length for number, length, _ in batch.blocks for _ in range(number))])
    for position, label in zip(batch.positions.tolist(), batch.labels.tolist(), strict=True):
        if label != IGNORED:
            sentence = np.searchsorted(starts, position, side="right") - 1
            found.append(
                (batch.input_ids[starts[sentence] : position + 1].tolist(), batch.position_ids[position].item(), label)
            )
    expected = [
        (words[row, : position + 1].tolist(), position, word)
        for row in rows
        for position, word in zip(samples.masked_lm_positions[row], samples.masked_lm_ids[row], strict=True)
        if position
    ]
    assert sorted(found) == sorted(expected)


def test_an_epoch_is_a_function_of_seed_and_number():
    first = global_batches(103, 10, seed=1, epoch=0, source="shard")
    assert first.shape == (10, 10) and len(np.unique(first)) == 100
    np.testing.assert_array_equal(first, global_batches(103, 10, seed=1, epoch=0, source="shard"))
    assert (first != global_batches(103, 10, seed=1, epoch=1, source="shard")).any()
    assert (first != global_batches(103, 10, seed=2, epoch=0, source="shard")).any()


def test_a_shard_smaller_than_a_batch_is_refused():
    with pytest.raises(InputError, match="train_shard_3.hdf5: has 9 samples, fewer than --train_batch_size 10"):
        global_batches(9, 10, seed=0, epoch=0, source="train_shard_3.hdf5")
