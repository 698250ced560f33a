"""Exact pre-training loss, entropy and gap of every model under a folder.

    python calculate_loss.py --model-path OUT --datafile pcfg_dataset/test0.txt --vocabfile vocab.txt --condprobfile LOOKUP

On a laptop, in a minute (the conditionals come from the grammar, without a lookup table file):

    python calculate_loss.py --model-path OUT --datafile pcfg_dataset/pcfg_B_validation.csv --vocabfile vocab.txt \\
        --rule-path rule_mini_mlm.txt

Whether two models have the same loss:

    python calculate_loss.py --compare OUT/A/step0001000 OUT/B/step0001000 (and the data as above)
    python calculate_loss.py --model-path OUT --compare-with OUT/B/step0001000 (every model under OUT with that one)

The loss is E[-sum_w P(w | x_-t) log f(x_-t)[w]] in nats over all positions, each masked alone (Liu et al. 2023, section 2).
Without conditionals: the plain MLM loss on HDF5 samples. Writes loss.json and loss.txt (one number, the mean over (sentence,
position) pairs) next to the weights. A comparison is in comparison_HASH.json next to the weights of the first model, with HASH
the first 12 digits of the SHA-256 of MODEL_B's weights. Under torchrun or the deepspeed launcher the ranks share the sentences.
"""

if __name__ == "__main__":
    import pcfg.common.start  # noqa: F401  before libraries, whose import takes seconds

import argparse
from pathlib import Path

from pcfg.common.cli import Parser, positive_int, run_main
from pcfg.common.files import InputError
from pretraining.evaluation.inputs import add_input_arguments, read_inputs
from pretraining.evaluation.loss import compare_models, measure_models
from pretraining.evaluation.records import record_folder
from pretraining.model.checkpoints import describe_model, is_model_folder, model_folders


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    add_input_arguments(parser, pairs=True)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the deepspeed launcher
    group = parser.add_argument_group("comparisons")
    group.add_argument(
        "--compare-with",
        metavar="MODEL_B",
        help="a model folder: instead of their losses, measure the differences of all models of --model-path to this one",
    )
    group = parser.add_argument_group("amount")
    group.add_argument("--nsamples", type=positive_int, help="sentences, the first of --datafile (default: all)")
    size = "masked sentences per forward pass; changes no result (default 256, for the cache of a CPU; on a GPU 8192)"
    group.add_argument("--batch-size", type=positive_int, help=size)
    return parser


def find_models(args: argparse.Namespace) -> tuple[list[tuple[Path, Path]], Path | None]:
    """The models to measure with the folders of their records, and the reference to compare them with, or None."""
    if args.compare and args.compare_with:
        raise InputError(f"--compare-with {args.compare_with}: goes with --model-path; --compare already names two models")
    flag = "--compare" if args.compare else "--compare-with"
    for folder in args.compare or filter(None, [args.compare_with]):
        if not is_model_folder(folder):
            raise InputError(f"{flag} {folder}: not a model folder")
    if args.compare:
        first, second = map(Path, args.compare)
        if describe_model(first) == describe_model(second):
            raise InputError(f"--compare {first} {second}: the same weights; give two models")
        return [(first, record_folder(first, first, args.records_path))], second
    models = [(folder, record_folder(folder, args.model_path, args.records_path)) for folder in model_folders(args.model_path)]
    return models, Path(args.compare_with) if args.compare_with else None


def main(arguments: list[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    models, reference = find_models(args)
    inputs = read_inputs(args, args.nsamples, for_loss=True)
    inputs.arguments = {} if args.nsamples is None else {"nsamples": args.nsamples}
    if reference is None:
        measure_models(models, inputs, args.device, args.batch_size, args.overwrite)
    else:
        compare_models(models, reference, inputs, args.device, args.batch_size, args.overwrite)


if __name__ == "__main__":
    run_main(main, ranks=True, memory="--batch-size")
