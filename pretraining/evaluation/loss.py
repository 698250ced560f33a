"""Pre-training loss against the true conditional probabilities, the entropy, and the gap between them.

    loss    L = E_{x,t}[ -sum_w P(w | x_-t) log f(x_-t)[w] ]       (Liu et al. 2023, section 2)
    entropy H = E_{x,t}[ -sum_w P(w | x_-t) log P(w | x_-t) ]
    gap     L - H = E_{x,t}[ KL(P(. | x_-t) || f(x_-t)) ] >= 0

all in nats, the expectation over x_t taken exactly, x_-t being x with the mask token at t. Two means are given. "pairs": over
all (sentence, position) pairs. "sentences": over sentences of the mean over positions; it is what one mask a sentence
minimises. The sampled loss, E[ -log f(x_-t)[x_t] ], has the same expectation when the conditionals belong to the text.

A lookup table made with --entropy-only has log P(x_t | x_-t) for the true word only. The gap is then the mean of
log P(x_t | x_-t) - log f(x_-t)[x_t], which has the same expectation and a larger error, and the loss is the entropy plus
the gap.
"""

import time

import numpy as np
import torch
from tqdm import tqdm

from pcfg.means import mean_by_pairs, mean_by_sentences
from pretraining.evaluation.contexts import Contexts, check_length


def _both_means(values: np.ndarray, counts: np.ndarray) -> dict:
    """Means and standard errors of per-context values, in nats; sentences are the clusters."""
    means = {"pairs": mean_by_pairs(values, counts), "sentences": mean_by_sentences(values, counts)}
    return {name: {"mean": float(mean), "standard_error": float(error)} for name, (mean, error) in means.items()}


def _kl_rows(table, columns, chosen, contexts: Contexts, log_f) -> np.ndarray:
    """KL(P || f) of the contexts `chosen`, (m,) float64 nats, summed where P > 0."""
    sentences = contexts.sentence[chosen]
    low, high = int(sentences.min()), int(sentences.max()) + 1
    rows = table.conditionals(low, high)[chosen - contexts.offsets[low]]  # (m, words) float64
    logs = np.log(rows, out=np.zeros_like(rows), where=rows > 0)
    return (rows * (logs - log_f[:, columns])).sum(1)


@torch.inference_mode()
def measure_loss(model, contexts: Contexts, table=None, columns=None, batch_size: int = 1024, source="") -> dict:
    """Loss, entropy and gap of a model.

    Args:
        model: a `MaskedLM` in eval mode.
        contexts: masked inputs.
        table: true conditionals of the same sentences (`pcfg.lookup.LookupTable`); None for the plain MLM loss.
        columns: (words,) the vocabulary id of each word of the table.
        batch_size: contexts a forward pass.
        source: the data file's name, for errors.

    Returns:
        The details of a loss record: "sampled_loss" always; "loss", "entropy", "gap" and "sampled_minus_exact" with a table,
        each {"pairs": {"mean", "standard_error"}, "sentences": {...}} in nats; "contexts", "sentences", "seconds".

    Raises:
        InputError: sentences longer than the model's position table.
    """
    check_length(contexts, model.config, source)
    started, device = time.monotonic(), next(model.parameters()).device
    contexts_of = contexts.counts
    sampled = np.empty(len(contexts.label))
    gap = np.empty(len(contexts.label))
    for chosen in tqdm(contexts.batches(batch_size), desc="loss", unit="batch", leave=False):
        ids, mask, flat = contexts.batch(chosen, device)
        # float64: log f enters differences that are a thousandth of its size
        log_f = torch.log_softmax(model(ids, mask, flat).double(), -1).cpu().numpy()  # (m, vocab_size)
        sampled[chosen] = -log_f[np.arange(len(chosen)), contexts.label[chosen]]
        if table is not None and table.stored == "none":
            gap[chosen] = table.log_true[chosen] + sampled[chosen]
        elif table is not None:
            gap[chosen] = _kl_rows(table, columns, chosen, contexts, log_f)
    details = {"sampled_loss": _both_means(sampled, contexts_of)}
    if table is not None:
        entropy = np.asarray(table.entropy[: len(sampled)])
        if table.stored != "none":
            details["sampled_minus_exact"] = _both_means(sampled - entropy - gap, contexts_of)
        details = {
            "loss": _both_means(entropy + gap, contexts_of),
            "entropy": _both_means(entropy, contexts_of),
            "gap": _both_means(gap, contexts_of),
            **details,
        }
    details |= {"contexts": len(sampled), "sentences": len(contexts_of), "seconds": time.monotonic() - started}
    return details
