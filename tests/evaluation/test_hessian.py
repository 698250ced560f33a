import numpy as np
import pytest
import torch
from torch.func import functional_call

from pcfg.artefacts import InputError, keyed_rng
from pcfg.grammar import Grammar
from pcfg.lookup import LookupTable
from pcfg.text import read_texts
from pretraining.data.vocabulary import Vocabulary
from pretraining.evaluation.contexts import from_texts
from pretraining.evaluation.hessian import (
    draw_labels,
    fisher_norms,
    fisher_trace,
    hutchinson_trace,
    measured_parameters,
)
from pretraining.model.bert import MaskedLM
from pretraining.model.config import ModelConfig


def small_model(vocab_size: int, mode: str) -> MaskedLM:
    torch.manual_seed(3)
    shape = ModelConfig(vocab_size, 8, 1, 2, 16, max_position_embeddings=10, encoder_ln_mode=mode, attention="eager")
    model = MaskedLM(shape).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


@pytest.fixture(scope="module")
def sentences(tiny_rules, tiny_data):
    """Vocabulary, 4 sentences of several lengths as contexts, their table and columns."""
    texts = sorted(read_texts(tiny_data / "test0.txt")[:60], key=len)[::16]
    vocabulary = Vocabulary.read(tiny_data / "vocab.txt")
    table = LookupTable.compute(Grammar.read(tiny_rules), texts, "test0.txt")
    columns = np.array([vocabulary.ids[word] for word in table.words])
    return vocabulary, from_texts(texts, vocabulary, "test0.txt"), table, columns


def naive_norm(model, contexts, context, label) -> float:
    """Squared gradient norm of one log f by plain autograd, without padding; the decoder's bias left out."""
    logits = model(*contexts.batch(np.array([context]), "cpu"))
    kept = [parameter for name, parameter in model.named_parameters() if name != "decoder_bias"]
    gradients = torch.autograd.grad(logits.log_softmax(-1)[0, label], kept)
    return sum(gradient.square().sum().item() for gradient in gradients)


@pytest.mark.parametrize("mode", ["pre-ln", "post-ln"])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_norms_against_single_gradients(sentences, mode, batch_size):
    vocabulary, contexts, *_ = sentences
    model = small_model(vocabulary.size, mode)
    labels = np.random.default_rng(0).integers(vocabulary.size, size=(len(contexts.label), 2))
    norms = fisher_norms(model, contexts, labels, batch_size)
    naive = [[naive_norm(model, contexts, c, label) for label in row] for c, row in enumerate(labels)]
    assert np.allclose(norms, naive, rtol=1e-9)


def test_labels_follow_the_model_and_not_the_batches(sentences):
    vocabulary, contexts, *_ = sentences
    model = small_model(vocabulary.size, "pre-ln")
    uniform = np.random.default_rng(1).random((len(contexts.label), 4000))
    labels = draw_labels(model, contexts, uniform, 64)
    assert np.array_equal(labels, draw_labels(model, contexts, uniform, 3))
    with torch.no_grad():
        expected = model(*contexts.batch(np.array([2]), "cpu")).softmax(-1)[0].numpy()
    counts = np.bincount(labels[2], minlength=vocabulary.size)
    assert (np.abs(counts - 4000 * expected) < 5 * np.sqrt(4000 * expected * (1 - expected)) + 5).all()


def test_fisher_against_all_labels(sentences):
    """The mean over many draws against the sum over every word weighted by f."""
    vocabulary, contexts, *_ = sentences
    model = small_model(vocabulary.size, "pre-ln")
    every_word = np.tile(np.arange(vocabulary.size), (len(contexts.label), 1))
    norms = fisher_norms(model, contexts, every_word, 64)
    with torch.no_grad():
        f = np.concatenate([model(*contexts.batch(np.array([c]), "cpu")).softmax(-1) for c in range(len(norms))])
    per_context = (f * norms).sum(1)
    exact = np.mean([per_context[contexts.sentence == s].mean() for s in range(len(contexts.lengths))])
    draws = 400
    estimate = fisher_trace(model, contexts, draws=draws, seed=5)
    spread = np.sqrt((f * (norms - per_context[:, None]) ** 2).sum(1).mean() / (draws * len(norms)))
    assert abs(estimate["value"] - exact) < 4 * spread
    assert estimate["draws"] == draws * len(norms) and estimate["n"] == len(contexts.lengths)
    assert estimate["parameters"] == model.number_of_parameters() - vocabulary.size


def full_hessian(model, contexts, targets, sentence):
    """Hessian of one sentence's loss (mean over its positions) over all measured parameters, in float64."""
    parameters = measured_parameters(model)
    shapes = {name: p.shape for name, p in parameters.items()}
    flat = torch.cat([p.reshape(-1) for p in parameters.values()])
    chosen_contexts = np.flatnonzero(contexts.sentence == sentence)

    def loss(vector):
        pieces = vector.split([shape.numel() for shape in shapes.values()])
        chosen = {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}
        rest = {"decoder_bias": model.decoder_bias.detach()}
        total = 0.0
        for context in chosen_contexts:
            log_f = functional_call(model, {**rest, **chosen}, contexts.batch(np.array([context]), "cpu")).log_softmax(-1)
            total = total - (targets[context] * log_f[0]).sum() / len(chosen_contexts)
        return total

    return torch.autograd.functional.hessian(loss, flat, vectorize=True)


@pytest.mark.parametrize("mode", ["pre-ln", "post-ln"])
@pytest.mark.parametrize("with_table", [True, False])
def test_hutchinson_against_the_full_hessian(sentences, mode, with_table):
    vocabulary, contexts, table, columns = sentences
    model = small_model(vocabulary.size, mode)
    targets = torch.zeros(len(contexts.label), vocabulary.size, dtype=torch.float64)
    if with_table:
        targets[:, columns] = torch.from_numpy(table.conditionals(0, len(contexts.lengths)))
    else:
        targets[torch.arange(len(contexts.label)), torch.from_numpy(contexts.label)] = 1.0
    hessians = [full_hessian(model, contexts, targets, sentence) for sentence in range(len(contexts.lengths))]
    exact = np.mean([hessian.trace().item() for hessian in hessians])

    # The very probes of a run, put through the full Hessians: the products must be exact.
    shapes = [tuple(p.shape) for p in measured_parameters(model).values()]
    expected = []
    for sentence, hessian in enumerate(hessians):
        for draw in range(2):
            rng = keyed_rng(7, "hutchinson probes", sentence, draw)
            probe = np.concatenate([(rng.integers(0, 2, shape, np.int8) * 2 - 1).reshape(-1) for shape in shapes])
            assert set(probe) == {-1, 1}
            expected.append(probe @ hessian.numpy() @ probe)
    truth = (table, columns) if with_table else (None, None)
    estimate = hutchinson_trace(model, contexts, *truth, draws=2, seed=7, block=1)
    assert estimate["value"] == pytest.approx(np.mean(expected), rel=1e-9)
    assert estimate["standard_error"] == pytest.approx(np.std(np.reshape(expected, (-1, 2)).mean(1), ddof=1) / 2)

    # And their mean tends to the trace.
    runs = [hutchinson_trace(model, contexts, *truth, draws=20, seed=seed, block=1)["value"] for seed in range(8)]
    error = np.std(runs, ddof=1) / np.sqrt(len(runs))
    assert abs(np.mean(runs) - exact) < 4 * error < 0.8 * abs(exact)


def test_hutchinson_needs_two_blocks(sentences):
    vocabulary, contexts, *_ = sentences
    with pytest.raises(InputError, match="--bs: 32 sentences a block leave one block of 4"):
        hutchinson_trace(small_model(vocabulary.size, "pre-ln"), contexts, block=32)
