"""Common inputs of calculate_loss.py and calculate_hessian.py: models, sentences, a vocabulary, true conditionals."""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from pcfg.common.cli import RECORDS_HELP, folder_name
from pcfg.common.files import InputError, describe_file
from pcfg.common.text import read_texts
from pcfg.grammar import Grammar, find_rules
from pcfg.lookup import LookupTable
from pretraining.data.contexts import Contexts, check_words, from_samples, from_texts, table_columns
from pretraining.data.sample_shards import is_of_documents
from pretraining.data.vocabulary import Vocabulary, find_vocabulary
from pretraining.model.bert import MaskedLM
from pretraining.model.checkpoints import check_vocabulary, read_facts

HDF5_SUFFIXES = (".hdf5", ".h5")
# From contexts (m,) to probabilities of words, (m, vocab_size), on the device of the model.
Distribution = Callable[[np.ndarray], torch.Tensor]


def device(text: str) -> str:
    """An argparse type: a device of this machine."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text}: not a device of this machine ({str(error).splitlines()[0]})") from None
    return text


def add_input_arguments(parser: argparse.ArgumentParser, pairs: bool = False) -> None:
    """Add the flags that the measurements share; with `pairs` also --compare, instead of --model-path."""
    group = parser.add_argument_group("models and data")
    models = group.add_mutually_exclusive_group(required=True) if pairs else group
    models.add_argument("--model-path", required=not pairs, help="a model folder, or a folder with model folders at any depth")
    if pairs:
        two = "two model folders: the difference of their gaps, A's minus B's, on the same sentences"
        models.add_argument("--compare", nargs=2, metavar=("MODEL_A", "MODEL_B"), help=two)
    sentences = "sentences: a text shard (.txt), a labelled file (.csv), or masked samples (.hdf5)"
    group.add_argument("--datafile", required=True, help=sentences)
    vocabulary = "vocabulary of the models; a bare name is looked up next to --datafile first"
    group.add_argument("--vocabfile", required=True, help=vocabulary)
    truth = group.add_mutually_exclusive_group()
    table = "true conditionals of --datafile, made by python -m pcfg.lookup or pretraining.sources.opt.lookup"
    truth.add_argument("--condprobfile", help=table)
    truth.add_argument("--rule-path", help="grammar that gives the true conditionals, instead of --condprobfile")
    group = parser.add_argument_group("computation")
    group.add_argument("--records-path", type=folder_name, metavar="FOLDER", help=RECORDS_HELP)
    available = "cuda" if torch.cuda.is_available() else "cpu"
    group.add_argument("--device", type=device, default=available, help="cpu or cuda (default: cuda when available)")
    group.add_argument("--overwrite", action="store_true", help="measure again what is measured already (default: skip it)")


@dataclasses.dataclass
class Truth:
    """True conditionals of sentences."""

    table: LookupTable
    columns: np.ndarray  # (words,) int64, the vocabulary id of each word of the table

    def window(self, contexts: Contexts, low: int, high: int, model: MaskedLM) -> Distribution:
        """P at contexts (m,) of the sentences low .. high - 1: (m, vocab_size) float64 on the model's device."""
        rows = self.table.conditionals(low, high)
        offset = contexts.offsets[low]

        def distribution(batch: np.ndarray) -> torch.Tensor:
            full = np.zeros((len(batch), model.config.vocab_size))
            full[:, self.columns] = rows[batch - offset]
            return torch.from_numpy(full).to(next(model.parameters()).device)

        return distribution


@dataclasses.dataclass
class Inputs:
    """Sentences as contexts, with the true conditionals if they are known."""

    source: Path  # the data file
    vocabulary: Vocabulary  # of the models
    vocabulary_path: Path
    contexts: Contexts  # the sentences
    truth: Truth | None  # of the same sentences, or None
    described: dict[str, dict]  # hashes of these files, for records
    arguments: dict[str, int] = dataclasses.field(default_factory=dict)  # of a record of the loss

    def check(self, folder: Path) -> None:
        """Refuse a model with another vocabulary."""
        check_vocabulary(folder, self.vocabulary, self.vocabulary_path)


def model_label(folder: Path) -> str:
    """Name of a model in a record, which holds no paths: job and step."""
    facts = read_facts(folder)
    cooled = ", cooled" if facts.get("cooled") else ""
    return f"{facts['job_name']} step {facts['step']}{cooled}" if {"job_name", "step"} <= facts.keys() else folder.name


def _check_data(data: Path, is_exact: bool, needs_truth: bool) -> None:
    if not data.is_file():
        raise InputError(f"--datafile {data}: no such file")
    if data.suffix == ".txt" and is_of_documents(data.parent):
        raise InputError(
            f"--datafile {data}: natural text, which has no known true conditionals; make masked samples of it with "
            "generate_samples.py and give one of their files (test_shard_0.hdf5)"
        )
    if needs_truth and not is_exact and data.suffix not in HDF5_SUFFIXES:
        raise InputError(
            f"--datafile {data}: text needs the true conditionals: give --condprobfile or --rule-path "
            f"(or masked samples, {' or '.join(HDF5_SUFFIXES)}, for the plain MLM loss)"
        )


def read_inputs(arguments: argparse.Namespace, max_sentences: int | None = None, for_loss: bool = False) -> Inputs:
    """Read the files that the flags of `add_input_arguments` name, and check that they belong together.

    Args:
        max_sentences: read the first ones only; None for all. A lookup table of fewer sentences limits them further.
        for_loss: the exact loss needs true conditionals. A lookup table may then have some positions of each sentence only,
            which become the contexts.
    """
    data = Path(arguments.datafile)
    _check_data(data, bool(arguments.condprobfile or arguments.rule_path), for_loss)
    # Samples lie in a folder of their own inside that of the dataset.
    neighbours = [data.parent, data.resolve().parent.parent] if data.suffix in HDF5_SUFFIXES else [data.parent]
    vocabulary_path = find_vocabulary(arguments.vocabfile, neighbours)
    vocabulary = Vocabulary.read(vocabulary_path)
    described: dict[str, dict] = {"data": describe_file(data), "vocabulary": {"sha256": vocabulary.sha256}}
    if data.suffix in HDF5_SUFFIXES:
        if arguments.condprobfile or arguments.rule_path:
            flag = "--condprobfile" if arguments.condprobfile else "--rule-path"
            raise InputError(f"{flag}: true conditionals are for sentences with one mask, not for the samples in {data}")
        contexts = from_samples(data, vocabulary, max_sentences)
        return Inputs(data, vocabulary, vocabulary_path, contexts, None, described)
    texts = read_texts(data)[:max_sentences]
    table = truth = None
    if arguments.condprobfile:
        source = arguments.condprobfile
        table = LookupTable.open(source)
        table.check_text(data)
        if not for_loss:
            table.check_positions()
        if table.sentences < len(texts):
            print(f"{source}: has the first {table.sentences:,} of {len(texts):,} sentences; only these are measured")
            texts = texts[: table.sentences]
    elif arguments.rule_path:
        source = find_rules(arguments.rule_path)
        table = LookupTable.compute(Grammar.read(source), texts, data)
    contexts = from_texts(texts, vocabulary, data, table)
    if table is not None:
        described["conditionals"] = {"grammar_sha256": table.grammar_sha256}
        if table.chosen is not None:  # some positions only
            described["conditionals"] |= {"chosen": table.chosen, "sentences": table.sentences}
        truth = Truth(table, table_columns(table, vocabulary, source))
        check_words(table, contexts, truth.columns, source)
    return Inputs(data, vocabulary, vocabulary_path, contexts, truth, described)
