"""What calculate_loss.py and calculate_hessian.py are given: models, sentences, a vocabulary and true conditionals."""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch

from pcfg.common.files import InputError, describe_file
from pcfg.common.text import read_texts
from pcfg.grammar import Grammar, find_rules
from pcfg.lookup import LookupTable
from pretraining.data.contexts import Contexts, check_words, from_samples, from_texts, table_columns
from pretraining.data.sample_shards import is_of_documents
from pretraining.data.vocabulary import Vocabulary, find_vocabulary

HDF5_SUFFIXES = (".hdf5", ".h5")


def device(text: str) -> str:
    """An argparse type: a device that this machine has."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text}: not a device of this machine ({str(error).splitlines()[0]})") from None
    return text


def add_input_arguments(parser: argparse.ArgumentParser, pairs: bool = False) -> None:
    """The flags that the measurements share; with `pairs` also --compare, in place of --model-path."""
    group = parser.add_argument_group("what is measured, and on what")
    models = group.add_mutually_exclusive_group(required=True) if pairs else group
    models.add_argument(
        "--model-path", required=not pairs, help="a model folder, or a folder that holds model folders at any depth"
    )
    if pairs:
        models.add_argument(
            "--compare",
            nargs=2,
            metavar=("MODEL_A", "MODEL_B"),
            help="two model folders: the difference of their gaps, A's minus B's, on the same sentences",
        )
    group.add_argument(
        "--datafile",
        required=True,
        help="sentences: a text shard (.txt), a labelled file (.csv), or masked samples (.hdf5)",
    )
    group.add_argument(
        "--vocabfile", required=True, help="the models' vocabulary; a bare name is looked up beside --datafile first"
    )
    truth = group.add_mutually_exclusive_group()
    truth.add_argument(
        "--condprobfile",
        help="true conditionals of --datafile, made by python -m pcfg.lookup or pretraining.sources.opt.lookup",
    )
    truth.add_argument("--rule-path", help="grammar to compute the true conditionals with, instead of --condprobfile")
    group = parser.add_argument_group("how it runs")
    group.add_argument(
        "--device",
        type=device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda (default: cuda if it is there)",
    )
    group.add_argument("--overwrite", action="store_true", help="measure again what is measured already (default: skip it)")


@dataclasses.dataclass
class Inputs:
    """Sentences as contexts, with the true conditionals where they were given."""

    vocabulary: Vocabulary
    vocabulary_path: Path
    contexts: Contexts
    table: LookupTable | None
    columns: np.ndarray | None
    described: dict


def _open_table(path, data: Path, some_positions: bool) -> LookupTable:
    """The lookup table of a text."""
    table = LookupTable.open(path)
    table.check_text(data)
    if not some_positions:
        table.check_positions()
    return table


def refuse_natural_text(data: Path) -> None:
    """Refuse a text shard of documents: what is measured on it are the samples that it is packed into."""
    if data.suffix == ".txt" and is_of_documents(data.parent):
        raise InputError(
            f"--datafile {data}: natural text, which no true conditionals are known of; make masked samples of it with "
            "generate_samples.py and give one of their files (test_shard_0.hdf5)"
        )


def _describe_table(table) -> dict:
    """What a record says of a lookup table: of what language, and of which positions, if it has some only."""
    described = {"grammar_sha256": table.grammar_sha256}
    return described if table.chosen is None else {**described, "chosen": table.chosen, "sentences": table.sentences}


def read_inputs(arguments: argparse.Namespace, max_sentences: int | None = None, some_positions: bool = False) -> Inputs:
    """Read what the flags of `add_input_arguments` name, and check that it belongs together.

    Args:
        max_sentences: take the first ones only; None for all. A lookup table of fewer sentences has the last word.
        some_positions: whether a lookup table may have some positions of each sentence only, which are then the contexts.

    Raises:
        InputError: a file is missing, malformed, or made from or for something else than the others.
    """
    data = Path(arguments.datafile)
    if not data.is_file():
        raise InputError(f"--datafile {data}: no such file")
    refuse_natural_text(data)
    # Samples lie in a folder of their own inside the dataset's.
    beside = [data.parent, data.resolve().parent.parent] if data.suffix in HDF5_SUFFIXES else [data.parent]
    vocabulary_path = find_vocabulary(arguments.vocabfile, beside)
    vocabulary = Vocabulary.read(vocabulary_path)
    described = {"data": describe_file(data), "vocabulary": {"sha256": vocabulary.sha256}}
    if data.suffix in HDF5_SUFFIXES:
        if arguments.condprobfile or arguments.rule_path:
            flag = "--condprobfile" if arguments.condprobfile else "--rule-path"
            raise InputError(f"{flag}: true conditionals are for sentences with one mask, not for the samples in {data}")
        contexts = from_samples(data, vocabulary, max_sentences)
        return Inputs(vocabulary, vocabulary_path, contexts, None, None, described)
    texts = read_texts(data)[:max_sentences]
    table = columns = None
    if arguments.condprobfile:
        source = arguments.condprobfile
        table = _open_table(source, data, some_positions)
        if table.sentences < len(texts):
            print(f"{source}: has the first {table.sentences:,} of {len(texts):,} sentences; these are measured")
            texts = texts[: table.sentences]
    elif arguments.rule_path:
        source = find_rules(arguments.rule_path)
        grammar = Grammar.read(source)
        table = LookupTable.compute(grammar, texts, data)
    contexts = from_texts(texts, vocabulary, data, table)
    if table is not None:
        described["conditionals"] = _describe_table(table)
        columns = table_columns(table, vocabulary, source)
        check_words(table, contexts, columns, source)
    return Inputs(vocabulary, vocabulary_path, contexts, table, columns, described)
