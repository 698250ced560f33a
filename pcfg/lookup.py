"""The lookup table of a text: the true P(x_t = w | x_-t) at every position of every sentence.

    python -m pcfg.lookup --rule-path rule_deep_mlm.txt --datafile pcfg_dataset/test0.txt --save-path lookup.hdf5

A version for a laptop: `--rule-path rule_mini_mlm.txt` with a text made from the same rules. `--entropy-only` leaves the
distributions out: 12 bytes a position, whatever the number of words.

The file is made in one pass over the text after one that counts it, in memory that its size does not matter to. It
is HDF5, not compressed (gzip and LZF both write slower than the disk). Its datasets, for n sentences of the text in order,
M words in all and V words of the language:

    words         (V,)    UTF-8 strings: what the columns stand for
    lengths       (n,)    uint8, words of each sentence
    conditionals  (M, V)  float32 or float16, P(x_t = w | x_-t); the positions of a sentence lie one below the other; not there
                          in a table made with --entropy-only
    true_words    (M,)    int32, the column of the word that stands there
    entropy       (M,)    float32, -sum_w P(w | x_-t) log P(w | x_-t), nats, from the conditionals before they are rounded
    log_true      (M,)    float32, log P(x_t | x_-t), nats, likewise

and its attributes: `format` (2), `conditionals` ("float32", "float16" or "none"), `text_sha256`, `text_name`, `grammar_sha256`
(of a grammar, or of a restricted language model), `versions` (JSON).

A table may have the first n sentences of its text only. Where it has some positions of each, chosen by chance
(`pretraining.sources.opt.lookup`), the format is 3, M counts these, and there are two more datasets and an attribute:

    counts        (n,)    uint8, chosen positions of each sentence
    positions     (M,)    uint8, from 0, ascending within a sentence
    chosen        JSON: how they were chosen (positions a sentence, seed)
"""

import argparse
import contextlib
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from pcfg.chart import Chart
from pcfg.common.cli import Parser, run_main
from pcfg.common.files import InputError, atomic_path, check_space, sha256, versions
from pcfg.common.means import SentenceMeans
from pcfg.common.text import text_blocks
from pcfg.common.words import WordIndex, padded
from pcfg.engine.chart_plan import offsets
from pcfg.grammar import Grammar, find_rules

FORMAT, FORMAT_CHOSEN = 2, 3  # of all positions, of some
DTYPES = ("float32", "float16", "none")
MAKERS = "python -m pcfg.lookup (of a language model's text: pretraining.sources.opt.lookup)"
ELSEWHERE = "give another --save-path, or --overwrite to replace it"
# Numbers in a block of conditionals while a table is computed: 16 MiB of float32, small enough for its memory to be used again.
BLOCK_ELEMENTS = 1 << 22
# Most sentences of a block, where distributions don't bound it.
BLOCK_SENTENCES = 1 << 15


def table_shapes(sentences: int, positions: int, columns: int, stored: str, chosen: bool = False) -> dict:
    """Name, shape and dtype of the datasets that hold numbers."""
    shapes = {
        "lengths": ((sentences,), np.uint8),
        "true_words": ((positions,), np.int32),
        "entropy": ((positions,), np.float32),
        "log_true": ((positions,), np.float32),
    }
    if chosen:
        shapes |= {"counts": ((sentences,), np.uint8), "positions": ((positions,), np.uint8)}
    if stored not in DTYPES:
        raise ValueError(f"conditionals stored as {stored!r}")
    return shapes if stored == "none" else {**shapes, "conditionals": ((positions, columns), np.dtype(stored))}


def _in_range(file, columns: int, counts: str) -> bool:
    """Whether the positions of the sentences, dataset `counts`, add up to those of the file and all true words are columns."""
    lengths, words, step = file[counts], file["true_words"], 1 << 22
    total = 0
    for first in range(0, len(lengths), step):
        block = lengths[first : first + step]
        total += int(block.sum(dtype=np.int64)) if block.min() >= 1 else len(words) + 1
    blocks = (words[first : first + step] for first in range(0, len(words), step))
    return total == len(words) and all(block.min() >= 0 and block.max() < columns for block in blocks)


def _positions_fit(file) -> bool:
    """Whether the chosen positions ascend within each sentence and are in it, and it is said how they were chosen."""
    json.loads(file.attrs["chosen"])["positions_per_sentence"]
    positions, counts, lengths = (file[name][:].astype(np.int64) for name in ("positions", "counts", "lengths"))
    begins = np.zeros(len(positions), bool)
    begins[np.cumsum(counts) - counts] = True
    return bool((begins[1:] | (np.diff(positions) > 0)).all() and (positions < np.repeat(lengths, counts)).all())


def open_file(path) -> tuple[h5py.File, list[str], str, str]:
    """The lookup table at `path`, its words, and the hashes of its text and language; it is open while the file object lives.

    Raises:
        InputError: no such file, not HDF5, or not a whole lookup table.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; make it with {MAKERS}")
    try:
        file = h5py.File(path, "r")
        if file.attrs["format"] not in (FORMAT, FORMAT_CHOSEN):
            raise InputError(f"{path}: lookup table of format {file.attrs['format']}, not {FORMAT}; make it again")
        chosen = file.attrs["format"] == FORMAT_CHOSEN
        words = [word.decode() for word in file["words"][:]]
        sentences, positions, stored = len(file["lengths"]), len(file["true_words"]), str(file.attrs["conditionals"])
        for name, (shape, kind) in table_shapes(sentences, positions, len(words), stored, chosen).items():
            if file[name].shape != shape or file[name].dtype != kind:
                raise InputError(
                    f"{path}: dataset {name!r} is {file[name].shape} {file[name].dtype}, not {shape} "
                    f"{np.dtype(kind)}; delete the file and make it again with {MAKERS}"
                )
        if not _in_range(file, len(words), "counts" if chosen else "lengths"):
            raise InputError(f"{path}: lengths or true_words out of range; delete the file and make it again")
        text_sha256, language_sha256 = str(file.attrs["text_sha256"]), str(file.attrs["grammar_sha256"])
        if chosen and not _positions_fit(file):
            raise InputError(f"{path}: positions out of range; delete the file and make it again")
    except (OSError, RuntimeError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a lookup table ({error}); give a file made by {MAKERS}") from error
    return file, words, text_sha256, language_sha256


@contextlib.contextmanager
def table_file(
    path, words: list[str], shapes: dict, datafile, language_sha256: str, chosen: dict | None = None
) -> Iterator[h5py.File]:
    """A lookup table at `path` to be filled: yields the open file with its empty datasets; complete or absent.

    Args:
        shapes: of `table_shapes`.
        datafile: the text.
        language_sha256: of what its distribution comes from.
        chosen: how the positions were chosen, where there are some only.

    Raises:
        InputError: a disk that can't hold the table.
    """
    size = sum(math.prod(shape) * np.dtype(kind).itemsize for shape, kind in shapes.values())
    # Asked beforehand: the HDF5 library does not survive a write that the disk refuses.
    check_space(path, size)
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        file.create_dataset("words", data=[word.encode() for word in words], dtype=h5py.string_dtype())
        for name, (shape, kind) in shapes.items():
            file.create_dataset(name, shape, kind)
        yield file
        file.attrs["format"] = FORMAT if chosen is None else FORMAT_CHOSEN
        if chosen is not None:
            file.attrs["chosen"] = json.dumps(chosen)
        file.attrs["conditionals"] = str(np.dtype(shapes["conditionals"][1])) if "conditionals" in shapes else "none"
        file.attrs["text_sha256"] = sha256(datafile)
        file.attrs["text_name"] = Path(datafile).name
        file.attrs["grammar_sha256"] = language_sha256
        file.attrs["versions"] = json.dumps(versions("numpy", "numba", "h5py"))


class LookupTable:
    """A lookup table, in a file (`open`, which reads each array when it is asked for) or in memory (`compute`).

    Attributes:
        words: what the V columns stand for.
        sentences, positions: n and M.
        lengths: (n,) int64, words of each sentence.
        counts: (n,) int64, positions of each sentence that the table has: all, or those that were chosen.
        places: (M,) int64, position of each row in its sentence, from 0.
        chosen: how the positions were chosen, {"positions_per_sentence", "seed"}; None in a table of all.
        offsets: (n + 1,) int64: the rows of sentence s are offsets[s] .. offsets[s + 1].
        true_words: (M,) int32, column of the word at each position.
        entropy: (M,) float64, entropy of the conditional, nats.
        log_true: (M,) float64, log P(x_t | x_-t), nats.
        stored: how the conditionals are stored, "float32", "float16" or "none".
        text_sha256: of the file the text was read from; empty if it came from none.
        grammar_sha256: of the grammar, or of the restricted language model.
    """

    def __init__(self, arrays, words: list[str], source: str, text_sha256: str, grammar_sha256: str):
        self.words = words
        self.source = source
        self.text_sha256 = text_sha256
        self.grammar_sha256 = grammar_sha256
        self._arrays = arrays
        self.sentences, self.positions = len(arrays["lengths"]), len(arrays["true_words"])
        self.stored = str(arrays["conditionals"].dtype) if "conditionals" in arrays else "none"
        self.chosen = json.loads(arrays.attrs["chosen"]) if "positions" in arrays else None

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        return self._arrays["lengths"][:].astype(np.int64)

    @functools.cached_property
    def counts(self) -> np.ndarray:
        return self.lengths if self.chosen is None else self._arrays["counts"][:].astype(np.int64)

    @functools.cached_property
    def places(self) -> np.ndarray:
        if self.chosen is not None:
            return self._arrays["positions"][:].astype(np.int64)
        return np.arange(self.positions) - np.repeat(self.offsets[:-1], self.lengths)

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        return offsets(self.counts)

    @functools.cached_property
    def true_words(self) -> np.ndarray:
        return self._arrays["true_words"][:]

    @functools.cached_property
    def entropy(self) -> np.ndarray:
        return self._arrays["entropy"][:].astype(np.float64)

    @functools.cached_property
    def log_true(self) -> np.ndarray:
        return self._arrays["log_true"][:].astype(np.float64)

    def mean_entropy(self) -> SentenceMeans:
        """Means of the entropy, read block by block."""
        means, row = SentenceMeans(), 0
        for first in range(0, self.sentences, BLOCK_SENTENCES):
            block = slice(first, first + BLOCK_SENTENCES)
            lengths = self._arrays["lengths"][block]
            counts = lengths if self.chosen is None else self._arrays["counts"][block]
            last = row + int(counts.sum(dtype=np.int64))
            means.add(self._arrays["entropy"][row:last], counts, lengths)
            row = last
        return means

    @classmethod
    def compute(cls, grammar, texts: list[str], source) -> "LookupTable":
        """The table of `texts` in memory; `source` names them in errors and is their file, where there is one.

        Raises:
            InputError: an unknown word, or a sentence that the grammar can't derive.
        """
        blocks = [WordIndex(grammar.words).encode_texts(texts, source)]
        shapes = table_shapes(*_sizes(blocks), len(grammar.words), "float32")
        arrays = {name: np.empty(shape, kind) for name, (shape, kind) in shapes.items()}
        _fill(arrays, Chart(grammar), blocks, source)
        text_sha256 = sha256(source) if Path(source).is_file() else ""
        return cls(arrays, list(grammar.words), str(source), text_sha256, grammar.sha256)

    @classmethod
    def open(cls, path) -> "LookupTable":
        """The table in the file at `path`; it stays open for `conditionals` while the object lives.

        Raises:
            InputError: no such file, not HDF5, or not a whole lookup table.
        """
        file, words, *hashes = open_file(path)
        return cls(file, words, str(path), *hashes)

    def conditionals(self, first_sentence: int, last_sentence: int) -> np.ndarray:
        """P(. | x_-t) at the positions of sentences first_sentence .. last_sentence - 1: (positions, V) float64.

        They are stored rounded; the rows are normalised again, so each sums to 1.

        Raises:
            InputError: the table was made with --entropy-only.
        """
        if self.stored == "none":
            raise InputError(f"{self.source}: has no distributions; make it again without --entropy-only")
        first, last = self.offsets[first_sentence], self.offsets[last_sentence]
        rows = self._arrays["conditionals"][first:last].astype(np.float64)
        rows /= rows.sum(axis=1, keepdims=True)
        return rows

    def check_text(self, datafile) -> None:
        """Make sure that the table belongs to a text file.

        Raises:
            InputError: it was made from a file with other bytes.
        """
        found = sha256(datafile)
        if found != self.text_sha256:
            raise InputError(
                f"{self.source}: this lookup table was made from another text (sha256 {self.text_sha256[:12] or 'none'}) "
                f"than {datafile} (sha256 {found[:12]}); make its own with "
                f"{MAKERS} --datafile {datafile} --save-path LOOKUP"
            )

    def check_positions(self) -> None:
        """Make sure that the table has every position of its sentences.

        Raises:
            InputError: it has some only.
        """
        if self.chosen is not None:
            number = self.chosen["positions_per_sentence"]
            raise InputError(
                f"{self.source}: has only some positions of each sentence, but all are needed here; make it again without "
                f"--positions-per-sentence {number}"
            )

    def check_whole(self, sentences: int) -> None:
        """Make sure that the table has every position of the first sentences of its text.

        Raises:
            InputError: as `check_positions`, or it has fewer sentences.
        """
        self.check_positions()
        if self.sentences < sentences:
            raise InputError(
                f"{self.source}: has the first {self.sentences} sentences of its text only, but {sentences} are needed here; "
                "make it again with a larger --max-sentences, or take fewer"
            )


def _blocks(grammar, datafile) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The sentences of a text or CSV file: word indices (M,) and lengths (n,) of one block after the other."""
    index, sentences = WordIndex(grammar.words), 0
    for block in text_blocks(datafile):
        flat, lengths = index.encode(block, datafile, sentences)
        sentences += len(lengths)
        yield flat, lengths


def _sizes(blocks) -> tuple[int, int]:
    """Sentences and positions in all."""
    sentences = positions = 0
    for flat, lengths in blocks:
        sentences, positions = sentences + len(lengths), positions + len(flat)
    return sentences, positions


def _fill(arrays, chart: Chart, blocks, source) -> None:
    """Compute a table, a block of sentences at a time, into `arrays`: HDF5 datasets or numpy arrays by name."""
    distributions = "conditionals" in arrays
    sentence = row = 0
    with tqdm(total=len(arrays["lengths"]), desc="lookup table", unit="sentence") as progress:
        for flat, lengths in blocks:
            tokens = padded(flat, lengths, -1)
            elements = len(chart.grammar.words) * tokens.shape[1] if distributions else 1
            step = min(BLOCK_SENTENCES, max(1, BLOCK_ELEMENTS // elements))
            for first in range(0, len(lengths), step):
                block, words = tokens[first : first + step], lengths[first : first + step]
                if distributions:
                    results = chart.conditionals_and_reductions(block, words, source, sentence)
                    conditionals, entropy, log_true, first_rows = results
                else:
                    entropy, log_true, first_rows = chart.reductions(block, words, source, sentence)
                rows = slice(row, row + int(first_rows[-1]))
                if distributions:
                    arrays["conditionals"][rows] = conditionals.astype(arrays["conditionals"].dtype, copy=False)
                arrays["true_words"][rows] = block[np.arange(block.shape[1]) < words[:, None]]
                arrays["entropy"][rows] = entropy
                arrays["log_true"][rows] = log_true
                arrays["lengths"][sentence : sentence + len(words)] = words
                row, sentence = rows.stop, sentence + len(words)
                progress.update(len(words))


def write_table(path, grammar, datafile, stored: str = "float32") -> int:
    """Compute the lookup table of a text or CSV file and write it to `path`; complete or absent.

    Args:
        stored: how the conditionals are stored: "float32", "float16", or "none" for their entropies only.

    Returns:
        The number of sentences that float32 charts could not do and that were done in float64.

    Raises:
        InputError: an unknown word, a sentence that the grammar can't derive, or a disk that can't hold the table.
    """
    shapes = table_shapes(*_sizes(_blocks(grammar, datafile)), len(grammar.words), stored)
    chart = Chart(grammar)
    with table_file(path, grammar.words, shapes, datafile, grammar.sha256) as file:
        _fill(file, chart, _blocks(grammar, datafile), datafile)
    return chart.redone


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m pcfg.lookup", description=__doc__)
    source = parser.add_argument_group("input")
    source.add_argument("--rule-path", required=True, help="rules file, or the name of a shipped grammar")
    add_file_arguments(source, parser)
    return parser


def add_file_arguments(source, parser: argparse.ArgumentParser) -> None:
    """Add the flags of the text, to a group, and of the table to be written."""
    source.add_argument("--datafile", required=True, help="text file (.txt) or labelled sentences (.csv, column `text`)")
    output = parser.add_argument_group("output")
    output.add_argument("--save-path", required=True, help="the HDF5 file to write")
    kept = output.add_mutually_exclusive_group()
    kept.add_argument(
        "--dtype", choices=DTYPES[:2], default="float32", help="of the stored conditionals (rounded last); default float32"
    )
    kept.add_argument(
        "--entropy-only",
        action="store_true",
        help="store the entropy and log P of the true word of each position, and no distributions",
    )
    output.add_argument("--overwrite", action="store_true", help="replace a file made from something else; default: refuse")


def wanted_storage(options: argparse.Namespace) -> str:
    """How the flags of `add_file_arguments` want the conditionals to be stored.

    Raises:
        InputError: there is no such text, or the table would replace it.
    """
    if not Path(options.datafile).is_file():
        raise InputError(f"--datafile {options.datafile}: no such file")
    if Path(options.save_path).resolve() == Path(options.datafile).resolve():
        raise InputError(f"--save-path {options.save_path}: is the text itself; give another place")
    return "none" if options.entropy_only else options.dtype


def find_made(path, language_sha256: str, datafile, stored: str, language: str = "grammar") -> LookupTable | None:
    """The table of this text and this language if `path` holds it already.

    Raises:
        InputError: it holds something else.
    """
    if not Path(path).exists():
        return None
    table = LookupTable.open(path)
    if table.grammar_sha256 != language_sha256:
        raise InputError(f"{path}: made from another {language}; {ELSEWHERE}")
    if table.text_sha256 != sha256(datafile):
        raise InputError(f"{path}: made from another text; {ELSEWHERE}")
    if table.stored != stored:
        kept = f"--dtype {table.stored}" if table.stored in DTYPES[:2] else "--entropy-only"
        raise InputError(f"{path}: made with {kept}; {ELSEWHERE}")
    return table


def print_table(path) -> None:
    """Print what a table has, and the mean entropy: the least loss that a model can have."""
    table = LookupTable.open(path)
    print(f"{path}: {table.sentences} sentences, {table.positions} positions, {len(table.words)} words")
    if table.sentences > 1:
        means = table.mean_entropy()
        pairs, sentences = means.by_pairs(), means.by_sentences()
        print(
            f"conditional entropy in nats: {pairs[0]:.4f} +- {pairs[1]:.4f} (pairs), "
            f"{sentences[0]:.4f} +- {sentences[1]:.4f} (sentences)"
        )


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    grammar = Grammar.read(find_rules(options.rule_path))
    stored = wanted_storage(options)
    if not options.overwrite and find_made(options.save_path, grammar.sha256, options.datafile, stored):
        print(f"{options.save_path}: skipped, complete already")
    else:
        redone = write_table(options.save_path, grammar, options.datafile, stored)
        print(f"{options.save_path}: {redone} sentences were too improbable for float32 and done again in float64")
    print_table(options.save_path)


if __name__ == "__main__":
    run_main(main)
