"""Validation during training: the loss on the test shards; and what measures how far it is above the entropy."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import nn

from pcfg.common.ranks import Ranks
from pretraining.data.vocabulary import Vocabulary
from pretraining.training.batches import masked_loss, micro_batch, rank_micro_batches
from pretraining.training.sample_stream import Shards


class Gap(Protocol):
    """Measures the gap of a model to the entropy (`pretraining.evaluation.gap`); training imports nothing of evaluation."""

    def measure(self, model: nn.Module) -> dict[str, float]: ...


# From grammar, number of sentences, vocabulary, most tokens of a sentence, seed.
GapMeter = Callable[[str, int, Vocabulary, int, int], Gap]


@torch.no_grad()
def validation_loss(engine: nn.Module, shards: Shards, size: int, ranks: Ranks) -> tuple[float, int]:
    """Mean of -log f over the masked positions of all shards.

    Sums and counts are added up over all batches and ranks; there is one division, at the end.

    Args:
        engine: DeepSpeed's; left in training mode.
        size: sentences of a forward pass.

    Returns:
        The loss in nats, and the number of masked positions.
    """
    engine.eval()
    loss, masks = torch.zeros((), dtype=torch.float64, device=ranks.device), 0
    for index in range(len(shards.paths)):
        samples = shards.read(index)
        for part in rank_micro_batches(samples, np.arange(len(samples)), size, ranks.rank, ranks.size):
            if len(part):
                batch = micro_batch(samples, part)
                loss += masked_loss(engine, batch.to(ranks.device))
                masks += len(batch.labels)
    engine.train()
    loss_of_all, masks_of_all = ranks.sum_on_host(np.array([loss.item(), masks], dtype=np.float64)).tolist()
    return loss_of_all / masks_of_all, int(masks_of_all)
