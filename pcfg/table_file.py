"""The file of a lookup table: its datasets and attributes, writing it and checking it.

The file is HDF5, not compressed (gzip and LZF both write slower than the disk). Its datasets, for n sentences of the text in
order, M words in all and V words of the language:

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
(`pretraining.sources.lookup`), the format is 3, M counts these, and there are two more datasets and an attribute:

    counts        (n,)    uint8, chosen positions of each sentence
    positions     (M,)    uint8, from 0, ascending within a sentence
    chosen        JSON: how they were chosen (positions a sentence, seed)
"""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from pcfg.artefacts import InputError, atomic_path, check_space, sha256, versions

FORMAT, FORMAT_CHOSEN = 2, 3  # of all positions, of some
DTYPES = ("float32", "float16", "none")
MAKERS = "python -m pcfg.lookup (of a language model's text: pretraining.sources.lookup)"


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
