"""The lookup table of a text: the true P(x_t = w | x_-t) at every position of every sentence.

    python -m pcfg.lookup --rule-path rule_deep_mlm.txt --datafile pcfg_dataset/test0.txt --save-path lookup.hdf5

A version for a laptop: `--rule-path rule_mini_mlm.txt` with a text made from the same rules. `--entropy-only` leaves the
distributions out: 12 bytes per position, whatever the number of words.

The file is made in one pass over the text after one that counts it, in memory that does not grow with the text. It is HDF5,
not compressed (gzip and LZF both write slower than the disk). Its datasets, for n sentences of the text in order, M words
in all and V words of the language:

    words         (V,)    UTF-8 strings: what the columns stand for
    lengths       (n,)    uint8, words of each sentence
    conditionals  (M, V)  float32 or float16, P(x_t = w | x_-t), one sentence after the other; absent with --entropy-only
    true_words    (M,)    int32, the column of the word in the text
    entropy       (M,)    float32, -sum_w P(w | x_-t) log P(w | x_-t), nats, from the conditionals before they are rounded
    log_true      (M,)    float32, log P(x_t | x_-t), nats, likewise

Its attributes: `format` (2), `conditionals` ("float32", "float16" or "none"), `text_sha256`, `text_name`, `grammar_sha256`
(of a grammar, or of a restricted language model), `versions` (JSON), and `sha256`, of everything before it in this list, which
is compared whenever a table is opened. Tables of earlier versions have none.

A table may have the first n sentences of its text only. A table of a random choice of positions
(`pretraining.sources.opt.lookup`) has format 3, M counts the choice, and there are two more datasets and an attribute:

    counts        (n,)    uint8, chosen positions of each sentence
    positions     (M,)    uint8, from 0, ascending within a sentence
    chosen        JSON: how they were chosen (positions per sentence, seed)
"""

if __name__ == "__main__":
    import pcfg.common.start  # noqa: F401  before libraries, whose import takes seconds

import argparse
import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from tqdm import tqdm

from pcfg.chart import Chart
from pcfg.common.cli import Parser, file_name, run_main
from pcfg.common.files import InputError, atomic_path, check_space, sha256, versions
from pcfg.common.means import SentenceMeans
from pcfg.common.text import text_blocks
from pcfg.common.words import WordIndex, padded
from pcfg.engine.chart_plan import offsets
from pcfg.grammar import Grammar, find_rules

FORMAT = 2  # of all positions
FORMAT_CHOSEN = 3  # of some
CHECKSUM = "sha256"
DTYPES = ("float32", "float16", "none")
MAKERS = "python -m pcfg.lookup (of a language model's text: pretraining.sources.opt.lookup)"
# Numbers in a block of a dataset: 16 MiB of float32, small enough for its memory to be used again.
BLOCK_ELEMENTS = 1 << 22
# Maximum number of sentences of a block, where distributions do not bound it.
BLOCK_SENTENCES = 1 << 15


def table_shapes(sentences: int, positions: int, columns: int, stored: str, chosen: bool = False) -> dict[str, tuple]:
    """Shape and dtype of the datasets that hold numbers, by name."""
    if stored not in DTYPES:
        raise ValueError(f"conditionals stored as {stored!r}")
    shapes: dict[str, tuple] = {
        "lengths": ((sentences,), np.uint8),
        "true_words": ((positions,), np.int32),
        "entropy": ((positions,), np.float32),
        "log_true": ((positions,), np.float32),
    }
    if chosen:
        shapes |= {"counts": ((sentences,), np.uint8), "positions": ((positions,), np.uint8)}
    if stored != "none":
        shapes["conditionals"] = ((positions, columns), np.dtype(stored))
    return shapes


def fill(arrays: Any, blocks: Iterable[dict[str, np.ndarray]]) -> None:
    """Append the rows of blocks, by name, to arrays of their final size: HDF5 datasets or numpy arrays."""
    filled: dict[str, int] = {}
    for block in blocks:
        for name, rows in block.items():
            first = filled.get(name, 0)
            filled[name] = first + len(rows)
            arrays[name][first : filled[name]] = rows.astype(arrays[name].dtype, copy=False)


@dataclasses.dataclass(frozen=True)
class TableOrigin:
    """What a table is made from and which parts of it, recorded in the file and compared with a file on disk."""

    language: str  # what the distributions come from, for messages
    language_sha256: str  # of what decides the distributions
    datafile: str  # the text
    stored: str  # how the conditionals are stored, "float32", "float16" or "none"
    sentences: int | None = None  # how many the table has; None where it has all
    chosen: dict | None = None  # how positions were chosen; None where it has all

    def is_complete(self, path: Path | str) -> bool:
        """Whether this table is at `path`, which is printed; refuses a table of another origin."""
        if not Path(path).exists():
            return False
        table = LookupTable.open(path)
        difference = None
        if table.grammar_sha256 != self.language_sha256:
            difference = f"made from another {self.language}"
        elif table.text_sha256 != sha256(self.datafile):
            difference = "made from another text"
        elif table.stored != self.stored:
            difference = f"made with {'--entropy-only' if table.stored == 'none' else f'--dtype {table.stored}'}"
        elif table.chosen != self.chosen or self.sentences not in (None, table.sentences):
            sizes = f"{table.sentences:,} sentences, {table.positions:,} positions"
            difference = f"made with other sentences or positions ({sizes})"
        if difference is not None:
            raise InputError(f"{path}: {difference}; give another --save-path, or --overwrite to replace it")
        print(f"{path}: skipped, complete already")
        return True

    def write(
        self, path: Path | str, words: list[str], sentences: int, positions: int, blocks: Iterable[dict[str, np.ndarray]]
    ) -> None:
        """Write the table from blocks of its rows (see `fill`); the file is complete or absent."""
        shapes = table_shapes(sentences, positions, len(words), self.stored, self.chosen is not None)
        # Asked beforehand: the HDF5 library does not survive a write that the disk refuses.
        check_space(path, sum(math.prod(shape) * np.dtype(kind).itemsize for shape, kind in shapes.values()))
        with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
            file.create_dataset("words", data=[word.encode() for word in words], dtype=h5py.string_dtype())
            for name, (shape, kind) in shapes.items():
                file.create_dataset(name, shape, kind)
            fill(file, blocks)
            file.attrs["format"] = FORMAT if self.chosen is None else FORMAT_CHOSEN
            if self.chosen is not None:
                file.attrs["chosen"] = json.dumps(self.chosen)
            file.attrs["conditionals"] = self.stored
            file.attrs["text_sha256"] = sha256(self.datafile)
            file.attrs["text_name"] = Path(self.datafile).name
            file.attrs["grammar_sha256"] = self.language_sha256
            file.attrs["versions"] = json.dumps(versions("numpy", "numba", "h5py"))
            file.attrs[CHECKSUM] = _content_sha256(file)


def _content_sha256(file: h5py.File) -> str:
    """SHA-256 of the attributes and datasets of a table, read block by block."""
    attributes = {name: str(value) for name, value in file.attrs.items() if name != CHECKSUM}
    digest = hashlib.sha256(json.dumps(attributes, sort_keys=True).encode())
    for name in sorted(file):
        for block in _blocks_of(file[name]):
            digest.update(b"\0".join(block.tolist()) if block.dtype == object else block.tobytes())
    return digest.hexdigest()


def _check_file(file: h5py.File, path: Path) -> None:
    """Refuse a file that is not a whole lookup table; a missing or unreadable part raises h5py's own exceptions."""
    again = f"delete the file and make it again with {MAKERS}"
    if file.attrs["format"] not in (FORMAT, FORMAT_CHOSEN):
        raise InputError(f"{path}: lookup table of format {file.attrs['format']}, not {FORMAT} or {FORMAT_CHOSEN}; {again}")
    chosen = file.attrs["format"] == FORMAT_CHOSEN
    columns = len(file["words"])
    sizes = (len(file["lengths"]), len(file["true_words"]), columns)
    for name, (shape, kind) in table_shapes(*sizes, str(file.attrs["conditionals"]), chosen).items():
        if file[name].shape != shape or file[name].dtype != kind:
            actual = f"{file[name].shape} {file[name].dtype}"
            raise InputError(f"{path}: dataset {name!r} is {actual}, not {shape} {np.dtype(kind)}; {again}")
    counts = (block.astype(np.int64) for block in _blocks_of(file["counts" if chosen else "lengths"]))
    if sum(int(block.sum()) if block.min() >= 1 else math.inf for block in counts) != sizes[1] or any(
        block.min() < 0 or block.max() >= columns for block in _blocks_of(file["true_words"])
    ):
        raise InputError(f"{path}: lengths or true_words out of range; {again}")
    if chosen and not _positions_fit(file):
        raise InputError(f"{path}: positions out of range; {again}")
    if CHECKSUM in file.attrs and file.attrs[CHECKSUM] != _content_sha256(file):
        raise InputError(f"{path}: damaged, its content does not have the SHA-256 that it was written with; {again}")


def _blocks_of(dataset: h5py.Dataset) -> Iterator[np.ndarray]:
    step = max(1, BLOCK_ELEMENTS // max(1, math.prod(dataset.shape[1:])))
    return (dataset[first : first + step] for first in range(0, len(dataset), step))


def _positions_fit(file: h5py.File) -> bool:
    """Whether chosen positions ascend within each sentence and are in it, and the file says how they were chosen."""
    json.loads(file.attrs["chosen"])["positions_per_sentence"]
    positions, counts, lengths = (file[name][:].astype(np.int64) for name in ("positions", "counts", "lengths"))
    begins = np.zeros(len(positions), bool)
    begins[np.cumsum(counts) - counts] = True
    return bool((begins[1:] | (np.diff(positions) > 0)).all() and (positions < np.repeat(lengths, counts)).all())


def _array(name: str, kind: type) -> Any:
    """An attribute of `LookupTable`: the array of this name, read at its first use."""
    return functools.cached_property(lambda table: table._arrays[name][:].astype(kind, copy=False))


class LookupTable:
    """A lookup table, in a file (`open`, which reads each array at its first use) or in memory (`compute`).

    The arrays are those of the file, see above, with integers as int64 and entropies as float64.

    Attributes:
        sentences, positions: n and M.
        counts: positions of each sentence that the table has: all, or the chosen ones.
        places: (M,) int64, position of each row in its sentence, from 0.
        chosen: how the positions were chosen, {"positions_per_sentence", "seed"}; None in a table of all.
        offsets: (n + 1,) int64: the rows of sentence s are offsets[s] .. offsets[s + 1].
        stored: how the conditionals are stored, "float32", "float16" or "none".
        text_sha256: of the file the text was read from; empty if it came from none.
    """

    lengths: np.ndarray = _array("lengths", np.int64)
    true_words: np.ndarray = _array("true_words", np.int32)
    entropy: np.ndarray = _array("entropy", np.float64)
    log_true: np.ndarray = _array("log_true", np.float64)

    def __init__(self, arrays: Any, words: list[str], source: str, text_sha256: str, grammar_sha256: str):
        self.words = words
        self.source = source
        self.text_sha256 = text_sha256
        self.grammar_sha256 = grammar_sha256
        self._arrays = arrays
        self.sentences = len(arrays["lengths"])
        self.positions = len(arrays["true_words"])
        self.stored = str(arrays["conditionals"].dtype) if "conditionals" in arrays else "none"
        self.chosen = json.loads(arrays.attrs["chosen"]) if "positions" in arrays else None

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

    def mean_entropy(self) -> SentenceMeans:
        """Means of the entropy, read block by block."""
        means = SentenceMeans()
        row = 0
        for first in range(0, self.sentences, BLOCK_SENTENCES):
            block = slice(first, first + BLOCK_SENTENCES)
            lengths = self._arrays["lengths"][block]
            counts = lengths if self.chosen is None else self._arrays["counts"][block]
            entropy = self._arrays["entropy"][row : row + int(counts.sum(dtype=np.int64))]
            means.add(entropy, counts, lengths)
            row += len(entropy)
        return means

    @classmethod
    def compute(cls, grammar: Grammar, texts: list[str], source: Path | str) -> "LookupTable":
        """The table of `texts` in memory; `source` names them in errors and is their file, where there is one."""
        flat, lengths = WordIndex(grammar.words).encode_texts(texts, source)
        shapes = table_shapes(len(lengths), len(flat), len(grammar.words), "float32")
        arrays = {name: np.empty(shape, kind) for name, (shape, kind) in shapes.items()}
        fill(arrays, _rows(Chart(grammar), [(flat, lengths)], source, len(lengths), True))
        text_sha256 = sha256(source) if Path(source).is_file() else ""
        return cls(arrays, list(grammar.words), str(source), text_sha256, grammar.sha256)

    @classmethod
    def open(cls, path: Path | str) -> "LookupTable":
        """The table in the file at `path`; it stays open for `conditionals` while the object lives."""
        path = Path(path)
        if not path.is_file():
            raise InputError(f"{path}: no such file; make it with {MAKERS}")
        try:
            file = h5py.File(path, "r")
            _check_file(file, path)
            words = [word.decode() for word in file["words"][:]]
            return cls(file, words, str(path), str(file.attrs["text_sha256"]), str(file.attrs["grammar_sha256"]))
        except (OSError, RuntimeError, KeyError, AttributeError, TypeError, ValueError) as error:
            raise InputError(f"{path}: not a lookup table ({error}); give a file made by {MAKERS}") from error

    def conditionals(self, first_sentence: int, last_sentence: int) -> np.ndarray:
        """P(. | x_-t) at the positions of sentences first_sentence .. last_sentence - 1: (positions, V) float64.

        They are stored rounded; the rows are normalised again, so each sums to 1.
        """
        if self.stored == "none":
            raise InputError(f"{self.source}: has no distributions; make it again without --entropy-only")
        first = self.offsets[first_sentence]
        last = self.offsets[last_sentence]
        rows = self._arrays["conditionals"][first:last].astype(np.float64)
        rows /= rows.sum(axis=1, keepdims=True)
        return rows

    def check_text(self, datafile: Path | str) -> None:
        """Refuse a text file that the table was not made from."""
        text_sha256 = sha256(datafile)
        if text_sha256 != self.text_sha256:
            other = f"made from another text (sha256 {self.text_sha256[:12] or 'none'})"
            raise InputError(
                f"{self.source}: this lookup table was {other} than {datafile} (sha256 {text_sha256[:12]}); make its own with "
                f"{MAKERS} --datafile {datafile} --save-path LOOKUP"
            )

    def check_positions(self) -> None:
        """Refuse a table that has some positions of its sentences only."""
        if self.chosen is not None:
            advice = f"make it again without --positions-per-sentence {self.chosen['positions_per_sentence']}"
            raise InputError(f"{self.source}: has only some positions of each sentence, but all are needed here; {advice}")

    def check_whole(self, sentences: int) -> None:
        """Refuse a table that lacks a position of the first `sentences` sentences of its text."""
        self.check_positions()
        if self.sentences < sentences:
            part = f"has the first {self.sentences} sentences of its text only, but {sentences} are needed here"
            raise InputError(f"{self.source}: {part}; make it again with a larger --max-sentences, or take fewer")


def _encoded(grammar: Grammar, datafile: Path | str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The sentences of a text or CSV file: word indices (M,) and lengths (n,) of one block after the other."""
    index = WordIndex(grammar.words)
    sentences = 0
    for block in text_blocks(datafile):
        flat, lengths = index.encode(block, datafile, sentences)
        sentences += len(lengths)
        yield flat, lengths


def _rows(
    chart: Chart, encoded: Iterable, source: Path | str, sentences: int, distributions: bool
) -> Iterator[dict[str, np.ndarray]]:
    """The rows of a table for `fill`, computed from blocks of `_encoded` sentences; `sentences` in all."""
    sentence = 0
    with tqdm(total=sentences, desc="lookup table", unit="sentence") as progress:
        for flat, lengths in encoded:
            tokens = padded(flat, lengths, -1)
            elements = len(chart.grammar.words) * tokens.shape[1] if distributions else 1
            step = min(BLOCK_SENTENCES, max(1, BLOCK_ELEMENTS // elements))
            for first in range(0, len(lengths), step):
                block = tokens[first : first + step]
                words = lengths[first : first + step]
                results = chart.conditionals_and_reductions(block, words, source, sentence, distributions)
                rows = {"entropy": results[1], "log_true": results[2], "lengths": words}
                rows["true_words"] = block[np.arange(block.shape[1]) < words[:, None]]
                yield rows | ({"conditionals": results[0]} if distributions else {})
                sentence += len(words)
                progress.update(len(words))


def write_table(path: Path | str, grammar: Grammar, origin: TableOrigin) -> int:
    """Compute and write the table of a text; returns how many sentences, too improbable for float32, were repeated."""
    sizes = [(len(lengths), len(flat)) for flat, lengths in _encoded(grammar, origin.datafile)]
    sentences, positions = map(sum, zip(*sizes, strict=True))
    chart = Chart(grammar)
    rows = _rows(chart, _encoded(grammar, origin.datafile), origin.datafile, sentences, origin.stored != "none")
    origin.write(path, grammar.words, sentences, positions, rows)
    return chart.redone


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m pcfg.lookup", description=__doc__)
    source = parser.add_argument_group("input")
    source.add_argument("--rule-path", required=True, help="rules file, or the name of a shipped grammar")
    add_table_arguments(parser, source)
    return parser


def add_table_arguments(parser: argparse.ArgumentParser, source: argparse._ArgumentGroup) -> None:
    """Add the flags of the text to the group `source`, and those of the table."""
    source.add_argument("--datafile", required=True, help="text file (.txt) or labelled sentences (.csv, column `text`)")
    output = parser.add_argument_group("output")
    output.add_argument("--save-path", type=file_name, required=True, help="the HDF5 file to write")
    stored = output.add_mutually_exclusive_group()
    stored.add_argument("--dtype", choices=DTYPES[:2], default="float32", help="of the stored conditionals; default float32")
    reduced = "store the entropy and log P of the true word of each position, and no distributions"
    stored.add_argument("--entropy-only", action="store_true", help=reduced)
    output.add_argument("--overwrite", action="store_true", help="replace a file made from something else; default: refuse")


def stored_dtype(options: argparse.Namespace) -> str:
    """One of `DTYPES` from the flags of `add_table_arguments`; refuses a missing text, or one that the table would replace."""
    if not Path(options.datafile).is_file():
        raise InputError(f"--datafile {options.datafile}: no such file")
    if Path(options.save_path).resolve() == Path(options.datafile).resolve():
        raise InputError(f"--save-path {options.save_path}: is the text itself; give another place")
    return "none" if options.entropy_only else options.dtype


def print_table(path: Path | str) -> None:
    """Print the sizes of a table and its mean entropy, the smallest loss that a model can have."""
    table = LookupTable.open(path)
    print(f"{path}: {table.sentences} sentences, {table.positions} positions, {len(table.words)} words")
    if table.sentences > 1:
        means = table.mean_entropy()
        values = "{:.4f} +- {:.4f} (pairs), {:.4f} +- {:.4f} (sentences)".format(*means.by_pairs(), *means.by_sentences())
        print(f"conditional entropy in nats: {values}")


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    grammar = Grammar.read(find_rules(options.rule_path))
    origin = TableOrigin("grammar", grammar.sha256, options.datafile, stored_dtype(options))
    if options.overwrite or not origin.is_complete(options.save_path):
        redone = write_table(options.save_path, grammar, origin)
        print(f"{options.save_path}: {redone} sentences were too improbable for float32 and repeated in float64")
    print_table(options.save_path)


if __name__ == "__main__":
    run_main(main)
