"""Estimates of the trace against the full Fisher matrix and the full Hessian, through torch.func in float64."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from pcfg.common.files import InputError, keyed_rng
from pcfg.common.means import SentenceMeans
from pcfg.common.ranks import Ranks
from pcfg.common.text import read_texts
from pretraining.data.contexts import Contexts, from_texts
from pretraining.data.vocabulary import Vocabulary
from pretraining.evaluation.fisher import GhostNorms, draw_words, residuals
from pretraining.evaluation.hessian import (
    Estimate,
    Partitions,
    Sampling,
    difference,
    draw_probe,
    estimate_trace,
    group_of,
    label_numbers,
    layer_of,
    mean_and_error,
    measured_contexts,
)
from pretraining.evaluation.inputs import Truth
from tests.evaluation.dense import VARIANTS, Flat, OwnDistribution, true_labels


def check_parts(found: dict, expected: dict[str, float]) -> None:
    """A record's value and all its parts against traces by parameter."""
    assert found["value"] == pytest.approx(sum(expected.values()), rel=1e-9)
    for kind, part_of in (("groups", group_of), ("layers", layer_of)):
        parts = found["parts"][kind]
        assert set(parts) == set(map(part_of, expected))
        assert sum(part["value"] for part in parts.values()) == pytest.approx(found["value"], rel=1e-9)
        for name, part in parts.items():
            of_part = sum(value for parameter, value in expected.items() if part_of(parameter) == name)
            assert part["value"] == pytest.approx(of_part, rel=1e-8), name


@pytest.mark.parametrize("mode, norm", VARIANTS)
def test_fisher_against_the_full_matrix(small_model, sentences, mode, norm):
    contexts, truth = sentences
    model = small_model(mode, norm)
    flat = Flat(model, contexts)
    found = estimate_trace("fisher", model, contexts, Sampling(nsamples=4, soft_labels=True), truth).described()
    check_parts(found, flat.by_parameter(flat.fisher(flat.f()).diagonal()))
    true = flat.fisher(true_labels(contexts, truth, model)).trace().item()
    assert found["true_labels"]["value"] == pytest.approx(true, rel=1e-9)
    assert found["true_labels"]["difference"]["value"] == pytest.approx(found["value"] - true, rel=1e-9)
    assert found["parameters"] == model.config.parameters - 13 and found["left_out"] == ["decoder_bias"]


@pytest.mark.parametrize("mode, norm", VARIANTS)
def test_hutchinson_against_the_full_hessian(small_model, sentences, mode, norm):
    """The very probes of a run, put through the full Hessian of each block: its products must be exact, part by part."""
    contexts, truth = sentences
    model = small_model(mode, norm, layers=1)
    flat, labels = Flat(model, contexts), true_labels(contexts, truth, model)
    sampling = Sampling(nsamples=4, probe="gaussian" if mode == "post-ln" else "rademacher", probe_num=2, block_size=3, seed=7)
    forms, traces, errors = [], [], []
    for block, inside in enumerate((range(3), range(3, 4))):
        hessian = flat.hessian(labels, inside)
        traces.append(hessian.trace().item())
        errors.append(np.sqrt(2 / 40) * hessian.norm().item())  # of the mean of v^T H v over 40 probes, at most
        for draw in range(2):
            probe = torch.cat([piece.reshape(-1) for piece in draw_probe(model, sampling.probe, 7, block, draw)])
            forms.append(probe * (hessian @ probe))
    expected = (3 * (forms[0] + forms[1]) + (forms[2] + forms[3])) / 8  # means over sentences
    estimate = estimate_trace("hutchinson", model, contexts, sampling, truth)
    check_parts(estimate.described(), flat.by_parameter(expected))
    assert estimate.sizes.tolist() == [3, 1] and estimate.draws == 4

    many = estimate_trace("hutchinson", model, contexts, dataclasses.replace(sampling, probe_num=40), truth).values[:, 0]
    assert (np.abs(many - traces) < 4 * np.array(errors)).all()


def test_hutchinson_with_the_texts_words(small_model, sentences):
    contexts, _ = sentences
    model = small_model(layers=1)
    flat = Flat(model, contexts)
    labels = torch.nn.functional.one_hot(torch.from_numpy(contexts.label), 13).double()
    probe = torch.cat([piece.reshape(-1) for piece in draw_probe(model, "rademacher", 0, 0, 0)])
    expected = probe @ flat.hessian(labels, range(2)) @ probe
    assert set(probe.tolist()) == {-1.0, 1.0}
    found = estimate_trace("hutchinson", model, contexts, Sampling(nsamples=4, probe_num=1, block_size=2)).values[0, 0]
    assert found == pytest.approx(expected.item(), rel=1e-9)


def test_probes_have_mean_0_and_variance_1(small_model):
    model = small_model(hidden=32)
    for kind, fourth in (("rademacher", 1.0), ("gaussian", 3.0)):
        probe = torch.cat([piece.reshape(-1) for piece in draw_probe(model, kind, 0, 0, 0)])
        error = 4 / np.sqrt(len(probe))
        assert abs(probe.mean()) < error and abs(probe.square().mean() - 1) < 2 * error
        assert probe.pow(4).mean().item() == pytest.approx(fourth, rel=0.1)


def test_the_three_agree_where_the_model_is_the_true_distribution(small_model, sentences):
    contexts, _ = sentences
    model = small_model(layers=1)
    flat = Flat(model, contexts)
    truth = Truth(OwnDistribution(flat.f(), contexts), np.arange(13))
    found = estimate_trace("fisher", model, contexts, Sampling(nsamples=4, soft_labels=True), truth).described()
    check_parts(found, flat.by_parameter(flat.hessian(flat.f(), range(4)).diagonal()))
    assert found["true_labels"]["difference"]["value"] == pytest.approx(0, abs=1e-9)
    drawn = estimate_trace("fisher", model, contexts, Sampling(nsamples=4, draws=3), truth).described()
    assert drawn["true_labels"]["difference"]["value"] == pytest.approx(0, abs=1e-9)


@pytest.fixture(scope="module")
def many(tiny_data):
    """60 sentences, every position."""
    return from_texts(read_texts(tiny_data / "test0.txt")[:60], Vocabulary.read(tiny_data / "vocab.txt"), "test0.txt")


@pytest.fixture(scope="module")
def every_word(small_model, many):
    """f and the squared gradient norm of every word at every context, (contexts, words) each."""
    model = small_model(layers=1)
    f, norms = np.empty((2, len(many.label), 13))
    for batch in many.batches(np.arange(len(many.label)), 64):
        ghost = GhostNorms(model, *many.batch(batch, "cpu"))
        f[batch] = ghost.f
        for word in range(13):
            norms[batch, word] = sum(ghost(torch.full((len(batch),), word)).values())
    return torch.from_numpy(f), norms


def drawn_values(contexts, sampling, f, norms) -> np.ndarray:
    """What `estimate_trace` averages, (sentences, 1), from norms that are known already."""
    chosen, total = measured_contexts(contexts, range(len(contexts.lengths)), sampling), np.zeros(len(contexts.label))
    for uniform in torch.from_numpy(label_numbers(contexts, chosen, sampling)):
        words, weights = draw_words(f, uniform, None if sampling.plain_labels else residuals(f))
        total += np.take_along_axis(norms, words[:, None].numpy(), 1)[:, 0] * weights.numpy() / sampling.draws
    return (np.bincount(contexts.sentence, total) / contexts.counts)[:, None]


@pytest.mark.parametrize("plain", [False, True])
def test_drawn_labels_are_those_of_the_keys(small_model, many, every_word, plain):
    sampling = Sampling(nsamples=60, draws=2, seed=5, plain_labels=plain)
    found = estimate_trace("fisher", small_model(layers=1), many, sampling).values[:, :1]
    np.testing.assert_allclose(found, drawn_values(many, sampling, *every_word), rtol=1e-9)


@pytest.mark.parametrize("plain", [False, True])
def test_intervals_cover_the_exact_value(many, every_word, plain):
    """1,000 runs of 40 sentences drawn with replacement and one label a position: value +- 1.96 standard errors."""
    f, norms = every_word
    per_sentence = np.bincount(many.sentence, (f.numpy() * norms).sum(1)) / many.counts
    exact, offsets, covered, values, errors = per_sentence.mean(), many.offsets, 0, [], []
    for seed in range(1000):
        rows = keyed_rng(0, "sentences of a run", seed).integers(60, size=40)
        inside = np.concatenate([np.arange(offsets[row], offsets[row + 1]) for row in rows])
        sentence = np.repeat(np.arange(40), many.counts[rows])
        run = Contexts(many.input_ids[rows], many.lengths[rows], sentence, many.position[inside], many.label[inside], None)
        found = drawn_values(run, Sampling(nsamples=40, seed=seed, plain_labels=plain), f[inside], norms[inside])
        (value,), (error,) = mean_and_error(found, np.ones(40))
        covered += abs(value - exact) <= 1.96 * error
        values.append(value)
        errors.append(error)
    assert abs(np.mean(values) - exact) < 4 * np.std(values) / np.sqrt(1000)
    assert 920 <= covered <= 980
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(values), rel=0.08)


def test_some_positions_of_each_sentence(small_model, many):
    sampling = Sampling(nsamples=60, positions=2, seed=3)
    chosen = measured_contexts(many, range(60), sampling)
    assert (np.bincount(many.sentence[chosen]) == 2).all()
    assert len(set((many.position[chosen]).tolist())) > 4
    # A position's labels do not depend on which others are measured.
    numbers = label_numbers(many, np.arange(len(many.label)), sampling)
    np.testing.assert_array_equal(label_numbers(many, chosen, sampling), numbers[:, chosen])
    estimate = estimate_trace("fisher", small_model(), many, sampling)
    assert (estimate.contexts, estimate.draws, estimate.sentences) == (120, 120, 60)
    everything = estimate_trace("fisher", small_model(), many, dataclasses.replace(sampling, positions=50))
    assert everything.contexts == len(many.label)


class OneOf(Ranks):
    """A rank whose sums are made by the test."""

    def __init__(self, rank, size):
        self.rank, self.size, self.is_main = rank, size, False

    def sum_on_host(self, array):
        return array


@pytest.mark.parametrize("estimator", ["fisher", "hutchinson"])
def test_neither_batches_nor_ranks_matter(small_model, many, estimator):
    model, sampling = small_model(layers=1).float(), Sampling(nsamples=14, draws=2, block_size=3, probe_num=2)
    values = estimate_trace(estimator, model, many, sampling, batch_size=32).values
    for size in (1, 7, 500):
        found = estimate_trace(estimator, model, many, sampling, batch_size=size).values
        np.testing.assert_allclose(found[:, 0].mean(), values[:, 0].mean(), rtol=1e-6)
        np.testing.assert_allclose(found[:, 0], values[:, 0], rtol=1e-4, atol=1e-3)
    dealt = [estimate_trace(estimator, model, many, sampling, ranks=OneOf(rank, 3)).values for rank in range(3)]
    assert all((part == 0).all(1).any() for part in dealt)
    np.testing.assert_allclose(sum(dealt)[:, 0].mean(), values[:, 0].mean(), rtol=1e-6)


def test_stopping_at_a_relative_error(small_model, many):
    model = small_model(layers=1)
    sampling = Sampling(nsamples=60, target_relative_error=0.9, min_draws=300)
    early = estimate_trace("fisher", model, many, sampling)
    assert early.draws >= 300 and early.sentences == 1 + np.searchsorted(np.cumsum(many.counts), 300) < 60
    assert early.described()["target_reached"] is True
    np.testing.assert_array_equal(
        early.values, estimate_trace("fisher", model, many, Sampling(nsamples=early.sentences)).values
    )
    never = estimate_trace("fisher", model, many, dataclasses.replace(sampling, target_relative_error=1e-6))
    assert never.sentences == 60 and never.described()["target_reached"] is False
    assert never.described()["relative_error"] > 1e-6
    blocks = estimate_trace(
        "hutchinson", model, many, Sampling(nsamples=60, target_relative_error=0.999, min_draws=8, block_size=4, probe_num=2)
    ).described()
    assert blocks["n"] in (4, 8, 15) and (blocks["target_reached"] or blocks["n"] == 15)


def test_means_and_differences(small_model):
    rng = np.random.default_rng(0)
    values, sizes = rng.normal(3, 1, (7, 2)), rng.integers(1, 5, 7)
    mean, error = mean_and_error(values, sizes)
    for column in range(2):
        pairs = SentenceMeans().add(np.repeat(values[:, column], sizes), sizes).by_pairs()
        assert (mean[column], error[column]) == pytest.approx(pairs)
    parts, ones = Partitions(small_model()), np.ones(10, np.int64)
    fisher = Estimate(parts, np.arange(10.0)[:, None], ones, 10, 10, None)
    blocks = Estimate(parts, np.array([[1.0], [2.0], [3.0]]), np.array([4, 4, 4]), 12, 3, None)
    assert difference(fisher, blocks) == {"value": (0.5 + 3.5) / 2, "standard_error": 1.5, "n": 2}
    assert difference(dataclasses.replace(fisher, values=fisher.values[:7], sizes=ones[:7]), blocks) is None


def test_three_counts_of_parameters(small_model):
    for mode in ("pre-ln", "post-ln"):
        model = small_model(mode)
        config = model.config
        assert sum(parameter.numel() for parameter in model.parameters()) == config.parameters
        assert Partitions(model).parameters == config.parameters - config.vocab_size
        theirs = AutoModelForMaskedLM.from_config(AutoConfig.for_model(**config.to_transformers()))
        assert theirs.num_parameters() == config.parameters + (config.hidden_size if mode == "pre-ln" else 0)


def test_too_many_words_for_soft_labels(small_model, many, monkeypatch):
    monkeypatch.setattr("pretraining.evaluation.hessian.SOFT_WORDS", 12)
    with pytest.raises(InputError, match="--soft-labels: .*13 words; at most 12"):
        estimate_trace("fisher", small_model(), many, Sampling(nsamples=60, soft_labels=True))
