"""Trace or spectrum of the Hessian of the pre-training loss at every model under a folder.

    python calculate_hessian.py --model-path OUT --datafile pcfg_dataset/test0.txt --vocabfile vocab.txt --condprobfile LOOKUP

On a laptop, in a minute (fewer sentences; the standard error is proportional to one over the root of their number):

    python calculate_hessian.py --model-path OUT --datafile pcfg_dataset/test0.txt --vocabfile vocab.txt --nsamples 64

fisher: E_{x,t} E_{w ~ f(x_-t)} ||grad log f(x_-t)[w]||^2 (Liu et al. 2023, appendix B.1), the trace where f is the true P.
hutchinson: E_v[v^T H v] (Hutchinson 1990), with H of the exact loss if conditionals are given: the trace at any model.
With conditionals, fisher also gives the value with labels w ~ P, and Hutchinson's trace: the three agree where f = P.
Each comes with numbers that need no scale of the parameters: the balanced trace and the relative flatness R.
spectrum: the largest eigenvalues of H, and the density of all (for small models, in float64).

Writes hessian.json and hessian.txt (hutchinson: hessian_hutchinson.json and .txt; spectrum: spectrum.json) next to the weights.
Under torchrun or the deepspeed launcher the ranks share the sentences; spectrum runs in one process.
"""

if __name__ == "__main__":
    import pcfg.common.start  # noqa: F401  before libraries, whose import takes seconds

import argparse
import dataclasses
from pathlib import Path

from pcfg.common.cli import Parser, fraction, non_negative_int, positive_int, run_main, warn_of_flags
from pcfg.common.files import InputError
from pretraining.evaluation.hessian import MIN_DRAWS, PROBES, RECORDS, Sampling, measure_models
from pretraining.evaluation.inputs import add_input_arguments, read_inputs
from pretraining.evaluation.records import record_folder
from pretraining.evaluation.spectrum import SpectrumOptions, measure_spectra
from pretraining.model.checkpoints import is_model_folder, model_folders, weights_file

SENTENCES = 512


def positions(text: str) -> int | None:
    """An argparse type: an integer of 1 or more, or "all"."""
    return None if text == "all" else positive_int(text)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    add_input_arguments(parser)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the deepspeed launcher
    group = parser.add_argument_group("estimator")
    group.add_argument(
        "--estimator", choices=(*RECORDS, "both", "spectrum"), default="fisher", help="see above (default fisher)"
    )
    first = f"sentences, the first of --datafile (default {SENTENCES}, or all of them with --target-relative-error)"
    group.add_argument("--nsamples", type=positive_int, help=first)
    drawn = "masked positions per sentence, drawn at random; sentences have equal weights (default all)"
    group.add_argument("--positions", type=positions, metavar="N|all", help=drawn)
    group.add_argument("--seed", type=non_negative_int, default=0, help="of every random number (default 0)")
    target = "stop at standard error / trace <= E, checked after 1, 2, 4, .. times --min-draws (default: all --nsamples)"
    group.add_argument("--target-relative-error", type=fraction, metavar="E", help=target)
    least = f"labels (default {MIN_DRAWS['fisher']}) or probes (default {MIN_DRAWS['hutchinson']}) before the first check"
    group.add_argument("--min-draws", type=positive_int, help=least)
    group.add_argument("--bs", type=positive_int, help="positions per batch; changes no result (default 128; on a GPU 1024)")
    group.add_argument(
        "--loadpath",
        help="other weights (a file, or a folder with model.safetensors or pytorch_model.bin) for the configuration of the one "
        "model folder --model-path; the results go next to them (default: the weights of the folder)",
    )
    group = parser.add_argument_group("fisher")
    group.add_argument("--draws", type=positive_int, default=1, help="labels drawn at each position (default 1)")
    group = group.add_mutually_exclusive_group()
    plain = "draw w from f; default: in proportion to f_w ||e_w - f||^2, weighted, which needs far fewer draws"
    group.add_argument("--plain-labels", action="store_true", help=plain)
    soft = "sum over all words instead of drawing: one backward pass per word, for small vocabularies"
    group.add_argument("--soft-labels", action="store_true", help=soft)
    group = parser.add_argument_group("hutchinson and spectrum")
    group.add_argument("--probe", choices=PROBES, default="rademacher", help="law of the probes' entries (default rademacher)")
    many = "probes per block of sentences; spectrum: in all (default 4)"
    group.add_argument("--probe-num", type=positive_int, default=4, help=many)
    block = "sentences that share their probes; spectrum: all do (default 16)"
    group.add_argument("--block-size", type=positive_int, default=16, help=block)
    group = parser.add_argument_group("spectrum")
    largest = SpectrumOptions.eigenvalues
    group.add_argument("--eigenvalues", type=positive_int, default=largest, help=f"number of the largest (default {largest})")
    steps = SpectrumOptions.lanczos_steps
    group.add_argument("--lanczos-steps", type=positive_int, default=steps, help=f"per probe of the density (default {steps})")
    return parser


def find_models(args: argparse.Namespace) -> list[tuple[Path, Path, Path]]:
    """(model folder, weights file, folder for the results) of every model to measure."""
    if args.loadpath is None:
        root = args.model_path
        return [(path, weights_file(path), record_folder(path, root, args.records_path)) for path in model_folders(root)]
    weights = Path(args.loadpath)
    weights = weights_file(weights) if weights.is_dir() else weights
    if not weights.is_file():
        raise InputError(f"--loadpath {args.loadpath}: no weights there ({weights} is missing)")
    if not is_model_folder(args.model_path):
        raise InputError(f"--model-path {args.model_path}: with --loadpath it must be one model folder, for its configuration")
    return [(Path(args.model_path), weights, record_folder(weights.parent, weights.parent, args.records_path))]


def ineffective_flags(args: argparse.Namespace) -> list[str]:
    """The flags whose values are not their defaults, and that have no effect on the chosen estimator."""
    unused = ["eigenvalues", "lanczos_steps"]
    if args.estimator == "spectrum":
        unused = ["draws", "plain_labels", "soft_labels", "block_size"]
    elif args.estimator == "fisher" and not (args.condprobfile or args.rule_path):  # else it gives Hutchinson's trace as well
        unused += ["probe", "probe_num", "block_size"]
    unused += ["min_draws"] if args.target_relative_error is None else []
    return [name.replace("_", "-") for name in unused if getattr(args, name) != build_parser().get_default(name)]


def main(arguments: list[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    warn_of_flags(ineffective_flags(args), f"--estimator {args.estimator} here")
    if args.estimator == "spectrum" and args.target_relative_error is not None:
        raise InputError("--target-relative-error: is for the trace, not for --estimator spectrum")
    models = find_models(args)
    if args.nsamples is None and args.target_relative_error is None:
        args.nsamples = SENTENCES
    inputs = read_inputs(args, args.nsamples)
    batch_size = args.bs or (128 if args.device == "cpu" else 1024)
    sampling = Sampling(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Sampling)})
    if args.estimator == "spectrum":
        options = SpectrumOptions(args.eigenvalues, args.lanczos_steps)
        measure_spectra(models, inputs, sampling, options, batch_size, args.device, args.overwrite)
        return
    measure_models(models, inputs, sampling, args.estimator, batch_size, args.device, args.overwrite)


if __name__ == "__main__":
    run_main(main, ranks=True, memory="--bs")
