"""The lookup table of a text: the true P(x_t = w | x_-t) at every position of every sentence.

    python -m pcfg.lookup --rule-path rule_deep_mlm.txt --datafile pcfg_dataset/test0.txt --save-path lookup.hdf5

A version for a laptop: `--rule-path rule_mini_mlm.txt` with a text made from the same rules.

The file is HDF5. Its datasets, for n sentences of the text in order, M words in all and V words of the grammar:

    words         (V,)    UTF-8 strings: what the columns stand for
    lengths       (n,)    int64, words of each sentence
    conditionals  (M, V)  float32, P(x_t = w | x_-t); the positions of a sentence lie one below the other
    true_words    (M,)    int32, the column of the word that stands there
    entropy       (M,)    float64, -sum_w P(w | x_-t) log P(w | x_-t), nats, from the conditionals before rounding
    log_true      (M,)    float64, log P(x_t | x_-t), nats, likewise

and its attributes: `format` (1), `text_sha256`, `text_name`, `grammar_sha256`, `versions` (JSON).
"""

import argparse
import json
import math
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from pcfg.artefacts import InputError, atomic_path, check_space, sha256, versions
from pcfg.chart import Chart
from pcfg.cli import run_main
from pcfg.grammar import Grammar, find_rules
from pcfg.text import read_texts

FORMAT = 1
# Numbers in a chunk of conditionals while a table is computed: 128 MiB of float64.
CHUNK_ELEMENTS = 1 << 24


class LookupTable:
    """A lookup table, in a file (`open`, conditionals are read on demand) or in memory (`compute`).

    Attributes:
        words: what the V columns stand for.
        lengths: (n,) int64, words of each sentence.
        offsets: (n + 1,) int64: the positions of sentence s are offsets[s] .. offsets[s + 1].
        true_words: (M,) int32, column of the word at each position.
        entropy: (M,) float64, entropy of the conditional, nats.
        log_true: (M,) float64, log P(x_t | x_-t), nats.
        text_sha256: of the file the text was read from; empty if it came from none.
        grammar_sha256: of the grammar.
    """

    def __init__(self, arrays, words: list[str], source: str, text_sha256: str, grammar_sha256: str):
        self.words = words
        self.source = source
        self.text_sha256 = text_sha256
        self.grammar_sha256 = grammar_sha256
        self.lengths = arrays["lengths"][:]
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        self.true_words = arrays["true_words"][:]
        self.entropy = arrays["entropy"][:]
        self.log_true = arrays["log_true"][:]
        self._conditionals = arrays["conditionals"]

    @classmethod
    def compute(cls, grammar, texts: list[str], source) -> "LookupTable":
        """The table of `texts` in memory; `source` names them in errors and is their file, where there is one.

        Raises:
            InputError: an unknown word, or a sentence that the grammar can't derive.
        """
        tokens, lengths = grammar.encode(texts, source)
        shapes = _shapes(lengths, len(grammar.words))
        arrays = {name: np.empty(shape, kind) for name, (shape, kind) in shapes.items()}
        _fill(arrays, grammar, tokens, lengths, source)
        text_sha256 = sha256(source) if Path(source).is_file() else ""
        return cls(arrays, list(grammar.words), str(source), text_sha256, grammar.sha256)

    @classmethod
    def open(cls, path) -> "LookupTable":
        """The table in the file at `path`; it stays open for `conditionals` while the object lives.

        Raises:
            InputError: no such file, not HDF5, or not a whole lookup table.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"{path}: no such file; make it with python -m pcfg.lookup")
        try:
            file = h5py.File(path, "r")
            words = [word.decode() for word in file["words"][:]]
            lengths = file["lengths"][:]
            for name, (shape, kind) in _shapes(lengths, len(words)).items():
                if file[name].shape != shape or file[name].dtype != kind:
                    raise InputError(
                        f"{path}: dataset {name!r} is {file[name].shape} {file[name].dtype}, not {shape} "
                        f"{np.dtype(kind)}; delete the file and make it again with python -m pcfg.lookup"
                    )
            if file.attrs["format"] != FORMAT:
                raise InputError(f"{path}: lookup table of format {file.attrs['format']}, not {FORMAT}; make it again")
            true_words = file["true_words"][:]
            if lengths.min() < 1 or true_words.min() < 0 or true_words.max() >= len(words):
                raise InputError(f"{path}: lengths or true_words out of range; delete the file and make it again")
            return cls(file, words, str(path), str(file.attrs["text_sha256"]), str(file.attrs["grammar_sha256"]))
        except (OSError, RuntimeError, KeyError, AttributeError, TypeError, ValueError) as error:
            raise InputError(f"{path}: not a lookup table ({error}); give a file made by python -m pcfg.lookup") from error

    def conditionals(self, first_sentence: int, last_sentence: int) -> np.ndarray:
        """P(. | x_-t) at the positions of sentences first_sentence .. last_sentence - 1: (positions, V) float64.

        They are stored as float32; the rows are normalised again, so each sums to 1.
        """
        first, last = self.offsets[first_sentence], self.offsets[last_sentence]
        rows = self._conditionals[first:last].astype(np.float64)
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
                f"python -m pcfg.lookup --rule-path RULES --datafile {datafile} --save-path LOOKUP"
            )


def _shapes(lengths, columns: int) -> dict:
    """Name, shape and dtype of the datasets that hold numbers."""
    rows = int(lengths.sum())
    return {
        "lengths": ((len(lengths),), np.int64),
        "conditionals": ((rows, columns), np.float32),
        "true_words": ((rows,), np.int32),
        "entropy": ((rows,), np.float64),
        "log_true": ((rows,), np.float64),
    }


def _fill(arrays, grammar, tokens, lengths, source) -> None:
    """Compute a table, a block of sentences at a time, into `arrays`: HDF5 datasets or numpy arrays by name."""
    chart = Chart(grammar)
    arrays["lengths"][:] = lengths
    step = max(1, CHUNK_ELEMENTS // (len(grammar.words) * tokens.shape[1]))
    row = 0
    with tqdm(total=len(lengths), desc="lookup table", unit="sentence") as progress:
        for first in range(0, len(lengths), step):
            block, words = tokens[first : first + step], lengths[first : first + step]
            conditionals, _ = chart.conditionals(block, words, source, first)  # (positions, V)
            true_words = block[np.arange(block.shape[1]) < words[:, None]]  # (positions,)
            rows = slice(row, row + len(true_words))
            logarithms = np.log(np.where(conditionals > 0, conditionals, 1.0))
            arrays["conditionals"][rows] = conditionals
            arrays["true_words"][rows] = true_words
            arrays["entropy"][rows] = -np.einsum("mv,mv->m", conditionals, logarithms)
            arrays["log_true"][rows] = np.log(conditionals[np.arange(len(true_words)), true_words])
            row = rows.stop
            progress.update(len(words))


def write_table(path, grammar, datafile) -> None:
    """Compute the lookup table of a text or CSV file and write it to `path`; complete or absent.

    Raises:
        InputError: an unknown word, a sentence that the grammar can't derive, or a disk that can't hold the table.
    """
    tokens, lengths = grammar.encode(read_texts(datafile), datafile)
    shapes = _shapes(lengths, len(grammar.words))
    size = sum(math.prod(shape) * np.dtype(kind).itemsize for shape, kind in shapes.values())
    # Asked beforehand: the HDF5 library does not survive a write that the disk refuses.
    check_space(path, size)
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        file.create_dataset("words", data=[word.encode() for word in grammar.words], dtype=h5py.string_dtype())
        for name, (shape, kind) in shapes.items():
            file.create_dataset(name, shape, kind)
        _fill(file, grammar, tokens, lengths, datafile)
        file.attrs["format"] = FORMAT
        file.attrs["text_sha256"] = sha256(datafile)
        file.attrs["text_name"] = Path(datafile).name
        file.attrs["grammar_sha256"] = grammar.sha256
        file.attrs["versions"] = json.dumps(versions("numpy", "numba", "h5py"))


def mean_by_pairs(values, lengths) -> tuple[float, float]:
    """Mean over all (sentence, position) pairs, and its standard error with sentences as clusters.

    With y_s the sum over sentence s and T_s its length, the mean is R = sum y_s / sum T_s, and its error that of a ratio
    estimator, sqrt(n / (n - 1) sum (y_s - R T_s)^2) / sum T_s (Cochran, Sampling Techniques, section 2.11).

    Args:
        values: (sum of lengths,), the positions of a sentence one after the other.
        lengths: (n,), n at least 2.

    >>> mean_by_pairs(np.array([1.0, 1.0, 4.0]), np.array([2, 1]))[0]
    2.0
    """
    sums, lengths = _sentence_sums(values, lengths)
    mean = sums.sum() / lengths.sum()
    number = len(lengths)
    error = np.sqrt(number / (number - 1) * np.sum((sums - mean * lengths) ** 2)) / lengths.sum()
    return float(mean), float(error)


def mean_by_sentences(values, lengths) -> tuple[float, float]:
    """Mean over sentences of the mean over positions, and its standard error; arguments as in `mean_by_pairs`.

    >>> mean_by_sentences(np.array([1.0, 1.0, 4.0]), np.array([2, 1]))[0]
    2.5
    """
    sums, lengths = _sentence_sums(values, lengths)
    means = sums / lengths
    return float(means.mean()), float(means.std(ddof=1) / np.sqrt(len(means)))


def _sentence_sums(values, lengths):
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) < 2:
        raise InputError(f"{len(lengths)} sentence: a standard error takes at least 2; give a longer text")
    return np.add.reduceat(np.asarray(values, np.float64), np.cumsum(lengths) - lengths), lengths


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pcfg.lookup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_argument_group("input")
    source.add_argument("--rule-path", required=True, help="rules file, or the name of a shipped grammar")
    source.add_argument("--datafile", required=True, help="text file (.txt) or labelled sentences (.csv, column `text`)")
    output = parser.add_argument_group("output")
    output.add_argument("--save-path", required=True, help="the HDF5 file to write")
    output.add_argument("--overwrite", action="store_true", help="replace a file made from something else; default: refuse")
    return parser


def _is_made(path, grammar, datafile) -> bool:
    """Whether `path` holds the table of this text and this grammar already; InputError if it holds something else."""
    if not Path(path).exists():
        return False
    table = LookupTable.open(path)
    if table.grammar_sha256 != grammar.sha256:
        raise InputError(f"{path}: made from another grammar; give another --save-path, or --overwrite to replace it")
    if table.text_sha256 != sha256(datafile):
        raise InputError(f"{path}: made from another text; give another --save-path, or --overwrite to replace it")
    return True


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    grammar = Grammar.read(find_rules(options.rule_path))
    if not Path(options.datafile).is_file():
        raise InputError(f"--datafile {options.datafile}: no such file")
    if Path(options.save_path).resolve() == Path(options.datafile).resolve():
        raise InputError(f"--save-path {options.save_path}: is the text itself; give another place")
    if not options.overwrite and _is_made(options.save_path, grammar, options.datafile):
        print(f"{options.save_path}: skipped, complete already")
    else:
        write_table(options.save_path, grammar, options.datafile)
    table = LookupTable.open(options.save_path)
    print(f"{options.save_path}: {len(table.lengths)} sentences, {len(table.entropy)} positions, {len(table.words)} words")
    if len(table.lengths) > 1:
        pairs, sentences = (mean(table.entropy, table.lengths) for mean in (mean_by_pairs, mean_by_sentences))
        print(
            f"conditional entropy in nats: {pairs[0]:.4f} +- {pairs[1]:.4f} (pairs), "
            f"{sentences[0]:.4f} +- {sentences[1]:.4f} (sentences)"
        )


if __name__ == "__main__":
    run_main(main)
