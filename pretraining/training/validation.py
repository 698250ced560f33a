"""Validation during training: the loss on the test shards, and the interface of what measures the gap to the entropy."""

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
    """Measures the gap of a model to the entropy, in nats, by names for the record: `pretraining.evaluation.gap.GapMeter`."""

    def measure(self, model: nn.Module) -> dict[str, float]: ...


# Makes one from the grammar, the number of sentences, the vocabulary, the maximum number of tokens per sentence, the seed.
GapMeter = Callable[[str, int, Vocabulary, int, int], Gap]


@torch.no_grad()
def validation_loss(engine: nn.Module, shards: Shards, size: int, ranks: Ranks) -> tuple[float, int]:
    """Mean of -log f over the masked positions of all shards.

    Sums and counts are added over all batches and ranks; there is one division, at the end.

    Args:
        engine: DeepSpeed's; left in training mode.
        size: maximum number of sentences per forward pass.

    Returns:
        The loss in nats, and the number of masked positions.
    """
    engine.eval()
    loss = torch.zeros((), dtype=torch.float64, device=ranks.device)
    masks = 0
    for index in range(len(shards.paths)):
        samples = shards.read(index)
        for rows in rank_micro_batches(samples, np.arange(len(samples)), size, ranks.rank, ranks.size):
            if len(rows):
                batch = micro_batch(samples, rows)
                loss += masked_loss(engine, batch.to(ranks.device))
                masks += len(batch.labels)
    engine.train()
    total_loss, total_masks = ranks.sum_on_host(np.array([loss.item(), masks], dtype=np.float64)).tolist()
    return total_loss / total_masks, int(total_masks)
