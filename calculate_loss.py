"""Exact pre-training loss, entropy and gap of every model under a folder.

    python calculate_loss.py --model-path OUT --datafile pcfg_dataset/test0.txt --vocabfile vocab.txt --condprobfile LOOKUP

A laptop's version, with the conditionals computed on the way (no lookup table file needed):

    python calculate_loss.py --model-path OUT --datafile pcfg_dataset/pcfg_B_validation.csv --vocabfile vocab.txt \\
        --rule-path rule_mini_mlm.txt

Whether two models have the same loss:

    python calculate_loss.py --compare OUT/A/step0001000 OUT/B/step0001000 (and the data as above)
    python calculate_loss.py --model-path OUT --compare-with OUT/B/step0001000 (every model under OUT with that one)

The loss is E[-sum_w P(w | x_-t) log f(x_-t)[w]] in nats over all positions, each masked alone (Liu et al. 2023, section 2); the
gap to the entropy is the mean of KL(P || f), computed as such; standard errors are over sentences. Without conditionals: the
plain MLM loss on HDF5 samples. --compare: the mean of each context's difference of the two gaps (a paired comparison).
Writes loss.json and loss.txt (one number, the mean over (sentence, position) pairs) beside the weights; --compare writes
comparison_HASH.json beside MODEL_A's, HASH being the first 12 digits of the SHA-256 of MODEL_B's weights; --compare-with writes
the same beside each model, and measures the one they are compared with once.
"""

import argparse
from pathlib import Path

from pcfg.common.cli import Parser, positive_int, run_main
from pcfg.common.files import InputError
from pretraining.evaluation.inputs import HDF5_SUFFIXES, Inputs, add_input_arguments, read_inputs, refuse_natural_text
from pretraining.evaluation.loss import compare_losses, context_losses, measure_loss
from pretraining.evaluation.records import ComparisonRecord, LossRecord, is_measured, write_record
from pretraining.model.checkpoints import (
    check_vocabulary,
    describe_model,
    is_model_folder,
    load_model,
    model_folders,
    read_facts,
)

RECORD = "loss.json"


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    add_input_arguments(parser, pairs=True)
    group = parser.add_argument_group("comparisons")
    group.add_argument(
        "--compare-with",
        metavar="MODEL_B",
        help="a model folder: instead of their losses, measure the differences of all models of --model-path to this one",
    )
    group = parser.add_argument_group("how much at a time")
    group.add_argument(
        "--batch-size",
        type=positive_int,
        default=256,
        help="masked sentences a forward pass (default 256, what fits into a CPU's cache; a GPU takes thousands); results "
        "don't depend on it",
    )
    return parser


def _number(means: dict, digits: int = 4) -> str:
    return f"{means['mean']:.{digits}f} +- {means['standard_error']:.{digits}f}"


def describe(details: dict, natural: bool = False) -> str:
    """One line of results, in nats; `natural` for those on natural text."""
    if "gap" not in details:
        why = "; natural text, no exact entropy exists for this data" if natural else ""
        return f"MLM loss {_number(details['sampled_loss']['pairs'])} (masked positions){why}"
    loss, entropy = (details[name]["pairs"]["mean"] for name in ("loss", "entropy"))
    gap = details["gap"]
    return (
        f"loss {loss:.4f}, entropy {entropy:.4f}, gap {_number(gap['pairs'])} (pairs); "
        f"gap {_number(gap['sentences'])} (sentences)"
    )


def _measurement(args: argparse.Namespace, inputs: Inputs) -> tuple:
    """What `measure_loss` and `compare_losses` take after the model."""
    return inputs.contexts, inputs.table, inputs.columns, args.batch_size, args.datafile


def measure(folder: Path, args: argparse.Namespace, inputs: Inputs) -> None:
    """Measure the model in `folder`, unless it is measured."""
    check_vocabulary(folder, inputs.vocabulary, inputs.vocabulary_path)
    described = {**inputs.described, "model": describe_model(folder)}
    if is_measured(folder, RECORD, described, {}, args.overwrite):
        print(f"{folder}: loss is measured already, skipped")
        return
    details = measure_loss(load_model(folder, args.device), *_measurement(args, inputs))
    mean = details.get("loss", details["sampled_loss"])["pairs"]
    record = LossRecord(
        value=mean["mean"],
        standard_error=mean["standard_error"],
        n=details["sentences"],
        unit="nats",
        inputs=described,
        arguments={},
        device=args.device,
        **details,
    )
    write_record(folder, RECORD, record, number_file=True)
    print(f"{folder}: {describe(details, inputs.contexts.natural)}")


def _label(folder: Path) -> str:
    """A model's name in a record, which holds no paths."""
    facts = read_facts(folder)
    return f"{facts['job_name']} step {facts['step']}" if {"job_name", "step"} <= facts.keys() else folder.name


class Reference:
    """The model that others are compared with; it is measured when the first of them is, and once."""

    def __init__(self, folder: Path, args: argparse.Namespace, inputs: Inputs):
        self.folder, self._args, self._inputs, self._losses = folder, args, inputs, None
        check_vocabulary(folder, inputs.vocabulary, inputs.vocabulary_path)
        self.described = describe_model(folder)

    def losses(self) -> tuple:
        """What `context_losses` gives for it."""
        if self._losses is None:
            model = load_model(self.folder, self._args.device)
            self._losses = context_losses(model, *_measurement(self._args, self._inputs))
        return self._losses


def compare(folder: Path, reference: Reference, args: argparse.Namespace, inputs: Inputs) -> None:
    """Compare the model in `folder` with the reference, unless it was done."""
    check_vocabulary(folder, inputs.vocabulary, inputs.vocabulary_path)
    described = {**inputs.described, "model": describe_model(folder), "other": reference.described}
    name = f"comparison_{reference.described['sha256'][:12]}.json"
    if is_measured(folder, name, described, {}, args.overwrite):
        print(f"{folder}: comparison with {reference.folder} is measured already, skipped")
        return
    models = load_model(folder, args.device), reference.losses()
    details = compare_losses(models, *_measurement(args, inputs))
    difference = details["difference"]
    record = ComparisonRecord(
        value=difference["pairs"]["mean"],
        standard_error=difference["pairs"]["standard_error"],
        n=details["sentences"],
        unit="nats",
        inputs=described,
        arguments={},
        device=args.device,
        models=[_label(model) for model in (folder, reference.folder)],
        **details,
    )
    write_record(folder, name, record)
    what = "gap" if "gap_a" in details else "loss"
    for letter, model in zip("ab", (folder, reference.folder), strict=True):
        print(f"{model}: {what} {_number(details[f'{what}_{letter}']['pairs'])} (pairs)")
    print(f"difference {_number(difference['pairs'], 6)} (pairs), {_number(difference['sentences'], 6)} (sentences)")


def compare_all(folders: list[Path], reference: Reference, args: argparse.Namespace, inputs: Inputs) -> None:
    """Compare all models with the reference, but for those of its own weights."""
    for folder in folders:
        if describe_model(folder) == reference.described:
            same = "is the model to compare with" if folder.samefile(reference.folder) else "has the same weights as that model"
            print(f"{folder}: {same}, skipped")
        else:
            compare(folder, reference, args, inputs)


def _folders(args: argparse.Namespace) -> tuple[list[Path], Path | None]:
    """The models to measure, and the one to compare them with, if any.

    Raises:
        InputError: one is not a model folder, or flags exclude each other.
    """
    if args.compare and args.compare_with:
        raise InputError(f"--compare-with {args.compare_with}: goes with --model-path; --compare already names two models")
    flag, named = ("--compare", args.compare) if args.compare else ("--compare-with", [args.compare_with])
    for folder in filter(None, named):
        if not is_model_folder(folder):
            raise InputError(f"{flag} {folder}: not a model folder")
    if args.compare:
        first, second = map(Path, args.compare)
        if describe_model(first) == describe_model(second):
            raise InputError(f"--compare {first} {second}: the same weights; give two models")
        return [first], second
    return model_folders(args.model_path), args.compare_with and Path(args.compare_with)


def main(arguments: list[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    folders, reference = _folders(args)
    refuse_natural_text(Path(args.datafile))
    if not (args.condprobfile or args.rule_path) and Path(args.datafile).suffix not in HDF5_SUFFIXES:
        raise InputError(
            f"--datafile {args.datafile}: text needs the true conditionals: give --condprobfile or --rule-path "
            f"(or masked samples, {' or '.join(HDF5_SUFFIXES)}, for the plain MLM loss)"
        )
    inputs = read_inputs(args, some_positions=True)
    if reference is not None:
        compare_all(folders, Reference(reference, args, inputs), args, inputs)
        return
    for folder in folders:
        measure(folder, args, inputs)


if __name__ == "__main__":
    run_main(main)
