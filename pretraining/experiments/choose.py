"""Choose the weight of the adversarial term, on models and labelled sentences that nothing else is measured on.

    python -m pretraining.experiments.choose --standard OUT/models/selection_standard/seed100/step0003000 \\
        --candidate 0.1 OUT/models/selection_0.1/seed100/step0003000 --candidate 1 OUT/models/selection_1/seed100/step0003000 \\
        --task pcfg_B --output OUT/adversarial

The question is whether the accuracy of the probe can fall at the same loss. Among the weights whose model has the same loss as
the standard one (`pretraining.report.same_loss`), the one with the lowest accuracy on --task is chosen, if that is below the
standard model's. Reads the records of calculate_loss.py --compare-with and run_lp.py next to the weights. Writes choice.json
(all weights, and the choice) and, if there is one, chosen.json, for --config of run_pretraining.py.
"""

if __name__ == "__main__":
    import pcfg.common.start  # noqa: F401  before libraries, whose import takes seconds

import argparse
from pathlib import Path

from pcfg.common.cli import Parser, non_negative, run_main
from pcfg.common.files import InputError, write_json
from pretraining.evaluation.records import AccuracyRecord, ComparisonRecord, read_records
from pretraining.model.checkpoints import weights_sha256
from pretraining.report.contract import Choice, Weight, write_choice
from pretraining.report.same_loss import MARGIN, MAX_GAP, SameLoss


def probe_of(folder: str, task: str) -> AccuracyRecord:
    """The record of the model's probe on a task."""
    record = read_records(folder).get(f"probe_{task}.json")
    if not isinstance(record, AccuracyRecord):
        raise InputError(f"{folder}: has no probe_{task}.json; measure it with run_lp.py first")
    return record


def comparison_with(folder: str, standard: str) -> ComparisonRecord:
    """The record of the loss's comparison with the model in `standard`."""
    digest = weights_sha256(standard)
    for record in read_records(folder).values():
        if isinstance(record, ComparisonRecord) and record.inputs["other"]["sha256"] == digest:
            return record
    raise InputError(f"{folder}: no comparison with {standard}; measure it with calculate_loss.py --compare-with first")


def choose(standard: str, candidates: dict[float, str], task: str, criterion: SameLoss) -> Choice:
    """The choice among models of several weights (`candidates`: their folders), by their probes of `task`.

    `standard` is the folder of the model without the term.
    """
    standard_accuracy = probe_of(standard, task).value
    weights = []
    for weight, folder in sorted(candidates.items()):
        comparison = comparison_with(folder, standard)
        if comparison.gap_a is None or comparison.gap_b is None:
            raise InputError(
                f"{folder}: its comparison with {standard} has no gaps, so it is not known whether they are saturated; measure "
                "it with calculate_loss.py --compare-with and --condprobfile or --rule-path"
            )
        difference = comparison.difference.sentences
        gaps = [gap.sentences for gap in (comparison.gap_a, comparison.gap_b)]
        are_saturated = all(criterion.is_saturated(gap.mean, gap.standard_error) for gap in gaps)
        probe = probe_of(folder, task)
        tried = Weight(
            weight=weight,
            gap_increase=difference.mean,
            gap_increase_se=difference.standard_error,
            accuracy=probe.value,
            accuracy_se=probe.standard_error,
            standard_accuracy=standard_accuracy,
            same_loss=are_saturated and criterion.is_equal(difference.mean, difference.standard_error),
        )
        weights.append(tried)
    allowed = [tried for tried in weights if tried.same_loss and tried.accuracy < standard_accuracy]
    return Choice(
        criterion=f"Lowest probe accuracy on {task}, below the standard model's, among the weights with the standard model's "
        f"loss. {criterion.statement()}",
        gap_allowed=criterion.margin,
        weights=tuple(weights),
        chosen=min(allowed, key=lambda tried: tried.accuracy).weight if allowed else None,
    )


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m pretraining.experiments.choose", description=__doc__)
    group = parser.add_argument_group("models")
    group.add_argument("--standard", required=True, help="model folder without the adversarial term")
    names = ("WEIGHT", "FOLDER")
    group.add_argument(
        "--candidate", nargs=2, action="append", required=True, metavar=names, help="a weight and its model; once per weight"
    )
    group = parser.add_argument_group("choice")
    group.add_argument("--task", required=True, help="name of the probe's task, pcfg_B for probe_pcfg_B.json")
    group.add_argument(
        "--max-gap",
        type=non_negative,
        default=MAX_GAP,
        help=f"nats; limit of gap + 1.96 standard errors (default: {MAX_GAP:g})",
    )
    group.add_argument(
        "--margin",
        "--gap-allowed",
        type=non_negative,
        default=MARGIN,
        help=f"nats; the 95%% interval of the difference of the gaps lies inside +- this (default: {MARGIN:g})",
    )
    group.add_argument("--output", required=True, help="folder for choice.json and chosen.json")
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        candidates = {non_negative(weight): folder for weight, folder in options.candidate}
    except (ValueError, argparse.ArgumentTypeError) as error:
        parser.error(f"--candidate: {error}")
    choice = choose(options.standard, candidates, options.task, SameLoss(options.max_gap, options.margin))
    output = Path(options.output)
    chosen = output / "chosen.json"
    if choice.chosen is None:
        chosen.unlink(missing_ok=True)
    else:
        write_json(chosen, {"arguments": {"adversarial_weight": choice.chosen}})
    write_choice(output / "choice.json", choice)
    for tried in choice.weights:
        print(
            f"weight {tried.weight:g}: gap {tried.gap_increase:+.4f} +- {tried.gap_increase_se:.4f} nats, "
            f"{'the same loss' if tried.same_loss else 'not the same loss'}, accuracy {100 * tried.accuracy:.1f}% "
            f"(standard {100 * tried.standard_accuracy:.1f}%)"
        )
    print(f"chosen: {choice.chosen:g}" if choice.chosen is not None else f"none is chosen: {choice.criterion}")


if __name__ == "__main__":
    run_main(main)
