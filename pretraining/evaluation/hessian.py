"""The trace of the Hessian of the pre-training loss at a model: the flatness of the loss there.

    fisher       E_{x,t} E_{w ~ f(x_-t)} || grad log f(x_-t)[w] ||^2       (Liu et al. 2023, appendix B.1)
    true labels  E_{x,t} E_{w ~ P(x_-t)} || grad log f(x_-t)[w] ||^2
    hutchinson   E_v[ v^T (grad^2 L) v ],  L = E_{x,t}[ -sum_w P(w | x_-t) log f(x_-t)[w] ]       (Hutchinson 1990)

in nats. The three agree where f = P at every context: there the covariance of the gradient equals the Hessian (Bartlett's
second identity). Elsewhere Hutchinson's is the trace. Without true conditionals P, its L takes the words of the text.

Fisher: words w are drawn with probability proportional to f_w || e_w - f ||^2 and weighted, which leaves the expectation as it
is and reduces the variance.

Hutchinson: v has independent entries of mean 0 and variance 1. They are uniform in {-1, 1} (Rademacher, the least variance: the
diagonal of H adds none) or standard normal (the released code). H v is the gradient of (grad L)^T v, a second backward pass
through the graph of the first, which serves several probes. It needs attention in plain operations: fused kernels have no
second derivative. Forward over forward mode (`torch.func.jvp` of `jvp`) through `F.layer_norm` is silently wrong in torch 2.13.

The mean is over sentences of the mean over their masked positions (all, or some drawn ones). Standard errors are over sentences
for Fisher norms, and over blocks of sentences that share their probes for Hutchinson. Every random number is keyed by the
sentence (or block) and the draw, so that neither batches nor ranks change the result.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pcfg.common.files import InputError, keyed_rng, sha256
from pcfg.common.ranks import Ranks
from pcfg.lookup import LookupTable
from pretraining.data.contexts import Contexts, check_length
from pretraining.evaluation.estimates import Estimate, Partitions, difference, is_reached, measured_parameters, stops
from pretraining.evaluation.fisher import GhostNorms, draw_words, residuals
from pretraining.evaluation.inputs import Inputs
from pretraining.evaluation.records import HessianRecord, is_measured, write_record
from pretraining.model.bert import MaskedLM
from pretraining.model.checkpoints import load_model

RECORDS = {"fisher": "hessian.json", "hutchinson": "hessian_hutchinson.json"}
PROBES = {
    "rademacher": lambda rng, shape: rng.integers(0, 2, shape, np.int8) * 2 - 1,
    "gaussian": lambda rng, shape: rng.standard_normal(shape, np.float32),
}
WINDOW = 512  # sentences whose conditionals a rank has in memory at a time
SOFT_WORDS = 4096  # largest vocabulary to sum over
# Before a relative error is trusted: labels, probes, sentences.
MIN_DRAWS = {"fisher": 1000, "hutchinson": 64}
MIN_SENTENCES = 32
COMPARED = 128  # sentences on which Hutchinson's trace is compared with fisher's: it is ten times as expensive

# From contexts (m,) to probabilities of words, (m, vocab_size), on the device of the model.
Distribution = Callable[[np.ndarray], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The choices that decide an estimate of a model on some text."""

    nsamples: int | None = None  # sentences at most, the first ones; None for all
    positions: int | None = None  # masked positions of each sentence, drawn without replacement; None for all
    seed: int = 0  # of every random number
    target_relative_error: float | None = None  # stop at this relative standard error; None to use all sentences
    min_draws: int | None = None  # labels or probes before that; None for `MIN_DRAWS`
    draws: int = 1  # fisher: labels at each position
    plain_labels: bool = False  # fisher: draw them from f itself, without weights
    soft_labels: bool = False  # fisher: sum over all words instead of drawing
    probe: str = "rademacher"  # hutchinson: kind of the probes
    probe_num: int = 4  # hutchinson: probes of each block
    block_size: int = 16  # hutchinson: sentences that share their probes

    def counts(self, contexts: Contexts) -> np.ndarray:
        """(sentences,) int64: number of positions of each sentence that are measured."""
        counts = contexts.counts[: self.nsamples]
        return counts if self.positions is None else np.minimum(counts, self.positions)

    def described(self) -> dict[str, Any]:
        """The arguments of a record."""
        return {**dataclasses.asdict(self), "nsamples": self.nsamples or "all", "positions": self.positions or "all"}


@dataclasses.dataclass
class Truth:
    """True conditionals of the sentences."""

    table: LookupTable
    columns: np.ndarray  # (words,) int64, the vocabulary id of each word of the table

    def window(self, contexts: Contexts, low: int, high: int, model: MaskedLM) -> Distribution:
        """P at contexts (m,) of the sentences low .. high - 1: (m, vocab_size) float64 on the model's device."""
        rows = self.table.conditionals(low, high)
        offset = contexts.offsets[low]
        width = model.config.vocab_size
        device = next(model.parameters()).device

        def distribution(batch: np.ndarray) -> torch.Tensor:
            full = np.zeros((len(batch), width))
            full[:, self.columns] = rows[batch - offset]
            return torch.from_numpy(full).to(device)

        return distribution


def measured_contexts(contexts: Contexts, sentences: np.ndarray | range, sampling: Sampling) -> np.ndarray:
    """The contexts of some sentences that are measured, ascending: all, or `sampling.positions` of each."""
    offsets = contexts.offsets
    measured = [np.empty(0, np.int64)]
    for sentence in sentences:
        inside = np.arange(offsets[sentence], offsets[sentence + 1])
        if sampling.positions is not None and sampling.positions < len(inside):
            rng = keyed_rng(sampling.seed, "hessian positions", int(sentence))
            inside = np.sort(rng.permutation(inside)[: sampling.positions])
        measured.append(inside)
    return np.concatenate(measured)


def label_numbers(contexts: Contexts, measured: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Uniform numbers in [0, 1) that decide the labels of contexts: (draws, len(measured)), a function of each context."""
    counts = contexts.counts
    offsets = contexts.offsets
    sentences, starts = np.unique(contexts.sentence[measured], return_index=True)
    numbers = [np.empty((sampling.draws, 0))]
    for sentence, inside in zip(sentences, np.split(measured, starts[1:]), strict=False):
        of_all = keyed_rng(sampling.seed, "hessian labels", int(sentence)).random((sampling.draws, counts[sentence]))
        numbers.append(of_all[:, inside - offsets[sentence]])
    return np.concatenate(numbers, axis=1)


def _windows(first: int, last: int, step: int) -> Iterator[tuple[int, int]]:
    for low in range(first, last, step):
        yield low, min(low + step, last)


def fisher_columns(
    model: MaskedLM,
    contexts: Contexts,
    measured: np.ndarray,
    sampling: Sampling,
    partitions: Partitions,
    truth: Distribution | None,
    size: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Squared gradient norms of the contexts `measured` (n,), averaged over their labels, in batches of `size`.

    Args:
        truth: P, to take labels from P too; or None.

    Yields:
        contexts (m,) and (m, 1 or 2, columns) float64: labels from f, and from P.
    """
    device = next(model.parameters()).device
    numbers = None if sampling.soft_labels else torch.from_numpy(label_numbers(contexts, measured, sampling)).to(device)
    for batch in contexts.batches(measured, size):
        ghost = GhostNorms(model, *contexts.batch(batch, device))
        distributions = [ghost.f] if truth is None else [ghost.f, truth(batch)]
        sizes = None if sampling.plain_labels else residuals(ghost.f)
        sums = [torch.zeros(len(batch), len(partitions.names), dtype=torch.float64, device=device) for _ in distributions]
        if numbers is None:
            for word in range(ghost.f.shape[1]):
                norms = partitions.stack(ghost(torch.full((len(batch),), word, device=device)))
                sums = [total + p[:, word, None] * norms for total, p in zip(sums, distributions, strict=True)]
        else:
            for uniform in numbers[:, np.searchsorted(measured, batch)]:
                # The same number for both: where f is near P they draw the same label, so that the difference has less noise.
                for index, p in enumerate(distributions):
                    words, weights = draw_words(p, uniform, sizes)
                    sums[index] = sums[index] + partitions.stack(ghost(words)) * weights[:, None] / sampling.draws
        yield batch, partitions.columns(torch.stack(sums, 1).cpu().numpy())


def fisher_trace(
    model: MaskedLM,
    contexts: Contexts,
    sampling: Sampling,
    truth: Truth | None = None,
    batch_size: int = 128,
    ranks: Ranks | None = None,
    source: Path | str = "",
) -> Estimate:
    """The estimator of the paper: the mean squared gradient norm, with labels drawn from the model.

    Args:
        model: in eval mode, with eager attention.
        truth: true conditionals, to take labels from them too.
        batch_size: contexts of one length per forward pass; the results do not depend on it.
        ranks: the processes that share the sentences; None for this one alone.
        source: the data file, for errors.
    """
    check_length(contexts, model.config.max_position_embeddings, source)
    words = model.config.vocab_size
    if sampling.soft_labels and words > SOFT_WORDS:
        raise InputError(f"--soft-labels: a backward pass for each of {words} words; at most {SOFT_WORDS}, draw labels instead")
    ranks = ranks or Ranks()
    partitions = Partitions(model)
    counts = sampling.counts(contexts)
    target = sampling.target_relative_error
    labels = np.cumsum(counts) * (words if sampling.soft_labels else sampling.draws)
    first = max(MIN_SENTENCES, 1 + int(np.searchsorted(labels, sampling.min_draws or MIN_DRAWS["fisher"])))
    values = np.zeros((0, 1 if truth is None else 2, len(partitions)))
    progress = tqdm(desc="fisher", total=len(counts), unit="sentence", leave=False, disable=not ranks.is_main)
    for stop in stops(len(counts), first, target):
        start = len(values)
        values = np.concatenate([values, np.zeros((stop - start, *values.shape[1:]))])
        for low, high in _windows(start, stop, WINDOW * ranks.size):
            window = None if truth is None else truth.window(contexts, low, high, model)
            measured = measured_contexts(contexts, ranks.own(range(low, high)), sampling)
            for batch, columns in fisher_columns(model, contexts, measured, sampling, partitions, window, batch_size):
                sentence = contexts.sentence[batch]
                np.add.at(values, sentence, columns / counts[sentence, None, None])
            progress.update(high - low)
        ranks.sum_on_host(values[start:])
        sizes = np.ones(stop, np.int64)
        if is_reached(values[:, 0], sizes, target):
            break
    progress.close()
    positions = int(counts[: len(values)].sum())
    true_values = None if truth is None else values[:, 1]
    return Estimate(partitions, values[:, 0], sizes, positions, int(labels[len(values) - 1]), target, true_values)


def draw_probe(model: MaskedLM, kind: str, seed: int, block: int, draw: int) -> list[torch.Tensor]:
    """The probe of a block and draw: one tensor per parameter of `measured_parameters`, a function of the key alone."""
    rng = keyed_rng(seed, f"hutchinson probes, {kind}", block, draw)
    parameters = measured_parameters(model).values()
    return [torch.from_numpy(PROBES[kind](rng, tuple(p.shape))).to(p.device, p.dtype) for p in parameters]


def quadratic_forms(
    model: MaskedLM,
    contexts: Contexts,
    batches: list[np.ndarray],
    targets: Distribution,
    probes: Sequence[Callable[[], list[torch.Tensor]]],
) -> np.ndarray:
    """v_p^T (H v)_p for each parameter p. Their sum over p is v^T H v; the expectation of each is the trace of p's own block.

    H is the Hessian of the loss -sum_c sum_w targets_cw log f_c[w], over the contexts c of all batches.

    Args:
        model: in eval mode, with eager attention.
        batches: contexts (m,), each batch of one length.
        targets: weights of the words.
        probes: functions that return a probe v, as `draw_probe` does.

    Returns:
        (probes, parameters) float64.
    """
    parameters = list(measured_parameters(model).values())
    device = parameters[0].device
    forms = np.zeros((len(probes), len(parameters)))
    for batch in batches:
        log_f = torch.log_softmax(model(*contexts.batch(batch, device)), -1)  # (m, vocab_size)
        loss = -(targets(batch).to(log_f.dtype) * log_f).sum()
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        for draw, probe in enumerate(probes):
            vector = probe()
            products = torch.autograd.grad(gradients, parameters, vector, retain_graph=draw + 1 < len(probes))
            form = torch.stack([(v * hv).sum(dtype=torch.float64) for v, hv in zip(vector, products, strict=True)])
            forms[draw] += form.cpu().numpy()
    return forms


def _block_targets(
    contexts: Contexts, low: int, high: int, counts: np.ndarray, model: MaskedLM, truth: Truth | None
) -> Distribution:
    """P or the words of the text at contexts of the sentences low .. high - 1, times their weight in the mean."""
    window = None if truth is None else truth.window(contexts, low, high, model)
    device = next(model.parameters()).device

    def targets(batch: np.ndarray) -> torch.Tensor:
        weight = 1.0 / (counts[contexts.sentence[batch]] * (high - low))
        if window is not None:
            labels = window(batch)
        else:
            labels = torch.from_numpy(contexts.label[batch]).to(device)
            labels = torch.nn.functional.one_hot(labels, model.config.vocab_size)
        return torch.from_numpy(weight).to(device)[:, None] * labels

    return targets


def hutchinson_trace(
    model: MaskedLM,
    contexts: Contexts,
    sampling: Sampling,
    truth: Truth | None = None,
    batch_size: int = 128,
    ranks: Ranks | None = None,
    source: Path | str = "",
) -> Estimate:
    """Hutchinson's estimator. Every block of sentences has its own probes, so that the blocks are independent.

    The spread of the blocks includes the error of the probes and that of the sentences. Arguments as in `fisher_trace`; without
    `truth` the labels are the words of the text.
    """
    check_length(contexts, model.config.max_position_embeddings, source)
    ranks = ranks or Ranks()
    partitions = Partitions(model)
    counts = sampling.counts(contexts)
    target = sampling.target_relative_error
    blocks = list(_windows(0, len(counts), sampling.block_size))
    sizes = np.array([high - low for low, high in blocks])
    first = max(2, -(-(sampling.min_draws or MIN_DRAWS["hutchinson"]) // sampling.probe_num))
    values = np.zeros((0, len(partitions)))
    progress = tqdm(desc="hutchinson", total=len(blocks), unit="block", leave=False, disable=not ranks.is_main)
    for stop in stops(len(blocks), first, target):
        start = len(values)
        values = np.concatenate([values, np.zeros((stop - start, len(partitions)))])
        for block in ranks.own(range(start, stop)).tolist():
            low, high = blocks[block]
            targets = _block_targets(contexts, low, high, counts, model, truth)
            batches = contexts.batches(measured_contexts(contexts, range(low, high), sampling), batch_size)
            probes = [
                partial(draw_probe, model, sampling.probe, sampling.seed, block, draw) for draw in range(sampling.probe_num)
            ]
            values[block] = partitions.columns(quadratic_forms(model, contexts, batches, targets, probes).mean(0))
            progress.update(ranks.size)
        ranks.sum_on_host(values[start:])
        if is_reached(values, sizes[:stop], target):
            break
    progress.close()
    sizes = sizes[: len(values)]
    positions = int(counts[: sizes.sum()].sum())
    return Estimate(partitions, values, sizes, positions, len(values) * sampling.probe_num, target)


def measure_trace(
    model: MaskedLM, inputs: Inputs, sampling: Sampling, estimator: str, batch_size: int, ranks: Ranks
) -> dict[str, dict[str, Any]]:
    """The trace at one model by "fisher", "hutchinson" or "both": fields of a record, by the name of the estimator.

    With both, or with true conditionals, fisher's fields have Hutchinson's trace on (some of) the same sentences too.
    """
    truth = None
    if inputs.table is not None and inputs.columns is not None:
        truth = Truth(inputs.table, inputs.columns)

    def run(trace: Callable[..., Estimate], sampling: Sampling) -> tuple[Estimate, dict[str, Any]]:
        started = time.monotonic()
        estimate = trace(model, inputs.contexts, sampling, truth, batch_size, ranks, inputs.source)
        return estimate, {**estimate.described(), "seconds": time.monotonic() - started}

    if estimator == "hutchinson":
        return {"hutchinson": run(hutchinson_trace, sampling)[1]}
    fisher, fields = run(fisher_trace, sampling)
    results = {"fisher": fields}
    sentences = min(fisher.sentences, COMPARED)
    if estimator == "both":
        hutchinson, results["hutchinson"] = run(hutchinson_trace, sampling)
        other = results["hutchinson"]
    elif truth is not None and sentences > sampling.block_size:
        some = dataclasses.replace(sampling, nsamples=sentences, target_relative_error=None)
        hutchinson, other = run(hutchinson_trace, some)
    else:
        return results
    fields["hutchinson"] = {key: other[key] for key in ("value", "standard_error", "n", "sentences", "draws")}
    if on_shared_blocks := difference(fisher, hutchinson):
        fields["hutchinson"]["difference"] = on_shared_blocks
    return results


def _number(estimate: dict[str, Any]) -> str:
    return f"{estimate['value']:.4f} +- {estimate['standard_error']:.4f}"


def print_traces(folder: Path, results: dict[str, dict[str, Any]]) -> None:
    """Print the traces at a model, and their differences."""
    traces = ", ".join(f"{_number(fields)} ({name}, n = {fields['n']})" for name, fields in results.items())
    print(f"{folder}: trace {traces}")
    for name, fields in results.items():
        if not fields.get("target_reached", True):
            error = fields["relative_error"]
            print(f"  {name}: relative error {error:.2%} with all sentences; give a longer text or more draws")
    fisher = results.get("fisher", {})
    for key, label in (("true_labels", "labels drawn from the true conditionals"), ("hutchinson", "hutchinson")):
        if other := fisher.get(key):
            minus = f"; fisher minus it {_number(other['difference'])}" if "difference" in other else ""
            print(f"  {label}: {_number(other)}{minus}")


def measure_models(
    models: list[tuple[Path, Path, Path]],
    inputs: Inputs,
    sampling: Sampling,
    estimator: str,
    batch_size: int,
    device: str,
    overwrite: bool,
) -> None:
    """Measure the trace at each model: write hessian.json (or hessian_hutchinson.json, or both), and print it.

    Args:
        models: model folder, weights file, folder for the results of each.
        estimator: "fisher", "hutchinson" or "both".
        overwrite: measure again; otherwise a measured model is skipped.
    """
    names = RECORDS if estimator == "both" else {estimator: RECORDS[estimator]}
    settings = {"estimator": estimator, **sampling.described()}
    ranks = Ranks(device)
    for folder, weights, output in models:
        inputs.check(folder)
        described = {**inputs.described, "model": {"sha256": sha256(weights)}}
        measured = [is_measured(output, name, described, settings, overwrite) for name in names.values()]
        if all(measured):
            if ranks.is_main:
                print(f"{output}: trace by {estimator} is measured already, skipped")
            continue
        model = load_model(folder, ranks.device, "eager", weights)
        results = measure_trace(model, inputs, sampling, estimator, batch_size, ranks)
        if not ranks.is_main:
            continue
        for name, fields in results.items():
            fields = {**fields, "seeds": [sampling.seed], "inputs": described, "arguments": settings, "device": device}
            write_record(output, names[name], HessianRecord(estimator=name, unit="nats", **fields), number_file=True)
        print_traces(output, results)
    ranks.close()
