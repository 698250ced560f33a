"""From a shard of samples to micro-batches with little padding.

A global batch is the same set of samples for any number of ranks and any size of micro-batches. How it is grouped changes
neither the loss nor the gradient (see `pretraining.training.trainer`).
"""

import dataclasses
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from pcfg.common.files import InputError, keyed_rng
from pretraining.data.samples import Samples
from pretraining.model import layers
from pretraining.model.layers import Places, places_by_sentence

# The cost of a micro-batch in addition to its tokens, in tokens: measured on CPU, near the minimum over a wide range.
OVERHEAD_TOKENS = 64


@dataclasses.dataclass
class GlobalBatch:
    """The samples of one step, over all ranks."""

    samples: Samples  # of the shard
    rows: np.ndarray  # (train_batch_size,) int64, those of this batch
    index: int  # of the batch in its epoch
    is_last: bool  # whether its epoch ends with it


@dataclasses.dataclass
class MicroBatch:
    """Sentences of one forward pass, as long as the longest of them."""

    input_ids: torch.Tensor  # (batch, length) int64
    input_mask: torch.Tensor | None  # (batch, length) bool, False at padding; None without padding
    flat_positions: torch.Tensor  # (masked,) int64, masked positions as indices into batch * length
    labels: torch.Tensor  # (masked,) int64, the original words
    places: Places = None  # `places_by_sentence` of the masked positions, if they are many

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on another device."""
        mask = None if self.input_mask is None else to_device(self.input_mask, device)
        positions = to_device(self.flat_positions, device)
        places = None if self.places is None else (to_device(self.places[0], device), self.places[1])
        return MicroBatch(to_device(self.input_ids, device), mask, positions, to_device(self.labels, device), places)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on another device; the host does not wait for it."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # from other memory the host would wait
    return tensor.to(device, non_blocking=True)


def micro_batch(samples: Samples, rows: np.ndarray) -> MicroBatch:
    """The samples `rows`, (batch,) int with batch >= 1, as tensors."""
    mask = samples.input_mask[rows] != 0  # (batch, T)
    lengths = mask.sum(1)
    length = int(lengths.max())
    positions = samples.masked_lm_positions[rows]  # (batch, P), 0 without a mask
    row, column = np.nonzero(positions)
    flat_positions = torch.from_numpy(row * length + positions[row, column])
    return MicroBatch(
        input_ids=torch.from_numpy(samples.input_ids[rows, :length].astype(np.int64)),
        input_mask=None if lengths.min() == length else torch.from_numpy(mask[:, :length].copy()),
        flat_positions=flat_positions,
        labels=torch.from_numpy(samples.masked_lm_ids[rows][row, column].astype(np.int64)),
        places=places_by_sentence(flat_positions, len(rows), length) if len(row) > layers.MOST_COPIES * len(rows) else None,
    )


def rank_micro_batches(samples: Samples, rows: np.ndarray, size: int, rank: int = 0, world_size: int = 1) -> list[np.ndarray]:
    """The micro-batches of one rank, arrays of rows: `rows` sorted by length, dealt to the ranks in turn, and cut by `cuts`.

    Ranks work on similar lengths at the same time, and all have the same number of micro-batches. On a rank without a row left
    for it, the last one is empty.
    """
    lengths = samples.input_mask[rows].sum(1, dtype=np.int64)
    order = np.argsort(lengths, kind="stable")
    longest = lengths[order][np.minimum(np.arange(world_size - 1, len(rows) + world_size - 1, world_size), len(rows) - 1)]
    own = rows[order][rank::world_size]
    return [own[start:end] for start, end in cuts(longest, size, OVERHEAD_TOKENS)]


def sort_and_cut(lengths: np.ndarray, size: int, overhead: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The order, (members, n) int64, of each member's sentences by their `lengths` (members, n), and `cuts` that all share."""
    order = np.argsort(lengths, axis=1, kind="stable")
    return order, cuts(np.take_along_axis(lengths, order, 1).max(0), size, overhead)


def cuts(lengths: np.ndarray, size: int, overhead: int) -> list[tuple[int, int]]:
    """Starts and ends of micro-batches of sentences sorted by length, at the minimum cost.

    A micro-batch of m sentences with at most L tokens costs m L + `overhead` tokens. A dynamic program over distinct lengths
    finds the cheapest of all ways to cut where the length changes. Parts of more than `size` sentences are then cut evenly.
    `lengths` are (n,) int64, ascending, n >= 1.

    >>> cuts(np.array([3, 3, 4, 9, 9, 9]), size=2, overhead=4)
    [(0, 2), (2, 3), (3, 4), (4, 6)]
    """
    ends = [*(np.flatnonzero(np.diff(lengths)) + 1).tolist(), len(lengths)]  # of the runs of equal lengths
    best = [0.0]  # cost of all sentences before a run
    start_of = [0]  # index of the run with which the last micro-batch before a run starts
    for end in ends:
        longest = int(lengths[end - 1])
        costs = [
            before + math.ceil((end - start) / size) * overhead + (end - start) * longest
            for before, start in zip(best, [0, *ends], strict=False)
        ]
        cheapest = min(range(len(costs)), key=costs.__getitem__)
        best.append(costs[cheapest])
        start_of.append(cheapest)
    cut_points = [len(lengths)]
    run = len(ends)
    while run:
        start = [0, *ends][start_of[run]]
        end = ends[run - 1]
        parts = math.ceil((end - start) / size)
        cut_points += [start + (end - start) * part // parts for part in reversed(range(parts))]
        run = start_of[run]
    return list(itertools.pairwise(cut_points[::-1]))


def masked_loss(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Sum over the masked positions of -log f(x)[w], in nats: a scalar, float32 or wider."""
    logits = model(batch.input_ids, batch.input_mask, batch.flat_positions, batch.places)  # (masked, vocab_size)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), batch.labels, reduction="sum")


def count_masks(samples: Samples, rows: np.ndarray) -> int:
    """Number of masked positions of the samples `rows`."""
    return int(np.count_nonzero(samples.masked_lm_positions[rows]))


def global_batches(number_of_samples: int, batch_size: int, seed: int, epoch: int, source: object) -> np.ndarray:
    """An epoch: the samples of a shard in an order that is a function of (seed, epoch), cut into global batches.

    The result is (batches, batch_size) int64 indices of samples. A last batch that is not full is left out. `source` is the
    shard's file, for messages.

    >>> global_batches(5, 2, seed=0, epoch=0, source="train_shard_0.hdf5").shape
    (2, 2)
    """
    if number_of_samples < batch_size:
        raise InputError(
            f"{source}: has {number_of_samples} samples, fewer than --train_batch_size {batch_size}; make a smaller batch "
            "or larger shards (--sentence-num of generate_pretraining.py)"
        )
    order = keyed_rng(seed, "epoch order", epoch).permutation(number_of_samples)
    whole = number_of_samples // batch_size
    return order[: whole * batch_size].reshape(whole, batch_size)
