"""Solvers of the linear probe: W and b, for the prediction argmax_c (W x + b)_c on fixed features x.

Ridge      the unique minimum of

               sum_i ||W x_i + b - y_i||^2 + lambda s ||W||^2,    s = mean_i ||x_i - mean x||^2,

           with y_i the one-hot label. lambda is the strength with the least squared leave-one-out residuals.
AdamW      the mean cross-entropy on the raw features, by batches and a schedule, as the Trainer of transformers would train
           the head (weight decay on W only). The result depends on all flags and on the seed.
L-BFGS     the unique minimum of

               J(W, b) = sum_i u_i CE(W z_i + b, y_i) / sum_i u_i + lambda / 2 ||W||^2

           with z the features standardised on the training part, u_i = 1 (or the count of sentence i in a bootstrap sample).
           lambda is the strength with the least cross-entropy on a held-out fifth of the training part.

Sources: Hastie, Tibshirani and Friedman 2009, sections 4.2 and 7.10 (ridge, leave-one-out); Liu et al. 2023, section 3 and
appendix A (AdamW); Bishop 2006, section 4.3.4 (multinomial logistic regression); Liu and Nocedal 1989 (L-BFGS); Efron and
Tibshirani 1993, chapter 6 (bootstrap).
"""

import collections
import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor, nn
from tqdm import tqdm
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_utils import IntervalStrategy

from pcfg.common.cli import Progress
from pcfg.common.files import InputError, keyed_rng
from pretraining.evaluation.downstream import training_steps

SOLVERS = ("adamw", "lbfgs", "ridge")
RIDGE_STRENGTHS = tuple(10.0 ** (power / 2) for power in range(-16, 5))  # lambda: 1e-8 to 100 by factors of sqrt(10)
STRENGTHS = tuple(10.0**-power for power in range(7))  # lambda, from the strongest on
HELD_OUT = 5  # one of 5 training sentences is held out
# Nats above the minimum, at most: for the choice of the strength, and for the result.
ROUGH = 1e-4
FINE = 1e-7
MAX_ITERATIONS = 2000
NEGLIGIBLE = 1e-5  # times the mean of a column: a standard deviation that is only rounding in float32
# A probe by AdamW is unfinished if this share of more steps lowers its training loss by more than so many nats.
FURTHER_STEPS = 0.1
STILL_FALLS = 0.005
DIVERGED = 100.0  # nats, a mean cross-entropy: the probability of a label is then 0 in float32
NOTHING_LEARNED = "the training of the classifier diverged; nothing is recorded, lower --learning_rate"
NO_CLASS = -1e4  # the bias of a class without training sentences: exp() of it is 0


@dataclasses.dataclass
class ProbeData:
    """Features and labels of both parts."""

    features: Tensor  # (n, d) float32
    labels: Tensor  # (n,) int64 in 0 .. classes - 1
    validation_features: Tensor  # (m, d) float32
    validation_labels: Tensor  # (m,) int64
    classes: int
    width: int  # of the features with all positions; they may be cut to the d columns that are not zero everywhere


def linear_head(width: int, classes: int, seed: int) -> nn.Linear:
    """Logits of `classes` from features of `width`; weights and biases uniform in +-1/sqrt(width), a function of `seed`.

    BERT's normal(0, 0.02) would start with logits of a standard deviation of 0.02 sqrt(width), above 3 for the widths here.
    """
    generator = torch.Generator().manual_seed(seed)
    head = nn.utils.skip_init(nn.Linear, width, classes)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.uniform_(-(width**-0.5), width**-0.5, generator=generator)
    return head


def correct(head: nn.Linear, features: Tensor, labels: Tensor, batch_size: int = 4096) -> Tensor:
    """(n,) bool on the CPU: whether the largest logit is that of the label."""
    device = head.weight.device
    with torch.inference_mode():
        predictions = [finite_argmax(head(rows.to(device))).cpu() for rows in features.split(batch_size)]
    return torch.cat(predictions) == labels.cpu()


def finite_argmax(logits: Tensor) -> Tensor:
    """argmax over the classes, (n, classes) -> (n,) int64; refuses logits that are not finite, whose argmax means nothing."""
    if not logits.isfinite().all():
        raise InputError(f"{NOTHING_LEARNED} (logits that are not finite)")
    return logits.argmax(-1)


def check_loss(loss: float) -> None:
    """Refuse the mean cross-entropy of all training sentences, in nats, of a diverged training."""
    if not loss <= DIVERGED:
        raise InputError(f"{NOTHING_LEARNED} (a loss of {loss:.3g} nats)")


def accuracy(head: nn.Linear, features: Tensor, labels: Tensor) -> float:
    """Share of sentences whose largest logit is that of their label."""
    return int(correct(head, features, labels).sum()) / len(labels)


def fit_adamw(
    data: ProbeData, training: TrainingArguments, seed: int, sentences: np.ndarray | None = None
) -> tuple[nn.Linear, float]:
    """Train a linear head with AdamW. Returns it, and the best validation accuracy at the end or by --eval_strategy.

    Columns that are zero in both parts get no gradient and do not change a logit. So the head is trained without them, with the
    initial weights of the full width, which gives the same numbers. The last batch of an epoch has the rest of the sentences.

    Args:
        seed: of initialisation and order.
        sentences: (n,) int64, the training sentences to train on, with repetitions; None for all, once.
    """
    rows = torch.arange(len(data.labels)) if sentences is None else torch.from_numpy(sentences)
    epoch_steps = math.ceil(len(rows) / _batch_size(training))
    steps = training_steps(training, len(rows))
    head = linear_head(data.width, data.classes, seed)
    head.weight = nn.Parameter(head.weight[:, : data.features.shape[1]].detach().clone())
    head.to(training.device)
    optimizer = _optimizer(head, training)
    scheduler = get_scheduler(
        training.lr_scheduler_type,
        optimizer,
        num_warmup_steps=training.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=cast(dict | None, training.lr_scheduler_kwargs),
    )
    intervals = {IntervalStrategy.EPOCH: epoch_steps, IntervalStrategy.STEPS: int(training.eval_steps or 0)}
    every = intervals.get(IntervalStrategy(training.eval_strategy))  # steps between two evaluations; None for none
    best = 0.0
    with Progress(total=steps, desc=f"probe, seed {seed}", unit="step", leave=False) as progress:
        for step, _ in enumerate(itertools.islice(_updates(head, optimizer, data, training, seed, rows), steps), 1):
            scheduler.step()
            progress.update()
            if every and step % every == 0 and step < steps:
                best = max(best, accuracy(head, data.validation_features, data.validation_labels))
    return head, max(best, accuracy(head, data.validation_features, data.validation_labels))


def _batch_size(training: TrainingArguments) -> int:
    return training.per_device_train_batch_size * training.gradient_accumulation_steps


def _optimizer(head: nn.Linear, training: TrainingArguments) -> torch.optim.Optimizer:
    """AdamW on the head."""
    groups = [{"params": [head.weight], "weight_decay": training.weight_decay}, {"params": [head.bias], "weight_decay": 0.0}]
    betas = (training.adam_beta1, training.adam_beta2)
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=betas, eps=training.adam_epsilon, fused=True)


def _updates(
    head: nn.Linear, optimizer: torch.optim.Optimizer, data: ProbeData, training: TrainingArguments, seed: int, rows: Tensor
) -> Iterator[None]:
    """Make optimizer steps on batches of the training sentences `rows`, without end; yields after each."""
    device = training.device
    batch_size = _batch_size(training)
    # One buffer for all batches: a new one per batch takes longer to allocate than to fill.
    buffer = data.features.new_empty(min(batch_size, len(rows)), data.features.shape[1])
    for epoch in itertools.count():
        order = rows[torch.from_numpy(keyed_rng(seed, "probe-order", epoch).permutation(len(rows)))]
        for batch in order.split(batch_size):
            features = torch.index_select(data.features, 0, batch.to(data.features.device), out=buffer[: len(batch)])
            # head(features), in an order of factors that takes a CPU half the time for few classes
            logits = (head.weight @ features.to(device).T).T + head.bias
            loss = F.cross_entropy(logits, data.labels[batch].to(device))
            optimizer.zero_grad()
            loss.backward()
            if training.max_grad_norm > 0:
                nn.utils.clip_grad_norm_(head.parameters(), training.max_grad_norm)
            optimizer.step()
            yield


def training_loss(head: nn.Linear, data: ProbeData) -> tuple[float, float]:
    """Mean cross-entropy of all training sentences, in nats, and the norm of its gradient with respect to W and b."""
    head.zero_grad()
    loss = 0.0
    for rows in torch.arange(len(data.labels)).split(4096):
        logits = head(data.features[rows.to(data.features.device)].to(head.weight.device))
        part = F.cross_entropy(logits, data.labels[rows].to(logits.device), reduction="sum") / len(data.labels)
        part.backward()
        loss += part.item()
    return loss, math.sqrt(sum(float(p.grad.square().sum()) for p in head.parameters() if p.grad is not None))


def progress_left(head: nn.Linear, data: ProbeData, training: TrainingArguments, seed: int) -> tuple[float, float]:
    """The gradient norm of a head trained by AdamW, and by how many nats its training loss still falls.

    A copy of the head is trained further at the constant rate --learning_rate: a tenth more steps, at least 10 and at least an
    epoch. The schedule's own end says nothing, since a rate of zero stops any training.
    """
    loss, norm = training_loss(head, data)
    check_loss(loss)
    further = copy.deepcopy(head)
    number = len(data.labels)
    steps = max(10, round(FURTHER_STEPS * training_steps(training, number)), math.ceil(number / _batch_size(training)))
    updates = _updates(further, _optimizer(further, training), data, training, seed, torch.arange(number))
    collections.deque(itertools.islice(updates, steps), maxlen=0)
    return norm, loss - training_loss(further, data)[0]


def standardise(data: ProbeData) -> None:
    """Scale each feature to mean 0 and standard deviation 1 on the training part, in place; constant ones become 0."""
    deviation, mean = torch.std_mean(data.features, 0, correction=0)
    scale = torch.where(deviation > NEGLIGIBLE * mean.abs(), 1 / deviation, 0.0)
    for features in (data.features, data.validation_features):
        features.sub_(mean).mul_(scale)


@dataclasses.dataclass
class Optimum:
    """A fit by L-BFGS."""

    head: nn.Linear
    excess: float  # bound on J above its minimum, nats; see `fit_lbfgs`


def fit_lbfgs(
    features: Tensor,
    labels: Tensor,
    classes: int,
    strength: float,
    tolerance: float = FINE,
    weights: Tensor | None = None,
    start: Optimum | None = None,
) -> Optimum:
    """The minimum of J(W, b); see the module.

    J is lambda-strongly convex in W, so J - min J <= ||grad J||^2 / (2 lambda) (Boyd and Vandenberghe 2004, eq. 9.9; for b
    lambda is at most the share of the rarest class, its curvature at W = 0). Iterations end when this bound is at most
    `tolerance`, or J stops falling in the dtype of the features.

    Args:
        features: (n, d), standardised.
        labels: (n,) int64.
        strength: lambda, above 0.
        tolerance: in nats.
        weights: (n,) u_i, with the dtype of the features; None for ones. Classes without weight get no probability.
        start: initial point; None for W = 0 and the frequencies of the classes.
    """
    weights = features.new_ones(len(labels)) if weights is None else weights
    shares = weights / weights.sum()
    counts = features.new_zeros(classes).index_add_(0, labels, weights)
    weight = features.new_zeros(classes, features.shape[1]) if start is None else start.head.weight
    bias = torch.where(counts > 0, (counts / weights.sum()).log(), NO_CLASS)
    if start is not None:  # it may have been fitted to other classes
        bias = torch.where((counts > 0) & (start.head.bias > NO_CLASS), start.head.bias, bias)
    one_hot = F.one_hot(labels, classes).to(features)
    curvature = torch.full((features.shape[1] + 1,), strength).to(features.device, torch.float64)  # of J, at least
    curvature[-1] = min(strength, float(counts[counts > 0].min() / weights.sum()))
    excess = math.inf

    def head_of(point: np.ndarray) -> Tensor:
        """(classes, d + 1): W and b."""
        return torch.from_numpy(point).to(features).view(classes, -1)

    def objective(point: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal excess
        head = head_of(point)
        log_p = torch.addmm(head[:, -1], features, head[:, :-1].T).log_softmax(1)  # (n, classes)
        # A class without weight may have no probability: 0 x infinity is NaN.
        losses = torch.where(shares > 0, -log_p.gather(1, labels[:, None])[:, 0], 0.0)
        residuals = (log_p.exp() - one_hot) * shares[:, None]
        gradient = torch.cat([residuals.T @ features + strength * head[:, :-1], residuals.sum(0)[:, None]], 1)
        loss = losses.double() @ shares.double() + strength / 2 * head[:, :-1].double().square().sum()
        excess = float(gradient.double().square().sum(0) @ curvature.reciprocal()) / 2
        return float(loss), gradient.double().cpu().numpy().ravel()

    def stop(_: np.ndarray) -> None:
        if excess <= tolerance:
            raise StopIteration

    options = {"maxcor": 20, "maxiter": MAX_ITERATIONS, "maxfun": 2 * MAX_ITERATIONS, "ftol": 0.0, "gtol": 0.0}
    first = torch.cat([weight, bias[:, None]], 1).double().cpu().numpy().ravel()
    found = minimize(objective, first, jac=True, method="L-BFGS-B", callback=stop, options=options)
    objective(found.x)  # its excess
    head = nn.utils.skip_init(nn.Linear, features.shape[1], classes)
    last = head_of(found.x)
    head.weight, head.bias = (nn.Parameter(part.contiguous(), requires_grad=False) for part in (last[:, :-1], last[:, -1]))
    return Optimum(head, excess)


def choose_strength(samples: list[tuple[Tensor, Tensor]], classes: int, seed: int) -> float:
    """The strength of `STRENGTHS` whose fit to 4/5 of a sample has the least mean cross-entropy on the held-out fifth.

    It is the mean over samples, each of features (n, d) and labels (n,). Held-out sentences of a class that only the held-out
    fifth has are left out: no strength gives them a probability.
    """
    weights: list[Tensor] = []
    known: list[Tensor] = []
    for features, labels in samples:
        held_out = keyed_rng(seed, "probe-held-out").permutation(len(labels))[: len(labels) // HELD_OUT]
        weights.append(features.new_ones(len(labels)))
        weights[-1][torch.from_numpy(held_out).to(features.device)] = 0
        known.append(torch.isin(labels, labels[weights[-1] > 0]) & (weights[-1] == 0))
        if not known[-1].any():
            raise InputError(f"--solver lbfgs: {len(labels)} training sentences are too few to hold some out; give more")
    losses: list[float] = []
    fits: list[Optimum | None] = [None] * len(samples)
    for strength in tqdm(STRENGTHS, desc=f"strength, seed {seed}", leave=False):
        held_out_losses = []
        for sample, (features, labels) in enumerate(samples):
            fit = fit_lbfgs(features, labels, classes, strength, ROUGH, weights[sample], fits[sample])
            fits[sample] = fit
            with torch.inference_mode():
                rows = known[sample]
                held_out_losses.append(F.cross_entropy(fit.head(features[rows]), labels[rows]).item())
        losses.append(math.fsum(held_out_losses))
        if losses[-1] > min(losses):  # weaker ones take longer and fit more noise
            break
    return STRENGTHS[int(np.argmin(losses))]


@dataclasses.dataclass
class RidgeFit:
    """A fit by ridge regression."""

    head: nn.Linear
    strength: float
    errors: list[float]  # sum over sentences and classes of squared leave-one-out residuals, by strength


def fit_ridge(features: Tensor, labels: Tensor, classes: int, strengths: tuple[float, ...] = RIDGE_STRENGTHS) -> RidgeFit:
    """The minimum of the ridge objective of the module, at the strength with the least leave-one-out errors.

    One eigendecomposition serves all strengths, of the centred features Z. With eigenvalues e, eigenvectors V and p = lambda s:

        Z^T Z:                                R = Z V    1 - h_ii = 1 - 1/n - sum_j R_ij^2 / (e_j + p)
        Z Z^T (dual, for about n features):   R = V      1 - h_ii = sum_j R_ij^2 p / (e_j + p), j without the constant vector
        sum_i ||(y_i - fitted_i) / (1 - h_ii)||^2     leave-one-out errors: those of n refits with the same p

    1/n is the leverage of the intercept. The dual form has no difference of nearly equal numbers where h_ii is almost 1.
    A class without sentences always has the score 0, and the scores of a sentence sum to 1: it is never predicted.

    Args:
        features: (n, d); computed with in float64.
        labels: (n,) int64.
        strengths: lambda, above 0.
    """
    number, width = features.shape
    mean = features.double().mean(0)
    centred = features.double() - mean  # (n, d)
    targets = F.one_hot(labels, classes).to(centred)  # (n, classes)
    share = targets.mean(0)
    outcome = targets - share
    scale = float(centred.square().sum() / number) or 1.0  # 1 for features that are all the same
    is_dual = width >= number - 1
    if is_dual:
        # The constant vector, of eigenvalue 0, is given the largest one, which is left out.
        eigenvalues, vectors = torch.linalg.eigh(centred @ centred.T + 2 * scale)
        eigenvalues = eigenvalues[:-1]
        rotated = vectors[:, :-1]  # (n, r)
    else:
        eigenvalues, vectors = torch.linalg.eigh(centred.T @ centred)
        rotated = centred @ vectors  # (n, r)
    eigenvalues = eigenvalues.clamp_min(0)
    projected = rotated.T @ outcome  # (r, classes)
    errors = []
    for strength in strengths:
        penalty = strength * scale
        inverse = 1 / (eigenvalues + penalty)
        residuals = rotated @ (inverse[:, None] * projected)
        rest = rotated.square() @ inverse  # (n,); with `residuals` up to the form
        residuals = penalty * residuals if is_dual else outcome - residuals
        rest = penalty * rest if is_dual else 1 - 1 / number - rest
        errors.append(float((residuals / rest[:, None]).square().sum()))
    strength = strengths[int(np.argmin(errors))]
    coefficients = projected / (eigenvalues + strength * scale)[:, None]
    weight = centred.T @ (rotated @ coefficients) if is_dual else vectors @ coefficients  # (d, classes)
    head = nn.utils.skip_init(nn.Linear, width, classes)
    head.weight = nn.Parameter(weight.T.to(features.dtype), requires_grad=False)
    head.bias = nn.Parameter((share - mean @ weight).to(features.dtype), requires_grad=False)
    return RidgeFit(head, strength, errors)


def bootstrap(
    data: ProbeData, fitted_correct: np.ndarray, refit: Callable[[np.ndarray], nn.Linear], replicates: int, seed: int
) -> dict[str, float]:
    """Standard errors of the accuracy over other samples of the data.

    Each replicate resamples both parts with replacement, at their sizes. `validation_standard_error` resamples the validation
    sentences and keeps the heads (about sqrt(a (1 - a) / n)). `training_standard_error` fits the head to resampled training
    sentences and keeps the validation sentences. `standard_error` does both.

    Args:
        fitted_correct: (validation sentences,) float, share of the heads of the measurement that are right on each.
        refit: from (n,) int64 resampled training sentences to a head.
    """
    accuracies = []
    for replicate in Progress(range(replicates), desc="bootstrap", leave=False):
        rng = keyed_rng(seed, "probe-bootstrap", replicate)
        train_sample = rng.integers(len(data.labels), size=len(data.labels))
        sample = rng.integers(len(fitted_correct), size=len(fitted_correct))
        right = correct(refit(train_sample), data.validation_features, data.validation_labels).numpy()
        accuracies.append((fitted_correct[sample].mean(), right.mean(), right[sample].mean()))
    names = ("validation_standard_error", "training_standard_error", "standard_error")
    errors = {name: float(np.std(values, ddof=1)) for name, values in zip(names, zip(*accuracies, strict=True), strict=True)}
    return {"replicates": replicates, **errors}
