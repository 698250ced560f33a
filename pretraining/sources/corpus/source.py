"""Text from a corpus: documents of local files or of the hub, split into sentences, without duplicates, in shards.

    python generate_pretraining.py --source corpus --dataset FOLDER --save-path corpus_dataset --n_processes 8

The first of two passes reads pieces of the corpus (files, ranges of large ones) in parallel. It writes the documents of each
piece as sentences, with a BLAKE2b hash of the sentences per document, into SAVE_PATH/parts. The second pass drops duplicates
(the first of equal documents stays), chooses test documents by their hash, and deals the documents, in order, to the shards.
Both passes resume after an interruption; then parts/ is removed. During the run the disk holds the text twice. The memory
holds some 150 bytes per document and, per piece, its largest document.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers.models import WordPiece

from pcfg.common.cli import positive_int, probability
from pcfg.common.executors import add_executor_arguments, end_if_asked, executor_options, run_jobs
from pcfg.common.files import InputError, Manifest, atomic_open, check_space, sha256, versions, write_json
from pcfg.common.text import write_shard
from pretraining.data.vocabulary import SPECIAL_TOKENS, Vocabulary
from pretraining.sources.corpus import documents
from pretraining.sources.corpus.documents import DamagedError, Piece, Reading
from pretraining.sources.text_shards import Shard, TextFolder, add_folder_arguments, number_shards, shard_count

PARTS = "parts"
PARTS_MANIFEST = "manifest_parts.json"
COUNTS = "corpus_counts.json"
PART_NAME = "part{:06d}.txt"
INDEX_NAME = "part{:06d}.npy"
INDEX = np.dtype([("hash", "<u8", 2), ("size", "<i8")])  # per document of a part: a hash in two numbers, bytes of its lines
SENTENCES_PER_DOCUMENT = {"bookcorpus": 256}  # its rows are sentences, and nothing marks the beginning of a book
VOCABULARY_BYTES = 1 << 28  # of training text that a vocabulary is trained on
MAX_LETTERS = 1000  # different characters that get an entry, as for BERT
MIN_PAIRS = 2  # occurrences of a pair of pieces that is merged


def make_part(folder: Path, reading: Reading, job: tuple[int, Piece]) -> dict:
    """Write the part of one numbered piece and its index; returns the part's entry in the manifest.

    "counts" are of what was read or dropped, "damaged" is the reason why the file could not be read to its end, or None.
    """
    number, piece = job
    counts: Counter[str] = Counter()
    index = []
    damage = None

    def texts() -> Iterator[bytes]:
        nonlocal damage
        try:
            for lines in documents.read_sentences(piece, reading, counts):
                end_if_asked()
                counts["documents read"] += 1
                if not lines:
                    counts["documents without a sentence"] += 1
                    continue
                text = "\n".join(lines).encode() + b"\n"
                index.append((np.frombuffer(hashlib.blake2b(text, digest_size=16).digest(), "<u8"), len(text)))
                counts["sentences"] += len(lines)
                yield text
        except DamagedError as error:
            damage = str(error) or type(error.__cause__).__name__

    part = write_shard(folder / PART_NAME.format(number), texts())
    with atomic_open(folder / INDEX_NAME.format(number), "wb") as file:
        np.save(file, np.array(index, dtype=INDEX))
    return {**part, "counts": dict(counts), "damaged": damage, "path": piece.path}


def make_parts(
    folder: Path, pieces: list[Piece], read_from: dict, write: Callable, skip_damaged: bool, executor: dict
) -> Counter[str]:
    """Write the missing parts with `write` (`make_part`), then refuse damaged files; returns the counts of all parts."""
    manifest = Manifest(folder / PARTS_MANIFEST, read_from, overwrite=True)
    jobs = [(number, piece) for number, piece in enumerate(pieces) if not _is_complete(manifest, number)]
    has_sizes = all(piece.size for piece in pieces)
    if has_sizes:
        # Text grows little, and rarely shrinks to less than a third when it is compressed.
        check_space(folder, 2 * sum(piece.size for _, piece in jobs))
    print(f"corpus: {len(pieces):,} pieces, {len(pieces) - len(jobs):,} are read already")
    weight = (lambda job: job[1].size) if has_sizes else None
    with contextlib.closing(run_jobs(write, jobs, what="reading", weight=weight, **executor)) as results:
        for (number, _), entry in results:
            manifest.add(INDEX_NAME.format(number))
            manifest.add(PART_NAME.format(number), **entry)
    entries = [manifest.entry(PART_NAME.format(number)) for number in range(len(pieces))]
    damaged = {entry["path"]: entry["damaged"] for entry in entries if entry["damaged"]}
    for path, reason in damaged.items():
        print(f"{path}: cut short or damaged ({reason})")
    if damaged and not skip_damaged:
        path, reason = next(iter(damaged.items()))
        raise InputError(
            f"{path}: cut short or damaged ({reason}; {len(damaged)} such files); fetch it again, or give --skip-damaged to "
            "use its readable beginning. Other files are not read again"
        )
    counts = Counter({"damaged files": len(damaged)}) if damaged else Counter()
    for entry in entries:
        counts.update(entry["counts"])
    return counts


def _is_complete(manifest: Manifest, number: int) -> bool:
    """Whether a part is complete; that of a damaged file is written again, as the file may have been replaced."""
    names = (PART_NAME.format(number), INDEX_NAME.format(number))
    return all(map(manifest.is_complete, names)) and not manifest.entry(names[0])["damaged"]


class Layout:
    """The distribution of documents to shards; `indices` has an array of `INDEX` per part."""

    def __init__(self, indices: list[np.ndarray], test_fraction: float):
        import pandas as pd  # not in the workers

        everything = np.concatenate(indices)
        unique = ~pd.DataFrame(everything["hash"]).duplicated().to_numpy()
        # One empty line between two documents of a part.
        offsets = [np.cumsum(index["size"] + 1) - index["size"] - 1 for index in indices]
        # (N,) of each document, in order, without the duplicates:
        self.part = np.repeat(np.arange(len(indices)), list(map(len, indices)))[unique]
        self.offset = np.concatenate(offsets)[unique]  # its first byte in the part
        self.size = everything["size"][unique]  # its bytes
        self.is_test = everything["hash"][unique, 0] < np.float64(test_fraction) * 2.0**64
        self.duplicates = len(everything) - len(self.size)

    def of(self, shard: Shard, shards: int) -> np.ndarray:
        """The documents of a shard, one of `shards` of its split: consecutive ones, as many in each shard."""
        return np.array_split(np.flatnonzero(self.is_test == (shard.split == "test")), shards)[shard.number]


def make_shard(folder: Path, layout: Layout, shards_per_split: dict[str, int], shard: Shard) -> dict:
    """Write one shard from the parts; returns its entry in the manifest."""
    members = layout.of(shard, shards_per_split[shard.split])
    sentences = 0

    def texts() -> Iterator[bytes]:
        nonlocal sentences
        for part, group in itertools.groupby(members, key=layout.part.__getitem__):
            with open(folder / PARTS / PART_NAME.format(int(part)), "rb") as file:
                for document in group:
                    end_if_asked()
                    file.seek(layout.offset[document])
                    text = file.read(layout.size[document])
                    sentences += text.count(b"\n")
                    yield text

    facts = write_shard(folder / shard.name, texts())
    return {**facts, "documents": len(members), "sentences": sentences}


# Why a corpus has no document at all, and what to do.
ADVICE = {
    "lines that are no JSON object": "JSON lines have one object per line, not one array or object over the whole file",
    "not a string": "give the column of the text by --text-column",
    "null": "give the column of the text by --text-column",
    "rows without the column": "give the column of the text by --text-column",
    "lines that are not UTF-8": "convert the files to UTF-8",
}


def count_documents(counts: Counter[str], layout: Layout, options: argparse.Namespace) -> None:
    """Add the numbers of documents to `counts`, and refuse fewer documents than shards."""
    counts["documents that were there before"] = layout.duplicates
    for split, number in (("training", options.shard_num), ("test", options.test_shard_num)):
        available = int((layout.is_test == (split == "test")).sum())
        counts[f"{split} documents"] = available
        if available < number:
            flags = "--test-shard-num or a larger --test-fraction" if split == "test" else "--shard-num"
            why = "; ".join(f"{what}: {count:,}" for what, count in counts.items() if count) or "the files have no rows"
            advice = f"give fewer {flags}"
            if not len(layout.size):
                advice = next((ADVICE[what] for what in ADVICE if counts[what]), "give files with text")
            have = f"{available} {split} documents for {number} shards"
            raise InputError(f"--dataset {options.dataset}: {have} ({why}); {advice}")


def train_wordpiece(texts: Callable[[], Iterable[str]], size: int, do_lower_case: bool) -> list[str]:
    """The entries, by id, of a WordPiece vocabulary (Schuster and Nakajima 2012; Devlin et al. 2019) trained on text.

    The special tokens come first, then single characters, then pieces in the order of their merges: `size` entries in all, or
    fewer of a small text. `texts()` gives the lines of the text; it is called twice. `do_lower_case` also strips accents.
    """
    tokenizer = Tokenizer(WordPiece(unk_token=SPECIAL_TOKENS[1]))
    tokenizer.normalizer = normalizers.BertNormalizer(strip_accents=None, lowercase=do_lower_case)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    letters: Counter[str] = Counter()
    for text in texts():
        letters.update(tokenizer.normalizer.normalize_str(text))
    by_frequency = sorted(letters.items(), key=lambda entry: (-entry[1], entry[0]))
    alphabet = sorted([letter for letter, _ in by_frequency if not letter.isspace()][:MAX_LETTERS])
    # All single characters get their ids beforehand. The trainer would number those inside words in the order of a hash map
    # and break ties between pairs by these numbers, which gives another vocabulary each time.
    entries = [*SPECIAL_TOKENS, *alphabet, *(f"##{letter}" for letter in alphabet)]
    if len(entries) > size:
        raise InputError(f"--vocab-size {size}: single characters alone take {len(entries)}; give more")
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=MIN_PAIRS,
        special_tokens=entries,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return [word for word, _ in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])]


def vocabulary_bytes(options: argparse.Namespace, shards: list[Shard]) -> bytes:
    """The content of vocab.txt: that of --vocab-file, checked, or one trained on the training shards."""
    if options.vocab_file is not None:
        Vocabulary.read(options.vocab_file)
        return Path(options.vocab_file).read_bytes()
    print(f"vocabulary: training {options.vocab_size:,} WordPieces")
    training = [options.save_path / shard.name for shard in shards if shard.split == "training"]

    def lines() -> Iterator[str]:
        """From the beginning of each shard, `VOCABULARY_BYTES` in all."""
        for path in training:
            with open(path, "rb") as file:
                yield from map(bytes.decode, file.readlines(VOCABULARY_BYTES // len(training) - 1))

    return "".join(f"{word}\n" for word in train_wordpiece(lines, options.vocab_size, bool(options.do_lower_case))).encode()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    corpus = parser.add_argument_group("corpus")
    dataset = "a file or a folder (.txt and .jsonl, also .gz and .zst, .parquet, .arrow), or a data set of the hub, such as "
    dataset += f"{' or '.join(documents.HUB_NAMES)} (only with HF_HUB_OFFLINE=0)"
    corpus.add_argument("--dataset", required=True, help=dataset)
    patterns = "read only files of a folder whose paths in it fit a pattern, such as '*.jsonl' (default: all)"
    corpus.add_argument("--include", nargs="+", default=[], metavar="PATTERN", help=patterns)
    patterns = "leave out files whose paths fit a pattern (default: none)"
    corpus.add_argument("--exclude", nargs="+", default=[], metavar="PATTERN", help=patterns)
    corpus.add_argument("--text-column", default="text", help="column or key of the text; default text")
    unit = "document of a .txt file: the text between two empty lines, a line, or the file; default blank-line"
    corpus.add_argument("--txt-documents", choices=documents.TXT_DOCUMENTS, default="blank-line", help=unit)
    rows = "above 1: a row is a sentence, not split, and this number of rows is a document; default 1, for bookcorpus 256"
    corpus.add_argument("--sentences-a-document", type=positive_int, help=rows)
    corpus.add_argument("--config-name", help="configuration of a hub data set")
    corpus.add_argument("--split", default="train", help="split of a hub data set; default train")
    corpus.add_argument("--revision", help="revision of a hub data set; default for the two named above: their parquet files")
    corpus.add_argument("--skip-damaged", action="store_true", help="use the readable beginning of files that are cut short")
    text = parser.add_argument_group("text")
    text.add_argument("--unicode", choices=documents.UNICODE_FORMS, default="NFC", help="normal form of the text; default NFC")
    text.add_argument("--min-words", type=positive_int, default=1, help="shorter sentences are dropped; default 1")
    text.add_argument("--language", default="en", help="ISO 639-1 code, for the sentence splitter; default en")
    files = parser.add_argument_group("files")
    add_folder_arguments(files)
    files.add_argument("--vocab-file", help="copy this WordPiece vocabulary to vocab.txt; default: train one")
    entries = "entries of a trained vocabulary; default 30522, BERT's"
    files.add_argument("--vocab-size", type=positive_int, default=30_522, help=entries)
    lower_case = "whether it is of lower-case text; default 1"
    files.add_argument("--do_lower_case", type=int, choices=(0, 1), default=1, help=lower_case)
    sizes = parser.add_argument_group("sizes")
    sizes.add_argument("--shard-num", type=shard_count, default=200, help="training shards; default 200")
    sizes.add_argument("--test-shard-num", type=shard_count, default=10, help="test shards; default 10")
    sizes.add_argument("--test-fraction", type=probability, default=0.005, help="share of test documents; default 0.005")
    add_executor_arguments(parser.add_argument_group("running"))


def check_options(options: argparse.Namespace) -> None:
    """Refuse flags that contradict each other."""
    if options.vocab_size < 100:
        raise InputError(f"--vocab-size {options.vocab_size}: too few for pieces of words; give 100 or more")
    if (options.test_shard_num == 0) != (options.test_fraction == 0):
        raise InputError(
            f"--test-shard-num {options.test_shard_num} --test-fraction {options.test_fraction:g}: both are 0 or neither"
        )
    if options.shard_num == 0 or options.test_fraction == 1:
        raise InputError(
            f"--shard-num {options.shard_num} --test-fraction {options.test_fraction:g}: leaves nothing to train on; give more "
            "shards, and a fraction below 1"
        )


def generate(options: argparse.Namespace) -> None:
    """Write the text that the command line asks for."""
    check_options(options)
    executor = executor_options(options, local="processes")
    flags = vars(options)
    flags["sentences_a_document"] = options.sentences_a_document or SENTENCES_PER_DOCUMENT.get(options.dataset, 1)
    reading = Reading(**{field.name: flags[field.name] for field in dataclasses.fields(Reading)})
    pieces, corpus = documents.find_pieces(options.dataset, reading, options.include, options.exclude)
    of_hub = ("config_name", "split", "revision")  # in `corpus`
    read_from = {
        "source": "corpus",
        "corpus": hashlib.sha256(json.dumps(corpus).encode()).hexdigest(),
        **{name: value for name, value in dataclasses.asdict(reading).items() if name not in of_hub},
        "range_bytes": documents.RANGE_BYTES,
        "sentencex": versions("sentencex")["sentencex"],
    }
    trained = f"WordPiece of {options.vocab_size} entries, lower case {options.do_lower_case}"
    made_from = {
        **read_from,
        **{name: flags[name] for name in ("skip_damaged", "shard_num", "test_shard_num", "test_fraction")},
        "vocabulary": trained if options.vocab_file is None else sha256(options.vocab_file),
    }
    folder = options.save_path
    parts = folder / PARTS
    text = TextFolder(folder, made_from, number_shards(options), options.overwrite)
    counts: Counter[str] = Counter()
    if text.missing_shards:
        write_part = functools.partial(make_part, parts.absolute(), reading)
        counts = make_parts(parts, pieces, read_from, write_part, options.skip_damaged, executor)
        layout = Layout([np.load(parts / INDEX_NAME.format(number)) for number in range(len(pieces))], options.test_fraction)
        count_documents(counts, layout, options)
        # Before the shards, so that none of them ever lacks a manifest.
        write_json(folder / COUNTS, dict(counts))
        text.manifest.add(COUNTS)
        shards_per_split = {"training": options.shard_num, "test": options.test_shard_num}
        write = functools.partial(make_shard, folder.absolute(), layout, shards_per_split)
        text.write_shards(write, n_processes=options.n_processes, executor="threads")
        for what, number in counts.items():
            print(f"{what}: {number:,}")
    else:
        text.write_shards(lambda _: {}, n_processes=1)
    if not text.manifest.is_complete("vocab.txt"):
        text.write_vocabulary(vocabulary_bytes(options, text.shards))
    shutil.rmtree(parts, ignore_errors=True)
