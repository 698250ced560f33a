"""Features of a sentence for a downstream task, and the linear head on them.

The features are the vectors of all positions, concatenated, with zeros at padding (Liu et al. 2023, section 3: "concatenation
of the token representations"):

    hidden       [h_0; h_1; ...; h_{T+1}; 0; ...]          max_seq_length x hidden numbers
    conditional  [p(. | x_-1); ...; p(. | x_-T); 0; ...]   max_words x words numbers

with h the last hidden states ([CLS] and [SEP] included) and p the distribution of the word at a position given the rest:
a model's prediction (softmax over its whole vocabulary) or the language's own conditionals (a lookup table).
"""

import os

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from pcfg.artefacts import InputError
from pretraining.evaluation.contexts import Contexts

SENTENCES_A_BLOCK = 512  # of a lookup table held in memory at a time


def concatenate(vectors: torch.Tensor, mask: torch.Tensor | None, positions: int) -> torch.Tensor:
    """Rows of concatenated vectors.

    Args:
        vectors: (batch, length, d).
        mask: (batch, length), 0 at padding, whose vectors are replaced by zeros; None where nothing is padded.
        positions: width of the result in vectors, at least `length`.

    Returns:
        (batch, positions * d).

    >>> concatenate(torch.ones(1, 2, 2), torch.tensor([[1, 0]]), 3).tolist()
    [[1.0, 1.0, 0.0, 0.0, 0.0, 0.0]]
    """
    if mask is not None:
        vectors = vectors.masked_fill(mask[..., None] == 0, 0.0)
    return F.pad(vectors, (0, 0, 0, positions - vectors.shape[1])).flatten(1)


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


def _allocate(rows: int, width: int) -> torch.Tensor:
    """Zeros of shape (rows, width), float32.

    Raises:
        InputError: they are more than the machine's memory.
    """
    needed, memory = 4 * rows * width, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise InputError(
            f"the features of {rows:,} sentences need {needed / 2**30:.1f} GiB, the machine has {memory / 2**30:.1f} GiB; "
            "use fewer sentences, a smaller --max_seq_length or a smaller vocabulary"
        )
    return torch.zeros(rows, width)


@torch.inference_mode()
def hidden_features(model, contexts: Contexts, max_seq_length: int, batch_size: int = 512) -> torch.Tensor:
    """Last hidden states of whole (unmasked) sentences, concatenated.

    Args:
        model: a `MaskedLM` in eval mode.
        contexts: the sentences; only their `input_ids` and `lengths` are used.

    Returns:
        (sentences, max_seq_length * hidden) float32, on the CPU.
    """
    features = _allocate(len(contexts.lengths), max_seq_length * model.config.hidden_size)
    device = next(model.parameters()).device
    order = np.argsort(contexts.lengths, kind="stable")  # batches of like lengths: little is padded
    for start in tqdm(range(0, len(order), batch_size), desc="features", unit="batch", leave=False):
        chosen = order[start : start + batch_size]
        ids, mask = sentence_batch(contexts, chosen)
        hidden = model.encode(ids.to(device), mask.to(device))  # (batch, length, hidden)
        features[torch.from_numpy(chosen)] = concatenate(hidden, mask.to(device), max_seq_length).float().cpu()
    return features


def sentence_batch(contexts: Contexts, chosen: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Model inputs of whole sentences: ids and mask, (batch, length) int64 and bool, trimmed to the longest."""
    lengths = contexts.lengths[chosen]
    longest = int(lengths.max())
    mask = np.arange(longest) < lengths[:, None]
    return torch.from_numpy(contexts.input_ids[chosen, :longest]), torch.from_numpy(mask)


@torch.inference_mode()
def conditional_features(model, contexts: Contexts, max_words: int, batch_size: int = 512) -> torch.Tensor:
    """A model's predicted conditionals f(x_-t) at every word position t, over its whole vocabulary, concatenated.

    Returns:
        (sentences, max_words * vocab_size) float32 probabilities, on the CPU; zeros beyond a sentence's end.
    """
    size = model.config.vocab_size
    features = _allocate(len(contexts.lengths), max_words * size)
    by_position = features.view(len(features), max_words, size)
    device = next(model.parameters()).device
    for chosen in tqdm(list(contexts.batches(batch_size)), desc="conditionals", unit="batch", leave=False):
        probabilities = torch.softmax(model(*contexts.batch(chosen, device)).float(), -1).cpu()  # (m, vocab_size)
        word = torch.from_numpy(contexts.position[chosen] - 1)  # position 0 is [CLS]
        by_position[torch.from_numpy(contexts.sentence[chosen]), word] = probabilities
    return features


def table_features(table, max_words: int) -> torch.Tensor:
    """The true conditionals P(. | x_-t) of a `pcfg.lookup.LookupTable` at every position, concatenated.

    Returns:
        (sentences, max_words * words) float32 probabilities; zeros beyond a sentence's end.
    """
    lengths = np.asarray(table.lengths)
    size = len(table.words)
    features = _allocate(len(lengths), max_words * size)
    by_position = features.view(len(features), max_words, size)
    for low in range(0, len(lengths), SENTENCES_A_BLOCK):
        high = min(low + SENTENCES_A_BLOCK, len(lengths))
        sentence, word = np.nonzero(np.arange(max_words) < lengths[low:high, None])
        rows = torch.from_numpy(np.asarray(table.conditionals(low, high), np.float32))
        by_position[torch.from_numpy(sentence + low), torch.from_numpy(word)] = rows
    return features
