"""Ghost norms against gradients of single contexts, parameter by parameter, in float64."""

import weakref

import numpy as np
import pytest
import torch
from torch.func import functional_call, grad, vmap

from pretraining.data.contexts import from_samples
from pretraining.data.samples import sample_paths
from pretraining.data.vocabulary import Vocabulary
from pretraining.evaluation import fisher
from pretraining.evaluation.fisher import GhostNorms, draw_words, residuals
from pretraining.evaluation.hessian import measured_parameters

VARIANTS = [(mode, norm) for mode in ("pre-ln", "post-ln") for norm in ("pytorch", "rms_norm")]


def single_norms(model, ids, mask, flat, words) -> dict:
    """Squared norms of each parameter's gradient of log f[w], context by context, through torch.func; (m,) by name."""
    parameters = {name: parameter.detach() for name, parameter in measured_parameters(model).items()}
    rest = {"decoder_bias": model.decoder_bias.detach()}
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask

    def log_likelihood(chosen, ids, mask, position, word):
        logits = functional_call(model, {**rest, **chosen}, (ids[None], mask[None], position[None]))
        return logits.log_softmax(-1)[0].gather(0, word[None])[0]

    gradients = vmap(grad(log_likelihood), (None, 0, 0, 0, 0))(parameters, ids, mask, flat % ids.shape[1], words)
    return {name: gradient.square().flatten(1).sum(1) for name, gradient in gradients.items()}


def check(model, batch, seed=0) -> None:
    """All parameters' ghost norms, for two words a context from one forward pass, against `single_norms`."""
    ghost = GhostNorms(model, *batch)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        words = torch.randint(ghost.f.shape[1], (len(batch[0]),), generator=generator)
        norms, expected = ghost(words), single_norms(model, *batch, words)
        assert norms.keys() == expected.keys() == measured_parameters(model).keys()
        for name, values in expected.items():
            torch.testing.assert_close(
                norms[name], values, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("mode, norm", VARIANTS)
def test_every_parameter(small_model, sentences, mode, norm):
    contexts, _ = sentences
    model = small_model(mode, norm)
    for batch in contexts.batches(np.arange(len(contexts.label)), 64):
        ids, mask, flat = contexts.batch(batch, "cpu")
        assert mask is None
        check(model, (ids, mask, flat))


@pytest.mark.parametrize("by_positions", [True, False])
def test_both_sides_of_a_matrix_norm(small_model, sentences, monkeypatch, by_positions):
    monkeypatch.setattr(fisher, "_gram_is_cheaper", lambda *_: by_positions)
    contexts, _ = sentences
    check(small_model(), contexts.batch(contexts.batches(np.arange(len(contexts.label)), 64)[-1], "cpu"))


def test_the_graph_is_freed(small_model, sentences):
    """Hooks that held on to the graph they hang in would keep every forward pass of a run in memory."""
    contexts, _ = sentences
    batch = contexts.batch(np.arange(len(contexts.label)), "cpu")
    ghost = GhostNorms(small_model(), *batch)
    ghost(batch[0][:, 1])
    kept = weakref.ref(ghost._logits)
    del ghost
    assert kept() is None


def test_padded_batch(small_model, sentences):
    """Rows of several lengths: what is said of a context is what is said of it without padding."""
    contexts, _ = sentences
    model, chosen = small_model(), np.arange(len(contexts.label))
    ids, mask, flat = contexts.batch(chosen, "cpu")
    assert mask is not None
    check(model, (ids, mask, flat))
    words = torch.arange(len(chosen)) % 13
    padded = GhostNorms(model, ids, mask, flat)(words)
    for batch in contexts.batches(chosen, 64):
        for name, values in GhostNorms(model, *contexts.batch(batch, "cpu"))(words[batch]).items():
            torch.testing.assert_close(padded[name][batch], values, rtol=1e-9, atol=1e-12)


def test_padding_idx_gets_no_gradient_as_an_input(small_model, sentences):
    contexts, _ = sentences
    model = small_model()
    batch = contexts.batches(np.arange(len(contexts.label)), 64)[0]
    ids, mask, flat = contexts.batch(batch, "cpu")
    word = int(ids[0, 1])
    before = GhostNorms(model, ids, mask, flat)(ids[:, 1])["embeddings.words.weight"]
    model.embeddings.words.padding_idx = word
    check(model, (ids, mask, flat))
    assert not torch.allclose(before, GhostNorms(model, ids, mask, flat)(ids[:, 1])["embeddings.words.weight"])


def test_samples_with_several_masks(small_model, tiny_samples, tiny_data):
    contexts = from_samples(sample_paths(tiny_samples, "test")[0], Vocabulary.read(tiny_data / "vocab.txt"), 60)
    several = np.flatnonzero(contexts.counts > 1)
    assert len(several)
    chosen = np.flatnonzero(np.isin(contexts.sentence, several))
    batch = contexts.batches(chosen, 16)[0]
    check(small_model(), contexts.batch(batch, "cpu"))


@pytest.mark.parametrize(
    "identity, broken",
    [
        ("_cross", lambda gradient, *_: torch.zeros(len(gradient), dtype=gradient.dtype)),
        ("_squared_sum", lambda gradient: gradient.square().sum((-2, -1))),
        ("_gram", lambda rows: torch.diag_embed(rows.square().sum(-1))),
    ],
)
def test_a_broken_identity_is_seen(small_model, sentences, monkeypatch, identity, broken):
    contexts, _ = sentences
    batch = contexts.batches(np.arange(len(contexts.label)), 64)[-1]
    monkeypatch.setattr(fisher, identity, broken)
    with pytest.raises(AssertionError, match="weight: "):
        check(small_model(hidden=16), contexts.batch(batch, "cpu"))


def test_words_are_drawn_from_the_distribution():
    probability = torch.tensor([[0.5, 0.0, 0.3, 0.2], [0.0, 0.1, 0.0, 0.0]], dtype=torch.float64)
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    first, second = (draw_words(row.expand(1000, 4), uniform) for row in probability)
    assert torch.bincount(first[0], minlength=4).tolist() == [500, 0, 300, 200]
    assert set(second[0].tolist()) == {1} and set(first[1].tolist()) == {1.0}


def test_weighted_words_have_the_same_expectation():
    rng = torch.Generator().manual_seed(0)
    f = torch.rand(1, 6, generator=rng, dtype=torch.float64).pow(4)
    f[0, 2] = 0
    f /= f.sum()
    sizes, identity = residuals(f), torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(sizes[0], (identity - f).square().sum(-1))
    uniform = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    words, weights = draw_words(f.expand(len(uniform), 6), uniform, sizes.expand(len(uniform), 6))
    share = torch.bincount(words, minlength=6) / len(words)
    torch.testing.assert_close(share, (f * sizes / (f * sizes).sum())[0].float(), rtol=0, atol=1e-4)
    means = torch.bincount(words, weights, minlength=6) / len(words)
    torch.testing.assert_close(means, f[0], rtol=0, atol=1e-4)  # of [w = v], for every word v


def test_a_certain_word_has_no_gradient():
    f = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)
    _, weights = draw_words(f, torch.tensor([0.3], dtype=torch.float64), residuals(f))
    assert weights.tolist() == [0.0]
