"""Trace of the Hessian of the pre-training loss at every model under a folder.

    python calculate_hessian.py --model-path OUT --datafile pcfg_dataset/test0.txt --vocabfile vocab.txt --condprobfile LOOKUP

A laptop's version: fewer sentences (the standard error grows as one over the root of their number):

    python calculate_hessian.py --model-path OUT --datafile pcfg_dataset/test0.txt --vocabfile vocab.txt --nsamples 64

fisher: E_{x,t} E_{w ~ f(x_-t)} ||grad log f(x_-t)[w]||^2, labels drawn from the model (Liu et al. 2023, appendix B.1): the
trace at a model that equals the true distribution. It needs no conditionals: a table that is given is only checked.
hutchinson: E_v[v^T H v] (Hutchinson 1990), the trace at any model; true conditionals, if given, replace the drawn words.
Writes hessian.json and hessian.txt (hutchinson: hessian_hutchinson.json and .txt) beside the weights.
"""

import argparse
from pathlib import Path

from pcfg.artefacts import InputError, sha256
from pcfg.cli import non_negative_int, positive_int, run_main
from pretraining.evaluation.hessian import fisher_trace, hutchinson_trace
from pretraining.evaluation.inputs import add_input_arguments, read_inputs
from pretraining.evaluation.records import is_measured, write_record
from pretraining.model.checkpoints import check_vocabulary, is_model_folder, load_model, model_folders, weights_file

RECORDS = {"fisher": "hessian.json", "hutchinson": "hessian_hutchinson.json"}
DEFAULT_DRAWS = {"fisher": 1, "hutchinson": 4}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_input_arguments(parser)
    group = parser.add_argument_group("estimator")
    group.add_argument("--estimator", choices=RECORDS, default="fisher", help="see above (default fisher)")
    group.add_argument(
        "--nsamples",
        type=positive_int,
        default=512,
        help="sentences, the first of --datafile (default 512; fewer if it has fewer)",
    )
    group.add_argument(
        "--draws",
        type=positive_int,
        help="labels drawn at each position (fisher, default 1), probes a block (hutchinson, default 4)",
    )
    group.add_argument(
        "--bs",
        type=positive_int,
        default=32,
        help="positions at a time (fisher), sentences a block (hutchinson) (default 32)",
    )
    group.add_argument("--seed", type=non_negative_int, default=0, help="of the drawn labels and probes (default 0)")
    group.add_argument(
        "--loadpath",
        help="other weights (a file, or a folder with model.safetensors or pytorch_model.bin) of the shape of the one model "
        "folder --model-path; the results go beside them (default: the folder's own)",
    )
    return parser


def find_weights(args: argparse.Namespace) -> list[tuple[Path, Path, Path]]:
    """(model folder, weights file, folder for the results) of every model to measure.

    Raises:
        InputError: --loadpath has no weights, or --model-path is not one model folder beside it.
    """
    if args.loadpath is None:
        return [(folder, weights_file(folder), folder) for folder in model_folders(args.model_path)]
    weights = Path(args.loadpath)
    weights = weights_file(weights) if weights.is_dir() else weights
    if not weights.is_file():
        raise InputError(f"--loadpath {args.loadpath}: no weights there ({weights} is missing)")
    if not is_model_folder(args.model_path):
        raise InputError(f"--model-path {args.model_path}: with --loadpath it must be one model folder, for its configuration")
    return [(Path(args.model_path), weights, weights.parent)]


def estimate(args: argparse.Namespace, model, inputs) -> dict:
    """The trace by the estimator that was asked for."""
    draws = args.draws or DEFAULT_DRAWS[args.estimator]
    if args.estimator == "fisher":
        return fisher_trace(model, inputs.contexts, draws, args.seed, args.bs, args.datafile)
    return hutchinson_trace(model, inputs.contexts, inputs.table, inputs.columns, draws, args.seed, args.bs, args.datafile)


def main(arguments: list[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    models = find_weights(args)
    inputs = read_inputs(args, args.nsamples)
    name = RECORDS[args.estimator]
    settings = {key: getattr(args, key) for key in ("estimator", "nsamples", "seed", "bs")}
    settings["draws"] = args.draws or DEFAULT_DRAWS[args.estimator]
    for folder, weights, results in models:
        check_vocabulary(folder, inputs.vocabulary, inputs.vocabulary_path)
        model_input = {"sha256": sha256(weights)}
        described = {**inputs.described, "model": model_input}
        if is_measured(results, name, described, settings, args.overwrite):
            print(f"{results}: trace by {args.estimator} is measured already, skipped")
            continue
        model = load_model(folder, args.device, "eager", weights)
        estimated = estimate(args, model, inputs)
        record = write_record(
            results,
            name,
            measurement="hessian",
            unit="nats",
            estimator=args.estimator,
            inputs=described,
            arguments=settings,
            device=args.device,
            number_file=True,
            **estimated,
        )
        print(f"{results}: trace {record['value']:.4f} +- {record['standard_error']:.4f} ({args.estimator}, n = {record['n']})")


if __name__ == "__main__":
    run_main(main)
