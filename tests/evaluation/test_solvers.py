"""The optimum of the probe against scipy's on the same objective, the choice of the strength, and the bootstrap's errors."""

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch
from torch import nn

from pcfg.common.files import InputError, keyed_rng
from pretraining.evaluation.downstream import DownstreamTrainingArguments
from pretraining.evaluation.solvers import (
    HELD_OUT,
    RIDGE_STRENGTHS,
    STILL_FALLS,
    STRENGTHS,
    ProbeData,
    accuracy,
    bootstrap,
    choose_strength,
    fit_adamw,
    fit_lbfgs,
    fit_ridge,
    progress_left,
    standardise,
    training_loss,
)

CLASSES, WIDTH = 4, 12


@pytest.fixture(scope="module")
def drawn():
    """400 features, labels that half of them tell, and how often each sentence counts."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(400, WIDTH))
    labels = rng.integers(0, CLASSES, 400)
    labels[:200] = features[:200, 0] > 0
    return torch.from_numpy(features), torch.from_numpy(labels), torch.from_numpy(rng.integers(0, 3, 400)).double()


def objective(parameters, features, labels, weights, strength):
    """J(W, b) and its gradient, written out in float64."""
    weight, bias = parameters[: CLASSES * WIDTH].reshape(CLASSES, WIDTH), parameters[CLASSES * WIDTH :]
    logits = features @ weight.T + bias
    total = scipy.special.logsumexp(logits, axis=1)
    shares = weights / weights.sum()
    value = shares @ (total - logits[np.arange(len(labels)), labels]) + strength / 2 * (weight**2).sum()
    errors = np.exp(logits - total[:, None])
    errors[np.arange(len(labels)), labels] -= 1
    errors *= shares[:, None]
    return value, np.concatenate([(errors.T @ features + strength * weight).ravel(), errors.sum(0)])


def test_the_objectives_gradient(drawn):
    arrays = [tensor.numpy() for tensor in drawn]
    point = np.random.default_rng(1).normal(size=CLASSES * (WIDTH + 1))
    wrong = scipy.optimize.check_grad(*(lambda p, i=i: objective(p, *arrays, 0.1)[i] for i in (0, 1)), point)
    assert wrong < 1e-5


@pytest.mark.parametrize("strength", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-4), (torch.float32, 1e-3)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_optimum_is_scipys(drawn, strength, dtype, close, weighted):
    features, labels, counts = drawn
    weights = counts if weighted else torch.ones(400, dtype=torch.float64)
    optimum = fit_lbfgs(features.to(dtype), labels, CLASSES, strength, weights=weights.to(dtype) if weighted else None)
    ours = np.concatenate([tensor.double().numpy().ravel() for tensor in (optimum.head.weight, optimum.head.bias)])
    arrays = (features.numpy(), labels.numpy(), weights.numpy(), strength)
    options = {"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-10}
    reference = scipy.optimize.minimize(objective, np.zeros(len(ours)), arrays, "L-BFGS-B", jac=True, options=options)
    above = objective(ours, *arrays)[0] - reference.fun
    assert -1e-10 < above < 1e-6 and above <= optimum.excess + 1e-7
    np.testing.assert_allclose(ours[: CLASSES * WIDTH], reference.x[: CLASSES * WIDTH], atol=close / strength**0.5)


def test_the_start_does_not_matter(drawn):
    features, labels, weights = drawn
    from_zero = fit_lbfgs(features, labels, CLASSES, 0.01, 1e-10)
    other = fit_lbfgs(features, labels, CLASSES, 1e-4, 1e-10, weights)
    from_other = fit_lbfgs(features, labels, CLASSES, 0.01, 1e-10, start=other)
    torch.testing.assert_close(from_other.head.weight, from_zero.head.weight, atol=1e-4, rtol=0)


def test_a_class_without_training_sentences_has_no_probability(drawn):
    features, labels, _ = drawn
    optimum = fit_lbfgs(features, labels, CLASSES + 1, 0.01, weights=(labels != 2).double())
    logits = optimum.head(features)
    assert torch.isfinite(logits).all() and not set(logits.argmax(1).tolist()) & {2, CLASSES}
    again = fit_lbfgs(features, labels, CLASSES + 1, 0.01, start=optimum)  # where class 2 has sentences
    expected = fit_lbfgs(features, labels, CLASSES + 1, 0.01)
    torch.testing.assert_close(again.head(features).softmax(1), expected.head(features).softmax(1), atol=1e-3, rtol=0)


def test_the_strength_is_chosen_on_training_sentences_held_out(drawn):
    features, labels, _ = drawn
    held_out = keyed_rng(3, "probe-held-out").permutation(400)[: 400 // HELD_OUT]
    rest = np.setdiff1d(np.arange(400), held_out)
    losses = []
    for strength in STRENGTHS:
        head = fit_lbfgs(features[rest], labels[rest], CLASSES, strength).head
        losses.append(nn.functional.cross_entropy(head(features[held_out]), labels[held_out]).item())
    assert choose_strength([(features, labels)], CLASSES, 3) == STRENGTHS[int(np.argmin(losses))]
    assert 0 < np.argmin(losses) < len(STRENGTHS) - 1
    with pytest.raises(InputError, match="too few to hold some out"):
        choose_strength([(features[:4], labels[:4])], CLASSES, 3)


def test_the_strength_of_several_samples_has_the_least_mean_loss(drawn):
    """Each sample's own choice, and the one of the summed losses of all strengths up to the first that is worse."""
    features, labels, _ = drawn
    samples = [(features[rows], labels[rows]) for rows in (slice(0, 60), slice(60, 120), slice(120, 180))]
    losses = []
    for strength in STRENGTHS:
        total = 0.0
        for part, part_labels in samples:
            held_out = keyed_rng(0, "probe-held-out").permutation(60)[:12]
            rest = np.setdiff1d(np.arange(60), held_out)
            head = fit_lbfgs(part[rest], part_labels[rest], CLASSES, strength).head
            total += nn.functional.cross_entropy(head(part[held_out]), part_labels[held_out]).item()
        losses.append(total)
    assert choose_strength(samples, CLASSES, 0) == STRENGTHS[int(np.argmin(losses))]


def ridge_by_rows(features, labels, classes, penalty):
    """W (d, classes) and b by a least-squares problem with one row more per feature: sqrt(penalty) W = 0."""
    n, width = features.shape
    rows = np.block([[features, np.ones((n, 1))], [np.sqrt(penalty) * np.eye(width), np.zeros((width, 1))]])
    targets = np.concatenate([np.eye(classes)[labels], np.zeros((width, classes))])
    solution = np.linalg.lstsq(rows, targets, rcond=None)[0]
    return solution[:-1], solution[-1]


@pytest.mark.parametrize("n, width", [(40, 6), (15, 30), (12, 12), (12, 11), (12, 10)])  # primal, dual, and the bounds
@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_ridge_is_chosen_by_refits_without_each_sentence(n, width, shift):
    rng = np.random.default_rng(n)
    features = rng.normal(shift, 1 + 2 * np.arange(width) / width, (n, width))
    labels = (features[:, 0] > shift).astype(int) + (features[:, 1] + rng.normal(size=n) > shift + 1)
    labels[labels == 2] = 3  # class 2 has no sentence
    penalties = [strength * ((features - features.mean(0)) ** 2).sum() / n for strength in RIDGE_STRENGTHS]
    errors = []
    for penalty in penalties:
        error = 0.0
        for i in range(n):
            weight, bias = ridge_by_rows(np.delete(features, i, 0), np.delete(labels, i), 4, penalty)
            error += ((features[i] @ weight + bias - np.eye(4)[labels[i]]) ** 2).sum()
        errors.append(error)
    fit = fit_ridge(torch.from_numpy(features), torch.from_numpy(labels), 4)
    np.testing.assert_allclose(fit.errors, errors, rtol=1e-6)
    assert fit.strength == RIDGE_STRENGTHS[int(np.argmin(errors))]
    weight, bias = ridge_by_rows(features, labels, 4, penalties[int(np.argmin(errors))])
    np.testing.assert_allclose(fit.head.weight.T, weight, atol=1e-9)
    np.testing.assert_allclose(fit.head.bias, bias, atol=1e-9)
    assert (fit.head(torch.from_numpy(features)).argmax(1) != 2).all()


def test_ridge_without_any_difference_predicts_the_most_frequent_class():
    fit = fit_ridge(torch.full((5, 3), 0.1), torch.tensor([0, 1, 1, 1, 2]), 3)
    torch.testing.assert_close(fit.head(torch.full((1, 3), 0.1)), torch.tensor([[0.2, 0.6, 0.2]]))


def test_the_training_loss_and_its_gradient(drawn):
    features, labels, _ = drawn
    data = ProbeData(features, labels, features, labels, CLASSES, WIDTH)
    head = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
    parameters = np.concatenate([p.detach().numpy().ravel() for p in head.parameters()])
    loss, gradient = objective(parameters, features.numpy(), labels.numpy(), np.ones(400), 0.0)
    assert training_loss(head, data) == (pytest.approx(loss), pytest.approx(np.linalg.norm(gradient)))


def test_an_unfinished_probe_is_told_from_a_finished_one(drawn, tmp_path):
    """The same schedule down to a rate of zero: 20 steps end far from the optimum, 1,000 steps close to it."""
    features, labels = drawn[0].float(), drawn[1]
    data = ProbeData(features, labels, features, labels, CLASSES, WIDTH)
    optimum = fit_lbfgs(features, labels, CLASSES, 1e-6).head
    falls = {}
    for steps in (20, 1000):
        training = DownstreamTrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, learning_rate=1e-2, max_steps=steps, per_device_train_batch_size=100
        )
        head, _ = fit_adamw(data, training, 0)
        weights = head.weight.clone()
        norm, falls[steps] = progress_left(head, data, training, 0)
        assert torch.equal(head.weight, weights) and norm == training_loss(head, data)[1]
        above = training_loss(head, data)[0] - training_loss(optimum.requires_grad_(), data)[0]
        assert above > 0.05 if steps == 20 else above < STILL_FALLS
    assert falls[20] > STILL_FALLS > falls[1000]


def test_standardised_features_have_mean_0_and_deviation_1_or_are_0():
    rng = np.random.default_rng(0)
    train, validation = (torch.from_numpy(rng.normal(5, 3, (n, 4))).float() for n in (300, 200))
    train[:, 1], validation[:, 1] = 7.0, 7.0
    train[:, 2] = 1.0 + 1e-7 * train[:, 2]  # constant but for rounding
    expected = (validation[:, 0] - train[:, 0].mean()) / train[:, 0].std(correction=0)
    data = ProbeData(train, torch.zeros(300), validation, torch.zeros(200), 2, 4)
    standardise(data)
    torch.testing.assert_close(data.validation_features[:, 0], expected)
    torch.testing.assert_close(train[:, [0, 3]].mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(train[:, [0, 3]].std(0, correction=0), torch.ones(2))
    assert (train[:, 1:3] == 0).all() and (validation[:, 1:3] == 0).all()


@pytest.fixture(scope="module")
def noisy():
    """Two classes that overlap: one feature, and the head at its threshold."""

    def part(n, seed):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 2, n)
        return torch.from_numpy(rng.normal(labels, 1.0)[:, None]), torch.from_numpy(labels)

    return ProbeData(*part(50, 0), *part(600, 1), 2, 1)


def threshold_head(threshold: float) -> nn.Linear:
    head = nn.Linear(1, 2, dtype=torch.float64).requires_grad_(False)
    head.weight.copy_(torch.tensor([[-1.0], [1.0]]))
    head.bias.copy_(torch.tensor([threshold, -threshold]))
    return head


def test_the_bootstraps_validation_error_is_the_binomial_one(noisy):
    head, n = threshold_head(0.5), len(noisy.validation_labels)
    right = (head(noisy.validation_features).argmax(1) == noisy.validation_labels).numpy()
    errors = bootstrap(noisy, right, lambda _: head, 1000, seed=0)
    share = right.mean()
    assert accuracy(head, noisy.validation_features, noisy.validation_labels) == pytest.approx(share)
    # the error of a standard deviation of 1,000 replicates is 1 / sqrt(2000), 2.2%
    assert errors["validation_standard_error"] == pytest.approx((share * (1 - share) / n) ** 0.5, rel=0.09)
    assert errors["training_standard_error"] == pytest.approx(0, abs=1e-12)
    assert errors["standard_error"] == pytest.approx(errors["validation_standard_error"])
    assert errors == bootstrap(noisy, right, lambda _: head, 1000, seed=0)


def test_the_bootstraps_training_error_is_that_of_refitted_heads(noisy):
    """The threshold halfway between the class means, from resampled sentences; both errors add up as variances do."""

    def refit(drawn):
        features, labels = noisy.features[drawn, 0], noisy.labels[drawn]
        return threshold_head(float(sum(features[labels == label].mean() for label in (0, 1)) / 2))

    right = (refit(np.arange(50))(noisy.validation_features).argmax(1) == noisy.validation_labels).numpy()
    errors = bootstrap(noisy, right, refit, 400, seed=1)
    rng = np.random.default_rng(7)
    heads = [refit(rng.integers(50, size=50)) for _ in range(400)]
    scattered = np.std([accuracy(head, noisy.validation_features, noisy.validation_labels) for head in heads])
    assert errors["training_standard_error"] == pytest.approx(scattered, rel=0.25)
    parts = (errors["training_standard_error"], errors["validation_standard_error"])
    assert errors["standard_error"] == pytest.approx(np.hypot(*parts), rel=0.15)
