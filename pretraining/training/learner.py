"""What the training loop trains: a `Learner` holds the models of a run with their optimizer, one model per `Member`."""

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from pretraining.model.bert import MaskedLM
from pretraining.training.adversarial import AdversarialTerm
from pretraining.training.batches import (
    GlobalBatch,
    MicroBatch,
    Packing,
    count_masks,
    masked_loss,
    micro_batch,
    rank_micro_batches,
    seed_dropout,
)
from pretraining.training.sample_stream import Shards


@dataclasses.dataclass(frozen=True)
class Member:
    """One model of a run, and what depends on its seed."""

    seed: int  # of the initial weights; names the model in folders and records where there are several
    stream: int  # key of the order of samples, their dynamic masks, dropout and labelled batches: the seed, except in a branch
    train: Shards  # may be shared with other members: it depends on the stream only with dynamic masks
    adversarial: AdversarialTerm | None  # its term is subtracted from the loss
    # Measures a model's gap to the entropy, in nats by names for the record; None without a grammar.
    measure_gap: Callable[[nn.Module], dict[str, float]] | None


class Learner(Protocol):
    """The models of a run with their optimizer, at one step; all ranks call its methods together."""

    packing: Packing

    @property
    def loss_scale(self) -> float | None:
        """The loss scale of float16; None in other arithmetic."""
        return None

    def models(self) -> list[MaskedLM]:
        """The model of each member, with its present weights, to measure or to save."""
        ...

    def accumulate(self, step: int, batches: Sequence[GlobalBatch], members: Sequence[Member]) -> dict[str, Tensor]:
        """Accumulate the gradient of one global batch per member; the dropout masks are a function of (stream, step, rank).

        With `--sam_rho` it is the gradient at the end of the ascent of `pretraining.training.sam`. Returns losses for the
        record, before the ascent, each (members,), the same on all ranks: "loss", the mean over the masked positions of the
        batch, in nats, and "adversarial_loss", without its weight, if there is one.
        """
        ...

    def step(self, lr: float) -> None:
        """Clip the accumulated gradients, change the weights with the learning rate `lr`, and clear the gradients."""
        ...

    def validation_loss(self, batches: Iterable[MicroBatch]) -> Tensor:
        """Sum of -log f over the masked positions of this rank's batches, in nats, without dropout: (members,) float64."""
        ...

    def save(self, folder: Path) -> None:
        """Write weights and optimizer into the folder of a training state."""
        ...

    def load(self, folder: Path, files: dict[str, str]) -> None:
        """Replace weights and optimizer, bit for bit, by what `save` wrote; `files` are the SHA-256 of its files by name."""
        ...


def backward_pass(
    options: argparse.Namespace,
    model: nn.Module,
    step: int,
    batch: GlobalBatch,
    member: Member,
    packing: Packing,
    backward: Callable[[Tensor], object] = Tensor.backward,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, Tensor]:
    """Accumulate the gradient of a global batch in one model; returns a rank's parts of the losses of `Learner.accumulate`.

    It has the same dropout masks whenever it is repeated. The mean of the gradients over ranks is that of the global batch.

    Args:
        model: a `MaskedLM`, or DeepSpeed's engine of one, in training mode.
        backward: adds the gradient of a scalar to those of the parameters.
    """
    device = next(model.parameters()).device
    seed_dropout(member.stream, "dropout", step, rank)
    masks = count_masks(batch.samples, batch.rows)
    loss = torch.zeros(1, device=device)
    size = options.train_micro_batch_size_per_gpu
    for rows in rank_micro_batches(batch.samples, batch.rows, size, packing, rank, world_size):
        # A rank without a row takes one times 0: all ranks go through the same collectives.
        part = micro_batch(batch.samples, rows if len(rows) else batch.rows[:1], packing).to(device)
        share = masked_loss(model, part) * (len(rows) > 0) / masks
        # The loss of a step is the mean over the masked positions of the GLOBAL batch, so that grouping changes nothing. Every
        # rank knows their number without communication.
        backward(share * world_size)
        loss += share.detach()
    losses = {"loss": loss}
    if member.adversarial is not None:
        # Every rank computes the whole term, so the mean over ranks is right. The recorded one is a sum of equal parts: either
        # all ranks see that it is not finite, or none.
        term = member.adversarial.loss(model, step)
        backward(-options.adversarial_weight * term)
        losses["adversarial_loss"] = term.detach().reshape(1) / world_size
    return losses
