"""Eigenvalues and spectral density against the dense Hessian of a model of 316 parameters, in float64."""

import numpy as np
import pytest
import torch

from pcfg.common.files import InputError
from pretraining.evaluation import hessian
from pretraining.evaluation.hessian import Sampling, draw_probe
from pretraining.evaluation.inputs import Truth
from pretraining.evaluation.spectrum import SpectrumOptions, density_of, hessian_operator, lanczos, measure_spectrum
from tests.evaluation.dense import Flat, OwnDistribution, true_labels

SAMPLING = Sampling(nsamples=1, probe_num=20)


@pytest.fixture(scope="module")
def dense(small_model, sentences):
    """A model of fewer than 400 parameters, conditionals near its own, and the Hessian of its exact loss on a sentence."""
    contexts, truth = sentences
    model = small_model(hidden=4, layers=1)
    flat = Flat(model, contexts)
    labels = 0.8 * flat.f() + 0.2 * true_labels(contexts, truth, model)
    matrix = flat.hessian(labels, range(1)).numpy()
    assert len(matrix) < 400
    return model, Truth(OwnDistribution(labels, contexts), np.arange(13)), matrix


def test_the_operator_is_the_hessian(dense, sentences):
    contexts, _ = sentences
    model, truth, matrix = dense
    found = hessian_operator(model, contexts, SAMPLING, truth, 128) @ np.eye(len(matrix))
    np.testing.assert_allclose(found, matrix, rtol=0, atol=1e-10)


@pytest.mark.parametrize("is_exact", [True, False])
def test_several_sentences_in_pieces(dense, sentences, is_exact, monkeypatch):
    """Means over sentences of means over positions; with the words of the text too."""
    contexts, truth = sentences
    model, *_ = dense
    labels = torch.nn.functional.one_hot(torch.from_numpy(contexts.label), 13).double()
    flat = Flat(model, contexts)
    expected = flat.hessian(true_labels(contexts, truth, model) if is_exact else labels, range(3)).numpy()
    vector = np.random.default_rng(0).normal(size=len(expected))
    monkeypatch.setattr(hessian, "WINDOW", 2)
    operator = hessian_operator(model, contexts, Sampling(nsamples=3), truth if is_exact else None, 2)
    np.testing.assert_allclose(operator @ vector, expected @ vector, rtol=0, atol=1e-10)


def test_eigenvalues_and_density(dense, sentences):
    contexts, _ = sentences
    model, truth, matrix = dense
    eigenvalues = np.linalg.eigvalsh(matrix)
    assert eigenvalues.sum() == pytest.approx(matrix.trace(), rel=1e-10) and eigenvalues[0] < -0.01
    fields = measure_spectrum(model, contexts, SAMPLING, SpectrumOptions(5, 6), truth)
    largest = [eigenvalue.value for eigenvalue in fields["eigenvalues"]]
    np.testing.assert_allclose(largest, eigenvalues[:-6:-1], rtol=0, atol=1e-6)
    assert max(eigenvalue.residual for eigenvalue in fields["eigenvalues"]) < 1e-6
    assert fields["value"] == largest[0] and fields["parameters"] == len(matrix)
    density, trace = fields["density"], fields["trace"]
    grid, curve = np.array(density.grid), np.array(density.values)
    assert np.trapezoid(curve, grid) == pytest.approx(1, rel=1e-6)
    assert len(matrix) * np.trapezoid(curve * grid, grid) == pytest.approx(trace.value, rel=1e-6)
    probes = [torch.cat([p.reshape(-1) for p in draw_probe(model, "rademacher", 0, 0, draw)]).numpy() for draw in range(20)]
    assert trace.value == pytest.approx(np.mean([probe @ matrix @ probe for probe in probes]), rel=1e-8)
    assert abs(trace.value - matrix.trace()) < 2.5 * trace.standard_error < matrix.trace()


def test_quadrature_against_the_dense_matrix(dense):
    """k nodes integrate powers up to 2 k - 1 exactly; all steps give the measure itself."""
    model, _, matrix = dense
    probe = torch.cat([piece.reshape(-1) for piece in draw_probe(model, "gaussian", 0, 0, 0)]).numpy()
    unit = probe / np.linalg.norm(probe)
    nodes, weights = lanczos(matrix.__matmul__, probe, 6)
    assert len(nodes) == 6 and weights.sum() == pytest.approx(1)
    power = unit
    for exponent in range(12):
        assert weights @ nodes**exponent == pytest.approx(unit @ power, rel=1e-8), exponent
        power = matrix @ power
    eigenvalues, vectors = np.linalg.eigh(matrix)
    exact = (eigenvalues, (vectors.T @ unit) ** 2)
    everything = lanczos(matrix.__matmul__, probe, len(matrix))
    whole, direct = (density_of([measure, measure], eigenvalues[-1]) for measure in (everything, exact))
    np.testing.assert_allclose(whole.values, direct.values, rtol=0, atol=1e-6 * max(direct.values))
    assert max(whole.standard_errors) == 0.0


def test_the_density_of_many_probes(dense):
    _, _, matrix = dense
    probes = np.random.default_rng(0).normal(size=(200, len(matrix)))
    density = density_of([lanczos(matrix.__matmul__, probe, 40) for probe in probes], 0.0)
    distances = (np.array(density.grid)[:, None] - np.linalg.eigvalsh(matrix)) / density.width
    exact = np.exp(-(distances**2) / 2).mean(1) / (density.width * np.sqrt(2 * np.pi))
    errors = np.array(density.standard_errors)
    wrong = np.abs(density.values - exact) - 5 * errors
    assert wrong.max() < 1e-3 * exact.max() and errors.max() < 0.1 * exact.max()


def test_a_matrix_of_low_rank_ends_the_steps():
    nodes, weights = lanczos(lambda v: np.diag([2.0, 2.0, -1.0, 0.0]) @ v, np.ones(4), 40)
    np.testing.assert_allclose(nodes, [-1, 0, 2], atol=1e-12)
    np.testing.assert_allclose(weights, [0.25, 0.25, 0.5])


def test_impossible_numbers(dense, sentences):
    contexts, _ = sentences
    model, truth, matrix = dense
    with pytest.raises(InputError, match=rf"--eigenvalues 400: the model has {len(matrix)} parameters in the trace"):
        measure_spectrum(model, contexts, SAMPLING, SpectrumOptions(400), truth)
    with pytest.raises(InputError, match="--probe-num 1: one probe has no standard error"):
        measure_spectrum(model, contexts, Sampling(nsamples=1, probe_num=1), SpectrumOptions(), truth)
