"""Trace of the Hessian of the pre-training loss at every model under a folder.

    python calculate_hessian.py --model-path OUT --datafile pcfg_dataset/test0.txt --vocabfile vocab.txt --condprobfile LOOKUP

A laptop's version: fewer sentences (the standard error grows as one over the root of their number):

    python calculate_hessian.py --model-path OUT --datafile pcfg_dataset/test0.txt --vocabfile vocab.txt --nsamples 64

fisher: E_{x,t} E_{w ~ f(x_-t)} ||grad log f(x_-t)[w]||^2 (Liu et al. 2023, appendix B.1), the trace where f is the true P.
hutchinson: E_v[v^T H v] (Hutchinson 1990), H of the exact loss if conditionals are given, the trace at any model.
With conditionals, fisher also gives the same with labels w ~ P, and Hutchinson's trace: the three agree where f = P.

Writes hessian.json and hessian.txt (hutchinson: hessian_hutchinson.json and .txt) beside the weights. Under torchrun or the
deepspeed launcher the ranks share the sentences.
"""

import argparse
import dataclasses
import time
from pathlib import Path

from pcfg.common.cli import Parser, non_negative_int, positive_int, run_main
from pcfg.common.files import InputError, sha256
from pcfg.common.ranks import Ranks
from pretraining.evaluation.estimates import Estimate, difference
from pretraining.evaluation.hessian import MIN_DRAWS, Plan, Truth, fisher_trace, hutchinson_trace
from pretraining.evaluation.hutchinson import PROBES
from pretraining.evaluation.inputs import add_input_arguments, read_inputs
from pretraining.evaluation.records import HessianRecord, is_measured, write_record
from pretraining.model.checkpoints import check_vocabulary, is_model_folder, load_model, model_folders, weights_file

RECORDS = {"fisher": "hessian.json", "hutchinson": "hessian_hutchinson.json"}
SENTENCES = 512
COMPARED = 128  # sentences of fisher's that Hutchinson's trace is taken on beside it: ten times as dear


def positions(text: str) -> int | None:
    """An argparse type: an integer of 1 or more, or "all"."""
    return None if text == "all" else positive_int(text)


def relative_error(text: str) -> float:
    """An argparse type: a number in (0, 1)."""
    value = float(text)
    if not 0.0 < value < 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and below 1")
    return value


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    add_input_arguments(parser)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher gives it
    group = parser.add_argument_group("estimator")
    group.add_argument(
        "--estimator", choices=(*RECORDS, "both"), default="fisher", help="see above (default fisher); both, side by side"
    )
    group.add_argument(
        "--nsamples",
        type=positive_int,
        help=f"sentences, the first of --datafile (default {SENTENCES}, or all of them with --target-relative-error)",
    )
    group.add_argument(
        "--positions",
        type=positions,
        metavar="N|all",
        help="masked positions of a sentence, drawn; each sentence counts once, whatever it has (default all)",
    )
    group.add_argument("--seed", type=non_negative_int, default=0, help="of all that is drawn (default 0)")
    group.add_argument(
        "--target-relative-error",
        type=relative_error,
        metavar="E",
        help="stop at standard error / trace <= E, looked at after 1, 2, 4, .. times --min-draws (default: all --nsamples)",
    )
    group.add_argument(
        "--min-draws",
        type=positive_int,
        help=f"before that: labels (default {MIN_DRAWS['fisher']}), probes of hutchinson (default {MIN_DRAWS['hutchinson']})",
    )
    group.add_argument("--bs", type=positive_int, default=128, help="positions at a time; changes no result (default 128)")
    group.add_argument(
        "--loadpath",
        help="other weights (a file, or a folder with model.safetensors or pytorch_model.bin) of the shape of the one model "
        "folder --model-path; the results go beside them (default: the folder's own)",
    )
    group = parser.add_argument_group("fisher")
    group.add_argument("--draws", type=positive_int, default=1, help="labels drawn at each position (default 1)")
    group = group.add_mutually_exclusive_group()
    group.add_argument(
        "--plain-labels",
        action="store_true",
        help="draw w from f itself; default: in proportion to f_w ||e_w - f||^2, and weight its norm, which has the same "
        "expectation and takes far fewer draws",
    )
    group.add_argument(
        "--soft-labels",
        action="store_true",
        help="sum over all words, each by its probability, instead of drawing: a backward pass a word, for small vocabularies",
    )
    group = parser.add_argument_group("hutchinson")
    group.add_argument("--probe", choices=PROBES, default="rademacher", help="law of the probes' entries (default rademacher)")
    group.add_argument("--probe-num", type=positive_int, default=4, help="probes of a block of sentences (default 4)")
    group.add_argument("--block-size", type=positive_int, default=16, help="sentences that share their probes (default 16)")
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


def make_plan(args: argparse.Namespace, sentences: int) -> Plan:
    return Plan(
        sentences=sentences,
        positions=args.positions,
        draws=args.draws,
        plain_labels=args.plain_labels,
        soft_labels=args.soft_labels,
        probe=args.probe,
        probes=args.probe_num,
        block=args.block_size,
        seed=args.seed,
        target=args.target_relative_error,
        min_draws=args.min_draws,
    )


def estimate(args: argparse.Namespace, model, inputs, ranks: Ranks) -> dict[str, dict]:
    """By the name of an estimator that was asked for, the fields of its record."""
    plan = make_plan(args, len(inputs.contexts.lengths))
    truth = None if inputs.table is None else Truth(inputs.table, inputs.columns)

    def run(trace, plan) -> tuple[Estimate, dict]:
        started = time.monotonic()
        estimated = trace(model, inputs.contexts, plan, truth, args.bs, ranks, args.datafile)
        return estimated, {**estimated.described(), "seconds": time.monotonic() - started}

    fields, other = {}, None
    if args.estimator != "hutchinson":
        fisher, fields["fisher"] = run(fisher_trace, plan)
        compared = min(fisher.sentences, COMPARED)
        if args.estimator == "fisher" and truth is not None and compared > plan.block:
            other = run(hutchinson_trace, dataclasses.replace(plan, sentences=compared, target=None))
    if args.estimator != "fisher":
        other = run(hutchinson_trace, plan)
        fields["hutchinson"] = other[1]
    if "fisher" in fields and other is not None:
        kept = ("value", "standard_error", "n", "sentences", "draws")
        fields["fisher"]["hutchinson"] = {key: other[1][key] for key in kept}
        if apart := difference(fisher, other[0]):
            fields["fisher"]["hutchinson"]["difference"] = apart
    return fields


def print_result(folder, fields: dict[str, dict]) -> None:
    """The traces of a model, and how far apart they are."""

    def number(found: dict) -> str:
        return f"{found['value']:.4f} +- {found['standard_error']:.4f}"

    print(f"{folder}: trace " + ", ".join(f"{number(found)} ({name}, n = {found['n']})" for name, found in fields.items()))
    for name, found in fields.items():
        if not found.get("target_reached", True):
            print(
                f"  {name}: relative error {found['relative_error']:.2%} with all sentences; give a longer text or more draws"
            )
    fisher = fields.get("fisher", {})
    for key, what in (("true_labels", "labels drawn from the true conditionals"), ("hutchinson", "hutchinson")):
        if found := fisher.get(key):
            apart = f"; fisher minus it {number(found['difference'])}" if "difference" in found else ""
            print(f"  {what}: {number(found)}{apart}")


def main(arguments: list[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    models = find_weights(args)
    if args.nsamples is None and args.target_relative_error is None:
        args.nsamples = SENTENCES
    inputs = read_inputs(args, args.nsamples)
    names = RECORDS if args.estimator == "both" else {args.estimator: RECORDS[args.estimator]}
    keys = ("estimator", "nsamples", "positions", "seed", "target_relative_error", "min_draws", "draws")
    others = ("plain_labels", "soft_labels", "probe", "probe_num", "block_size")
    settings = {key: getattr(args, key) for key in (*keys, *others)}
    settings |= {key: settings[key] or "all" for key in ("nsamples", "positions")}
    ranks = Ranks(args.device)
    for folder, weights, results in models:
        check_vocabulary(folder, inputs.vocabulary, inputs.vocabulary_path)
        described = {**inputs.described, "model": {"sha256": sha256(weights)}}
        finished = [is_measured(results, name, described, settings, args.overwrite) for name in names.values()]
        if all(finished):
            if ranks.is_main:
                print(f"{results}: trace by {args.estimator} is measured already, skipped")
            continue
        model = load_model(folder, ranks.device, "eager", weights)
        fields = estimate(args, model, inputs, ranks)
        if not ranks.is_main:
            continue
        common = {"unit": "nats", "inputs": described, "arguments": settings, "device": args.device}
        for estimator, found in fields.items():
            record = HessianRecord(estimator=estimator, seeds=[args.seed], **common, **found)
            write_record(results, names[estimator], record, number_file=True)
        print_result(results, fields)
    ranks.close()


if __name__ == "__main__":
    run_main(main)
