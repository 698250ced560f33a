"""From text shards to shards of masked samples, with the tokenizer that they were made with.

Text shard i with `dup_factor` d gives the sample shards k = i * d + j, j = 0..d-1: the same sentences, other masks. A sample
shard is a pure function of (text shard, vocabulary, masking rule, seed, split, k).

A text is of one of two kinds. Sentences of a known language: each is a sample, a word is a token, and anything else is an
error. Documents, natural text: the tokenizer splits words into pieces, and `pack` packs a document's sentences into samples,
differently for each k if there are short ones.
"""

import argparse
import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import h5py
import numba
import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from pcfg.common.executors import executor_options, run_jobs
from pcfg.common.files import AnyPath, InputError, Manifest, atomic_folder, check_file, keyed_rng, read_json, sha256, versions
from pcfg.common.text import SPLITS, TEXT_MANIFEST, shard_paths, text_blocks
from pretraining.data.masking import MaskingRule, check_lengths, mask_sentences
from pretraining.data.piece_encoder import BLOCK_BYTES, PieceEncoder
from pretraining.data.samples import ROWS_PER_CHUNK, SAMPLES_MANIFEST, Samples, sample_name, sample_paths, write_samples
from pretraining.data.vocabulary import TOKENIZER_FILES, Vocabulary, find_vocabulary
from pretraining.data.wordpiece import check_same_tokenizer, find_own_tokenizer, wordpiece, write_tokenizer

SAMPLE_SPLITS = {split: split.removesuffix("ing") for split in SPLITS}  # of text files -> of sample files: train, test
ROWS_PER_BLOCK = 4 * ROWS_PER_CHUNK  # samples that are in memory at the same time, uncompressed
TEXT_ATTRIBUTE = "text"  # an attribute of packed samples, with the value `DOCUMENTS`
DOCUMENTS = "documents"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything apart from the text that decides the bytes of all sample shards."""

    vocabulary: Vocabulary  # words and ids
    do_lower_case: bool  # whether the tokenizer lower-cases; it then must not change any word of the data
    max_seq_length: int  # tokens per sample, [CLS], [SEP] and padding included
    dup_factor: int  # sample shards per text shard
    rule: MaskingRule  # how words are masked
    seed: int  # of all random numbers
    documents: bool = False  # whether the text is of documents; a line is a sentence, and an empty line ends a document
    short_seq_prob: float = 0.0  # share of short samples of documents

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
    """A text file, its SHA-256 and the numbers k of its sample shards."""

    path: Path
    sha256: str
    split: str  # "train" or "test"
    numbers: tuple[int, ...]


def is_of_documents(folder: AnyPath) -> bool:
    """Whether the text in `folder` is natural, documents of sentences, according to its manifest."""
    path = Path(folder) / TEXT_MANIFEST
    made_from = read_json(path).get("made_from") if path.is_file() else None
    return isinstance(made_from, dict) and made_from.get("source") == "corpus"


def find_text_shards(folder: AnyPath, dup_factor: int) -> list[TextShard]:
    """All text shards of a folder, checked against the manifest of generate_pretraining.py if there is one."""
    paths = [(split, path) for split in SPLITS for path in shard_paths(folder, split)]
    if not paths:
        raise InputError(f"{folder}: no training{{i}}.txt or test{{i}}.txt; make text with generate_pretraining.py first")
    manifest_path = Path(folder) / TEXT_MANIFEST
    manifest = Manifest.read(manifest_path) if manifest_path.exists() else None
    if manifest is None:
        print(f"{manifest_path}: not there, so the text is used as it is")

    shards = []
    for split, path in tqdm(paths, desc="checking text", unit="file"):
        if manifest is not None:
            check_file(path, manifest_path, manifest.content, "run generate_pretraining.py again")
        first = int(path.stem.removeprefix(split)) * dup_factor
        digest = sha256(path) if manifest is None else manifest.entry(path.name)["sha256"]
        shards.append(TextShard(path, digest, SAMPLE_SPLITS[split], tuple(range(first, first + dup_factor))))
    return shards


def missing_shards(shards: list[TextShard], manifest: Manifest, overwrite: bool) -> list[TextShard]:
    """The text shards with those of their sample shards that are not on disk, complete and made from this very text.

    Sample files of another set, which readers would take for part of this one, are removed with `overwrite`, else refused.
    """
    _handle_strangers(shards, manifest, overwrite)
    remaining = []
    for shard in tqdm(shards, desc="checking samples", unit="file"):
        missing = []
        for number in shard.numbers:
            name = sample_name(shard.split, number)
            listed = manifest.entry(name)["source_sha256"] if name in manifest.names() else shard.sha256
            if listed != shard.sha256 and not overwrite:
                raise InputError(
                    f"{manifest.path.parent / name}: was made from another {shard.path.name} (sha256 {listed[:12]}, now "
                    f"{shard.sha256[:12]}); give another folder, or --overwrite to replace it"
                )
            if listed != shard.sha256 or not manifest.is_complete(name):
                missing.append(number)
        if missing:
            remaining.append(dataclasses.replace(shard, numbers=tuple(missing)))
    return remaining


def _handle_strangers(shards: list[TextShard], manifest: Manifest, overwrite: bool) -> None:
    """Remove (`overwrite`) or refuse sample files in the folder that neither the text shards nor the manifest know."""
    known = {sample_name(shard.split, number) for shard in shards for number in shard.numbers} | set(manifest.names())
    for path in (path for split in SAMPLE_SPLITS.values() for path in sample_paths(manifest.path.parent, split)):
        if path.name not in known:
            if not overwrite:
                raise InputError(f"{path}: a sample file of another set; remove it, or give --overwrite to have it removed")
            path.unlink()
            print(f"{path}: removed, it belonged to another set")


def make_samples(shard: TextShard, recipe: Recipe, changed_words: frozenset[str], folder: Path) -> dict[str, dict[str, int]]:
    """Write the sample shards of one text shard into `folder`; returns size and counts of each file, by name.

    The counts are "samples"; of documents also "tokens", those that are "unknown" and "cut_sentences". `changed_words` are the
    words of the vocabulary that the tokenizer would split or change.
    """
    counts = {}
    if recipe.documents:
        flat, lines = _encode_documents(shard.path, recipe)
        counts["tokens"] = len(flat)
        counts["unknown"] = int((flat == recipe.vocabulary.unk_id).sum())
        counts["cut_sentences"] = int((lines > recipe.max_seq_length - 2).sum())
    else:
        flat, lines = _encode_sentences(shard.path, recipe, changed_words)
        check_lengths(lines, recipe.max_seq_length, shard.path)
    facts = {}
    for number in shard.numbers:
        name = sample_name(shard.split, number)
        lengths = lines
        if recipe.documents:
            rng = keyed_rng(recipe.seed, f"packing-{shard.split}", number)
            lengths = pack(lines, recipe.max_seq_length - 2, recipe.short_seq_prob, rng)
        write_samples(folder / name, _masked_blocks(flat, lengths, shard, recipe, number))
        facts[name] = {"size": (folder / name).stat().st_size, "samples": len(lengths), **counts}
    return facts


def _encode_documents(path: Path, recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """The text as ids of pieces (M,) int32, line after line, and the pieces per line, (n,) int32, `BLANK` for an empty one."""
    encoder = PieceEncoder(recipe.vocabulary, recipe.do_lower_case)
    flat, lines = zip(*map(encoder.encode, text_blocks(path, BLOCK_BYTES)), strict=True)
    if not any(map(len, flat)):
        raise InputError(f"{path}: the tokenizer makes no token of it; remove the file")
    return np.concatenate(flat), np.concatenate(lines)


def _encode_sentences(path: Path, recipe: Recipe, changed_words: frozenset[str]) -> tuple[np.ndarray, np.ndarray]:
    """The text as ids (M,) int32, sentence after sentence, and the words per sentence, (n,) int32."""
    blocks: list[tuple[np.ndarray, np.ndarray]] = []
    sentences = 0
    for block in text_blocks(path):
        blocks.append(recipe.vocabulary.encode_text(block, path, sentences))
        sentences += len(blocks[-1][1])
    flat, lengths = map(np.concatenate, zip(*blocks, strict=True))
    used = [recipe.vocabulary.words[index] for index in np.flatnonzero(np.bincount(flat))] if changed_words else []
    if changed := [word for word in used if word in changed_words]:
        raise InputError(
            f"{path}: word {changed[0]!r} is not one token: the tokenizer would split or change it (--do_lower_case "
            f"{int(recipe.do_lower_case)}); {len(changed)} such words; replace them or use another --do_lower_case"
        )
    return flat, lengths


def pack(lines: np.ndarray, room: int, short_seq_prob: float, rng: np.random.Generator) -> np.ndarray:
    """The lengths of the samples of documents: (samples,) int32 tokens, 1 or more; samples are slices of the text's ids.

    A sample takes sentences of one document, in order, as long as they fit into its room. With probability `short_seq_prob`
    (Devlin et al., arXiv 1810.04805, appendix A.2, and BERT's released code) a sample is short: its room is uniform in
    2 .. `room`. A sentence that fits into the full room is never cut; a longer one begins a new sample and is cut wherever a
    sample is full.

    Args:
        lines: (lines,) int32 tokens per sentence, negative at the end of a document; lines of 0 tokens have no effect.
        room: tokens of a full sample, without [CLS] and [SEP], 1 or more.
        rng: one generator per text; used only if there are short samples.

    >>> pack(np.array([3, 2, 4, -1, 1, 12]), 6, 0.0, np.random.default_rng(0)).tolist()
    [5, 4, 1, 6, 6]
    """
    max_samples = int(np.maximum(-(-lines // room), 0).sum())  # if no sample had two sentences
    rooms = np.full(max_samples, room, dtype=np.int32)
    if short_seq_prob > 0:
        is_short = rng.random(max_samples) < short_seq_prob
        rooms[is_short] = rng.integers(min(2, room), room + 1, size=max_samples, dtype=np.int32)[is_short]
    lengths = np.empty(max_samples, dtype=np.int32)
    return lengths[: _pack(lines, room, rooms, lengths)].copy()


@numba.njit(cache=True, nogil=True)
def _pack(lines, room, rooms, lengths):
    """Fill `lengths` with the tokens of the samples, whose rooms are `rooms`; returns their number."""
    samples = 0
    filled = 0
    for line in range(len(lines)):
        length = lines[line]
        if filled > 0 and (length < 0 or filled + length > rooms[samples]):
            lengths[samples] = filled
            samples += 1
            filled = 0
        while length > room:  # the sample is empty
            lengths[samples] = room
            samples += 1
            length -= room
        filled += max(length, 0)
    if filled > 0:
        lengths[samples] = filled
        samples += 1
    return samples


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


def generate(options: argparse.Namespace) -> None:
    """Make what is missing of the samples and the tokenizer that the flags of generate_samples.py ask for.

    Text shards are worked on in parallel; the files do not depend on how. Prints counts.
    """
    name = options.model_name
    if not name or Path(name).is_absolute() or ".." in Path(name).parts or name.startswith("."):
        raise InputError(f"--model_name: {name!r} can't be a folder in --output_dir; give a name like bert-large-uncased")
    executor = executor_options(options, local="processes")
    recipe, own = read_recipe(options)
    text = find_text_shards(options.dir.absolute(), options.dup_factor)
    manifest = Manifest(options.output_dir / SAMPLES_MANIFEST, recipe.facts(), options.overwrite, products="*.hdf5")
    remaining = missing_shards(text, manifest, options.overwrite)
    total, missing = (sum(len(shard.numbers) for shard in shards) for shards in (text, remaining))
    print(f"{len(text)} text shards, {total} sample shards: {total - missing} skipped (complete), {missing} to make")

    with manifest.or_nothing():
        _save_tokenizer(recipe, own, name, manifest)
        changed: frozenset[str] = frozenset()
        if remaining and not recipe.documents:
            changed = recipe.vocabulary.changed_by(own or wordpiece(recipe.vocabulary, recipe.do_lower_case))
        # Absolute, as a Ray task may run in another working directory.
        make = functools.partial(make_samples, recipe=recipe, changed_words=changed, folder=options.output_dir.absolute())
        with contextlib.closing(run_jobs(make, remaining, what="masking", **executor)) as results:
            for shard, facts in results:
                for file, counts in facts.items():
                    manifest.add(file, **counts, source=shard.path.name, source_sha256=shard.sha256)
    if recipe.documents:
        print(_describe_documents(manifest))
    print(f"samples: {options.output_dir}; tokenizer: {options.output_dir / name}")


def read_recipe(options: argparse.Namespace) -> tuple[Recipe, Tokenizer | None]:
    """The recipe that the flags of generate_samples.py ask for, and the tokenizer that the text came with, or None."""
    documents = is_of_documents(options.dir) if options.text == "auto" else options.text == DOCUMENTS
    if documents and options.max_seq_length < 3:
        raise InputError(f"--max_seq_length: {options.max_seq_length} leaves no room between [CLS] and [SEP]; give 3 or more")
    if options.short_seq_prob is not None and not documents:
        raise InputError(
            f"--short_seq_prob {options.short_seq_prob:g}: sentences aren't packed; leave it out or give --text documents"
        )
    max_predictions = options.max_predictions_per_seq
    if max_predictions is None:
        max_predictions = max(1, round(options.masked_lm_prob * options.max_seq_length)) if documents else 5
    path = find_vocabulary(options.vocab_file, [options.dir])
    vocabulary = Vocabulary.read(path)
    if path.suffix == ".json":
        check_same_tokenizer(path, vocabulary, bool(options.do_lower_case))
    own = None if documents else find_own_tokenizer(options.dir, vocabulary)
    flags = {name: getattr(options, name) for name in ("masked_lm_prob", "mask_token_prob", "random_token_prob", "single_mask")}
    rule = MaskingRule(**flags, max_predictions=max_predictions, pieces=documents)
    recipe = Recipe(
        vocabulary=vocabulary,
        do_lower_case=bool(options.do_lower_case) and own is None,
        max_seq_length=options.max_seq_length,
        dup_factor=options.dup_factor,
        rule=rule,
        seed=options.seed,
        documents=documents,
        short_seq_prob=(0.1 if options.short_seq_prob is None else options.short_seq_prob) if documents else 0.0,
    )
    return recipe, own


def _save_tokenizer(recipe: Recipe, own: Tokenizer | None, name: str, manifest: Manifest) -> None:
    """Save the text's own tokenizer or, for None, the recipe's as a folder next to the manifest, unless it is complete."""
    files = [f"{name}/{file}" for file in TOKENIZER_FILES]
    if all(manifest.is_complete(file) for file in files):
        return
    with atomic_folder(manifest.path.parent / name) as folder:
        tokenizer = own or wordpiece(recipe.vocabulary, recipe.do_lower_case)
        lower = None if own else recipe.do_lower_case
        write_tokenizer(folder, tokenizer, recipe.vocabulary, recipe.max_seq_length, name, lower)
    for file in files:
        manifest.add(file)


def _describe_documents(manifest: Manifest) -> str:
    """Counts of all samples of documents, in a line."""
    entries = [manifest.entry(name) for name in manifest.names() if name.endswith(".hdf5")]
    keys = ("samples", "tokens", "unknown", "cut_sentences")
    samples, tokens, unknown, cut = (sum(entry[key] for entry in entries) for key in keys)
    return (
        f"documents: {samples:,} samples of {tokens:,} WordPieces; {unknown:,} ({unknown / tokens:.2%}) are [UNK]; "
        f"{cut:,} sentences were split over samples"
    )
