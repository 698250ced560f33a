"""Solvers of the linear probe: W and b of softmax(W x + b) on features x that are fixed.

AdamW      the mean cross-entropy on the raw features, by batches and a schedule, as transformers' Trainer would train the head
           (weight decay on W only); what it reaches depends on all of its flags and on the seed.
L-BFGS     the one minimum of

               J(W, b) = sum_i u_i CE(W z_i + b, y_i) / sum_i u_i + lambda / 2 ||W||^2

           with z the features standardised by the training part, u_i = 1 (or how often the bootstrap drew sentence i), and
           lambda the strength with the least cross-entropy on a fifth of the training part that was held out.

Sources: Liu et al. 2023, section 3 and appendix A (AdamW); Bishop 2006, section 4.3.4 (multinomial logistic regression); Liu
and Nocedal 1989 (L-BFGS); Efron and Tibshirani 1993, chapter 6 (bootstrap).
"""

import dataclasses
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm, trange
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_utils import IntervalStrategy

from pcfg.common.files import InputError, keyed_rng
from pretraining.evaluation.downstream import training_steps
from pretraining.evaluation.heads import linear_head

SOLVERS = ("adamw", "lbfgs")
STRENGTHS = tuple(10.0**-power for power in range(7))  # lambda, tried from the strongest on
HELD_OUT = 5  # one of so many training sentences
ROUGH, FINE = 1e-4, 1e-6  # nats above the minimum, at most: to choose the strength, and in the end
MAX_ITERATIONS, ITERATIONS_A_LOOK = 2000, 20
NEGLIGIBLE = 1e-5  # of a column's mean: a standard deviation that is only float32's rounding
NO_CLASS = -1e4  # the bias of a class without training sentences: exp() of it is 0


@dataclasses.dataclass
class ProbeData:
    """Features and labels of both parts.

    Args:
        features, validation_features: (n, d) float32.
        labels, validation_labels: (n,) int64 in 0 .. classes - 1.
        width: of the features with all positions; they may be cut to the d columns that are not zero everywhere.
    """

    features: torch.Tensor
    labels: torch.Tensor
    validation_features: torch.Tensor
    validation_labels: torch.Tensor
    classes: int
    width: int


def correct(head: nn.Linear, features, labels, batch_size: int = 4096) -> torch.Tensor:
    """(n,) bool on the CPU: whether the largest logit is that of the label."""
    device, found = head.weight.device, []
    with torch.inference_mode():
        for rows, truth in zip(features.split(batch_size), labels.split(batch_size), strict=True):
            found.append(head(rows.to(device)).argmax(-1).cpu() == truth.cpu())
    return torch.cat(found)


def accuracy(head: nn.Linear, features, labels) -> float:
    """Share of sentences whose largest logit is that of their label."""
    return int(correct(head, features, labels).sum()) / len(labels)


def fit_adamw(data: ProbeData, training: TrainingArguments, seed: int, drawn=None) -> tuple[nn.Linear, float]:
    """Train a linear head with AdamW.

    Columns that are zero in both parts have no gradient and no part in a logit, so the head may be trained without them: with
    the initial weights that it has in the full width, the others are the same numbers.

    Args:
        training: `TrainingArguments`. A batch has per_device_train_batch_size x gradient_accumulation_steps sentences, the last
            of an epoch what is left.
        seed: of initialisation and order.
        drawn: (n,) int64, the training sentences to train on, with repetitions; None for all, once.

    Returns:
        The head, and its best validation accuracy over the evaluations of --eval_strategy and the last.
    """
    device = training.device
    batch_size = training.per_device_train_batch_size * training.gradient_accumulation_steps
    drawn = torch.arange(len(data.labels)) if drawn is None else torch.from_numpy(drawn)
    steps_an_epoch = math.ceil(len(drawn) / batch_size)
    steps = training_steps(training, len(drawn))
    head = _first_columns(linear_head(data.width, data.classes, seed), data.features.shape[1]).to(device)
    optimizer, scheduler = _optimizer(head, training, steps)
    every = _evaluation_interval(training, steps_an_epoch)
    # One buffer for all batches: to allocate one each time takes longer than to fill it.
    buffer = data.features.new_empty(min(batch_size, len(drawn)), data.features.shape[1])
    best, step = 0.0, 0
    with trange(steps, desc=f"probe, seed {seed}", unit="step", leave=False) as progress:
        for epoch in range(math.ceil(steps / steps_an_epoch)):
            order = drawn[torch.from_numpy(keyed_rng(seed, "probe-order", epoch).permutation(len(drawn)))]
            for batch in order.split(batch_size)[: steps - step]:
                rows = torch.index_select(data.features, 0, batch.to(data.features.device), out=buffer[: len(batch)])
                # head(rows), in the order of factors that takes a CPU half the time for so few classes
                logits = (head.weight @ rows.to(device).T).T + head.bias
                loss = F.cross_entropy(logits, data.labels[batch].to(device))
                optimizer.zero_grad()
                loss.backward()
                if training.max_grad_norm > 0:
                    nn.utils.clip_grad_norm_(head.parameters(), training.max_grad_norm)
                optimizer.step()
                scheduler.step()
                step += 1
                progress.update()
                if every and step % every == 0 and step < steps:
                    best = max(best, accuracy(head, data.validation_features, data.validation_labels))
    return head, max(best, accuracy(head, data.validation_features, data.validation_labels))


def _first_columns(head: nn.Linear, width: int) -> nn.Linear:
    """The head on the first `width` features alone."""
    cut = nn.utils.skip_init(nn.Linear, width, head.out_features)
    cut.load_state_dict({"weight": head.weight[:, :width], "bias": head.bias})
    return cut


def _optimizer(head, training: TrainingArguments, steps: int) -> tuple:
    """AdamW on the head and the schedule of the learning rate over `steps`."""
    groups = [
        {"params": [head.weight], "weight_decay": training.weight_decay},
        {"params": [head.bias], "weight_decay": 0.0},
    ]
    betas = (training.adam_beta1, training.adam_beta2)
    optimizer = torch.optim.AdamW(groups, lr=training.learning_rate, betas=betas, eps=training.adam_epsilon, fused=True)
    scheduler = get_scheduler(
        training.lr_scheduler_type,
        optimizer,
        num_warmup_steps=training.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=training.lr_scheduler_kwargs,
    )
    return optimizer, scheduler


def _evaluation_interval(training: TrainingArguments, steps_an_epoch: int) -> int | None:
    """Steps between two evaluations on the way; None for none."""
    if training.eval_strategy == IntervalStrategy.EPOCH:
        return steps_an_epoch
    return int(training.eval_steps) if training.eval_strategy == IntervalStrategy.STEPS else None


def standardise(data: ProbeData) -> None:
    """Bring each feature to mean 0 and standard deviation 1 on the training part, in place; constant ones become 0."""
    deviation, mean = torch.std_mean(data.features, 0, correction=0)
    scale = torch.where(deviation > NEGLIGIBLE * mean.abs(), 1 / deviation, 0.0)
    for features in (data.features, data.validation_features):
        features.sub_(mean).mul_(scale)


@dataclasses.dataclass
class Optimum:
    """A fit by L-BFGS: the head, and how far J may be above its minimum (nats, see `fit_lbfgs`)."""

    head: nn.Linear
    excess: float


def fit_lbfgs(
    features, labels, classes: int, strength: float, tolerance: float = FINE, weights=None, start: Optimum | None = None
) -> Optimum:
    """The minimum of J(W, b); see the module.

    J is lambda-strongly convex in W, so J - min J <= ||grad J||^2 / (2 lambda) (Boyd and Vandenberghe 2004, eq. 9.9; b, which
    is not penalised, is counted as if it were): iterations end when that is `tolerance`, or float32 gets no further.

    Args:
        features: (n, d), standardised.
        labels: (n,) int64.
        strength: lambda, above 0.
        tolerance: in nats.
        weights: (n,) u_i, of the features' dtype; None for ones. Classes without weight get no probability.
        start: where to begin; None for W = 0 and the classes' frequencies.
    """
    weights = features.new_ones(len(labels)) if weights is None else weights
    total, counts = weights.sum(), features.new_zeros(classes).index_add_(0, labels, weights)
    weight = features.new_zeros(classes, features.shape[1]) if start is None else start.head.weight.detach().clone()
    bias = torch.where(counts > 0, (counts / total).log(), NO_CLASS)
    if start is not None:  # which may have known other classes
        bias = torch.where((counts > 0) & (start.head.bias > NO_CLASS), start.head.bias, bias)
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    # Its own tests, on the largest element of the gradient and on the last step, say nothing of the distance to the minimum.
    never = {"tolerance_grad": 0, "tolerance_change": torch.finfo(features.dtype).tiny}
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=ITERATIONS_A_LOOK, history_size=20, line_search_fn="strong_wolfe", **never
    )

    def objective():
        optimizer.zero_grad()
        losses = F.cross_entropy(F.linear(features, weight, bias), labels, reduction="none")
        # Where a label has no weight its class may have no probability: 0 x infinity is no number.
        loss = torch.where(weights > 0, losses, 0.0) @ weights / total + strength / 2 * weight.square().sum()
        loss.backward()
        return loss

    best, excess = math.inf, math.inf
    for _ in range(MAX_ITERATIONS // ITERATIONS_A_LOOK):
        optimizer.step(objective)
        loss = objective().item()  # the line search may have looked at other points last
        excess = sum(parameter.grad.square().sum().item() for parameter in parameters) / (2 * strength)
        if excess <= tolerance or loss >= best:
            break
        best = loss
    head = nn.utils.skip_init(nn.Linear, features.shape[1], classes)
    head.weight, head.bias = (nn.Parameter(parameter.detach(), requires_grad=False) for parameter in parameters)
    return Optimum(head, excess)


def choose_strength(features, labels, classes: int, seed: int) -> float:
    """The strength of `STRENGTHS` whose fit to 4/5 of the sentences has the least mean cross-entropy on the others.

    Sentences of a class that only the held-out fifth has don't count: no strength gives them a probability.

    Args:
        seed: of the fifth that is held out.

    Raises:
        InputError: there are too few sentences to hold some out.
    """
    held_out = keyed_rng(seed, "probe-held-out").permutation(len(labels))[: len(labels) // HELD_OUT]
    weights = features.new_ones(len(labels))
    weights[torch.from_numpy(held_out).to(weights.device)] = 0
    known = torch.isin(labels, labels[weights > 0]) & (weights == 0)
    if not known.any():
        raise InputError(f"--solver lbfgs: {len(labels)} training sentences are too few to hold some out; give more")
    losses, fit = [], None
    for strength in tqdm(STRENGTHS, desc=f"strength, seed {seed}", leave=False):
        fit = fit_lbfgs(features, labels, classes, strength, ROUGH, weights, fit)
        with torch.inference_mode():
            losses.append(F.cross_entropy(fit.head(features[known]), labels[known]).item())
        if losses[-1] > min(losses):  # weaker ones take ever longer, and fit the noise ever closer
            break
    return STRENGTHS[int(np.argmin(losses))]


def bootstrap(data: ProbeData, fitted_correct, refit, replicates: int, seed: int) -> dict:
    """Standard errors of the accuracy that come from the data: how it would scatter over other samples of sentences.

    Replicate b draws as many training and validation sentences as there are, with replacement. `validation_standard_error`
    resamples the validation sentences and keeps the heads (about sqrt(a (1 - a) / n)); `training_standard_error` fits the head
    to the resampled training sentences and keeps the validation sentences; `standard_error` does both.

    Args:
        fitted_correct: (validation sentences,) float, share of the heads of the measurement that are right on each.
        refit: from (n,) int64 drawn training sentences to a head.
        replicates: 2 or more.
        seed: of the draws.
    """
    validation, training, both = [], [], []
    for replicate in trange(replicates, desc="bootstrap", leave=False):
        rng = keyed_rng(seed, "probe-bootstrap", replicate)
        drawn = rng.integers(len(data.labels), size=len(data.labels))
        measured = rng.integers(len(fitted_correct), size=len(fitted_correct))
        right = correct(refit(drawn), data.validation_features, data.validation_labels).numpy()
        validation.append(fitted_correct[measured].mean())
        training.append(right.mean())
        both.append(right[measured].mean())
    names = ("validation_standard_error", "training_standard_error", "standard_error")
    errors = {name: float(np.std(values, ddof=1)) for name, values in zip(names, (validation, training, both), strict=True)}
    return {"replicates": replicates, **errors}
