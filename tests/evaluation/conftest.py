"""What the tests of the trace of the Hessian share."""

import numpy as np
import pytest
import torch

from pcfg.common.text import read_texts
from pcfg.grammar import Grammar
from pcfg.lookup import LookupTable
from pretraining.data.contexts import from_texts
from pretraining.data.vocabulary import Vocabulary
from pretraining.evaluation.inputs import Truth
from pretraining.model.bert import MaskedLM
from pretraining.model.config import ModelConfig

WORDS = 13  # of the vocabulary of `tiny_data`


@pytest.fixture(scope="session")
def small_model():
    """A function that makes a random model in float64 with the vocabulary of `tiny_data`."""

    def make(mode="pre-ln", norm="pytorch", hidden=8, layers=2) -> MaskedLM:
        torch.manual_seed(3)
        sizes = {"num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 2 * hidden}
        variant = {"encoder_ln_mode": mode, "layer_norm_type": norm, "attention": "eager"}
        model = MaskedLM(ModelConfig(WORDS, hidden, **sizes, **variant, max_position_embeddings=10)).double()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def sentences(tiny_rules, tiny_data):
    """Every position of 4 sentences of several lengths, some with a word twice; their true conditionals."""
    texts = sorted(read_texts(tiny_data / "test0.txt")[:60], key=len)[::16]
    assert any(len(set(text.split())) < len(text.split()) for text in texts)
    vocabulary = Vocabulary.read(tiny_data / "vocab.txt")
    assert vocabulary.size == WORDS
    table = LookupTable.compute(Grammar.read(tiny_rules), texts, "test0.txt")
    truth = Truth(table, np.array([vocabulary.ids[word] for word in table.words]))
    return from_texts(texts, vocabulary, "test0.txt"), truth
