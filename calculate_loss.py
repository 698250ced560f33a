"""Exact pre-training loss, entropy and gap of every model under a folder.

    python calculate_loss.py --model-path OUT --datafile pcfg_dataset/test0.txt --vocabfile vocab.txt --condprobfile LOOKUP

A laptop's version, with the conditionals computed on the way (no lookup table file needed):

    python calculate_loss.py --model-path OUT --datafile pcfg_dataset/pcfg_B_validation.csv --vocabfile vocab.txt \\
        --rule-path rule_mini_mlm.txt

The loss is E[-sum_w P(w | x_-t) log f(x_-t)[w]] in nats over all positions, each masked alone (Liu et al. 2023, section 2); the
gap to the entropy is the mean KL divergence, computed as such. Without conditionals: the plain MLM loss on HDF5 samples.
Writes loss.json and loss.txt (one number, the mean over (sentence, position) pairs) beside the weights.
"""

import argparse
from pathlib import Path

from pcfg.artefacts import InputError
from pcfg.cli import positive_int, run_main
from pretraining.evaluation.inputs import HDF5_SUFFIXES, add_input_arguments, read_inputs
from pretraining.evaluation.loss import measure_loss
from pretraining.evaluation.records import describe_model, is_measured, write_record
from pretraining.model.checkpoints import check_vocabulary, load_model, model_folders

RECORD = "loss.json"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_input_arguments(parser)
    group = parser.add_argument_group("how much at a time")
    group.add_argument("--batch-size", type=positive_int, default=1024, help="masked sentences a forward pass (default 1024)")
    return parser


def describe(details: dict) -> str:
    """One line of results, in nats."""
    if "gap" not in details:
        means = details["sampled_loss"]["pairs"]
        return f"MLM loss {means['mean']:.4f} +- {means['standard_error']:.4f} (masked positions)"
    loss, entropy, gap = (details[name]["pairs"]["mean"] for name in ("loss", "entropy", "gap"))
    by_sentence = details["gap"]["sentences"]
    return (
        f"loss {loss:.4f}, entropy {entropy:.4f}, gap {gap:.4f} +- {details['gap']['pairs']['standard_error']:.4f} (pairs); "
        f"gap {by_sentence['mean']:.4f} +- {by_sentence['standard_error']:.4f} (sentences)"
    )


def main(arguments: list[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    folders = model_folders(args.model_path)
    if not (args.condprobfile or args.rule_path) and Path(args.datafile).suffix not in HDF5_SUFFIXES:
        raise InputError(
            f"--datafile {args.datafile}: text needs the true conditionals: give --condprobfile or --rule-path "
            f"(or masked samples, {' or '.join(HDF5_SUFFIXES)}, for the plain MLM loss)"
        )
    inputs = read_inputs(args)
    for folder in folders:
        check_vocabulary(folder, inputs.vocabulary, inputs.vocabulary_path)
        described = {**inputs.described, "model": describe_model(folder)}
        if is_measured(folder, RECORD, described, {}, args.overwrite):
            print(f"{folder}: loss is measured already, skipped")
            continue
        model = load_model(folder, args.device)
        details = measure_loss(model, inputs.contexts, inputs.table, inputs.columns, args.batch_size, args.datafile)
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


if __name__ == "__main__":
    run_main(main)
