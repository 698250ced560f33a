"""Pre-training loss against the true conditional probabilities, the entropy, and the gap between them.

    loss    L = E_{x,t}[ -sum_w P(w | x_-t) log f(x_-t)[w] ]       (Liu et al. 2023, section 2)
    entropy H = E_{x,t}[ -sum_w P(w | x_-t) log P(w | x_-t) ]
    gap     L - H = E_{x,t}[ KL(P(. | x_-t) || f(x_-t)) ] >= 0

all in nats, the expectation over x_t taken exactly, x_-t being x with the mask token at t. Two means are given. "pairs": over
all (sentence, position) pairs. "sentences": over sentences of the mean over positions; it is what one mask a sentence
minimises. The sampled loss, E[ -log f(x_-t)[x_t] ], has the same expectation when the conditionals belong to the text.

A table with some positions of each sentence, chosen by chance, is measured at these: a sentence's mean over them takes the
place of its mean over all, and the "pairs" weigh it by the sentence's length. Both errors hold what the choice adds.

A lookup table made with --entropy-only has log P(x_t | x_-t) for the true word only. The gap is then the mean of
log P(x_t | x_-t) - log f(x_-t)[x_t], which has the same expectation and a larger error, and the loss is the entropy plus
the gap.

How it is computed: contexts of one length go through the encoder together, so that nothing is padded, each different context
once. Logits are float32. Those of the words that can occur are taken to float64, where log f and the divergence are summed;
of all others only their share of the normaliser is needed, the sum of exp in float32. Its relative error of 1e-7 is one of the
probability r that the model gives to those words, and KL >= -log(1 - r) >= r: no divergence falls below 0 for it.
"""

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from pcfg.common.means import mean_by_pairs, mean_by_sentences
from pretraining.data.contexts import Contexts, check_length

BLOCK_WORDS = 2048  # words that never occur whose logits are in memory at a time: they stay in the processor's cache
# Numbers of the lookup table in memory at a time (float64: 64 MiB), and most sentences, where no table bounds them.
WINDOW_NUMBERS, WINDOW_SENTENCES = 1 << 23, 4096


def _both_means(values: np.ndarray, contexts: Contexts) -> dict:
    """Means and standard errors of per-context values, in nats; sentences are the clusters."""
    given = values, contexts.counts, contexts.stands_for
    means = {"pairs": mean_by_pairs(*given), "sentences": mean_by_sentences(*given)}
    return {name: {"mean": float(mean), "standard_error": float(error)} for name, (mean, error) in means.items()}


class Decoder:
    """log f of the words that can occur: the tied decoder and the softmax over the whole vocabulary.

    Args:
        model: a `MaskedLM`.
        columns: (n,) int64, the ids of the words that can occur.
    """

    def __init__(self, model, columns: np.ndarray):
        weight, bias = model.embeddings.words.weight, model.decoder_bias
        occurring = torch.from_numpy(columns).to(weight.device)
        others = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
        others[occurring] = False
        with torch.no_grad():
            self.occurring = weight[occurring], bias[occurring]
            self.others = [(weight[block], bias[block]) for block in others.nonzero()[:, 0].split(BLOCK_WORDS)]

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

    Args:
        rows: P, (m, n) float64, each row of sum 1.
        log_f: (m, n) float64.

    Returns:
        (m,) float64, 0 or more up to rounding (1e-15 for each nat of log P).

    >>> p = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    >>> divergences(p, torch.tensor([[0.25, 0.25, 0.5]], dtype=torch.float64).log()).tolist()
    [0.6931471805599453]
    """
    return (torch.special.xlogy(rows, rows) - rows * log_f).sum(1)


def _windows(contexts: Contexts, words: int) -> Iterator[tuple[int, int]]:
    """Ranges of sentences whose conditionals over `words` words fit into memory."""
    longest = int(contexts.counts.max())
    size = max(1, min(WINDOW_SENTENCES, WINDOW_NUMBERS // (longest * words)))
    for low in range(0, len(contexts.lengths), size):
        yield low, min(low + size, len(contexts.lengths))


def _batches(contexts: Contexts, inside: np.ndarray, size: int) -> Iterator[tuple]:
    """The contexts `inside` in batches of one length, each different input once.

    Args:
        size: inputs a batch.

    Yields:
        input_ids (b, length) int64, flat (k,) int64 the different masked positions in it (indices into the flattened
        b * length), chosen (m,) int64 the contexts, which (m,) int64 the entry of `flat` that each of them is.
    """
    lengths = contexts.lengths[contexts.sentence[inside]]
    for length in np.unique(lengths):
        of_length = inside[lengths == length]
        ids, _, flat = contexts.batch(of_length, "cpu")  # no mask: nothing is padded
        ids, position = ids.numpy(), flat.numpy() % length
        as_bytes = np.ascontiguousarray(ids).view(np.dtype((np.void, ids.itemsize * int(length))))[:, 0]
        _, first, row = np.unique(as_bytes, return_index=True, return_inverse=True)
        order = np.argsort(row, kind="stable")
        starts = np.arange(0, len(first), size)
        ends = np.searchsorted(row[order], [*starts[1:], len(first)])
        for start, part in zip(starts, np.split(order, ends[:-1]), strict=True):
            flat, which = np.unique((row[part] - start) * length + position[part], return_inverse=True)
            yield torch.from_numpy(ids[first[start : start + size]]), torch.from_numpy(flat), of_length[part], which


@contextlib.contextmanager
def _parallel_map(device: torch.device):
    """A `map` in threads, each with one core: small batches side by side are faster than each on all cores."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield map
        return
    try:
        # The choice of a kernel is the process's: a thread that leaves the model's own choice would undo that of the others.
        with (
            sdpa_kernel(SDPBackend.MATH),
            ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            yield pool.map
    finally:
        torch.set_num_threads(threads)  # threads that are started later take over what was set last


def context_losses(
    model, contexts: Contexts, table=None, columns=None, batch_size: int = 256, source=""
) -> tuple[np.ndarray, np.ndarray | None]:
    """What a model loses at each context.

    Args:
        model: a `MaskedLM` in eval mode.
        contexts: masked inputs.
        table: true conditionals of the same sentences (`pcfg.lookup.LookupTable`); None for the plain MLM loss.
        columns: (words,) the vocabulary id of each word of the table.
        batch_size: masked sentences a forward pass.
        source: the data file's name, for errors.

    Returns:
        sampled: (M,) float64, -log f(x_-t)[x_t], nats.
        gap: (M,) float64, KL(P || f), nats; log P(x_t | x_-t) - log f(x_-t)[x_t] for a table of entropies only; None
            without a table.

    Raises:
        InputError: sentences longer than the model's position table.
    """
    check_length(contexts, model.config, source)
    device, offsets = next(model.parameters()).device, contexts.offsets
    columns = np.unique(contexts.label) if columns is None else columns
    column = np.full(model.config.vocab_size, -1)
    column[columns] = np.arange(len(columns))
    label, decoder = column[contexts.label], Decoder(model, columns)
    exact = table is not None and table.stored != "none"
    sampled, gap = np.empty(len(label)), np.empty(len(label)) if table is not None else None

    @torch.inference_mode()  # of this thread
    def measure(batch: tuple, rows: np.ndarray | None, first: int) -> int:
        """Fill in a batch's entries of `sampled` and `gap`; `rows` are the conditionals of the contexts from `first` on."""
        ids, flat, chosen, which = batch
        hidden = model.encode(ids.to(device), None, flat.to(device)).squeeze(1)
        log_f = decoder.log_probabilities(model.transform(hidden)).cpu()[which]  # (m, words)
        sampled[chosen] = -log_f[np.arange(len(chosen)), label[chosen]].numpy()
        if exact:
            gap[chosen] = divergences(torch.from_numpy(rows[chosen - first]), log_f).numpy()
        return len(chosen)

    with tqdm(total=len(label), desc="loss", unit="context", leave=False) as progress, _parallel_map(device) as run:
        for low, high in _windows(contexts, len(columns)):
            batches = _batches(contexts, np.arange(offsets[low], offsets[high]), batch_size)
            rows = table.conditionals(low, high) if exact else None  # (contexts of the window, words) float64
            for done in run(partial(measure, rows=rows, first=offsets[low]), batches):
                progress.update(done)
    if table is not None and not exact:
        gap = table.log_true[: len(sampled)] + sampled
    return sampled, gap


def measure_loss(model, contexts: Contexts, table=None, columns=None, batch_size: int = 256, source="") -> dict:
    """Loss, entropy and gap of a model; arguments and errors as in `context_losses`.

    Returns:
        The details of a loss record: "sampled_loss" always; "loss", "entropy", "gap" and "sampled_minus_exact" with a table,
        each {"pairs": {"mean", "standard_error"}, "sentences": {...}} in nats; "contexts", "sentences", "seconds".
    """
    started = time.monotonic()
    sampled, gap = context_losses(model, contexts, table, columns, batch_size, source)
    details = {}
    if table is not None:
        entropy = np.asarray(table.entropy[: len(sampled)])
        parts = {"loss": entropy + gap, "entropy": entropy, "gap": gap}
        if table.stored != "none":
            parts["sampled_minus_exact"] = sampled - entropy - gap
        details = {name: _both_means(values, contexts) for name, values in parts.items()}
    details["sampled_loss"] = _both_means(sampled, contexts)
    return {**details, "contexts": len(sampled), "sentences": len(contexts.lengths), "seconds": time.monotonic() - started}


def compare_losses(models, contexts: Contexts, table=None, columns=None, batch_size: int = 256, source="") -> dict:
    """How far apart the losses of two models are, on the same contexts.

    What the sentences have in common cancels in each context's difference, so its standard error is far below that of the two
    losses (a paired comparison). With conditionals it is that of the gaps, E[ sum_w P(w) (log f_B(w) - log f_A(w)) ].

    Args:
        models: the two, A and B, of one vocabulary; for one that was measured before, what `context_losses` gave in its place.
            The rest as in `context_losses`.

    Returns:
        The details of a comparison record: "difference" of A's loss minus B's and "loss_a", "loss_b" (named "gap_a", "gap_b"
        with a table), each {"pairs": {"mean", "standard_error"}, "sentences": {...}} in nats; "contexts", "sentences",
        "seconds".
    """
    started = time.monotonic()
    losses = [
        model if isinstance(model, tuple) else context_losses(model, contexts, table, columns, batch_size, source)
        for model in models
    ]
    name, which = ("loss", 0) if table is None else ("gap", 1)
    a, b = (of_model[which] for of_model in losses)
    return {
        "difference": _both_means(a - b, contexts),
        f"{name}_a": _both_means(a, contexts),
        f"{name}_b": _both_means(b, contexts),
        "contexts": len(a),
        "sentences": len(contexts.lengths),
        "seconds": time.monotonic() - started,
    }
