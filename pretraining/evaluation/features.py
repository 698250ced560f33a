"""Frozen features of sentences for a linear probe.

The features are the vectors of all positions, concatenated, with zeros at padding (Liu et al. 2023, section 3: "concatenation
of the token representations"):

    hidden       [h_0; h_1; ...; h_{T+1}; 0; ...]          max_seq_length x hidden numbers
    conditional  [p(. | x_-1); ...; p(. | x_-T); 0; ...]   max_words x words numbers
    words        [1(x_1); ...; 1(x_T); 0; ...]             max_words x words numbers, those that occur in training

h are the hidden states ([CLS] and [SEP] included) after `layer` layers: 0 for the embeddings, by default the last ones, after
the final LayerNorm. p is the distribution of the word at a position given the rest: the prediction of a model (softmax over its
vocabulary), or the conditionals of the language itself (a lookup table). 1(x) is the one-hot vector of a word: the features of
no model, which show what a task needs no pre-training for. The pooling is "concat", or "mean" (over the positions that are not
padding), or "cls" (h_0 alone), or a number: the vector of the word at that position, from 1.
"""

import os

import numpy as np
import torch
from torch import Tensor

from pcfg.common.cli import Progress
from pcfg.common.files import InputError
from pcfg.lookup import LookupTable
from pretraining.data.contexts import Contexts, concatenate
from pretraining.model.bert import MaskedLM

FEATURES = ("hidden", "conditional", "words")
POOLS = ("concat", "mean", "cls")
Pool = str | int  # one of them, or the position of the one word that is read, from 1
BLOCK_SENTENCES = 512  # of a lookup table in memory at a time
# Per encoder pass: more do not fit into the cache of a CPU (20% slower at 32,768), and a GPU needs more.
BATCH_TOKENS = {"cpu": 4096, "cuda": 65_536}
BATCH_CONTEXTS = 512  # of predicted conditionals


def _allocate(rows: int, width: int) -> Tensor:
    """Zeros of shape (rows, width), float32, if they fit into memory."""
    needed = 4 * rows * width
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise InputError(
            f"the features of {rows:,} sentences need {needed / 2**30:.1f} GiB, the machine has {memory / 2**30:.1f} GiB; "
            "use fewer sentences, a smaller --max_seq_length or a smaller vocabulary"
        )
    with torch.inference_mode(False):  # an inference tensor could not be trained on
        return torch.zeros(rows, width)


def feature_width(pool: Pool, positions: int, size: int) -> int:
    """Numbers of one sentence's features: `positions` vectors of `size`, or one of them."""
    return positions * size if pool == "concat" else size


def check_position(pool: Pool, words: np.ndarray, source: object) -> None:
    """Refuse a position beyond the end of a sentence of `words` (n,) words."""
    if isinstance(pool, int) and pool > words.min():
        raise InputError(
            f"{source}: sentence {int(words.argmin()) + 1} has {words.min()} words; give --position {words.min()} or less"
        )


def _pooled(vectors: Tensor, pool: Pool, positions: int) -> Tensor:
    """(batch, length, size) vectors of sentences without padding -> (batch, feature_width(pool, positions, size))."""
    if pool == "mean":
        return vectors.mean(1)
    if pool == "concat":
        return concatenate(vectors, None, positions)
    return vectors[:, 0 if isinstance(pool, str) else pool]  # position 0 is [CLS]


@torch.inference_mode()
def hidden_features(
    model: MaskedLM, contexts: Contexts, positions: int, pool: Pool = "concat", layer: int | None = None
) -> Tensor:
    """Hidden states of whole (unmasked) sentences.

    A batch has sentences of one length, so that nothing is padded or masked; repeated sentences are computed once. All is
    float32: bfloat16, with its 8 bits, changes the accuracy of a probe.

    Args:
        contexts: the sentences; only their `input_ids` and `lengths` are used.
        positions: of the concatenated features, at least the longest length.
        layer: number of layers before the hidden states; None for all.

    Returns:
        (sentences, feature_width(pool, positions, hidden)) float32, on the CPU.
    """
    width = feature_width(pool, positions, model.config.hidden_size)
    features = _allocate(len(contexts.lengths), width)
    device = next(model.parameters()).device
    layers = len(model.layers)
    if layer is not None and not 0 <= layer <= layers:
        raise InputError(f"--layer {layer}: the model has {layers} layers; give 0 (embeddings) to {layers}")

    def encode(ids: Tensor) -> Tensor:
        if layer in (None, layers):
            return model.encode(ids)
        hidden = model.embeddings(ids, torch.arange(ids.shape[1], device=device))
        for module in model.layers[:layer]:
            hidden = module(hidden, [(*ids.shape, False)], None)
        return hidden

    with Progress(total=len(features), desc="features", unit="sentence", leave=False) as progress:
        for length in np.unique(contexts.lengths).tolist():
            rows = np.flatnonzero(contexts.lengths == length)
            distinct, inverse = np.unique(contexts.input_ids[rows, :length], axis=0, return_inverse=True)
            sentences = torch.from_numpy(distinct).split(max(1, BATCH_TOKENS.get(device.type, BATCH_TOKENS["cuda"]) // length))
            encoded = [_pooled(encode(ids.to(device)), pool, positions).float().cpu() for ids in sentences]
            features[torch.from_numpy(rows)] = torch.cat(encoded)[torch.from_numpy(inverse.ravel())]
            progress.update(len(rows))
    return features


def _put(features: Tensor, sentence: np.ndarray, word: np.ndarray, vectors: Tensor, counts: np.ndarray, pool: Pool) -> None:
    """Put the vectors (m, size) of words (m,) of sentences (m,) into their features; `counts` (sentences,) are of words."""
    rows = torch.from_numpy(sentence)
    if isinstance(pool, int):
        chosen = torch.from_numpy(word == pool - 1)
        features[rows[chosen]] = vectors[chosen]
    elif pool == "concat":
        features.view(len(features), -1, vectors.shape[1])[rows, torch.from_numpy(word)] = vectors
    else:
        features.index_add_(0, rows, vectors / torch.from_numpy(counts[sentence])[:, None])


@torch.inference_mode()
def conditional_features(model: MaskedLM, contexts: Contexts, max_words: int, pool: Pool = "concat") -> Tensor:
    """Conditionals f(x_-t) that a model predicts at every word position t, over its whole vocabulary; concatenated or the mean.

    Returns:
        (sentences, feature_width(pool, max_words, vocab_size)) float32, on the CPU; zeros beyond the end of a sentence.
    """
    features = _allocate(len(contexts.lengths), feature_width(pool, max_words, model.config.vocab_size))
    device = next(model.parameters()).device
    counts = contexts.counts
    batches = contexts.batches(np.arange(len(contexts.label)), BATCH_CONTEXTS)
    for batch in Progress(batches, desc="conditionals", unit="batch", leave=False):
        probabilities = torch.softmax(model(*contexts.batch(batch, device)).float(), -1).cpu()  # (m, vocab_size)
        word = contexts.position[batch] - 1  # position 0 is [CLS]
        _put(features, contexts.sentence[batch], word, probabilities, counts, pool)
    return features


def table_features(table: LookupTable, max_words: int, pool: Pool = "concat", sentences: int | None = None) -> Tensor:
    """The true conditionals P(. | x_-t) of the first `sentences` of a lookup table (None: all); concatenated or the mean.

    Returns:
        (sentences, feature_width(pool, max_words, words)) float32; zeros beyond the end of a sentence.
    """
    lengths = np.asarray(table.lengths[:sentences], np.int64)
    features = _allocate(len(lengths), feature_width(pool, max_words, len(table.words)))
    for low in range(0, len(lengths), BLOCK_SENTENCES):
        high = min(low + BLOCK_SENTENCES, len(lengths))
        sentence, word = np.nonzero(np.arange(max_words) < lengths[low:high, None])
        rows = torch.from_numpy(np.asarray(table.conditionals(low, high), np.float32))
        _put(features, sentence + low, word, rows, lengths, pool)
    return features


def word_features(parts: list[list[list[str]]], pool: Pool = "concat") -> list[Tensor]:
    """One-hot words of the sentences (lists of words) of the training and the validation part; by position, or the mean.

    Returns:
        (sentences, d) float32 of each part; the columns are those that occur in the training part: no head could use others.
    """
    by_position = pool == "concat"
    if isinstance(pool, int):
        parts = [[words[pool - 1 : pool] for words in part] for part in parts]
    keys = dict.fromkeys((by_position * t, word) for words in parts[0] for t, word in enumerate(words))
    column = {key: number for number, key in enumerate(keys)}
    features = [_allocate(len(part), len(column)) for part in parts]
    for part, rows in zip(parts, features, strict=True):
        for row, words in zip(rows.numpy(), part, strict=True):
            known = [column[key] for t, word in enumerate(words) if (key := (by_position * t, word)) in column]
            np.add.at(row, known, 1 / len(words) if pool == "mean" else 1)
    return features
