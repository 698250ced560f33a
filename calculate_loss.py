"""Exact pre-training loss, entropy and gap of every model under a folder.

    python calculate_loss.py --model-path OUT --datafile pcfg_dataset/test0.txt --vocabfile vocab.txt --condprobfile LOOKUP

A laptop's version, with the conditionals computed on the way (no lookup table file needed):

    python calculate_loss.py --model-path OUT --datafile pcfg_dataset/pcfg_B_validation.csv --vocabfile vocab.txt \\
        --rule-path rule_mini_mlm.txt

Whether two models have the same loss:

    python calculate_loss.py --compare OUT/A/step0001000 OUT/B/step0001000 (and the data as above)

The loss is E[-sum_w P(w | x_-t) log f(x_-t)[w]] in nats over all positions, each masked alone (Liu et al. 2023, section 2); the
gap to the entropy is the mean of KL(P || f), computed as such; standard errors are over sentences. Without conditionals: the
plain MLM loss on HDF5 samples. --compare: the mean of each context's difference of the two gaps (a paired comparison).
Writes loss.json and loss.txt (one number, the mean over (sentence, position) pairs) beside the weights; --compare writes
comparison_HASH.json beside MODEL_A's, HASH being the first 12 digits of the SHA-256 of MODEL_B's weights.
"""

import argparse
from pathlib import Path

from pcfg.artefacts import InputError
from pcfg.cli import positive_int, run_main
from pretraining.evaluation.inputs import HDF5_SUFFIXES, Inputs, add_input_arguments, read_inputs
from pretraining.evaluation.loss import compare_losses, measure_loss
from pretraining.evaluation.records import describe_model, is_measured, write_record
from pretraining.model.checkpoints import check_vocabulary, is_model_folder, load_model, model_folders, read_facts

RECORD = "loss.json"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_input_arguments(parser, pairs=True)
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


def describe(details: dict) -> str:
    """One line of results, in nats."""
    if "gap" not in details:
        return f"MLM loss {_number(details['sampled_loss']['pairs'])} (masked positions)"
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
    write_record(
        folder,
        RECORD,
        measurement="loss",
        value=mean["mean"],
        standard_error=mean["standard_error"],
        n=details["sentences"],
        unit="nats",
        inputs=described,
        arguments={},
        device=args.device,
        number_file=True,
        **details,
    )
    print(f"{folder}: {describe(details)}")


def _label(folder: Path) -> str:
    """A model's name in a record, which holds no paths."""
    facts = read_facts(folder)
    return f"{facts['job_name']} step {facts['step']}" if {"job_name", "step"} <= facts.keys() else folder.name


def compare(folders: list[Path], args: argparse.Namespace, inputs: Inputs) -> None:
    """Compare two models, unless it was done.

    Raises:
        InputError: their weights are the same.
    """
    for folder in folders:
        check_vocabulary(folder, inputs.vocabulary, inputs.vocabulary_path)
    first, second = (describe_model(folder) for folder in folders)
    if first == second:
        raise InputError(f"--compare {folders[0]} {folders[1]}: the same weights; give two models")
    described = {**inputs.described, "model": first, "other": second}
    name = f"comparison_{second['sha256'][:12]}.json"
    if is_measured(folders[0], name, described, {}, args.overwrite):
        print(f"{folders[0]}: comparison with {folders[1]} is measured already, skipped")
        return
    details = compare_losses([load_model(folder, args.device) for folder in folders], *_measurement(args, inputs))
    difference = details["difference"]
    write_record(
        folders[0],
        name,
        measurement="comparison",
        value=difference["pairs"]["mean"],
        standard_error=difference["pairs"]["standard_error"],
        n=details["sentences"],
        unit="nats",
        inputs=described,
        arguments={},
        device=args.device,
        models=[_label(folder) for folder in folders],
        **details,
    )
    what = "gap" if "gap_a" in details else "loss"
    for letter, folder in zip("ab", folders, strict=True):
        print(f"{folder}: {what} {_number(details[f'{what}_{letter}']['pairs'])} (pairs)")
    print(f"difference {_number(difference['pairs'], 6)} (pairs), {_number(difference['sentences'], 6)} (sentences)")


def main(arguments: list[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    if args.compare:
        folders = [Path(folder) for folder in args.compare]
        for folder in folders:
            if not is_model_folder(folder):
                raise InputError(f"--compare {folder}: not a model folder")
    else:
        folders = model_folders(args.model_path)
    if not (args.condprobfile or args.rule_path) and Path(args.datafile).suffix not in HDF5_SUFFIXES:
        raise InputError(
            f"--datafile {args.datafile}: text needs the true conditionals: give --condprobfile or --rule-path "
            f"(or masked samples, {' or '.join(HDF5_SUFFIXES)}, for the plain MLM loss)"
        )
    inputs = read_inputs(args)
    if args.compare:
        compare(folders, args, inputs)
        return
    for folder in folders:
        measure(folder, args, inputs)


if __name__ == "__main__":
    run_main(main)
