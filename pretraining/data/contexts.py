"""The contexts that a masked language model is measured in: each sentence with one position masked, for every position."""

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F

from pcfg.common.files import InputError
from pcfg.lookup import MAKERS
from pretraining.data.sample_shards import DOCUMENTS, TEXT_ATTRIBUTE
from pretraining.data.samples import read_samples
from pretraining.data.vocabulary import Vocabulary
from pretraining.model.config import ModelConfig

MOST_PAIRS = 1 << 21  # of positions that look at each other, in a batch: 512 contexts of 64 tokens, 8 of 512


@dataclasses.dataclass
class Contexts:
    """Masked inputs, one masked position each, grouped by the sentence they come from.

    Args:
        input_ids: (sentences, length) int64, [CLS] words [SEP] and padding; not yet masked where `mask_id` is set.
        lengths: (sentences,) int64 tokens, [CLS] and [SEP] included.
        sentence: (M,) int64, the sentence of each context.
        position: (M,) int64, the position of its masked token in `input_ids`.
        label: (M,) int64, the id of the true word.
        mask_id: the id put at `position`; None where the file has its masks in it already (all masks of a sample at once).
        natural: whether they are of natural text, whose true conditionals nobody knows.
        stands_for: (sentences,) int64, how many positions the contexts of each sentence are a random choice of; None if they
            are all that there are.
    """

    input_ids: np.ndarray
    lengths: np.ndarray
    sentence: np.ndarray
    position: np.ndarray
    label: np.ndarray
    mask_id: int | None
    natural: bool = False
    stands_for: np.ndarray | None = None

    @property
    def counts(self) -> np.ndarray:
        """(sentences,) int64: contexts of each sentence."""
        return np.bincount(self.sentence, minlength=len(self.lengths))

    def batch(self, chosen: np.ndarray, device) -> tuple:
        """Model inputs for the contexts `chosen`, trimmed to the longest of them.

        Returns:
            input_ids (m, length) int64, input_mask (m, length) or None when nothing is padded, flat_positions (m,).
        """
        lengths = self.lengths[self.sentence[chosen]]
        longest = int(lengths.max())
        ids = self.input_ids[self.sentence[chosen], :longest].copy()  # (m, length)
        if self.mask_id is not None:
            ids[np.arange(len(chosen)), self.position[chosen]] = self.mask_id
        mask = None
        if lengths.min() < longest:
            mask = torch.from_numpy(np.arange(longest) < lengths[:, None]).to(device)
        flat = torch.from_numpy(np.arange(len(chosen)) * longest + self.position[chosen]).to(device)
        return torch.from_numpy(ids).to(device), mask, flat

    @property
    def offsets(self) -> np.ndarray:
        """(sentences + 1,) int64: the contexts of sentence i are offsets[i] .. offsets[i + 1] - 1."""
        return np.concatenate([[0], np.cumsum(self.counts)])

    def batches(self, chosen: np.ndarray, size: int) -> list[np.ndarray]:
        """The contexts `chosen`, in batches that are of one length each, so that nothing is padded.

        A batch has at most `size` of them; fewer where they are long, as attention takes memory by the square of the length.
        """
        lengths, batches = self.lengths[self.sentence[chosen]], []
        for length in np.unique(lengths).tolist():
            same, step = chosen[lengths == length], max(1, min(size, MOST_PAIRS // length**2))
            batches += [same[start : start + step] for start in range(0, len(same), step)]
        return batches


def from_texts(texts: list[str], vocabulary: Vocabulary, source, table=None) -> Contexts:
    """Every position of every sentence, masked alone: x_-t for all t.

    Args:
        table: a `pcfg.lookup.LookupTable` of the sentences; where it has some positions only, they are the contexts.

    Raises:
        InputError: the table is of other sentences.
    """
    tokens, words = vocabulary.encode(texts, source)
    sentences, longest = tokens.shape
    input_ids = np.full((sentences, longest + 2), vocabulary.pad_id, np.int64)
    input_ids[:, 0] = vocabulary.cls_id
    input_ids[:, 1:-1] = tokens
    input_ids[np.arange(sentences), words + 1] = vocabulary.sep_id
    words = words.astype(np.int64)
    if table is None or table.chosen is None:
        sentence, word = np.nonzero(np.arange(longest) < words[:, None])  # in the order of the text
    else:
        _check_lengths(table, words)
        sentence = np.repeat(np.arange(sentences), table.counts[:sentences])
        word = table.places[: len(sentence)]
    label = tokens[sentence, word].astype(np.int64)
    stands_for = words if table is not None and table.chosen is not None else None
    return Contexts(input_ids, words + 2, sentence, word + 1, label, vocabulary.mask_id, stands_for=stands_for)


def _check_lengths(table, words: np.ndarray) -> None:
    if not np.array_equal(np.asarray(table.lengths[: len(words)]), words):
        raise _others(table.source)


def table_columns(table, vocabulary, source) -> np.ndarray:
    """(words,) int64: the vocabulary id of each word of a lookup table."""
    missing = [word for word in table.words if word not in vocabulary.ids]
    if missing:
        raise InputError(f"{source}: word {missing[0]!r} is not in the vocabulary; it was made for another one")
    return np.array([vocabulary.ids[word] for word in table.words])


def check_words(table, contexts: Contexts, columns: np.ndarray, source) -> None:
    """Refuse a lookup table that does not begin with the sentences of the contexts.

    Args:
        columns: (words,) the vocabulary id of each word of the table.

    Raises:
        InputError: names the table.
    """
    if table.chosen is None and not np.array_equal(table.lengths[: len(contexts.lengths)], contexts.counts):
        raise _others(source)
    if not np.array_equal(columns[np.asarray(table.true_words[: len(contexts.label)])], contexts.label):
        raise _others(source)


def _others(source) -> InputError:
    return InputError(f"{source}: the lookup table is of other sentences; make one with {MAKERS}")


def from_samples(path, vocabulary: Vocabulary, max_sentences: int | None = None) -> Contexts:
    """The masked positions of (the first `max_sentences`) HDF5 samples, with the masks that are in the file.

    Raises:
        InputError: the samples were made with another vocabulary.
    """
    samples = read_samples(path)
    if samples.attributes.get("vocab_sha256") != vocabulary.sha256:
        raise InputError(f"{path}: was made with another vocabulary than the one given; make the samples again with it")
    positions = samples.masked_lm_positions[:max_sentences]
    sentence, slot = np.nonzero(positions)  # position 0 is [CLS] and stands for "none"
    return Contexts(
        samples.input_ids[:max_sentences].astype(np.int64),
        samples.input_mask[:max_sentences].sum(1, dtype=np.int64),
        sentence,
        positions[sentence, slot].astype(np.int64),
        samples.masked_lm_ids[sentence, slot].astype(np.int64),
        None,
        samples.attributes.get(TEXT_ATTRIBUTE) == DOCUMENTS,
    )


def check_length(contexts: Contexts, config: ModelConfig, source) -> None:
    """Refuse sentences that the model has no positions for.

    Raises:
        InputError: names the length needed.
    """
    longest = int(contexts.lengths.max())
    if longest > config.max_position_embeddings:
        raise InputError(
            f"{source}: its longest sentence has {longest} tokens with [CLS] and [SEP], the model has "
            f"{config.max_position_embeddings} positions; measure on shorter sentences"
        )


def sentence_batch(contexts: Contexts, chosen: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Model inputs of whole sentences: ids and mask, (batch, length) int64 and bool, trimmed to the longest."""
    lengths = contexts.lengths[chosen]
    longest = int(lengths.max())
    mask = np.arange(longest) < lengths[:, None]
    return torch.from_numpy(contexts.input_ids[chosen, :longest]), torch.from_numpy(mask)


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
