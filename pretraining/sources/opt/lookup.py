"""The lookup table of a language model's text: the exact P(x_t = w | x_-t), as `python -m pcfg.lookup` makes it of a grammar's.

    python -m pretraining.sources.opt.lookup --data-path opt_dataset --model-name facebook/opt-125m \\
        --datafile opt_dataset/test0.txt --save-path lookup.hdf5 --max-sentences 1000 --positions-per-sentence 2

That takes hours on a CPU, about 4e12 operations per position (`pretraining.sources.opt.conditionals` has the formula). On a
laptop, take the text of a small model, or fewer sentences. The number of operations is printed first; the progress bar has
the measured rate.

--max-sentences takes the first sentences of the text, which were drawn independently of each other: they are as good as any.
--positions-per-sentence takes K positions of each by chance, a function of (--seed, number of the sentence); fewer positions
of more sentences give a smaller error for the same work. Contexts that are the same are computed once.

What is computed is kept in a folder beside the table, FILE.partial, and written to the disk every 20 seconds; the same command
goes on there after an interruption. The table, `pcfg.lookup`, is made from it at the end, complete or absent.
"""

import argparse
import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from pcfg.common.cli import Parser, non_negative_int, positive_int, run_main
from pcfg.common.files import InputError, check_space, keyed_rng, sha256
from pcfg.common.text import read_texts
from pcfg.common.words import WordIndex
from pcfg.lookup import ELSEWHERE, add_file_arguments, find_made, print_table, table_file, table_shapes, wanted_storage
from pretraining.sources.opt.causal_lm import RestrictedLM, Restriction, find_device, read_restriction
from pretraining.sources.opt.conditionals import LogJoints, MaskedTexts, conditionals
from pretraining.sources.opt.partial import PartialArray

# Contexts of which the conditionals are in memory at a time: 64 MiB of float64 at 2,000 words.
BLOCK_CONTEXTS = 4096


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Sentences and their chosen positions.

    Args:
        flat: (N,) int32 columns of all tokens, one sentence after the other; lengths: (n,) int64.
        counts: (n,) int64, chosen positions of each; sentence, position: (M,) int64, each of them, ascending.
        how: for the table's attribute `chosen`; None if all positions are.
    """

    flat: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray
    sentence: np.ndarray
    position: np.ndarray
    how: dict | None

    @property
    def true_words(self) -> np.ndarray:
        """(M,) int32, the column of the token at each chosen position."""
        return self.flat[(np.cumsum(self.lengths) - self.lengths)[self.sentence] + self.position]


def why_unknown(word: str) -> str:  # noqa: ARG001 (the reason is the same for every word)
    """Why a word of the text is refused."""
    return "is none of the kept tokens; give the --data-path that the text was made in"


def choose(datafile, restriction: Restriction, max_sentences: int | None, positions: int | None, seed: int) -> Chosen:
    """The sentences and positions that are asked for.

    Raises:
        InputError: the file can't be read; a word that is no piece, or a sentence that is too long, with its number.
    """
    texts = read_texts(datafile)[:max_sentences]
    flat, lengths = WordIndex(restriction.pieces, why_unknown).encode_texts(texts, datafile)
    lengths = lengths.astype(np.int64)
    long = np.flatnonzero(lengths > restriction.max_tokens)
    if len(long):
        raise InputError(
            f"{datafile}: sentence {long[0] + 1}: {lengths[long[0]]} tokens, but the language has at most "
            f"{restriction.max_tokens}; give a text of this language"
        )
    if lengths.max() > 255:
        raise InputError(f"{datafile}: a sentence of {lengths.max()} tokens; a lookup table takes at most 255")
    chosen = [np.arange(length) for length in lengths.tolist()]
    if positions is not None:
        rngs = (keyed_rng(seed, "lookup positions", number) for number in range(len(chosen)))
        chosen = [np.sort(rng.permutation(places)[:positions]) for rng, places in zip(rngs, chosen, strict=True)]
    counts = np.array([len(places) for places in chosen])
    how = None if positions is None else {"positions_per_sentence": positions, "seed": seed}
    return Chosen(flat, lengths, counts, np.repeat(np.arange(len(texts)), counts), np.concatenate(chosen), how)


def language_sha256(restriction: Restriction) -> str:
    """Of what decides the distribution: the model, the kept tokens, start and end token, the longest sentence."""
    facts = [restriction.model_sha256, restriction.kept, restriction.start_id, restriction.end_id, restriction.max_tokens]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def print_plan(joints: LogJoints, chosen: Chosen, done: int) -> None:
    """Print the number of operations, and how much of the work an interrupted command did; the progress bar has the rate."""
    print(
        f"plan: {len(chosen.sentence):,} positions of {len(chosen.lengths):,} sentences, {len(joints.texts):,} of them "
        f"different, {joints.words:,} candidates each; {joints.operations(0, joints.rows):.2g} operations"
    )
    if done:
        print(f"plan: {done / joints.rows:.1%} of the candidates are computed already")


def compute(joints: LogJoints, partial: PartialArray) -> None:
    """Compute the rows that a partial array lacks."""
    total = joints.operations(0, joints.rows)
    done = joints.operations(0, partial.done) if partial.done else 0.0
    with tqdm(total=total, initial=done, desc="conditionals", unit="op", unit_scale=True) as progress:
        for first, last, values in joints.compute_from(partial.done):
            partial.append(values)
            progress.update(joints.operations(first, last))


def write_table(
    path, log_joint: np.ndarray, which: np.ndarray, chosen: Chosen, pieces: list[str], stored: str, **about
) -> None:
    """Write the lookup table from log J.

    Args:
        log_joint: (U, V) float64; which: (M,) the row of each chosen position.
        about: of `table_file`.
    """
    shapes = table_shapes(len(chosen.lengths), len(which), len(pieces), stored, chosen.how is not None)
    true_words = chosen.true_words
    with table_file(path, pieces, shapes, chosen=chosen.how, **about) as file:
        file["lengths"][:], file["true_words"][:] = chosen.lengths, true_words
        if chosen.how is not None:
            file["counts"][:], file["positions"][:] = chosen.counts, chosen.position
        for first in range(0, len(which), BLOCK_CONTEXTS):
            rows = slice(first, min(first + BLOCK_CONTEXTS, len(which)))
            p, log_p = conditionals(log_joint[which[rows]])
            file["entropy"][rows] = -np.sum(p * log_p, axis=1)
            file["log_true"][rows] = log_p[np.arange(len(p)), true_words[rows]]
            if stored != "none":
                file["conditionals"][rows] = p


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m pretraining.sources.opt.lookup", description=__doc__)
    source = parser.add_argument_group("input")
    source.add_argument("--data-path", required=True, help="folder of the text, with its top_tokens.json")
    source.add_argument("--model-name", required=True, help="the model that the text was made with: a folder, or a hub name")
    source.add_argument("--max-sentences", type=positive_int, help="take the first N sentences; default: all")
    source.add_argument(
        "--positions-per-sentence", type=positive_int, metavar="K", help="take K positions of each by chance; default: all"
    )
    source.add_argument("--seed", type=non_negative_int, default=0, help="of the choice of positions; default 0")
    add_file_arguments(source, parser)
    running = parser.add_argument_group("running")
    running.add_argument("--device", choices=("cpu", "cuda"), help="where the model runs; default: cuda if it is there")
    running.add_argument(
        "--batch-tokens", type=positive_int, help="tokens a forward pass, of all its candidates; default 1024, on cuda 65536"
    )
    return parser


def _is_complete(options: argparse.Namespace, language: str, chosen: Chosen, stored: str) -> bool:
    """Whether the table is there already; InputError if something else is."""
    table = find_made(options.save_path, language, options.datafile, stored, "language model, or other kept tokens")
    if table is None:
        return False
    if table.chosen != chosen.how or table.sentences != len(chosen.lengths):
        raise InputError(
            f"{options.save_path}: made with other sentences or positions ({table.sentences:,} sentences, {table.positions:,} "
            f"positions; now {len(chosen.lengths):,} and {len(chosen.sentence):,}); {ELSEWHERE}"
        )
    return True


def make(options: argparse.Namespace, restriction: Restriction, chosen: Chosen, stored: str) -> None:
    """Compute the table that the command line asks for, or go on with it."""
    language, device = language_sha256(restriction), find_device(options.device)
    texts, which = MaskedTexts.of(chosen.flat, chosen.lengths, chosen.sentence, chosen.position)
    facts = {
        "language_sha256": language,
        "text_sha256": sha256(options.datafile),
        "sentences": len(chosen.lengths),
        "chosen": chosen.how,
        "device": device,
    }
    columns = len(restriction.kept)
    restricted = RestrictedLM.from_folder(options.data_path, options.model_name, device, torch.float32)
    joints = LogJoints(restricted, texts, options.batch_tokens)
    stored_bytes = {"none": 0, "float16": 2, "float32": 4}[stored]
    check_space(options.save_path, 8 * joints.rows + stored_bytes * len(which) * columns)
    path = Path(options.save_path)
    with PartialArray(path.with_name(f"{path.name}.partial"), facts, joints.rows, options.overwrite) as partial:
        try:
            print_plan(joints, chosen, partial.done)
            compute(joints, partial)
        except torch.OutOfMemoryError as error:
            raise InputError(f"--batch-tokens {joints.batch_tokens}: not enough memory on {device}; give fewer") from error
        about = {"datafile": options.datafile, "language_sha256": language}
        write_table(path, partial.read().reshape(-1, columns), which, chosen, restriction.pieces, stored, **about)
    shutil.rmtree(partial.folder)


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    stored = wanted_storage(options)
    restriction = read_restriction(options.data_path)
    chosen = choose(options.datafile, restriction, options.max_sentences, options.positions_per_sentence, options.seed)
    if not options.overwrite and _is_complete(options, language_sha256(restriction), chosen, stored):
        print(f"{options.save_path}: skipped, complete already")
    else:
        make(options, restriction, chosen, stored)
    print_table(options.save_path)


if __name__ == "__main__":
    run_main(main)
