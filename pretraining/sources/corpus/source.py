"""Text from a corpus: documents of local files or of the hub, split into sentences, without duplicates, in shards.

    python generate_pretraining.py --source corpus --dataset FOLDER --save-path corpus_dataset --n_processes 8

Two passes. The first reads the corpus piece by piece (files, ranges of large ones), side by side, and writes each piece's
documents as sentences, with a hash of each document, into SAVE_PATH/parts. The second finds documents that were there before
(the first one of equal ones stays), puts a document into the test part if its hash says so, and deals what is left, in order,
to the shards. Both go on where they were interrupted; then parts/ is removed. On the way the disk holds the text twice; in
memory there are 24 bytes a document and, for a piece, its largest document.

The hash is BLAKE2b over the sentences, so that documents that differ in white space only are duplicates. A shard is a function
of the corpus and the flags, and not of the number of workers.
"""

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pcfg.common.cli import non_negative_int, positive_int, probability
from pcfg.common.executors import add_executor_arguments, end_if_asked, executor_options, run_jobs
from pcfg.common.files import InputError, Manifest, atomic_path, check_space, sha256, versions, write_json
from pcfg.common.text import write_shard
from pretraining.data.vocabulary import Vocabulary
from pretraining.sources.corpus.documents import (
    HUB_NAMES,
    RANGE_BYTES,
    TXT_DOCUMENTS,
    DamagedError,
    Piece,
    Reading,
    find_files,
    hub_pieces,
    identity,
    local_pieces,
    read_documents,
)
from pretraining.sources.corpus.sentences import UNICODE_FORMS, Normalisation, kept, sentences
from pretraining.sources.corpus.train_vocabulary import train_wordpiece
from pretraining.sources.text_shards import Shard, complete_names, open_manifest, write_vocabulary

PARTS, PARTS_MANIFEST, COUNTS = "parts", "manifest_parts.json", "corpus_counts.json"
# Of a document in a part: its hash in two numbers, the bytes of its lines.
INDEX = np.dtype([("hash", "<u8", 2), ("size", "<i8")])
SENTENCES_A_DOCUMENT = {"bookcorpus": 256}  # its rows are sentences, without a sign of where a book begins
VOCABULARY_BYTES = 1 << 28  # of training text that a vocabulary is trained on


def part_name(number: int) -> str:
    return f"part{number:06d}.txt"


def index_name(number: int) -> str:
    return f"part{number:06d}.npy"


def _grouped(texts: Iterator[str], number: int, rules: Normalisation, counts: Counter) -> Iterator[list[str]]:
    """Documents as lists of sentences: of each text its own, or `number` texts in order, each of them a sentence."""
    if number == 1:
        for text in texts:
            yield sentences(text, rules, counts)
    else:
        while rows := list(itertools.islice(texts, number)):
            yield kept([" ".join(rules.clean(row).split()) for row in rows], rules, counts)


def make_part(folder: Path, reading: Reading, rules: Normalisation, number_a_document: int, job: tuple[int, Piece]) -> dict:
    """Write the part of one piece and its index.

    Returns:
        "counts", by what was read or dropped; "part" and "index", size and sha256 of the files; "damaged", why the file could
        not be read to its end, or None.
    """
    number, piece = job
    counts, index, damaged = Counter(), [], None

    def documents() -> Iterator[bytes]:
        nonlocal damaged
        texts = read_documents(piece, reading, counts)
        try:
            for lines in _grouped(texts, number_a_document, rules, counts):
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
            damaged = str(error) or type(error.__cause__).__name__

    part = write_shard(folder / part_name(number), documents())
    with atomic_path(folder / index_name(number)) as temporary, open(temporary, "wb") as file:
        np.save(file, np.array(index, dtype=INDEX))
    entry = {"size": (folder / index_name(number)).stat().st_size, "sha256": sha256(folder / index_name(number))}
    return {"counts": dict(counts), "part": part, "index": entry, "damaged": damaged}


def make_parts(folder: Path, pieces: list[Piece], made_from: dict, function, skip_damaged: bool, executor: dict) -> Counter:
    """Make the parts that are not there yet; returns the counts of all.

    Raises:
        InputError: files are damaged, and `skip_damaged` is not set; all other parts are made before.
    """
    manifest = Manifest(folder / PARTS_MANIFEST, made_from, overwrite=True)
    jobs = [(i, piece) for i, piece in enumerate(pieces) if not _is_made(manifest, i)]
    known = all(piece.size for piece in pieces)
    if known:
        # Text grows little, and shrinks rarely to less than a third when it is decompressed.
        check_space(folder, 2 * sum(piece.size for _, piece in jobs))
    print(f"corpus: {len(pieces):,} pieces, {len(pieces) - len(jobs):,} are read already")
    weight = (lambda job: job[1].size) if known else None
    with contextlib.closing(run_jobs(function, jobs, what="reading", weight=weight, **executor)) as made:
        for (number, piece), facts in made:
            manifest.add(index_name(number), **facts["index"])
            manifest.add(part_name(number), **facts["part"], counts=facts["counts"], damaged=facts["damaged"], path=piece.path)
    entries = [manifest.entry(part_name(i)) for i in range(len(pieces))]
    damaged = {entry["path"]: entry["damaged"] for entry in entries if entry["damaged"]}
    for path, why in damaged.items():
        print(f"{path}: cut short or damaged ({why})")
    if damaged and not skip_damaged:
        raise InputError(
            f"{next(iter(damaged))}: cut short or damaged ({next(iter(damaged.values()))}; {len(damaged)} such files); fetch "
            "it again, or give --skip-damaged to take what of it could be read. What was read of other files is kept"
        )
    counts = Counter({"damaged files": len(damaged)}) if damaged else Counter()
    for entry in entries:
        counts.update(entry["counts"])
    return counts


def _is_made(manifest: Manifest, number: int) -> bool:
    """Whether a part is complete; that of a damaged file is made again, as the file may be another one now."""
    names = part_name(number), index_name(number)
    return all(map(manifest.is_complete, names)) and not manifest.entry(names[0])["damaged"]


class Layout:
    """Which document goes where.

    Args:
        indices: of each part, (documents,) of `INDEX`.
        test_fraction: share of the hashes whose documents are for the test.

    Attributes:
        part, offset, size: (N,) of each document that stays, in order: its part, where it begins there, its bytes.
        is_test: (N,) bool.
        duplicates: number of documents that don't stay.
    """

    def __init__(self, indices: list[np.ndarray], test_fraction: float):
        numbers = np.array([len(index) for index in indices])
        everything = np.concatenate(indices)
        # One empty line between two documents of a part.
        offsets = [np.cumsum(np.concatenate([[0], index["size"][:-1] + 1]))[: len(index)] for index in indices]
        hashes = np.ascontiguousarray(everything["hash"])
        order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: of equal ones the first comes first
        first = np.ones(len(order), dtype=bool)
        first[1:] = (hashes[order[1:]] != hashes[order[:-1]]).any(1)
        stays = np.sort(order[first])
        self.part = np.repeat(np.arange(len(indices)), numbers)[stays]
        self.offset = np.concatenate(offsets)[stays]
        self.size = everything["size"][stays]
        self.is_test = hashes[stays, 0] < np.float64(test_fraction) * 2.0**64
        self.duplicates = len(everything) - len(stays)

    def of(self, shard: Shard, shards: int) -> np.ndarray:
        """The documents of a shard, one of `shards` of its split; neighbours in the corpus, as many in each."""
        return np.array_split(np.flatnonzero(self.is_test == (shard.split == "test")), shards)[shard.number]


def make_shard(folder: Path, layout: Layout, numbers: dict[str, int], shard: Shard) -> dict:
    """Write one shard from the parts; returns what the manifest says of it."""
    documents = layout.of(shard, numbers[shard.split])
    sentences_written = 0

    def blocks() -> Iterator[bytes]:
        nonlocal sentences_written
        for part, group in itertools.groupby(documents, key=layout.part.__getitem__):
            with open(folder / PARTS / part_name(part), "rb") as file:
                for document in group:
                    end_if_asked()
                    file.seek(layout.offset[document])
                    text = file.read(layout.size[document])
                    sentences_written += text.count(b"\n")
                    yield text

    written = write_shard(folder / shard.name, blocks())
    return {**written, "documents": len(documents), "sentences": sentences_written}


def training_text(folder: Path, shards: list[Shard]) -> Iterator[str]:
    """Lines of the training shards, of each from its beginning, `VOCABULARY_BYTES` in all."""
    training = [shard for shard in shards if shard.split == "training"]
    for shard in training:
        with open(folder / shard.name, "rb") as file:
            read = 0
            while read < VOCABULARY_BYTES // len(training) and (line := file.readline()):
                read += len(line)
                yield line.decode()


def vocabulary_bytes(options: argparse.Namespace, shards: list[Shard]) -> bytes:
    """The content of vocab.txt: that of --vocab-file, checked, or one trained on the text."""
    if options.vocab_file is not None:
        Vocabulary.read(options.vocab_file)
        return Path(options.vocab_file).read_bytes()
    print(f"vocabulary: training {options.vocab_size:,} WordPieces")
    text = functools.partial(training_text, options.save_path, shards)
    words = train_wordpiece(text, options.vocab_size, bool(options.do_lower_case))
    return "".join(f"{word}\n" for word in words).encode()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    corpus = parser.add_argument_group("corpus")
    corpus.add_argument(
        "--dataset",
        required=True,
        help=f"a file or a folder (.txt and .jsonl, also .gz and .zst, .parquet, .arrow), {' or '.join(HUB_NAMES)}, or the "
        "name of another data set on the hub, which is asked only with HF_HUB_OFFLINE=0",
    )
    corpus.add_argument("--text-column", default="text", help="which column or key is the text; default text")
    corpus.add_argument(
        "--txt-documents",
        choices=TXT_DOCUMENTS,
        default=TXT_DOCUMENTS[0],
        help="what a document of a .txt file is: what stands between empty lines, a line, or the file; default blank-line",
    )
    corpus.add_argument(
        "--sentences-a-document",
        type=positive_int,
        help="above 1: a row is one sentence, not split, and so many in order are a document; default 1, of bookcorpus 256",
    )
    corpus.add_argument("--config-name", help="configuration of a hub data set")
    corpus.add_argument("--split", default="train", help="split of a hub data set; default train")
    corpus.add_argument("--revision", help="revision of a hub data set; of the two named above that of its parquet files")
    corpus.add_argument("--skip-damaged", action="store_true", help="take what can be read of files that are cut short")
    text = parser.add_argument_group("text")
    text.add_argument("--unicode", choices=UNICODE_FORMS, default="NFC", help="normal form of the text; default NFC")
    text.add_argument("--min-words", type=positive_int, default=1, help="shorter sentences are dropped; default 1")
    text.add_argument("--language", default="en", help="ISO 639-1 code, for the sentence splitter; default en")
    files = parser.add_argument_group("files")
    files.add_argument("--save-path", type=Path, required=True, help="folder for the text; made if missing")
    files.add_argument("--vocab-file", help="copy this WordPiece vocabulary to vocab.txt; default: train one")
    files.add_argument(
        "--vocab-size", type=positive_int, default=30_522, help="entries of a trained one; default 30522, BERT's"
    )
    files.add_argument(
        "--do_lower_case", type=int, choices=(0, 1), default=1, help="whether it is of lower-case text; default 1"
    )
    files.add_argument("--overwrite", action="store_true", help="replace text that was made otherwise; default: refuse")
    sizes = parser.add_argument_group("sizes")
    sizes.add_argument("--shard-num", type=positive_int, default=200, help="training shards; default 200")
    sizes.add_argument("--test-shard-num", type=non_negative_int, default=10, help="test shards; default 10")
    sizes.add_argument("--test-fraction", type=probability, default=0.005, help="share of test documents; default 0.005")
    add_executor_arguments(parser.add_argument_group("running"))


def check_options(options: argparse.Namespace) -> None:
    """Refuse what can't be."""
    if options.vocab_size < 100:
        raise InputError(f"--vocab-size {options.vocab_size}: too few for pieces of words; give 100 or more")
    if (options.test_shard_num == 0) != (options.test_fraction == 0):
        raise InputError(
            f"--test-shard-num {options.test_shard_num} --test-fraction {options.test_fraction:g}: both are 0 or neither"
        )
    if options.test_fraction == 1:
        raise InputError("--test-fraction 1: leaves nothing to train on")


def find_pieces(options: argparse.Namespace, reading: Reading) -> tuple[list[Piece], list]:
    """The pieces of the corpus, and what identifies it."""
    path = Path(options.dataset)
    if not path.exists():
        return hub_pieces(options.dataset, reading), [options.dataset, options.config_name, options.split, options.revision]
    files = find_files(path)
    return local_pieces(files, reading), [identity(file, path) for file in files]


def generate(options: argparse.Namespace) -> None:
    """Make the text that the command line asks for."""
    check_options(options)
    executor = executor_options(options, local="processes")
    reading = Reading(options.text_column, options.txt_documents, options.config_name, options.split, options.revision)
    rules = Normalisation(options.unicode, options.min_words, options.language)
    number_a_document = options.sentences_a_document or SENTENCES_A_DOCUMENT.get(options.dataset, 1)
    pieces, corpus = find_pieces(options, reading)
    read_from = {
        "source": "corpus",
        "corpus": hashlib.sha256(json.dumps(corpus).encode()).hexdigest(),
        "text_column": reading.column,
        "txt_documents": reading.txt_documents,
        "sentences_a_document": number_a_document,
        "unicode": rules.unicode,
        "min_words": rules.min_words,
        "language": rules.language,
        "range_bytes": RANGE_BYTES,
        "sentencex": versions("sentencex")["sentencex"],
    }
    trained = f"WordPiece of {options.vocab_size} entries, lower case {options.do_lower_case}"
    made_from = {
        **read_from,
        "skip_damaged": options.skip_damaged,
        "shard_num": options.shard_num,
        "test_shard_num": options.test_shard_num,
        "test_fraction": options.test_fraction,
        "vocabulary": trained if options.vocab_file is None else sha256(options.vocab_file),
    }
    folder = options.save_path
    shards = [Shard("training", i, 0) for i in range(options.shard_num)]
    shards += [Shard("test", i, 0) for i in range(options.test_shard_num)]
    manifest = open_manifest(folder, made_from, options.overwrite)
    complete = complete_names(manifest, shards)
    wanted = [shard for shard in shards if shard.name not in complete]
    if wanted:
        function = functools.partial(make_part, (folder / PARTS).absolute(), reading, rules, number_a_document)
        counts = make_parts(folder / PARTS, pieces, read_from, function, options.skip_damaged, executor)
        layout = Layout([np.load(folder / PARTS / index_name(i)) for i in range(len(pieces))], options.test_fraction)
        count_documents(counts, layout, options)
        # Before the shards, so that none of them is ever there without a manifest.
        write_json(folder / COUNTS, dict(counts))
        manifest.add(COUNTS)
        write_shards(folder, layout, shards, wanted, manifest, options.n_processes)
        for what, number in counts.items():
            print(f"{what}: {number:,}")
    if not manifest.is_complete("vocab.txt"):
        write_vocabulary(manifest, folder, vocabulary_bytes(options, shards), options.overwrite)
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    print(f"{folder}: {len(wanted)} shards made, {len(shards) - len(wanted)} skipped as complete; vocab.txt beside them")


def write_shards(folder: Path, layout: Layout, shards: list[Shard], wanted: list[Shard], manifest, n_processes: int) -> None:
    """The second pass: from the parts to the shards."""
    numbers = dict(Counter(shard.split for shard in shards))
    function = functools.partial(make_shard, folder.absolute(), layout, numbers)
    with contextlib.closing(run_jobs(function, wanted, n_processes, "text shards", "threads")) as made:
        for shard, facts in made:
            manifest.add(shard.name, **facts)


def count_documents(counts: Counter, layout: Layout, options: argparse.Namespace) -> None:
    """Add what became of the documents to `counts`.

    Raises:
        InputError: fewer documents than shards.
    """
    counts["documents that were there before"] = layout.duplicates
    for split, number in (("training", options.shard_num), ("test", options.test_shard_num)):
        documents = int((layout.is_test == (split == "test")).sum())
        counts[f"{split} documents"] = documents
        if documents < number:
            flags = "--test-shard-num or a larger --test-fraction" if split == "test" else "--shard-num"
            raise InputError(
                f"--dataset {options.dataset}: {documents} {split} documents for {number} shards; give fewer {flags}"
            )
