"""Pre-training loss against the true conditional probabilities, the entropy, and the gap between them.

    loss    L = E_{x,t}[ -sum_w P(w | x_-t) log f(x_-t)[w] ]       (Liu et al. 2023, section 2)
    entropy H = E_{x,t}[ -sum_w P(w | x_-t) log P(w | x_-t) ]
    gap     L - H = E_{x,t}[ KL(P(. | x_-t) || f(x_-t)) ] >= 0

All three are in nats. The expectation over x_t is exact; x_-t is x with the mask token at t. Each has two means:

    pairs      over all (sentence, position) pairs
    sentences  over sentences of the mean over positions, which training with one mask per sentence minimises

The sampled loss, E[ -log f(x_-t)[x_t] ], has the same expectation as L when P is the distribution of the text.

A lookup table may have some positions of each sentence only, drawn at random. The mean over them then takes the place of the
sentence's mean over all positions, and "pairs" weights it by the length of the sentence. Both standard errors include the
sampling of positions.

A lookup table made with --entropy-only has log P(x_t | x_-t) of the true word only. The gap is then the mean of
log P(x_t | x_-t) - log f(x_-t)[x_t], which has the same expectation and a larger error. The loss is the entropy plus the gap.

Computation: contexts of one length go through the encoder together, without padding, each distinct context once. Logits are
float32. Those of the words that can occur become float64, in which log f and the divergence are summed. The other words only
contribute to the normaliser, as a sum of exponentials in float32. That sum's relative error of 1e-7 changes log f by at most
1e-7 r, with r the probability that the model gives to these words. Since KL >= -log(1 - r) >= r, no divergence becomes
negative by it.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from pcfg.common.cli import Progress
from pcfg.common.files import keyed_rng
from pcfg.common.means import SentenceMeans
from pcfg.common.ranks import Ranks, map_on_cores
from pcfg.grammar import Grammar, find_rules
from pcfg.lookup import LookupTable
from pcfg.sampler import Sampler
from pretraining.data.contexts import Contexts, check_length, from_texts, table_columns
from pretraining.data.vocabulary import Vocabulary
from pretraining.evaluation.inputs import Inputs, Truth, model_label
from pretraining.evaluation.records import ComparisonRecord, LossRecord, Mean, is_measured, write_record
from pretraining.model.bert import MaskedLM
from pretraining.model.checkpoints import describe_model, load_model

RECORD = "loss.json"
BLOCK_WORDS = 2048  # words that never occur whose logits are in memory at a time: they fit into the cache of a CPU
# Numbers of the lookup table in memory at a time (float64: 64 MiB), and sentences, where no table bounds them.
WINDOW_NUMBERS = 1 << 23
WINDOW_SENTENCES = 4096


def _both_means(values: np.ndarray, contexts: Contexts) -> dict[str, dict[str, float]]:
    """Means and standard errors of values (M,), one per context, in nats; sentences are the clusters."""
    means = SentenceMeans().add(values, contexts.counts, contexts.stands_for)
    both = {"pairs": means.by_pairs(), "sentences": means.by_sentences()}
    return {name: {"mean": mean, "standard_error": error} for name, (mean, error) in both.items()}


class Decoder:
    """log f of the words that can occur: the tied decoder and the softmax over the whole vocabulary."""

    def __init__(self, model: MaskedLM, columns: np.ndarray):
        """`columns` (n,) int64 are the ids of the words that can occur."""
        weight = model.embeddings.words.weight
        bias = model.decoder_bias
        occurring = torch.from_numpy(columns).to(weight.device)
        others = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
        others[occurring] = False
        block = BLOCK_WORDS if weight.device.type == "cpu" else len(weight)
        with torch.no_grad():
            self.occurring = weight[occurring], bias[occurring]
            self.others = [(weight[words], bias[words]) for words in others.nonzero()[:, 0].split(block)]

    def log_probabilities(self, transformed: torch.Tensor) -> torch.Tensor:
        """log f, (m, n) float64 nats, from the transformed hidden states (m, hidden)."""
        logits = F.linear(transformed, *self.occurring).double()  # (m, n)
        parts = [logits.logsumexp(1)]
        for weight, bias in self.others:
            block = F.linear(transformed, weight, bias)
            largest = block.amax(1, keepdim=True)
            parts.append(block.sub_(largest).exp_().sum(1).double().log_() + largest[:, 0])
        return logits - torch.stack(parts, 1).logsumexp(1, keepdim=True)


def divergences(rows: torch.Tensor, log_f: torch.Tensor) -> torch.Tensor:
    """KL(P || f) = sum_w P(w) (log P(w) - log f(w)) of each row, nats.

    P is `rows`, (m, n) float64, each of sum 1; `log_f` is (m, n) float64. Returns (m,) float64, 0 or more up to rounding (1e-15
    per nat of log P).

    >>> p = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    >>> divergences(p, torch.tensor([[0.25, 0.25, 0.5]], dtype=torch.float64).log()).tolist()
    [0.6931471805599453]
    """
    return (torch.special.xlogy(rows, rows) - rows * log_f).sum(1)


def _batches(contexts: Contexts, inside: np.ndarray, size: int) -> Iterator[tuple]:
    """The contexts `inside` in batches of one length and at most `size` inputs, each distinct input once.

    Yields:
        input_ids (b, length) int64; flat (k,) int64, the distinct masked positions in them (indices into the flattened
        b * length); rows (m,) int64, the contexts; which (m,) int64, the entry of `flat` of each context.
    """
    lengths = contexts.lengths[contexts.sentence[inside]]
    for length in np.unique(lengths):
        of_length = inside[lengths == length]
        inputs, _, masked = contexts.batch(of_length, "cpu")  # no mask: nothing is padded
        ids = inputs.numpy()
        position = masked.numpy() % length
        as_bytes = np.ascontiguousarray(ids).view(np.dtype((np.void, ids.itemsize * int(length))))[:, 0]
        _, first, row = np.unique(as_bytes, return_index=True, return_inverse=True)
        order = np.argsort(row, kind="stable")
        starts = np.arange(0, len(first), size)
        ends = np.searchsorted(row[order], [*starts[1:], len(first)])
        for start, part in zip(starts, np.split(order, ends[:-1]), strict=True):
            flat, which = np.unique((row[part] - start) * length + position[part], return_inverse=True)
            yield torch.from_numpy(ids[first[start : start + size]]), torch.from_numpy(flat), of_length[part], which


def context_losses(
    model: MaskedLM,
    contexts: Contexts,
    truth: Truth | None = None,
    batch_size: int | None = None,
    source: Path | str = "",
    ranks: Ranks | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Losses of a model in eval mode at each of M contexts.

    Args:
        truth: of the same sentences; None for the plain MLM loss.
        batch_size: masked sentences per forward pass; None for 256 on a CPU, 8192 on a GPU.
        source: the data file, for errors.
        ranks: the processes that share the batches; None for this one alone. The result is the same on all, bit by bit.

    Returns:
        sampled: (M,) float64, -log f(x_-t)[x_t], nats.
        gap: (M,) float64, KL(P || f), nats; log P(x_t | x_-t) - log f(x_-t)[x_t] for a table of entropies only; None
            without a table.
    """
    check_length(contexts, model.config.max_position_embeddings, source)
    rank, size = (ranks.rank, ranks.size) if ranks else (0, 1)
    device = next(model.parameters()).device
    batch_size = batch_size or (256 if device.type == "cpu" else 8192)
    table = None if truth is None else truth.table
    columns = np.unique(contexts.label) if truth is None else truth.columns
    column = np.full(model.config.vocab_size, -1)
    column[columns] = np.arange(len(columns))
    label = column[contexts.label]
    decoder = Decoder(model, columns)
    is_exact = table is not None and table.stored != "none"
    sampled = np.zeros(len(label))
    gap = np.zeros(len(label))

    @torch.inference_mode()  # holds for one thread
    def measure(batch: tuple, conditionals: np.ndarray | None, first: int) -> int:
        """Fill in a batch's entries of `sampled` and `gap`; `conditionals` are P at the contexts from `first` on."""
        ids, flat, rows, which = batch
        hidden = model.encode(ids.to(device), None, flat.to(device))  # (k, hidden)
        log_f = decoder.log_probabilities(model.transform(hidden)).cpu()[which]  # (m, words)
        sampled[rows] = -log_f[np.arange(len(rows)), label[rows]].numpy()
        if conditionals is not None:
            gap[rows] = divergences(torch.from_numpy(conditionals[rows - first]), log_f).numpy()
        return len(rows)

    offsets = contexts.offsets
    sentences = len(contexts.lengths)
    window = max(1, min(WINDOW_SENTENCES, WINDOW_NUMBERS // (int(contexts.counts.max()) * len(columns))))
    with (
        Progress(total=len(label), desc="loss", unit="context", leave=False, disable=rank > 0) as progress,
        map_on_cores(device) as run,
    ):
        for low in range(0, sentences, window):
            high = min(low + window, sentences)
            batches = _batches(contexts, np.arange(offsets[low], offsets[high]), batch_size)
            own = itertools.islice(batches, rank, None, size)
            # (contexts of the window, words) float64
            conditionals = table.conditionals(low, high) if table is not None and is_exact else None
            for contexts_measured in run(partial(measure, conditionals=conditionals, first=offsets[low]), own):
                progress.update(contexts_measured * size)
    if ranks is not None:
        ranks.sum_on_host(sampled)
        ranks.sum_on_host(gap)
    if table is None:
        return sampled, None
    return sampled, gap if is_exact else table.log_true[: len(sampled)] + sampled


def measure_loss(
    model: MaskedLM,
    contexts: Contexts,
    truth: Truth | None = None,
    batch_size: int | None = None,
    source: Path | str = "",
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Loss, entropy and gap of a model: fields of a `LossRecord`, and "seconds"; arguments as in `context_losses`."""
    started = time.monotonic()
    sampled, gap = context_losses(model, contexts, truth, batch_size, source, ranks)
    fields: dict[str, Any] = {"sampled_loss": _both_means(sampled, contexts)}
    if truth is not None and gap is not None:
        entropy = truth.table.entropy[: len(sampled)]
        fields["loss"] = _both_means(entropy + gap, contexts)
        fields["entropy"] = _both_means(entropy, contexts)
        fields["gap"] = _both_means(gap, contexts)
        if truth.table.stored != "none":
            fields["sampled_minus_exact"] = _both_means(sampled - entropy - gap, contexts)
    return {**fields, "contexts": len(sampled), "sentences": len(contexts.lengths), "seconds": time.monotonic() - started}


def compare_losses(
    losses_a: tuple[np.ndarray, np.ndarray | None], losses_b: tuple[np.ndarray, np.ndarray | None], contexts: Contexts
) -> dict[str, Any]:
    """Difference of the losses of two models on the same contexts, a paired comparison: fields of a `ComparisonRecord`.

    The common part of the two losses cancels in the difference at each context, so that its standard error is far below
    theirs. With conditionals, it is the difference of the gaps, E[ sum_w P(w) (log f_B(w) - log f_A(w)) ].

    Args:
        losses_a, losses_b: results of `context_losses` for models A and B of one vocabulary.
    """
    (a, gap_a) = losses_a
    (b, gap_b) = losses_b
    name = "loss"
    if gap_a is not None and gap_b is not None:
        name = "gap"
        a = gap_a
        b = gap_b
    return {
        "difference": _both_means(a - b, contexts),
        f"{name}_a": _both_means(a, contexts),
        f"{name}_b": _both_means(b, contexts),
        "contexts": len(a),
        "sentences": len(contexts.lengths),
    }


def _number(mean: Mean, digits: int = 4) -> str:
    return f"{mean.mean:.{digits}f} +- {mean.standard_error:.{digits}f}"


def describe_loss(record: LossRecord, is_natural: bool = False) -> str:
    """One line of results, in nats; `is_natural` for those on natural text."""
    if record.loss is None or record.entropy is None or record.gap is None:
        reason = "; natural text, no exact entropy exists for this data" if is_natural else ""
        masked = record.sampled_loss
        return f"MLM loss {_number(masked.pairs)} (mean over pairs), {_number(masked.sentences)} (over sentences){reason}"
    means = {
        mean: f"loss {getattr(record.loss, mean).mean:.4f}, entropy {getattr(record.entropy, mean).mean:.4f}, "
        f"gap {_number(getattr(record.gap, mean))}"
        for mean in ("pairs", "sentences")
    }
    return f"{means['pairs']} (mean over pairs, as in loss.txt); {means['sentences']} (mean over sentences)"


def _common_fields(means: dict, inputs: Inputs, described: dict, device: str) -> dict[str, Any]:
    """Fields that the records of a loss and of a comparison share."""
    value = {"value": means["pairs"]["mean"], "standard_error": means["pairs"]["standard_error"], "unit": "nats"}
    return {**value, "n": len(inputs.contexts.lengths), "inputs": described, "arguments": inputs.arguments, "device": device}


def measure_models(
    models: list[tuple[Path, Path]], inputs: Inputs, device: str, batch_size: int | None, overwrite: bool
) -> None:
    """Measure the loss of each model: write loss.json and loss.txt, and print a line; `models`: with folders of records.

    The ranks of `torchrun` or `deepspeed` share the work; the main one writes and prints.
    """
    ranks = Ranks(device)
    for folder, output in models:
        inputs.check(folder)
        described = {**inputs.described, "model": describe_model(folder)}
        if is_measured(output, RECORD, described, inputs.arguments, overwrite):
            if ranks.is_main:
                print(f"{folder}: loss is measured already, skipped")
            continue
        model = load_model(folder, ranks.device)
        fields = measure_loss(model, inputs.contexts, inputs.truth, batch_size, inputs.source, ranks)
        if not ranks.is_main:
            continue
        means = fields.get("loss", fields["sampled_loss"])
        record = LossRecord(**fields, **_common_fields(means, inputs, described, device))
        write_record(output, RECORD, record, number_file=True)
        print(f"{folder}: {describe_loss(record, inputs.contexts.natural)}")
    ranks.close()


def compare_models(
    models: list[tuple[Path, Path]], reference: Path, inputs: Inputs, device: str, batch_size: int | None, overwrite: bool
) -> None:
    """Compare each model with the reference: write comparison_HASH.json, and print the difference; as `measure_models`.

    The reference is measured once, with the first model that needs it. Models of its own weights are skipped.
    """
    ranks = Ranks(device)
    report = print if ranks.is_main else lambda _: None
    inputs.check(reference)
    other = describe_model(reference)
    name = f"comparison_{other['sha256'][:12]}.json"

    def losses(folder: Path) -> tuple[np.ndarray, np.ndarray | None]:
        model = load_model(folder, ranks.device)
        return context_losses(model, inputs.contexts, inputs.truth, batch_size, inputs.source, ranks)

    reference_losses = None
    for folder, output in models:
        described = {**inputs.described, "model": describe_model(folder), "other": other}
        if described["model"] == other:
            same = "is the model to compare with" if folder.samefile(reference) else "has the same weights as that model"
            report(f"{folder}: {same}, skipped")
            continue
        inputs.check(folder)
        if is_measured(output, name, described, inputs.arguments, overwrite):
            report(f"{folder}: comparison with {reference} is measured already, skipped")
            continue
        reference_losses = losses(reference) if reference_losses is None else reference_losses
        started = time.monotonic()
        fields = compare_losses(losses(folder), reference_losses, inputs.contexts)
        if not ranks.is_main:
            continue
        fields["seconds"] = time.monotonic() - started
        fields["models"] = [model_label(folder), model_label(reference)]
        record = ComparisonRecord(**fields, **_common_fields(fields["difference"], inputs, described, device))
        write_record(output, name, record)
        quantity = "gap" if record.gap_a else "loss"
        for model, means in ((folder, record.gap_a or record.loss_a), (reference, record.gap_b or record.loss_b)):
            if means is not None:
                print(f"{model}: {quantity} {_number(means.pairs)} (pairs)")
        means = record.difference
        print(f"difference {_number(means.pairs, 6)} (pairs), {_number(means.sentences, 6)} (sentences)")
    ranks.close()


def gap_meter(
    rules: str, sentences: int, vocabulary: Vocabulary, max_tokens: int, seed: int
) -> Callable[[nn.Module], dict[str, float]]:
    """A function that measures the gap of a model in training, in nats by pairs and by sentences, with standard errors.

    The sentences are drawn from the grammar and are the same at each measurement: a function of the seed, in a random stream
    that no shard has. The model is left in training mode.

    Args:
        rules: the grammar's file, or a shipped one's name.
        max_tokens: of a sentence with [CLS] and [SEP].
    """
    path = find_rules(rules)
    grammar = Grammar.read(path)
    sampler = Sampler(grammar, max_tokens - 2)
    texts = sampler.texts(*sampler.sample(sentences, keyed_rng(seed, "gap sentences")))
    table = LookupTable.compute(grammar, texts, path)
    truth = Truth(table, table_columns(table, vocabulary, path))
    contexts = from_texts(texts, vocabulary, path)

    def measure(model: nn.Module) -> dict[str, float]:
        model.eval()
        gap = measure_loss(cast(MaskedLM, model), contexts, truth)["gap"]
        model.train()
        return {
            f"gap_{mean}{suffix}": gap[mean][key]
            for mean in ("pairs", "sentences")
            for key, suffix in (("mean", ""), ("standard_error", "_se"))
        }

    return measure
