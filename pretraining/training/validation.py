"""Validation during training: the loss on the test shards, and how far it is above the entropy."""

import numpy as np
import torch
from torch import nn

from pcfg.common.files import keyed_rng
from pcfg.grammar import Grammar, find_rules
from pcfg.lookup import LookupTable
from pcfg.sampler import Sampler
from pretraining.data.contexts import from_texts, table_columns
from pretraining.data.vocabulary import Vocabulary
from pretraining.evaluation.loss import measure_loss
from pretraining.training.batches import masked_loss, micro_batch, rank_micro_batches
from pretraining.training.distributed import Ranks
from pretraining.training.sample_stream import Shards


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
        for part in rank_micro_batches(samples, np.arange(len(samples)), size, ranks.rank, ranks.world_size):
            if len(part):
                batch = micro_batch(samples, part)
                loss += masked_loss(engine, batch.to(ranks.device))
                masks += len(batch.labels)
    engine.train()
    loss_of_all, masks_of_all = ranks.add_up(loss, torch.tensor(masks, device=ranks.device))
    return loss_of_all / masks_of_all, int(masks_of_all)


class GapMeter:
    """The gap of a model to the entropy, E[ KL(P(. | x_-t) || f(x_-t)) ], on sentences drawn from the grammar.

    The sentences are the same at each measurement, a function of the seed, and of a stream that no shard has. For a figure to
    report, calculate_loss.py measures the saved models on as many sentences as are wanted.

    Args:
        rules: the grammar's file, or a shipped one's name.
        sentences: how many are drawn.
        vocabulary: of the model.
        max_tokens: of a sentence with [CLS] and [SEP].

    Raises:
        InputError: the grammar can't be read, has words that the vocabulary lacks, or no sentence that is short enough.
    """

    def __init__(self, rules: str, sentences: int, vocabulary: Vocabulary, max_tokens: int, seed: int):
        path = find_rules(rules)
        grammar = Grammar.read(path)
        tokens, lengths = Sampler(grammar, max_tokens - 2).sample(sentences, keyed_rng(seed, "gap sentences"))
        texts = [" ".join(grammar.words[word] for word in row[:length]) for row, length in zip(tokens, lengths, strict=True)]
        self._table = LookupTable.compute(grammar, texts, path)
        self._columns = table_columns(self._table, vocabulary, path)
        self._contexts = from_texts(texts, vocabulary, path)

    def measure(self, model: nn.Module) -> dict[str, float]:
        """The gap in nats by pairs and by sentences, with standard errors; the model is left in training mode."""
        model.eval()
        gap = measure_loss(model, self._contexts, self._table, self._columns)["gap"]
        model.train()
        return {
            f"gap_{mean}{suffix}": gap[mean][key]
            for mean in ("pairs", "sentences")
            for key, suffix in (("mean", ""), ("standard_error", "_se"))
        }
