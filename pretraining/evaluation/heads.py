"""Features of a sentence for a downstream task, and the linear head on them.

The features are the vectors of all positions, concatenated, with zeros at padding (Liu et al. 2023, section 3: "concatenation
of the token representations"):

    hidden       [h_0; h_1; ...; h_{T+1}; 0; ...]          max_seq_length x hidden numbers
    conditional  [p(. | x_-1); ...; p(. | x_-T); 0; ...]   max_words x words numbers

with h the last hidden states ([CLS] and [SEP] included) and p the distribution of the word at a position given the rest:
a model's prediction (softmax over its whole vocabulary) or the language's own conditionals (a lookup table). Instead of
concatenating ("concat"), `pool` may take their mean over the positions that are not padding ("mean"), or h_0 alone ("cls").
"""

import os

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from pcfg.common.files import InputError
from pretraining.data.contexts import Contexts, concatenate

SENTENCES_A_BLOCK = 512  # of a lookup table held in memory at a time
# Of one encoder pass: more leave a CPU's cache (20% slower at 32,768), and a GPU wants more.
TOKENS_A_BATCH = {"cpu": 4096, "cuda": 65_536}
POOLS = ("concat", "mean", "cls")


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
    with torch.inference_mode(False):  # what inference mode makes can't be part of a training later
        return torch.zeros(rows, width)


def feature_width(pool: str, positions: int, size: int) -> int:
    """Numbers of one sentence's features: `positions` vectors of `size`, or one of them."""
    return positions * size if pool == "concat" else size


def _pooled(vectors: torch.Tensor, pool: str, positions: int) -> torch.Tensor:
    """(batch, length, size) vectors of sentences without padding -> (batch, feature_width(pool, positions, size))."""
    if pool == "mean":
        return vectors.mean(1)
    return vectors[:, 0] if pool == "cls" else concatenate(vectors, None, positions)


@torch.inference_mode()
def hidden_features(
    model, contexts: Contexts, positions: int, pool: str = "concat", tokens_a_batch: int | None = None
) -> torch.Tensor:
    """Last hidden states of whole (unmasked) sentences.

    A batch has sentences of one length, so that nothing is padded or masked, and a sentence that is there twice is computed
    once. float32 throughout: bfloat16 has 8 bits, and moves a probe's accuracy.

    Args:
        model: a `MaskedLM` in eval mode.
        contexts: the sentences; only their `input_ids` and `lengths` are used.
        positions: of the concatenated features, at least the longest length.
        pool: see the module.
        tokens_a_batch: as many sentences a batch as have about that many tokens; None for what suits the device.

    Returns:
        (sentences, feature_width(pool, positions, hidden)) float32, on the CPU.
    """
    width = feature_width(pool, positions, model.config.hidden_size)
    features = _allocate(len(contexts.lengths), width)
    device = next(model.parameters()).device
    tokens_a_batch = tokens_a_batch or TOKENS_A_BATCH[device.type]
    with tqdm(total=len(features), desc="features", unit="sentence", leave=False) as progress:
        for length in np.unique(contexts.lengths).tolist():
            rows = np.flatnonzero(contexts.lengths == length)
            distinct, inverse = np.unique(contexts.input_ids[rows, :length], axis=0, return_inverse=True)
            sentences = torch.from_numpy(distinct).split(max(1, tokens_a_batch // length))
            encoded = [_pooled(model.encode(ids.to(device)), pool, positions).float().cpu() for ids in sentences]
            features[torch.from_numpy(rows)] = torch.cat(encoded)[torch.from_numpy(inverse.ravel())]
            progress.update(len(rows))
    return features


def _put(features: torch.Tensor, sentence, word, vectors: torch.Tensor, counts, pool: str) -> None:
    """Put the vectors (m, size) of words `word` (m,) of sentences `sentence` (m,) into their features.

    Args:
        counts: (sentences,) words of each sentence.
    """
    rows = torch.from_numpy(sentence)
    if pool == "concat":
        features.view(len(features), -1, vectors.shape[1])[rows, torch.from_numpy(word)] = vectors
    else:
        features.index_add_(0, rows, vectors / torch.from_numpy(counts[sentence])[:, None])


@torch.inference_mode()
def conditional_features(
    model, contexts: Contexts, max_words: int, pool: str = "concat", batch_size: int = 512
) -> torch.Tensor:
    """A model's predicted conditionals f(x_-t) at every word position t, over its whole vocabulary, concatenated or their mean.

    Returns:
        (sentences, feature_width(pool, max_words, vocab_size)) float32 probabilities, on the CPU; concatenated, zeros beyond a
        sentence's end.
    """
    features = _allocate(len(contexts.lengths), feature_width(pool, max_words, model.config.vocab_size))
    device, counts = next(model.parameters()).device, contexts.counts
    for chosen in tqdm(
        list(contexts.batches(np.arange(len(contexts.label)), batch_size)), desc="conditionals", unit="batch", leave=False
    ):
        probabilities = torch.softmax(model(*contexts.batch(chosen, device)).float(), -1).cpu()  # (m, vocab_size)
        word = contexts.position[chosen] - 1  # position 0 is [CLS]
        _put(features, contexts.sentence[chosen], word, probabilities, counts, pool)
    return features


def table_features(table, max_words: int, pool: str = "concat", sentences: int | None = None) -> torch.Tensor:
    """The true conditionals P(. | x_-t) of a `pcfg.lookup.LookupTable` at every position, concatenated or their mean.

    Args:
        sentences: take the first ones of the table; all for None.

    Returns:
        (sentences, feature_width(pool, max_words, words)) float32 probabilities; concatenated, zeros beyond a sentence's end.
    """
    lengths = np.asarray(table.lengths[:sentences], np.int64)
    features = _allocate(len(lengths), feature_width(pool, max_words, len(table.words)))
    for low in range(0, len(lengths), SENTENCES_A_BLOCK):
        high = min(low + SENTENCES_A_BLOCK, len(lengths))
        sentence, word = np.nonzero(np.arange(max_words) < lengths[low:high, None])
        rows = torch.from_numpy(np.asarray(table.conditionals(low, high), np.float32))
        _put(features, sentence + low, word, rows, lengths, pool)
    return features
