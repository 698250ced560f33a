"""The trace of the Hessian of the pre-training loss at a model: how flat the loss is there.

    fisher       E_{x,t} E_{w ~ f(x_-t)} || grad log f(x_-t)[w] ||^2       (Liu et al. 2023, appendix B.1)
    true labels  E_{x,t} E_{w ~ P(x_-t)} || grad log f(x_-t)[w] ||^2
    hutchinson   E_v[ v^T (grad^2 L) v ],  L = E_{x,t}[ -sum_w P(w | x_-t) log f(x_-t)[w] ]       (Hutchinson 1990)

The three agree where f = P at every context, since there the gradient's covariance equals the Hessian (Bartlett's second
identity); elsewhere Hutchinson's is the trace. Without true conditionals P, its L has the words that stand in the text.

Words w are drawn in proportion to f_w || e_w - f ||^2 and weighted, which leaves the expectation as it stands above.
The mean is over sentences of the mean over their masked positions (all, or some drawn ones). Standard errors are over sentences
for Fisher norms, and for Hutchinson over blocks of sentences that share their probes. All that is drawn is keyed by the
sentence (or block) and the draw, so neither batches nor ranks decide anything.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from pcfg.common.files import InputError, keyed_rng
from pcfg.common.ranks import Ranks
from pretraining.data.contexts import Contexts, check_length
from pretraining.evaluation.estimates import Estimate, is_reached, stops
from pretraining.evaluation.fisher import GhostNorms, draw_words, residuals
from pretraining.evaluation.hutchinson import draw_probe, quadratic_forms
from pretraining.evaluation.parts import Parts

WINDOW = 512  # sentences whose conditionals a rank has in memory at a time
SOFT_WORDS = 4096  # more words are not summed over
# Before a relative error is believed: labels, probes, sentences.
MIN_DRAWS = {"fisher": 1000, "hutchinson": 64}
MIN_SENTENCES = 32


@dataclasses.dataclass(frozen=True)
class Plan:
    """What decides an estimate, beside the model and the sentences.

    Attributes:
        sentences: at most, the first ones.
        positions: masked positions of each sentence, drawn without replacement; None for all.
        draws: labels drawn at each position, for fisher.
        plain_labels: draw them from f itself; else with probability proportional to f_w || e_w - f ||^2, and weighted: the
            same expectation, less variance.
        soft_labels: sum over all words instead of drawing.
        probe, probes: kind and number of each block's probes, for hutchinson.
        block: sentences that share their probes.
        seed: of all that is drawn.
        target: stop at this relative standard error; None to use all sentences.
        min_draws: labels or probes before that; None for `MIN_DRAWS`.
    """

    sentences: int
    positions: int | None = None
    draws: int = 1
    plain_labels: bool = False
    soft_labels: bool = False
    probe: str = "rademacher"
    probes: int = 4
    block: int = 16
    seed: int = 0
    target: float | None = None
    min_draws: int | None = None

    def taken(self, contexts: Contexts) -> np.ndarray:
        """(sentences,) int64: how many positions of each sentence are measured."""
        counts = contexts.counts[: self.sentences]
        return counts if self.positions is None else np.minimum(counts, self.positions)


@dataclasses.dataclass
class Truth:
    """True conditionals of the sentences.

    Attributes:
        table: a `pcfg.lookup.LookupTable`.
        columns: (words,) the vocabulary id of each of its words.
    """

    table: object
    columns: np.ndarray

    def window(self, contexts: Contexts, low: int, high: int, model):
        """A function from contexts (m,) of the sentences low .. high - 1 to P, (m, vocab_size) float64, on its device."""
        rows, offset = self.table.conditionals(low, high), contexts.offsets[low]
        width, device = model.config.vocab_size, next(model.parameters()).device

        def distribution(chosen):
            full = np.zeros((len(chosen), width))
            full[:, self.columns] = rows[chosen - offset]
            return torch.from_numpy(full).to(device)

        return distribution


def chosen_contexts(contexts: Contexts, sentences, plan: Plan) -> np.ndarray:
    """The contexts of some sentences that are measured, ascending: all, or `plan.positions` of each."""
    offsets, chosen = contexts.offsets, [np.empty(0, np.int64)]
    for sentence in sentences:
        inside = np.arange(offsets[sentence], offsets[sentence + 1])
        if plan.positions is not None and plan.positions < len(inside):
            inside = np.sort(keyed_rng(plan.seed, "hessian positions", int(sentence)).permutation(inside)[: plan.positions])
        chosen.append(inside)
    return np.concatenate(chosen)


def label_numbers(contexts: Contexts, chosen: np.ndarray, plan: Plan) -> np.ndarray:
    """Uniform numbers in [0, 1) that decide the labels of contexts: (draws, len(chosen)), whatever else is drawn."""
    counts, offsets = contexts.counts, contexts.offsets
    sentences, starts = np.unique(contexts.sentence[chosen], return_index=True)
    numbers = [np.empty((plan.draws, 0))]
    for sentence, inside in zip(sentences, np.split(chosen, starts[1:]), strict=False):
        of_all = keyed_rng(plan.seed, "hessian labels", int(sentence)).random((plan.draws, counts[sentence]))
        numbers.append(of_all[:, inside - offsets[sentence]])
    return np.concatenate(numbers, axis=1)


def _windows(first: int, last: int, step: int) -> Iterator[tuple[int, int]]:
    for low in range(first, last, step):
        yield low, min(low + step, last)


def fisher_columns(
    model, contexts: Contexts, chosen: np.ndarray, plan: Plan, parts: Parts, truth, size: int
) -> Iterator[tuple]:
    """Squared gradient norms of the contexts `chosen` (m,), averaged over their labels, in batches of `size` and of one length.

    Args:
        truth: a function from contexts to P, to take labels from P too; or None.

    Yields:
        contexts (m,) and (m, 1 or 2, columns) float64: labels from f, and from P.
    """
    device = next(model.parameters()).device
    numbers = None if plan.soft_labels else torch.from_numpy(label_numbers(contexts, chosen, plan)).to(device)
    for batch in contexts.batches(chosen, size):
        ghost = GhostNorms(model, *contexts.batch(batch, device))
        distributions = [ghost.f] if truth is None else [ghost.f, truth(batch)]
        sizes = None if plan.plain_labels else residuals(ghost.f)
        sums = [0.0] * len(distributions)
        if plan.soft_labels:
            for word in range(ghost.f.shape[1]):
                norms = parts.stack(ghost(torch.full((len(batch),), word, device=device)))
                sums = [total + p[:, word, None] * norms for total, p in zip(sums, distributions, strict=True)]
        else:
            for uniform in numbers[:, np.searchsorted(chosen, batch)]:
                # One number for both: where f is near P they have the same label, and nearly no difference is by chance.
                for number, p in enumerate(distributions):
                    words, weights = draw_words(p, uniform, sizes)
                    sums[number] = sums[number] + parts.stack(ghost(words)) * weights[:, None] / plan.draws
        yield batch, parts.columns(torch.stack(sums, 1).cpu().numpy())


def fisher_trace(
    model, contexts: Contexts, plan: Plan, truth: Truth | None = None, batch_size: int = 128, ranks=None, source=""
) -> Estimate:
    """The paper's estimator: the mean squared gradient norm, labels drawn from the model.

    Args:
        model: a `MaskedLM` in eval mode with eager attention.
        truth: true conditionals, to take labels from them too.
        batch_size: contexts of one length a forward pass; the results do not depend on it.
        ranks: the processes that share the sentences; None for this one alone.
        source: the data file's name, for errors.

    Raises:
        InputError: a sentence longer than the model's position table, or a vocabulary too large for soft labels.
    """
    check_length(contexts, model.config, source)
    words = model.config.vocab_size
    if plan.soft_labels and words > SOFT_WORDS:
        raise InputError(f"--soft-labels: a backward pass for each of {words} words; at most {SOFT_WORDS}, draw labels instead")
    ranks, parts, taken = ranks or Ranks(), Parts(model), plan.taken(contexts)
    labels = np.cumsum(taken) * (words if plan.soft_labels else plan.draws)
    first = max(MIN_SENTENCES, 1 + int(np.searchsorted(labels, plan.min_draws or MIN_DRAWS["fisher"])))
    values = np.zeros((0, 1 if truth is None else 2, len(parts)))
    progress = tqdm(desc="fisher", total=len(taken), unit="sentence", leave=False, disable=not ranks.is_main)
    for stop in stops(len(taken), first, plan.target):
        done = len(values)
        values = np.concatenate([values, np.zeros((stop - done, *values.shape[1:]))])
        for low, high in _windows(done, stop, WINDOW * ranks.size):
            window = None if truth is None else truth.window(contexts, low, high, model)
            chosen = chosen_contexts(contexts, ranks.own(range(low, high)), plan)
            for batch, columns in fisher_columns(model, contexts, chosen, plan, parts, window, batch_size):
                sentence = contexts.sentence[batch]
                np.add.at(values, sentence, columns / taken[sentence, None, None])
            progress.update(high - low)
        ranks.sum_on_host(values[done:])
        sizes = np.ones(stop, np.int64)
        if is_reached(values[:, 0], sizes, plan.target):
            break
    progress.close()
    measured = int(taken[: len(values)].sum()), int(labels[len(values) - 1])
    return Estimate(parts, values[:, 0], sizes, *measured, plan.target, None if truth is None else values[:, 1])


def _block_targets(contexts: Contexts, low: int, high: int, taken: np.ndarray, model, truth: Truth | None):
    """The labels of the contexts of sentences low .. high - 1, P or the words that stand there, by their weight in the mean."""
    window = None if truth is None else truth.window(contexts, low, high, model)
    device = next(model.parameters()).device

    def targets(batch):
        weight = 1.0 / (taken[contexts.sentence[batch]] * (high - low))
        if window is not None:
            labels = window(batch)
        else:
            labels = torch.from_numpy(contexts.label[batch]).to(device)
            labels = torch.nn.functional.one_hot(labels, model.config.vocab_size)
        return torch.from_numpy(weight).to(device)[:, None] * labels

    return targets


def hutchinson_trace(
    model, contexts: Contexts, plan: Plan, truth: Truth | None = None, batch_size: int = 128, ranks=None, source=""
) -> Estimate:
    """Hutchinson's estimator; every block of sentences has probes of its own, so that the blocks are independent.

    Their spread holds the probes' error as well as the sentences'. Arguments are as in `fisher_trace`; without `truth` the
    labels are the words of the text.

    Raises:
        InputError: a sentence longer than the model's position table.
    """
    check_length(contexts, model.config, source)
    ranks, parts, taken = ranks or Ranks(), Parts(model), plan.taken(contexts)
    blocks = list(_windows(0, len(taken), plan.block))
    sizes = np.array([high - low for low, high in blocks])
    first = max(2, -(-(plan.min_draws or MIN_DRAWS["hutchinson"]) // plan.probes))
    values = np.zeros((0, len(parts)))
    progress = tqdm(desc="hutchinson", total=len(blocks), unit="block", leave=False, disable=not ranks.is_main)
    for stop in stops(len(blocks), first, plan.target):
        done = len(values)
        values = np.concatenate([values, np.zeros((stop - done, len(parts)))])
        for block in ranks.own(range(done, stop)).tolist():
            targets = _block_targets(contexts, *blocks[block], taken, model, truth)
            batches = contexts.batches(chosen_contexts(contexts, range(*blocks[block]), plan), batch_size)
            probes = [partial(draw_probe, model, plan.probe, plan.seed, block, draw) for draw in range(plan.probes)]
            values[block] = parts.columns(quadratic_forms(model, contexts, batches, targets, probes).mean(0))
            progress.update(ranks.size)
        ranks.sum_on_host(values[done:])
        if is_reached(values, sizes[:stop], plan.target):
            break
    progress.close()
    sizes = sizes[: len(values)]
    return Estimate(parts, values, sizes, int(taken[: sizes.sum()].sum()), len(values) * plan.probes, plan.target)
