"""From a shard of samples to micro-batches that waste nothing on padding.

A global batch is the same set of samples for any number of ranks and any size of micro-batches; how it is grouped changes
neither the loss nor the gradient (see `pretraining.training.trainer`).
"""

import dataclasses

import numpy as np
import torch

from pcfg.artefacts import InputError, keyed_rng
from pretraining.data.samples import Samples


@dataclasses.dataclass
class MicroBatch:
    """Sentences of one forward pass, cut at the longest.

    Attributes:
        input_ids: (batch, length) int64.
        input_mask: (batch, length) bool, False at padding; None where nothing is padded.
        flat_positions: (masked,) int64, masked positions as indices into batch * length.
        labels: (masked,) int64, the words that stood there.
    """

    input_ids: torch.Tensor
    input_mask: torch.Tensor | None
    flat_positions: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on another device."""
        tensors = (getattr(self, field.name) for field in dataclasses.fields(self))
        return MicroBatch(*(tensor if tensor is None else tensor.to(device, non_blocking=True) for tensor in tensors))


def micro_batch(samples: Samples, rows: np.ndarray) -> MicroBatch:
    """The samples `rows`, (batch,) int, as tensors."""
    mask = samples.input_mask[rows] != 0  # (batch, T)
    lengths = mask.sum(1)
    length = int(lengths.max())
    positions = samples.masked_lm_positions[rows]  # (batch, P), 0 where there is no mask
    row, column = np.nonzero(positions)
    return MicroBatch(
        input_ids=torch.from_numpy(samples.input_ids[rows, :length].astype(np.int64)),
        input_mask=None if lengths.min() == length else torch.from_numpy(mask[:, :length].copy()),
        flat_positions=torch.from_numpy(row * length + positions[row, column]),
        labels=torch.from_numpy(samples.masked_lm_ids[rows][row, column].astype(np.int64)),
    )


def sorted_micro_batches(samples: Samples, rows: np.ndarray, size: int) -> list[np.ndarray]:
    """`rows` sorted by length and cut into parts of `size` (the last may be smaller): each part needs little padding."""
    lengths = samples.input_mask[rows].sum(1, dtype=np.int64)
    ordered = rows[np.argsort(lengths, kind="stable")]
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def rank_micro_batches(samples: Samples, rows: np.ndarray, size: int, rank: int, world_size: int) -> list[np.ndarray]:
    """The micro-batches of one rank: every `world_size`-th, so that ranks work on like lengths at the same time.

    All ranks get the same number if len(rows) is a multiple of size x world_size.
    """
    return sorted_micro_batches(samples, rows, size)[rank::world_size]


def number_of_masks(samples: Samples, rows: np.ndarray) -> int:
    """Masked positions of the samples `rows`."""
    return int(np.count_nonzero(samples.masked_lm_positions[rows]))


def global_batches(number_of_samples: int, batch_size: int, seed: int, epoch: int, source) -> np.ndarray:
    """An epoch: the samples of a shard in an order that is a function of (seed, epoch), cut into global batches.

    Returns:
        (batches, batch_size) int64 indices of samples; what doesn't fill a batch is left out.

    Raises:
        InputError: the shard has fewer samples than a batch.

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
