"""The trace of the Hessian of the pre-training loss at a model: the flatness of the loss there.

    fisher       E_{x,t} E_{w ~ f(x_-t)} || grad log f(x_-t)[w] ||^2       (Liu et al. 2023, appendix B.1)
    true labels  E_{x,t} E_{w ~ P(x_-t)} || grad log f(x_-t)[w] ||^2
    hutchinson   E_v[ v^T (grad^2 L) v ],  L = E_{x,t}[ -sum_w P(w | x_-t) log f(x_-t)[w] ]       (Hutchinson 1990)

in nats. The three agree where f = P at every context: there the covariance of the gradient equals the Hessian (Bartlett's
second identity). Elsewhere Hutchinson's is the trace. Without true conditionals P, its L takes the words of the text. Records
say which it is: "Fisher trace", the paper's estimator, or "Hessian trace (Hutchinson)", and of which loss.

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
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import one_hot

from pcfg.common.cli import Progress
from pcfg.common.files import InputError, keyed_rng, sha256
from pcfg.common.ranks import Ranks, use_threads
from pretraining.data.contexts import Contexts, check_length
from pretraining.evaluation.fisher import GhostNorms, draw_words, residuals
from pretraining.evaluation.flatness import flatness_fields, mean_and_covariance
from pretraining.evaluation.inputs import Distribution, Inputs, Truth
from pretraining.evaluation.records import HessianRecord, OtherTrace, is_measured, write_record
from pretraining.model.bert import MaskedLM
from pretraining.model.checkpoints import load_model

RECORDS = {"fisher": "hessian.json", "hutchinson": "hessian_hutchinson.json"}
QUANTITIES = {"fisher": "Fisher trace", "hutchinson": "Hessian trace (Hutchinson)"}
# Standard errors by which a trace must be positive before a root or ratio of it is formed; Fisher's are sums of squares.
POSITIVE_ERRORS = {"fisher": 0.0, "hutchinson": 2.0}
PROBES = {
    "rademacher": lambda rng, shape: rng.integers(0, 2, shape, np.int8) * 2 - 1,
    "gaussian": lambda rng, shape: rng.standard_normal(shape, np.float32),
}
WINDOW = 512  # sentences whose conditionals a rank has in memory at a time
SOFT_WORDS = 4096  # largest vocabulary to sum over
# Before a relative error is trusted: labels and sentences (fisher), probes and blocks of sentences (hutchinson).
MIN_DRAWS = {"fisher": 1000, "hutchinson": 64}
MIN_UNITS = {"fisher": 32, "hutchinson": 2}
COMPARED = 128  # sentences on which Hutchinson's trace is compared with fisher's: it is ten times as expensive
COMPARED_FIELDS = ("value", "standard_error", "n", "sentences", "draws", "loss")
LEFT_OUT = ("decoder_bias",)  # as in the released code; the model has no pooler
TABLES = {
    "embeddings.words.weight": "word_table",  # as the input and as the decoder, with their cross term
    "embeddings.positions.weight": "position_table",
    "embeddings.token_types.weight": "token_type_table",
}
GROUPS = (*TABLES.values(), "encoder_matrices", "vectors", "head")
Places = list[tuple[Path, Path, Path]]  # model folder, weights file, folder for the results of each
# Of some units (m,): their indices (m,), a share (m, 1 or 2, columns) float64 of their values, number of contexts in it.
Values = Iterator[tuple[np.ndarray, np.ndarray, int]]


def measured_parameters(model: MaskedLM) -> dict[str, torch.nn.Parameter]:
    """The parameters in the trace, by name: all but those in `LEFT_OUT`, the tied word table once."""
    return {name: parameter for name, parameter in model.named_parameters() if name not in LEFT_OUT}


def group_of(name: str) -> str:
    """The member of `GROUPS` that a parameter belongs to.

    >>> group_of("layers.0.attention.qkv.weight"), group_of("layers.0.attention.qkv.bias"), group_of("head_dense.bias")
    ('encoder_matrices', 'vectors', 'head')
    """
    if name in TABLES:
        return TABLES[name]
    if name.startswith("head_"):
        return "head"
    return "vectors" if name.endswith(".bias") or "norm" in name else "encoder_matrices"


def layer_of(name: str) -> str:
    """The layer of a parameter: "embeddings" (with the word table's part as the decoder), "layer_0", .., "head".

    >>> layer_of("layers.3.output.weight"), layer_of("final_norm.bias"), layer_of("head_norm.weight")
    ('layer_3', 'final_norm', 'head')
    """
    if match := re.match(r"layers\.(\d+)\.", name):
        return f"layer_{match[1]}"
    return "head" if name.startswith("head_") else name.split(".")[0]


class Partitions:
    """The columns of a table of values: the whole trace, its groups, layers and tensors. Each partition sums to the whole."""

    def __init__(self, model: MaskedLM):
        measured = measured_parameters(model)
        self.names = list(measured)  # in the order in which `columns` takes their values
        self.parameters = sum(parameter.numel() for parameter in measured.values())  # count of numbers that the trace is over
        groups = list(map(group_of, self.names))
        layers = list(map(layer_of, self.names))
        self.groups = [group for group in GROUPS if group in groups]
        self.layers = list(dict.fromkeys(layers))
        sums = [[True] * len(self.names)]
        sums += [[name == group for name in groups] for group in self.groups]
        sums += [[name == layer for name in layers] for layer in self.layers]
        self._sums = np.hstack([np.array(sums, float).T, np.eye(len(self.names))])  # (parameters, columns)

    def __len__(self) -> int:
        return self._sums.shape[1]

    def tensors(self, values: np.ndarray) -> np.ndarray:
        """(n, columns) -> (n, parameters): the columns of single tensors."""
        return values[:, -len(self.names) :]

    def stack(self, values: dict[str, torch.Tensor]) -> torch.Tensor:
        """Values (m,) of each parameter, by its name, as (m, parameters) float64."""
        return torch.stack([values[name] for name in self.names], -1).double()

    def columns(self, values: np.ndarray) -> np.ndarray:
        """(..., parameters) float64 -> (..., columns)."""
        return values @ self._sums

    def described(self, means: np.ndarray, errors: np.ndarray) -> dict[str, dict]:
        """{"groups": {name: {"value", "standard_error"}}, "layers": {...}} of the columns after the first."""
        parts = [{"value": float(mean), "standard_error": float(error)} for mean, error in zip(means, errors, strict=True)]
        middle = 1 + len(self.groups)
        groups = dict(zip(self.groups, parts[1:middle], strict=True))
        layers = dict(zip(self.layers, parts[middle : middle + len(self.layers)], strict=True))
        return {"groups": groups, "layers": layers}


def mean_and_error(values: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over sentences and their standard errors, (columns,) each; arguments as in `mean_and_covariance`.

    >>> mean_and_error(np.array([[1.0], [3.0]]), np.array([1, 1]))
    (array([2.]), array([1.]))
    """
    mean, covariance = mean_and_covariance(values, sizes)
    return mean, np.sqrt(covariance.diagonal())


def whole(values: np.ndarray, sizes: np.ndarray) -> dict[str, float]:
    """Mean and standard error of the first column."""
    mean, error = mean_and_error(values[:, :1], sizes)
    return {"value": float(mean[0]), "standard_error": float(error[0])}


@dataclasses.dataclass
class Estimate:
    """An estimate of the trace."""

    partitions: Partitions  # meaning of the columns
    values: np.ndarray  # (n, columns) float64, mean over the sentences of a unit: a sentence (fisher), a block (hutchinson)
    sizes: np.ndarray  # (n,) int64, sentences of each unit
    contexts: int  # number of masked positions
    draws: int  # number of labels or probes
    target: float | None  # the relative error to stop at, or None
    true_values: np.ndarray | None = None  # fisher with labels from the true conditionals, if they are known

    @property
    def sentences(self) -> int:
        return int(self.sizes.sum())

    def described(self) -> dict[str, Any]:
        """Fields of a record."""
        means, errors = mean_and_error(self.values, self.sizes)
        fields = {
            "value": float(means[0]),
            "standard_error": float(errors[0]),
            "n": len(self.values),
            "sentences": self.sentences,
            "contexts": self.contexts,
            "draws": self.draws,
            "mean": "over sentences of the mean over their masked positions",
            "parameters": self.partitions.parameters,
            "left_out": list(LEFT_OUT),
            "parts": self.partitions.described(means, errors),
        }
        if self.target is not None:
            fields["relative_error"] = float(errors[0] / abs(means[0]))
            fields["target_reached"] = is_reached(self.values, self.sizes, self.target)
        if self.true_values is not None:
            true = whole(self.true_values, self.sizes)
            fields["true_labels"] = {**true, "difference": whole(self.values - self.true_values, self.sizes)}
        return fields


def difference(fisher: Estimate, hutchinson: Estimate) -> dict[str, float] | None:
    """Fisher's trace minus Hutchinson's, on the blocks of sentences (n) that both have; None for fewer than 2 blocks."""
    number = int((np.cumsum(hutchinson.sizes) <= fisher.sentences).sum())
    if number < 2:
        return None
    sizes = hutchinson.sizes[:number]
    starts = np.cumsum(sizes) - sizes
    in_blocks = np.add.reduceat(fisher.values[: sizes.sum()], starts) / sizes[:, None]
    return {**whole(in_blocks - hutchinson.values[:number], sizes), "n": number}


def stops(total: int, first: int, target: float | None) -> list[int]:
    """Numbers of units after which to check the error: first, 2 first, 4 first, .., total; without a target only total.

    >>> stops(1000, 200, 0.01)
    [200, 400, 800, 1000]
    """
    numbers = []
    while target is not None and first < total:
        numbers.append(first)
        first *= 2
    return [*numbers, total]


def is_reached(values: np.ndarray, sizes: np.ndarray, target: float | None) -> bool:
    """Whether the relative standard error of the first column is at most `target`; always without a target."""
    if target is None:
        return True
    mean, error = mean_and_error(values[:, :1], sizes)
    return bool(error[0] <= target * abs(mean[0]))


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


def _device(model: MaskedLM) -> torch.device:
    return next(model.parameters()).device


def loss_name(truth: Truth | None) -> str:
    """Which loss a Hessian is of."""
    return "words of the text" if truth is None else "exact"


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


def _fisher_values(
    model: MaskedLM,
    contexts: Contexts,
    sampling: Sampling,
    truth: Truth | None,
    batch_size: int,
    partitions: Partitions,
    sentences: np.ndarray,
) -> Values:
    """Squared gradient norms at the measured positions of sentences (n,), averaged over their labels.

    A unit is a sentence. With `truth`, the two values are those of labels from f and of labels from P.
    """
    counts = sampling.counts(contexts)
    device = _device(model)
    for start in range(0, len(sentences), WINDOW):
        window = sentences[start : start + WINDOW]
        measured = measured_contexts(contexts, window, sampling)
        conditionals = None if truth is None else truth.window(contexts, int(window[0]), int(window[-1]) + 1, model)
        numbers = None if sampling.soft_labels else torch.from_numpy(label_numbers(contexts, measured, sampling)).to(device)
        for batch in contexts.batches(measured, batch_size):
            ghost = GhostNorms(model, *contexts.batch(batch, device))
            distributions = [ghost.f] if conditionals is None else [ghost.f, conditionals(batch)]
            sizes = None if sampling.plain_labels else residuals(ghost.f)
            sums = [torch.zeros(len(batch), len(partitions.names), dtype=torch.float64, device=device) for _ in distributions]
            if numbers is None:
                for word in range(ghost.f.shape[1]):
                    norms = partitions.stack(ghost(torch.full((len(batch),), word, device=device)))
                    sums = [total + p[:, word, None] * norms for total, p in zip(sums, distributions, strict=True)]
            else:
                for uniform in numbers[:, np.searchsorted(measured, batch)]:
                    # The same number for both: near f = P they draw the same label, so that the difference has less noise.
                    for index, p in enumerate(distributions):
                        words, weights = draw_words(p, uniform, sizes)
                        sums[index] = sums[index] + partitions.stack(ghost(words)) * weights[:, None] / sampling.draws
            sentence = contexts.sentence[batch]
            columns = partitions.columns(torch.stack(sums, 1).cpu().numpy())
            yield sentence, columns / counts[sentence, None, None], len(batch)


def draw_probe(model: MaskedLM, kind: str, seed: int, block: int, draw: int) -> list[torch.Tensor]:
    """The probe of a block and draw: one tensor per parameter of `measured_parameters`, a function of the key alone."""
    rng = keyed_rng(seed, f"hutchinson probes, {kind}", block, draw)
    parameters = list(measured_parameters(model).values())
    drawn = torch.cat([torch.from_numpy(PROBES[kind](rng, tuple(p.shape))).flatten() for p in parameters])
    pieces = drawn.to(parameters[0].device).to(parameters[0].dtype).split([p.numel() for p in parameters])  # one copy
    return [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]


def loss_gradients(
    model: MaskedLM, contexts: Contexts, batch: np.ndarray, weights: np.ndarray, conditionals: Distribution | None
) -> tuple[torch.Tensor, ...]:
    """The gradient of sum_c weights_c L_c over contexts `batch` (m,), with its graph; one tensor per measured parameter.

    Args:
        weights: (m,) float64.
        conditionals: P; None for the words of the text.
    """
    device = _device(model)
    if conditionals is None:
        labels = one_hot(torch.from_numpy(contexts.label[batch]).to(device), model.config.vocab_size)
    else:
        labels = conditionals(batch)
    log_f = torch.log_softmax(model(*contexts.batch(batch, device)), -1)  # (m, vocab_size)
    loss = -((torch.from_numpy(weights).to(device)[:, None] * labels).to(log_f.dtype) * log_f).sum()
    return torch.autograd.grad(loss, list(measured_parameters(model).values()), create_graph=True)


def _hutchinson_values(
    model: MaskedLM,
    contexts: Contexts,
    sampling: Sampling,
    truth: Truth | None,
    batch_size: int,
    partitions: Partitions,
    blocks: np.ndarray,
) -> Values:
    """v_p^T (H v)_p for each parameter p, averaged over the probes v of each block (n,) of sentences.

    Their sum over p is v^T H v; the expectation of each is the trace of p's own block of H. A unit is a block of sentences with
    probes of its own: the units are independent, and their spread includes the error of the probes and that of the sentences.
    """
    counts = sampling.counts(contexts)
    parameters = list(measured_parameters(model).values())
    for block in blocks.tolist():
        low = block * sampling.block_size
        high = min(low + sampling.block_size, len(counts))
        conditionals = None if truth is None else truth.window(contexts, low, high, model)
        measured = measured_contexts(contexts, range(low, high), sampling)
        forms = np.zeros((sampling.probe_num, len(parameters)))
        for batch in contexts.batches(measured, batch_size):
            weights = 1.0 / (counts[contexts.sentence[batch]] * (high - low))  # in the mean
            gradients = loss_gradients(model, contexts, batch, weights, conditionals)
            for draw in range(sampling.probe_num):
                probe = draw_probe(model, sampling.probe, sampling.seed, block, draw)
                retain_graph = draw + 1 < sampling.probe_num
                products = torch.autograd.grad(gradients, parameters, probe, retain_graph=retain_graph)
                form = torch.stack([(v * hv).sum(dtype=torch.float64) for v, hv in zip(probe, products, strict=True)])
                forms[draw] += form.cpu().numpy()
        yield np.array([block]), partitions.columns(forms.mean(0))[None, None], len(measured)


def check_plan(estimators: list[str], model: MaskedLM, contexts: Contexts, sampling: Sampling, source: Path | str = "") -> None:
    """Refuse what the estimators could not measure, before the first of them is; arguments as in `estimate_trace`."""
    check_length(contexts, model.config.max_position_embeddings, source)
    words = model.config.vocab_size
    if "fisher" in estimators and sampling.soft_labels and words > SOFT_WORDS:
        raise InputError(f"--soft-labels: a backward pass for each of {words} words; at most {SOFT_WORDS}, draw labels instead")
    sentences = len(sampling.counts(contexts))
    if sentences < 2:
        raise InputError("--nsamples: 1 sentence has no standard error; give 2 or more, or a longer --datafile")
    if "hutchinson" in estimators and sentences <= sampling.block_size:
        raise InputError(
            f"--block-size {sampling.block_size}: {sentences} sentences are one block, which has no standard error; give "
            f"{(sentences + 1) // 2} or less"
        )


def estimate_trace(
    estimator: str,
    model: MaskedLM,
    contexts: Contexts,
    sampling: Sampling,
    truth: Truth | None = None,
    batch_size: int = 128,
    ranks: Ranks | None = None,
    source: Path | str = "",
) -> Estimate:
    """The trace by "fisher" or "hutchinson", from sentences or blocks of them until the relative error is reached.

    Args:
        model: in eval mode, with eager attention.
        truth: P. Fisher takes labels from P too; Hutchinson's takes the words of the text without it.
        batch_size: contexts of one length per forward pass; the results do not depend on it.
        ranks: the processes that share the sentences; None for this one alone.
        source: the data file, for errors.
    """
    check_plan([estimator], model, contexts, sampling, source)
    words = model.config.vocab_size
    is_fisher = estimator == "fisher"
    ranks = ranks or Ranks()
    partitions = Partitions(model)
    counts = sampling.counts(contexts)
    target = sampling.target_relative_error
    starts = np.arange(0, len(counts), 1 if is_fisher else sampling.block_size)
    sizes = np.diff(starts, append=len(counts))
    labels = counts * (words if sampling.soft_labels else sampling.draws)
    draws = np.cumsum(labels if is_fisher else np.full(len(starts), sampling.probe_num))
    first = max(MIN_UNITS[estimator], 1 + int(np.searchsorted(draws, sampling.min_draws or MIN_DRAWS[estimator])))
    measure = _fisher_values if is_fisher else _hutchinson_values
    values = np.zeros((0, 2 if is_fisher and truth is not None else 1, len(partitions)))
    progress = Progress(desc=estimator, total=int(counts.sum()), unit="position", leave=False, disable=not ranks.is_main)
    for stop in stops(len(starts), first, target):
        start = len(values)
        values = np.concatenate([values, np.zeros((stop - start, *values.shape[1:]))])
        own = ranks.own(range(start, stop))
        for unit, columns, positions in measure(model, contexts, sampling, truth, batch_size, partitions, own):
            np.add.at(values, unit, columns)
            progress.update(positions * ranks.size)
        ranks.sum_on_host(values[start:])
        if is_reached(values[:, 0], sizes[:stop], target):
            break
    progress.close()
    sizes = sizes[: len(values)]
    true_values = values[:, 1] if values.shape[1] == 2 else None
    positions = int(counts[: sizes.sum()].sum())
    return Estimate(partitions, values[:, 0], sizes, positions, int(draws[len(values) - 1]), target, true_values)


def measure_trace(
    model: MaskedLM, inputs: Inputs, sampling: Sampling, estimator: str, batch_size: int, ranks: Ranks
) -> dict[str, dict[str, Any]]:
    """The trace at one model by "fisher", "hutchinson" or "both": fields of a record, by the name of the estimator.

    Fields of Hutchinson have Fisher's trace on the same sentences. Those of Fisher have Hutchinson's on (some of) the same
    sentences, with "both" or with true conditionals.
    """
    truth = inputs.truth
    contexts = inputs.contexts
    estimates: dict[str, Estimate] = {}
    results: dict[str, dict[str, Any]] = {}

    def run(name: str, sampling: Sampling) -> None:
        started = time.monotonic()
        estimate = estimate_trace(name, model, contexts, sampling, truth, batch_size, ranks, inputs.source)
        tensors = estimate.partitions.tensors(estimate.values)
        positions = int(contexts.lengths[: estimate.sentences].max())
        fields = estimate.described() | {"quantity": QUANTITIES[name]}
        if name == "hutchinson":
            fields["loss"] = loss_name(truth)
        fields |= flatness_fields(tensors, estimate.sizes, measured_parameters(model), positions, POSITIVE_ERRORS[name])
        estimates[name] = estimate
        results[name] = {**fields, "seconds": time.monotonic() - started}

    names = list(RECORDS) if estimator == "both" else [estimator]
    check_plan(names + ["fisher"] * (estimator == "hutchinson"), model, contexts, sampling, inputs.source)
    for name in names:
        run(name, sampling)
    sentences = estimates[names[0]].sentences
    if estimator == "fisher" and truth is not None and sentences > sampling.block_size:
        some = min(sentences, COMPARED)
        run("hutchinson", dataclasses.replace(sampling, nsamples=some, target_relative_error=None))
    elif estimator == "hutchinson":
        run("fisher", dataclasses.replace(sampling, nsamples=sentences, target_relative_error=None))
    if len(estimates) == 2:
        shared = difference(estimates["fisher"], estimates["hutchinson"])
        for name, other in (RECORDS, reversed(RECORDS)):
            compared = {key: results[other][key] for key in COMPARED_FIELDS if key in results[other]}
            results[name][other] = compared | ({"difference": shared} if shared else {})
    return {name: results[name] for name in names}


def _number(part: Any) -> str:
    return f"{part.value:.4f} +- {part.standard_error:.4f}"


def _other_text(name: str, other: OtherTrace | None, sentences: int) -> str:
    """A line on the trace in another way; empty for None. `sentences` are those of the record."""
    if other is None:
        return ""
    own = (other.model_extra or {}).get("sentences", sentences)
    fewer = f"on the first {own} of {sentences} sentences" if own < sentences else f"on the same {own} sentences"
    line = f"\n  {name}: {_number(other)} {fewer}"
    if gap := other.difference:
        line += (
            f"; Fisher minus {'Hutchinson' if name in QUANTITIES.values() else 'it'}, both on these sentences, {_number(gap)}"
        )
        line += ", more than two standard errors" * (abs(gap.value) > 2 * (gap.standard_error or 0))
    return line


def described_trace(record: HessianRecord) -> str:
    """The trace of a record made by `measure_trace`, its differences to others, and the flatness that needs no scale."""
    balanced: Any = record.balanced
    fields: dict[str, Any] = record.model_extra or {}
    sentences = int(fields.get("sentences", record.n))
    blocks = f" in {record.n} blocks" if record.n < sentences else ""
    loss = f", loss: {record.loss}" if record.loss else ""
    text = f"{record.quantity} {_number(record)} (mean over {sentences} sentences{blocks}{loss})"
    if not fields.get("target_reached", True):
        text += f"\n  relative error {fields['relative_error']:.2%} with all sentences; give a longer text or more draws"
    text += f"\n  balanced trace {f'not defined: {balanced.reason}' if balanced.reason else _number(balanced)}"
    text += f"; relative flatness R {_number(record.relative)}"
    if record.constant_share:
        text += f"; constant directions {record.constant_share.value:.1%} of the trace"
    others = {"labels drawn from the true conditionals": record.true_labels}
    others |= {QUANTITIES["hutchinson"]: record.hutchinson, QUANTITIES["fisher"]: record.fisher}
    return text + "".join(_other_text(name, other, sentences) for name, other in others.items())


def unmeasured(
    models: Places, inputs: Inputs, names: dict[str, str], settings: dict[str, Any], ranks: Ranks, overwrite: bool
) -> Iterator[tuple[Path, dict, MaskedLM]]:
    """Of each model without its records: the folder of the results, the inputs of a record, and the model.

    Args:
        names: file names of the records, by what they record.
    """
    for folder, weights, output in models:
        inputs.check(folder)
        described = {**inputs.described, "model": {"sha256": sha256(weights)}}
        measured = [is_measured(output, name, described, settings, overwrite) for name in names.values()]
        if not all(measured):
            model = load_model(folder, ranks.device, "eager", weights)
            use_threads(model.config.hidden_size)
            yield output, described, model
        elif ranks.is_main:
            print(f"{output}: {' and '.join(names)} measured already, skipped")


def measure_models(
    models: Places, inputs: Inputs, sampling: Sampling, estimator: str, batch_size: int, device: str, overwrite: bool
) -> None:
    """Measure the trace at each model: write hessian.json (or hessian_hutchinson.json, or both), and print it.

    Args:
        estimator: "fisher", "hutchinson" or "both".
    """
    files = RECORDS if estimator == "both" else {estimator: RECORDS[estimator]}
    settings = {"estimator": estimator, **sampling.described()}
    ranks = Ranks(device)
    names = {QUANTITIES[name]: file for name, file in files.items()}
    for output, described, model in unmeasured(models, inputs, names, settings, ranks, overwrite):
        results = measure_trace(model, inputs, sampling, estimator, batch_size, ranks)
        if not ranks.is_main:
            continue
        for name, fields in results.items():
            fields |= {"seeds": [sampling.seed], "inputs": described, "arguments": settings, "device": device}
            record = HessianRecord(estimator=name, unit="nats", **fields)
            write_record(output, files[name], record, number_file=True)
            print(f"{output}: {described_trace(record)}")
    ranks.close()
