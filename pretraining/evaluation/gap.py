"""The gap to the entropy during training."""

from typing import cast

from torch import nn

from pcfg.common.files import keyed_rng
from pcfg.grammar import Grammar, find_rules
from pcfg.lookup import LookupTable
from pcfg.sampler import Sampler
from pretraining.data.contexts import from_texts, table_columns
from pretraining.data.vocabulary import Vocabulary
from pretraining.evaluation.loss import measure_loss
from pretraining.model.bert import MaskedLM


class GapMeter:
    """The gap of a model to the entropy, E[ KL(P(. | x_-t) || f(x_-t)) ], on sentences drawn from the grammar.

    The sentences are the same at each measurement: a function of the seed, in a random stream that no shard has. For a figure
    to report, use calculate_loss.py, which measures saved models on any number of sentences.

    Args:
        rules: the grammar's file, or a shipped one's name.
        sentences: their number.
        vocabulary: of the model.
        max_tokens: of a sentence with [CLS] and [SEP].
    """

    def __init__(self, rules: str, sentences: int, vocabulary: Vocabulary, max_tokens: int, seed: int):
        path = find_rules(rules)
        grammar = Grammar.read(path)
        sampler = Sampler(grammar, max_tokens - 2)
        tokens, lengths = sampler.sample(sentences, keyed_rng(seed, "gap sentences"))
        texts = sampler.texts(tokens, lengths)
        self._table = LookupTable.compute(grammar, texts, path)
        self._columns = table_columns(self._table, vocabulary, path)
        self._contexts = from_texts(texts, vocabulary, path)

    def measure(self, model: nn.Module) -> dict[str, float]:
        """The gap in nats by pairs and by sentences, with standard errors; the model is left in training mode."""
        model.eval()
        gap = measure_loss(cast(MaskedLM, model), self._contexts, self._table, self._columns)["gap"]
        model.train()
        return {
            f"gap_{mean}{suffix}": gap[mean][key]
            for mean in ("pairs", "sentences")
            for key, suffix in (("mean", ""), ("standard_error", "_se"))
        }
