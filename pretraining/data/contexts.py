"""The contexts in which a masked language model is measured: each sentence with one position masked, for every position."""

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F

from pcfg.common.files import AnyPath, InputError
from pcfg.lookup import MAKERS, LookupTable
from pretraining.data.masking import check_lengths
from pretraining.data.sample_shards import DOCUMENTS, TEXT_ATTRIBUTE
from pretraining.data.samples import read_samples
from pretraining.data.vocabulary import Vocabulary

MAX_PAIRS = 1 << 21  # of positions that attend to each other, per batch: 512 contexts of 64 tokens, 8 of 512


@dataclasses.dataclass
class Contexts:
    """Masked inputs, one masked position each, grouped by sentence."""

    input_ids: np.ndarray  # (sentences, length) int64, [CLS] words [SEP] and padding; not yet masked if `mask_id` is set
    lengths: np.ndarray  # (sentences,) int64 tokens, [CLS] and [SEP] included
    sentence: np.ndarray  # (M,) int64, the sentence of each context
    position: np.ndarray  # (M,) int64, the position of its masked token in `input_ids`
    label: np.ndarray  # (M,) int64, the id of the true word
    mask_id: int | None  # the id put at `position`; None if `input_ids` has its masks already (all masks of a sample at once)
    natural: bool = False  # whether the text is natural, with unknown true conditionals
    # stands_for: (sentences,) int64, number of positions from which the contexts of each sentence were drawn; None if they are
    # all positions
    stands_for: np.ndarray | None = None

    @property
    def counts(self) -> np.ndarray:
        """(sentences,) int64: contexts of each sentence."""
        return np.bincount(self.sentence, minlength=len(self.lengths))

    @property
    def offsets(self) -> np.ndarray:
        """(sentences + 1,) int64: the contexts of sentence i are offsets[i] .. offsets[i + 1] - 1."""
        return np.concatenate([[0], np.cumsum(self.counts)])

    def batch(self, rows: np.ndarray, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Model inputs for the contexts `rows`, trimmed to the longest: input_ids (m, length) int64, flat positions (m,).

        Between them is input_mask (m, length), or None when nothing is padded.
        """
        lengths = self.lengths[self.sentence[rows]]
        longest = int(lengths.max())
        ids = self.input_ids[self.sentence[rows], :longest].copy()  # (m, length)
        if self.mask_id is not None:
            ids[np.arange(len(rows)), self.position[rows]] = self.mask_id
        mask = None
        if lengths.min() < longest:
            mask = torch.from_numpy(np.arange(longest) < lengths[:, None]).to(device)
        flat = torch.from_numpy(np.arange(len(rows)) * longest + self.position[rows]).to(device)
        return torch.from_numpy(ids).to(device), mask, flat

    def batches(self, rows: np.ndarray, size: int) -> list[np.ndarray]:
        """The contexts `rows` in batches of one length each, so that nothing is padded.

        A batch has at most `size` contexts; long ones fewer, as attention takes memory by the square of the length.
        """
        lengths = self.lengths[self.sentence[rows]]
        batches: list[np.ndarray] = []
        for length in np.unique(lengths).tolist():
            same = rows[lengths == length]
            step = max(1, min(size, MAX_PAIRS // length**2))
            batches += [same[start : start + step] for start in range(0, len(same), step)]
        return batches


def from_texts(texts: list[str], vocabulary: Vocabulary, source: object, table: LookupTable | None = None) -> Contexts:
    """Every position of every sentence, masked alone: x_-t for all t; with a table of some positions, only these."""
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
        if not np.array_equal(np.asarray(table.lengths[:sentences]), words):
            raise _other_sentences(table.source)
        sentence = np.repeat(np.arange(sentences), table.counts[:sentences])
        word = table.places[: len(sentence)]
    label = tokens[sentence, word].astype(np.int64)
    stands_for = words if table is not None and table.chosen is not None else None
    return Contexts(input_ids, words + 2, sentence, word + 1, label, vocabulary.mask_id, stands_for=stands_for)


def table_columns(table: LookupTable, vocabulary: Vocabulary, source: object) -> np.ndarray:
    """(words,) int64: the vocabulary id of each word of a lookup table."""
    if missing := [word for word in table.words if word not in vocabulary.ids]:
        raise InputError(f"{source}: word {missing[0]!r} is not in the vocabulary; give the vocabulary of the table")
    return np.array([vocabulary.ids[word] for word in table.words])


def check_words(table: LookupTable, contexts: Contexts, columns: np.ndarray, source: object) -> None:
    """Refuse a table that does not begin with the sentences of the contexts; `columns`: as from `table_columns`."""
    if table.chosen is None and not np.array_equal(table.lengths[: len(contexts.lengths)], contexts.counts):
        raise _other_sentences(source)
    if not np.array_equal(columns[np.asarray(table.true_words[: len(contexts.label)])], contexts.label):
        raise _other_sentences(source)


def _other_sentences(source: object) -> InputError:
    return InputError(f"{source}: the lookup table is of other sentences; make one with {MAKERS}")


def from_samples(path: AnyPath, vocabulary: Vocabulary, max_sentences: int | None = None) -> Contexts:
    """The masked positions of (the first `max_sentences`) HDF5 samples, with the masks of the file."""
    samples = read_samples(path, vocabulary)
    if samples.attributes.get("vocab_sha256") != vocabulary.sha256:
        raise InputError(f"{path}: made with another vocabulary than --vocabfile; give its own, or make the samples again")
    samples.check_vocabulary(vocabulary, path)  # files of other programs say nothing of their vocabulary
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


def check_length(contexts: Contexts, positions: int, source: object) -> None:
    """Refuse sentences that are longer than the positions of the model."""
    check_lengths(contexts.lengths - 2, positions, source, "max_position_embeddings")


def sentence_batch(contexts: Contexts, sentences: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Model inputs of whole sentences: ids and mask, (batch, length) int64 and bool, trimmed to the longest."""
    lengths = contexts.lengths[sentences]
    longest = int(lengths.max())
    mask = np.arange(longest) < lengths[:, None]
    return torch.from_numpy(contexts.input_ids[sentences, :longest]), torch.from_numpy(mask)


def concatenate(vectors: torch.Tensor, mask: torch.Tensor | None, positions: int) -> torch.Tensor:
    """The vectors (batch, length, d) of each row, one after the other, and zeros: (batch, positions * d).

    `mask` (batch, length) is 0 at padding, whose vectors become zeros; None without padding.

    >>> concatenate(torch.ones(1, 2, 2), torch.tensor([[1, 0]]), 3).tolist()
    [[1.0, 1.0, 0.0, 0.0, 0.0, 0.0]]
    """
    if mask is not None:
        vectors = vectors.masked_fill(mask[..., None] == 0, 0.0)
    return F.pad(vectors, (0, 0, 0, positions - vectors.shape[1])).flatten(1)
