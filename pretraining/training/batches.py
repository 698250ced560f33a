"""From a shard of samples to micro-batches of packed sentences.

A global batch is the same set of samples for any number of ranks and any size of micro-batches. How it is grouped changes
neither the loss nor the gradient (see `pretraining.training.trainer`).
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from pcfg.common.files import InputError, keyed_rng
from pretraining.data.samples import Samples
from pretraining.model.config import ModelConfig
from pretraining.model.layers import Blocks

# The cost of attention to one block of sentences more, in multiply-adds of a layer's matrices, by device type.
BLOCK_COST = {"cpu": 4e6, "cuda": 2.5e9}  # measured on one core; estimated
MOST_TOKENS = {"cpu": 16_384, "cuda": 65_536}  # of a micro-batch, by device type
IGNORED = -100  # label of a position that `F.cross_entropy` leaves out


@dataclasses.dataclass
class GlobalBatch:
    """The samples of one step, over all ranks."""

    samples: Samples  # of the shard
    rows: np.ndarray  # (train_batch_size,) int64, those of this batch
    index: int  # of the batch in its epoch
    is_last: bool  # whether its epoch ends with it


@dataclasses.dataclass(frozen=True)
class Packing:
    """How sentences become micro-batches; it changes neither the loss nor the gradient."""

    overhead: float = 64.0  # the cost of a block of sentences in addition to its tokens, in tokens
    most_tokens: int = MOST_TOKENS["cpu"]  # of a micro-batch
    has_few_shapes: bool = False  # numbers of tokens and masks are `rounded`, since the backend prepares each one anew

    @classmethod
    def of(cls, config: ModelConfig, device: torch.device, arithmetic: str) -> "Packing":
        """That of a model on a device, in the arithmetic of `pretraining.training.engine.precision`."""
        kind = device.type if device.type in MOST_TOKENS else "cuda"
        products = 4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size  # of a token in a layer
        return cls(BLOCK_COST[kind] / products, MOST_TOKENS[kind], arithmetic != "float32")


@dataclasses.dataclass
class MicroBatch:
    """Sentences of one forward pass, packed one after the other in the order of their lengths; the inputs of `MaskedLM`.

    Where there are several members, all tensors have them as first axis.
    """

    input_ids: torch.Tensor  # (N,) int64
    input_mask: torch.Tensor | None  # (N,) bool, False at padding; None without padding
    positions: torch.Tensor  # (M,) int64, masked positions as indices into N
    position_ids: torch.Tensor  # (N,) int64, of each token in its sentence
    labels: torch.Tensor  # (M,) int64, the original words, or `IGNORED`
    blocks: Blocks  # number of sentences, their length, whether some of them are padded to it

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "MicroBatch":
        """The same with `function` of each tensor."""
        return self.of({name: function(tensor) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}

    def of(self, tensors: dict[str, Any]) -> "MicroBatch":
        """The same with other `tensors`."""
        return dataclasses.replace(self, **tensors)

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on another device."""
        return self.map(lambda tensor: to_device(tensor, device))


def seed_dropout(seed: int, purpose: str, *index: int) -> None:
    """Make the dropout masks drawn from here on a function of the key, as in `keyed_rng`."""
    number = int(keyed_rng(seed, purpose, *index).integers(1 << 63))
    # `torch.manual_seed` takes a millisecond: it keeps the call stack for each kind of device that is not there.
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(number)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on another device; the host does not wait for it."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # from other memory the host would wait
    return tensor.to(device, non_blocking=True)


def micro_batch(samples: Samples, rows: np.ndarray, packing: Packing) -> MicroBatch:
    """The samples `rows`, (batch,) int with batch >= 1, as tensors."""
    return pack([(samples, rows)], packing).map(lambda tensor: tensor[0])


def pack(members: Sequence[tuple[Samples, np.ndarray]], packing: Packing) -> MicroBatch:
    """Samples of several members, the same number of rows of each, as one micro-batch with the members as first axis.

    Each member's sentences are sorted by length. Those at one place have one length for all members, and blocks of similar
    length are padded to the longest of them where that costs less than a block more, by `cuts`. A member with fewer masks than
    another one has labels `IGNORED` in their place.
    """
    order, longest = by_length(np.stack([sentence_lengths(*member) for member in members]))
    cut = cuts(longest, packing.overhead)
    input_ids, input_mask, masks, words = (
        np.stack([getattr(samples, name)[rows[own]] for (samples, rows), own in zip(members, order, strict=True)])
        for name in ("input_ids", "input_mask", "masked_lm_positions", "masked_lm_ids")
    )
    lengths = input_mask.sum(2, dtype=np.int64)  # (members, sentences)
    padded = np.repeat([longest[end - 1] for _, end in cut], [end - start for start, end in cut])  # lengths, (sentences,)
    starts = padded.cumsum() - padded
    sentence = np.repeat(np.arange(len(padded)), padded)  # of each token, (N,)
    column = np.arange(len(sentence)) - starts[sentence]
    blocks = [(end - start, int(padded[start]), bool((lengths[:, start:end] < padded[start]).any())) for start, end in cut]

    is_mask = (masks != 0).reshape(len(members), -1)
    most = int(is_mask.sum(1).max())
    chosen = np.argsort(~is_mask, axis=1, kind="stable")[:, :most]  # the masks of a member come first
    flat = np.take_along_axis((masks + starts[:, None]).reshape(len(members), -1), chosen, 1)
    labels = np.take_along_axis(np.where(is_mask, words.reshape(len(members), -1), IGNORED), chosen, 1)

    more_tokens, more_masks = (rounded(n) - n if packing.has_few_shapes else 0 for n in (len(sentence), most))

    def tensor(array: np.ndarray, more: int, value: int = 0) -> torch.Tensor:
        return torch.from_numpy(np.pad(array, ((0, 0), (0, more)), constant_values=value).astype(np.int64))

    mask = torch.from_numpy(input_mask[:, sentence, column] != 0) if any(is_padded for *_, is_padded in blocks) else None
    return MicroBatch(
        input_ids=tensor(input_ids[:, sentence, column], more_tokens),
        input_mask=mask,
        positions=tensor(flat, more_masks),
        position_ids=tensor(np.tile(column, (len(members), 1)), more_tokens),
        labels=tensor(labels, more_masks, IGNORED),
        blocks=blocks,
    )


def rounded(number: int) -> int:
    """`number` rounded up by at most a 16th, and by less than 256: in a run it takes few values.

    >>> rounded(15), rounded(100), rounded(3901), rounded(60_300)
    (15, 100, 3968, 60416)
    """
    unit = min(256, 1 << max(0, (number // 16).bit_length() - 1))
    return -(-number // unit) * unit


def sentence_lengths(samples: Samples, rows: np.ndarray) -> np.ndarray:
    """(rows,) int64: number of tokens of each."""
    return samples.input_mask[rows].sum(1, dtype=np.int64)


def rank_micro_batches(
    samples: Samples, rows: np.ndarray, size: int, packing: Packing, rank: int = 0, world_size: int = 1
) -> list[np.ndarray]:
    """The micro-batches of one rank, arrays of rows: `rows` by length, dealt to the ranks in turn, and cut by `portions`.

    Ranks work on similar lengths at the same time, and all have the same number of micro-batches. On a rank without a row left
    for it, the last one is empty.
    """
    (order,), longest = by_length(sentence_lengths(samples, rows)[None])
    longest = longest[np.minimum(np.arange(world_size - 1, len(rows) + world_size - 1, world_size), len(rows) - 1)]
    own = rows[order][rank::world_size]
    return [own[start:end] for start, end in portions(longest, size, packing.most_tokens)]


def portions(lengths: np.ndarray, size: int, most_tokens: int) -> list[tuple[int, int]]:
    """Starts and ends of micro-batches of at most `size` sentences, and of about `most_tokens` tokens if one has so few.

    >>> portions(np.array([3, 3, 4, 9, 9, 9]), size=2, most_tokens=20)
    [(0, 2), (2, 4), (4, 6)]
    """
    total = lengths.cumsum()
    number = math.ceil(total[-1] / most_tokens)
    ends = np.unique(np.searchsorted(total, total[-1] * np.arange(1, number + 1) / number)) + 1
    parts: list[tuple[int, int]] = []
    for start, end in itertools.pairwise([0, *ends.tolist()]):
        pieces = math.ceil((end - start) / size)
        points = [start + (end - start) * piece // pieces for piece in range(pieces + 1)]
        parts += itertools.pairwise(points)
    return parts


def by_length(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order, (members, n) int64, of each member's sentences by `lengths` (members, n); the longest at each place, (n,)."""
    order = np.argsort(lengths, axis=1, kind="stable")
    return order, np.take_along_axis(lengths, order, 1).max(0)


def cuts(lengths: np.ndarray, overhead: float) -> list[tuple[int, int]]:
    """Starts and ends of blocks of sentences sorted by length, at the minimum cost.

    A block of m sentences with at most L tokens costs m L + `overhead` tokens. A dynamic program over distinct lengths finds
    the cheapest of all ways to cut where the length changes. `lengths` are (n,) int64, ascending, n >= 1.

    >>> cuts(np.array([3, 3, 4, 9, 9, 9]), overhead=4)
    [(0, 3), (3, 6)]
    """
    ends = [*(np.flatnonzero(np.diff(lengths)) + 1).tolist(), len(lengths)]  # of the runs of equal lengths
    best: list[tuple[float, list[tuple[int, int]]]] = [(0.0, [])]  # cost and blocks of all sentences before a run
    for end in ends:
        longest = int(lengths[end - 1])
        starts = zip(best, [0, *ends], strict=False)
        cost, blocks, start = min(
            (cost + overhead + (end - start) * longest, blocks, start) for (cost, blocks), start in starts
        )
        best.append((cost, [*blocks, (start, end)]))
    return best[-1][1]


def masked_loss(model: Callable[..., torch.Tensor], batch: MicroBatch) -> torch.Tensor:
    """Sum over the masked positions of -log f(x)[w], in nats: a scalar, float32 or wider."""
    inputs = (batch.input_ids, batch.input_mask, batch.positions, batch.position_ids, batch.blocks)
    logits = model(*inputs)  # (M, vocab_size)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), batch.labels, reduction="sum", ignore_index=IGNORED)


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
