"""The lookup table of a language model's text: the exact P(x_t = w | x_-t), as `python -m pcfg.lookup` makes it of a grammar's.

    python -m pretraining.sources.opt.lookup --data-path opt_dataset --model-name facebook/opt-125m \\
        --datafile opt_dataset/test0.txt --save-path lookup.hdf5 --max-sentences 1000 --positions-per-sentence 2

That takes hours on a CPU, about 4e12 operations per position (`pretraining.sources.opt.conditionals` has the formula). A
version for a laptop: a small model's text, or fewer sentences.

--max-sentences takes the first sentences of the text, which are as good as any: they were drawn independently of each other.
--positions-per-sentence takes K random positions of each, a function of (--seed, number of the sentence). Fewer positions of
more sentences give a smaller error for the same work. Equal contexts are computed once.

The numbers so far are in a folder next to the table, FILE.partial; after an interruption the same command resumes there.
"""

if __name__ == "__main__":
    import pcfg.common.start  # noqa: F401  before libraries, whose import takes seconds

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from tqdm import tqdm

from pcfg.common.cli import Parser, non_negative_int, positive_int, run_main
from pcfg.common.files import InputError, check_space, disk_errors, keyed_rng, read_json, sha256, write_json
from pcfg.common.text import read_texts
from pcfg.common.words import WordIndex
from pcfg.lookup import TableOrigin, add_table_arguments, print_table, stored_dtype
from pretraining.sources.opt import causal_lm
from pretraining.sources.opt.causal_lm import RestrictedLM, Restriction, read_restriction
from pretraining.sources.opt.conditionals import LogJoints, MaskedTexts, conditionals

BLOCK_CONTEXTS = 4096  # whose conditionals are in memory at a time: 64 MiB of float64 at 2,000 words
PARTIAL_FORMAT = "partial array, 1"
SECONDS = 20.0  # between two writings of a partial array to the disk


class PartialArray:
    """A float64 array that is filled from its beginning to its end over hours; a kill loses the last seconds only.

    Its folder has the numbers, `values`, and `progress.json`: their origin, how many are certain to be on the disk, and their
    CRC-32. A context manager, which writes at its end, also on an exception. `overwrite`: begin anew in a folder of another
    origin, instead of refusing it.
    """

    def __init__(self, folder: Path | str, made_from: dict, length: int, overwrite: bool = False):
        self.folder = Path(folder)
        self._facts = {"format": PARTIAL_FORMAT, "made_from": made_from, "length": length}
        self._state = (0, 0)  # numbers, CRC-32
        self._values = self.folder / "values"
        self._progress = self.folder / "progress.json"
        self._file: BinaryIO
        if self.folder.exists():
            self._resume(overwrite)

    def _resume(self, overwrite: bool) -> None:
        again = "remove the folder, or give --overwrite to begin anew"
        if not self._progress.is_file():
            if any(path.name not in ("values", f".{self._progress.name}.tmp") for path in self.folder.iterdir()):
                raise InputError(f"{self.folder}: not made by this script; {again}")
            return  # killed before the first writing
        progress = read_json(self._progress)
        if {key: progress.get(key) for key in self._facts} != self._facts:
            if not overwrite:
                raise InputError(f"{self.folder}: begun with another model, text or choice of positions; {again}")
            shutil.rmtree(self.folder)
            return
        checksum = 0
        left = 8 * progress["done"]
        with open(self._values, "rb") as file:
            while left and (block := file.read(min(left, 1 << 24))):
                checksum = zlib.crc32(block, checksum)
                left -= len(block)
        if left or checksum != progress["crc32"]:
            raise InputError(f"{self._values}: damaged; {again}")
        self._state = (progress["done"], checksum)

    @property
    def done(self) -> int:
        """How many numbers it has."""
        return self._state[0]

    def __enter__(self) -> "PartialArray":
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self._values, "r+b" if self._values.exists() else "w+b")  # noqa: SIM115 (closed by __exit__)
            self._file.truncate(8 * self.done)
            self._file.seek(8 * self.done)
            self._write()
        return self

    def __exit__(self, *_: object) -> None:
        with disk_errors(self.folder), self._file:
            self._write()

    def append(self, values: np.ndarray) -> None:
        """Append the next numbers, (n,) float64."""
        with disk_errors(self.folder):
            block = np.ascontiguousarray(values, np.float64).tobytes()
            self._file.write(block)
            # Both at once, so that an interruption finds both or none.
            self._state = (self.done + len(values), zlib.crc32(block, self._state[1]))
            if time.monotonic() - self._written > SECONDS:
                self._write()

    def _write(self) -> None:
        """Bring everything to the disk, and then say so in progress.json."""
        self._file.flush()
        os.fsync(self._file.fileno())
        write_json(self._progress, {**self._facts, "done": self.done, "crc32": self._state[1]})
        self._written = time.monotonic()

    def read(self) -> np.ndarray:
        """The numbers so far, (done,) float64, read from the disk at their use."""
        self._file.flush()
        return np.memmap(self._values, np.float64, "r", shape=(self.done,))


@dataclasses.dataclass(frozen=True)
class Selection:
    """Sentences and M of their positions."""

    flat: np.ndarray  # (N,) int32 columns of all tokens, one sentence after the other; lengths: (n,) int64
    lengths: np.ndarray
    counts: np.ndarray  # (n,) int64, selected positions per sentence; sentence, position: (M,) int64, each of them, ascending
    sentence: np.ndarray
    position: np.ndarray
    rule: dict | None  # how positions were chosen, for the table's attribute `chosen`; None for all


def select(options: argparse.Namespace, restriction: Restriction) -> Selection:
    """The sentences and positions of the command line."""
    datafile = options.datafile
    texts = read_texts(datafile)[: options.max_sentences]
    unknown = "is none of the kept tokens; give the --data-path that the text was made in"
    flat, lengths = WordIndex(restriction.pieces, lambda _: unknown).encode_texts(texts, datafile)
    lengths = lengths.astype(np.int64)
    for number in np.flatnonzero(lengths > restriction.max_tokens)[:1]:
        raise InputError(
            f"{datafile}: sentence {number + 1}: {lengths[number]} tokens, but the language has at most "
            f"{restriction.max_tokens}; give a text of this language"
        )
    if lengths.max() > 255:
        raise InputError(f"{datafile}: a sentence of {lengths.max()} tokens; a lookup table takes at most 255")
    positions = [np.arange(length) for length in lengths.tolist()]
    size = options.positions_per_sentence
    rule = None
    if size is not None:
        rngs = (keyed_rng(options.seed, "lookup positions", number) for number in range(len(positions)))
        positions = [np.sort(rng.permutation(all_of_it)[:size]) for rng, all_of_it in zip(rngs, positions, strict=True)]
        rule = {"positions_per_sentence": size, "seed": options.seed}
    counts = np.array([len(places) for places in positions])
    return Selection(flat, lengths, counts, np.repeat(np.arange(len(texts)), counts), np.concatenate(positions), rule)


def language_sha256(restriction: Restriction) -> str:
    """Of what decides the distribution: the model, the kept tokens, start and end token, the longest sentence."""
    facts = [restriction.model_sha256, restriction.kept, restriction.start_id, restriction.end_id, restriction.max_tokens]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def table_blocks(
    log_joint: np.ndarray, which: np.ndarray, selection: Selection, distributions: bool
) -> Iterator[dict[str, np.ndarray]]:
    """The rows of the table (`pcfg.lookup.fill`) from log J, (U, V) float64; `which`, (M,): the row of each position."""
    begins = np.cumsum(selection.lengths) - selection.lengths
    true_words = selection.flat[begins[selection.sentence] + selection.position]
    yield {"lengths": selection.lengths, "true_words": true_words}
    if selection.rule is not None:
        yield {"counts": selection.counts, "positions": selection.position}
    for first in range(0, len(which), BLOCK_CONTEXTS):
        rows = slice(first, first + BLOCK_CONTEXTS)
        p, log_p = conditionals(log_joint[which[rows]])
        block = {"entropy": -np.sum(p * log_p, axis=1), "log_true": log_p[np.arange(len(p)), true_words[rows]]}
        yield block | ({"conditionals": p} if distributions else {})


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m pretraining.sources.opt.lookup", description=__doc__)
    source = parser.add_argument_group("input")
    source.add_argument("--data-path", required=True, help="folder of the text, with its top_tokens.json")
    source.add_argument("--model-name", required=True, help="the model that the text was made with: a folder, or a hub name")
    source.add_argument("--max-sentences", type=positive_int, help="take the first N sentences; default: all")
    positions = "take K random positions of each; default: all"
    source.add_argument("--positions-per-sentence", type=positive_int, metavar="K", help=positions)
    source.add_argument("--seed", type=non_negative_int, default=0, help="of the choice of positions; default 0")
    add_table_arguments(parser, source)
    running = parser.add_argument_group("running")
    running.add_argument("--device", choices=("cpu", "cuda"), help="where the model runs; default: cuda if available")
    tokens = "tokens per forward pass, of all its candidates; default 1024, on cuda 65536"
    running.add_argument("--batch-tokens", type=positive_int, help=tokens)
    return parser


def write_table(options: argparse.Namespace, restriction: Restriction, selection: Selection, origin: TableOrigin) -> None:
    """Compute the table of the command line, or resume its computation."""
    device = causal_lm.find_device(options.device)
    texts, which = MaskedTexts.of(selection.flat, selection.lengths, selection.sentence, selection.position)
    facts = {
        "language_sha256": origin.language_sha256,
        "text_sha256": sha256(options.datafile),
        "sentences": len(selection.lengths),
        "chosen": selection.rule,
        "device": device,
    }
    columns = len(restriction.kept)
    model, _, digest = causal_lm.load_causal_lm(options.model_name, device, torch.float32)
    causal_lm.check_model(restriction, options.data_path, options.model_name, digest)
    joints = LogJoints(RestrictedLM.of(model, restriction), texts, options.batch_tokens)
    stored_bytes = 0 if origin.stored == "none" else np.dtype(origin.stored).itemsize
    check_space(options.save_path, 8 * joints.rows + stored_bytes * len(which) * columns)
    path = Path(options.save_path)
    with PartialArray(path.with_name(f"{path.name}.partial"), facts, joints.rows, options.overwrite) as partial:
        total = joints.operations(0, joints.rows)
        print(
            f"plan: {len(which):,} positions of {len(selection.lengths):,} sentences, {len(texts):,} of them different, "
            f"{columns:,} candidates each; {total:.2g} operations"
        )
        done = joints.operations(0, partial.done)
        if done:
            print(f"plan: {partial.done / joints.rows:.1%} of the candidates are computed already")
        try:
            with tqdm(total=total, initial=done, desc="conditionals", unit="op", unit_scale=True) as progress:
                for first, last, values in joints.compute_from(partial.done):
                    partial.append(values)
                    progress.update(joints.operations(first, last))
        except torch.OutOfMemoryError as error:
            raise InputError(f"--batch-tokens {joints.batch_tokens}: not enough memory on {device}; give fewer") from error
        blocks = table_blocks(partial.read().reshape(-1, columns), which, selection, origin.stored != "none")
        origin.write(path, restriction.pieces, len(selection.lengths), len(which), blocks)
    shutil.rmtree(partial.folder)


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    stored = stored_dtype(options)  # first, as it checks the files
    restriction = read_restriction(options.data_path)
    selection = select(options, restriction)
    language = "language model, or other kept tokens"
    digest = language_sha256(restriction)
    origin = TableOrigin(language, digest, options.datafile, stored, len(selection.lengths), selection.rule)
    if options.overwrite or not origin.is_complete(options.save_path):
        write_table(options, restriction, selection, origin)
    print_table(options.save_path)


if __name__ == "__main__":
    run_main(main)
