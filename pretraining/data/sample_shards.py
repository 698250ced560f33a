"""From text shards to shards of masked samples: what has to be made, and the making of one text shard's samples.

Text shard i with `dup_factor` d gives the sample shards k = i * d + j, j = 0..d-1: the same sentences, other masks. A sample
shard is a pure function of (text shard, vocabulary, masking rule, seed, split, k).

A text is of one of two kinds. Sentences of a known language: each is a sample, a word is a token, and what doesn't fit is an
error. Documents, natural text: the tokenizer splits words into pieces, and `pretraining.data.packing` packs a document's
sentences into samples, for each k in a way of its own if there are short ones.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from pcfg.common.files import InputError, Manifest, check_file, keyed_rng, read_json, sha256, versions
from pcfg.common.text import TEXT_MANIFEST, shard_paths, text_blocks
from pretraining.data.masking import MaskingRule, check_lengths, mask_sentences
from pretraining.data.packing import pack
from pretraining.data.piece_encoder import BLOCK_BYTES, PieceEncoder
from pretraining.data.samples import ROWS_PER_CHUNK, Samples, sample_name, sample_paths, write_samples
from pretraining.data.vocabulary import Vocabulary

SPLITS = {"training": "train", "test": "test"}  # of text files -> of sample files
ROWS_PER_BLOCK = 4 * ROWS_PER_CHUNK  # samples that are in memory at once, uncompressed
TEXT_ATTRIBUTE, DOCUMENTS = "text", "documents"  # an attribute of samples that were packed, and its value


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What decides the bytes of all sample shards, the text aside.

    Attributes:
        vocabulary: words and ids.
        do_lower_case: whether the tokenizer lower-cases; it then must not change any word of the data.
        max_seq_length: tokens of a sample, [CLS], [SEP] and padding included.
        dup_factor: sample shards of each text shard.
        rule: how words are masked.
        seed: of all that is drawn.
        documents: whether the text is of documents; a line is a sentence, and an empty line ends one.
        short_seq_prob: share of short samples of documents.
    """

    vocabulary: Vocabulary
    do_lower_case: bool
    max_seq_length: int
    dup_factor: int
    rule: MaskingRule
    seed: int
    documents: bool = False
    short_seq_prob: float = 0.0

    def facts(self) -> dict:
        """The recipe as plain values, for manifests and file attributes."""
        packing = {TEXT_ATTRIBUTE: DOCUMENTS, "short_seq_prob": self.short_seq_prob} if self.documents else {}
        return {
            "vocab_sha256": self.vocabulary.sha256,
            "vocab_size": self.vocabulary.size,
            "do_lower_case": self.do_lower_case,
            "max_seq_length": self.max_seq_length,
            "dup_factor": self.dup_factor,
            **self.rule.facts(),
            "seed": self.seed,
            **packing,
        }


@dataclasses.dataclass(frozen=True)
class TextShard:
    """A text shard, its SHA-256 and the sample shards to be made of it.

    Attributes:
        path: the text file.
        sha256: of its bytes.
        split: "train" or "test".
        numbers: numbers k of the sample shards that are wanted.
    """

    path: Path
    sha256: str
    split: str
    numbers: tuple[int, ...]


def is_of_documents(folder) -> bool:
    """Whether the text in `folder` is natural: documents of sentences, as its manifest says."""
    path = Path(folder) / TEXT_MANIFEST
    made_from = read_json(path).get("made_from") if path.is_file() else None
    return isinstance(made_from, dict) and made_from.get("source") == "corpus"


def find_text_shards(folder, dup_factor: int) -> list[TextShard]:
    """All text shards of a folder, checked against the manifest of generate_pretraining.py if there is one.

    Raises:
        InputError: no text shards, or one that is not what the manifest says.
    """
    found = [(split, path) for split in SPLITS for path in shard_paths(folder, split)]
    if not found:
        raise InputError(f"{folder}: no training{{i}}.txt or test{{i}}.txt; make text with generate_pretraining.py first")
    manifest_path = Path(folder) / TEXT_MANIFEST
    manifest = Manifest.read(manifest_path) if manifest_path.exists() else None
    if manifest is None:
        print(f"{manifest_path}: not there, so the text is taken as it is")

    shards = []
    for split, path in tqdm(found, desc="checking text", unit="file"):
        if manifest is not None:
            check_file(path, manifest_path, manifest.content, "run generate_pretraining.py again")
        first = int(path.stem.removeprefix(split)) * dup_factor
        digest = sha256(path) if manifest is None else manifest.entry(path.name)["sha256"]
        shards.append(TextShard(path, digest, SPLITS[split], tuple(range(first, first + dup_factor))))
    return shards


def missing_shards(shards: list[TextShard], manifest: Manifest, overwrite: bool) -> list[TextShard]:
    """The text shards with those of their sample shards that are not on disk, complete and made from this very text.

    With `overwrite`, sample files that no text shard asks for are removed: readers would take them for part of the set.

    Raises:
        InputError: without `overwrite`, a sample shard was made from other text, or a file is of another set.
    """
    _handle_strangers(shards, manifest, overwrite)
    remaining = []
    for shard in tqdm(shards, desc="checking samples", unit="file"):
        wanted = []
        for number in shard.numbers:
            name = sample_name(shard.split, number)
            listed = manifest.entry(name)["source_sha256"] if name in manifest.names() else shard.sha256
            if listed != shard.sha256 and not overwrite:
                raise InputError(
                    f"{manifest.path.parent / name}: was made from another {shard.path.name} (sha256 {listed[:12]}, now "
                    f"{shard.sha256[:12]}); give another folder, or --overwrite to replace it"
                )
            if listed != shard.sha256 or not manifest.is_complete(name):
                wanted.append(number)
        if wanted:
            remaining.append(dataclasses.replace(shard, numbers=tuple(wanted)))
    return remaining


def _handle_strangers(shards: list[TextShard], manifest: Manifest, overwrite: bool) -> None:
    """Remove (`overwrite`) or refuse sample files in the folder that neither the text shards nor the manifest know."""
    known = {sample_name(shard.split, number) for shard in shards for number in shard.numbers} | set(manifest.names())
    for path in (path for split in SPLITS.values() for path in sample_paths(manifest.path.parent, split)):
        if path.name in known:
            continue
        if not overwrite:
            raise InputError(f"{path}: a sample file of another set; remove it, or give --overwrite to have it removed")
        path.unlink()
        print(f"{path}: removed, it belonged to another set")


@dataclasses.dataclass(frozen=True)
class SampleJob:
    """The work of one process: the sample shards of one text shard.

    Attributes:
        shard: the text and the numbers of the sample shards.
        recipe: how they are made.
        changed_words: the words of the vocabulary that the tokenizer would split or change.
        folder: where the samples go.
    """

    shard: TextShard
    recipe: Recipe
    changed_words: frozenset[str]
    folder: Path


def make_samples(job: SampleJob) -> dict[str, dict]:
    """Write the sample shards of one text shard.

    Returns:
        For each file written, by name: its number of "samples"; of documents also its "tokens", those that are "unknown" and
        the "cut_sentences".

    Raises:
        InputError: the text can't be read; of sentences one is too long, or a word of one is not one token.
    """
    shard, recipe = job.shard, job.recipe
    flat, lines = (_encode_documents if recipe.documents else _encode_sentences)(job)
    counts = {}
    if recipe.documents:
        unknown, cut = (flat == recipe.vocabulary.unk_id).sum(), (lines > recipe.max_seq_length - 2).sum()
        counts = {"tokens": len(flat), "unknown": int(unknown), "cut_sentences": int(cut)}
    else:
        check_lengths(lines, recipe.max_seq_length, shard.path)
    made = {}
    for number in shard.numbers:
        name, lengths = sample_name(shard.split, number), lines
        if recipe.documents:
            rng = keyed_rng(recipe.seed, f"packing-{shard.split}", number)
            lengths = pack(lines, recipe.max_seq_length - 2, recipe.short_seq_prob, rng)
        write_samples(job.folder / name, _masked_blocks(flat, lengths, shard, recipe, number))
        made[name] = {"samples": len(lengths), **counts}
    return made


def _encode_documents(job: SampleJob) -> tuple[np.ndarray, np.ndarray]:
    """The text as ids of pieces (M,) int32, line after line, and the pieces of each line, (n,) int32, `BLANK` for an empty one.

    Raises:
        InputError: the text can't be read, or has nothing that is a token.
    """
    path, recipe = job.shard.path, job.recipe
    encoder = PieceEncoder(recipe.vocabulary, recipe.do_lower_case)
    flat, lines = zip(*map(encoder.encode, text_blocks(path, BLOCK_BYTES)), strict=True)
    if not any(map(len, flat)):
        raise InputError(f"{path}: no token in it for the tokenizer; remove the file")
    return np.concatenate(flat), np.concatenate(lines)


def _encode_sentences(job: SampleJob) -> tuple[np.ndarray, np.ndarray]:
    """The text as ids (M,) int32, sentence after sentence, and the words of each sentence, (n,) int32."""
    path, vocabulary = job.shard.path, job.recipe.vocabulary
    flat, lengths, sentences = [], [], 0
    for block in text_blocks(path):
        ids, words = vocabulary.encode_text(block, path, sentences)
        if job.changed_words:
            _refuse_changed(ids, job)
        flat.append(ids)
        lengths.append(words)
        sentences += len(words)
    return np.concatenate(flat), np.concatenate(lengths)


def _refuse_changed(flat: np.ndarray, job: SampleJob) -> None:
    """Raise an `InputError` if a word of the text is one that the tokenizer would split or change."""
    words = job.recipe.vocabulary.words
    changed = [words[index] for index in np.flatnonzero(np.bincount(flat)) if words[index] in job.changed_words]
    if changed:
        raise InputError(
            f"{job.shard.path}: word {changed[0]!r} is not one token: the tokenizer would split or change it "
            f"(--do_lower_case {int(job.recipe.do_lower_case)}); {len(changed)} such words; replace them or use another "
            "--do_lower_case"
        )


def _masked_blocks(flat: np.ndarray, lengths: np.ndarray, shard: TextShard, recipe: Recipe, number: int) -> Iterator[Samples]:
    """The samples of sample shard `number`, `ROWS_PER_BLOCK` at a time."""
    rng = keyed_rng(recipe.seed, f"masking-{shard.split}", number)
    attributes = {
        **recipe.facts(),
        "source": shard.path.name,
        "source_sha256": shard.sha256,
        "split": shard.split,
        "shard": number,
        **{f"version_{package}": version for package, version in versions("numpy", "h5py").items()},
        "version_hdf5": h5py.version.hdf5_version,
    }
    place = 0
    for first in range(0, len(lengths), ROWS_PER_BLOCK):
        words = lengths[first : first + ROWS_PER_BLOCK]
        ids = flat[place : place + words.sum()]
        place += len(ids)
        samples = mask_sentences(ids, words, recipe.vocabulary, recipe.rule, recipe.max_seq_length, rng, shard.path)
        samples.attributes = attributes
        yield samples
