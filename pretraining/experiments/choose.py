"""Choose the weight of the adversarial term, on models and labelled sentences that nothing else is measured on.

    python -m pretraining.experiments.choose --standard OUT/models/selection_standard/seed100/step0003000 \\
        --candidate 0.1 OUT/models/selection_0.1/seed100/step0003000 --candidate 1 OUT/models/selection_1/seed100/step0003000 \\
        --task pcfg_B --gap-allowed 0.02 --output OUT/adversarial

The question is whether the loss can stay while the probe's accuracy falls. So among the weights whose gap is larger than the
standard model's by at most --gap-allowed (the paired difference plus two standard errors), the one with the lowest accuracy on
--task is chosen, if that is below the standard model's. Reads the records of calculate_loss.py --compare-with and run_lp.py
beside the weights. Writes choice.json (all weights, and the choice) and, if there is one, chosen.json, for --config of
run_pretraining.py.
"""

import argparse
from pathlib import Path

from pcfg.common.cli import Parser, non_negative, run_main
from pcfg.common.files import InputError, write_json
from pretraining.evaluation.records import ComparisonRecord, Record, read_records
from pretraining.model.checkpoints import weights_sha256
from pretraining.report.contract import Choice, Weight, write_choice

ERRORS = 2.0  # standard errors that a gap's increase must stay below the limit by


def probe_of(folder, task: str) -> Record:
    """The record of the model's probe on a task."""
    name = f"probe_{task}.json"
    records = read_records(folder)
    if name not in records:
        raise InputError(f"{folder}: has no {name}; measure it with run_lp.py first")
    return records[name]


def comparison_with(folder, standard) -> ComparisonRecord:
    """The record of the loss's comparison with the model in `standard`."""
    digest = weights_sha256(standard)
    for record in read_records(folder).values():
        if isinstance(record, ComparisonRecord) and record.inputs["other"]["sha256"] == digest:
            return record
    raise InputError(f"{folder}: no comparison with {standard}; measure it with calculate_loss.py --compare-with first")


def choose(standard, candidates: dict, task: str, gap_allowed: float) -> Choice:
    """The choice among models of several weights.

    Args:
        standard: folder of the model without the term.
        candidates: folders by weight.
        task: of the probe's record.
        gap_allowed: nats, by which the gap (sentence mean) may be larger.

    Raises:
        InputError: a measurement is missing.
    """
    standard_accuracy = probe_of(standard, task).value
    weights = []
    for weight, folder in sorted(candidates.items()):
        difference = comparison_with(folder, standard).difference.sentences
        probe = probe_of(folder, task)
        weights.append(
            Weight(
                weight=weight,
                gap_increase=difference.mean,
                gap_increase_se=difference.standard_error,
                accuracy=probe.value,
                accuracy_se=probe.standard_error,
                standard_accuracy=standard_accuracy,
            )
        )
    allowed = [
        tried
        for tried in weights
        if tried.gap_increase + ERRORS * tried.gap_increase_se <= gap_allowed and tried.accuracy < standard_accuracy
    ]
    criterion = (
        f"lowest probe accuracy on {task}, below the standard model's, among the weights whose gap is larger by at most "
        f"{gap_allowed:g} nats (paired difference plus {ERRORS:g} standard errors)"
    )
    chosen = min(allowed, key=lambda tried: tried.accuracy).weight if allowed else None
    return Choice(criterion=criterion, gap_allowed=gap_allowed, weights=tuple(weights), chosen=chosen)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m pretraining.experiments.choose", description=__doc__)
    group = parser.add_argument_group("models")
    group.add_argument("--standard", required=True, help="model folder without the adversarial term")
    group.add_argument(
        "--candidate",
        nargs=2,
        action="append",
        required=True,
        metavar=("WEIGHT", "FOLDER"),
        help="a weight and the model folder trained with it; once a weight",
    )
    group = parser.add_argument_group("choice")
    group.add_argument("--task", required=True, help="name of the probe's task, pcfg_B for probe_pcfg_B.json")
    group.add_argument("--gap-allowed", type=non_negative, default=0.02, help="nats (default 0.02)")
    group.add_argument("--output", required=True, help="folder for choice.json and chosen.json")
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        candidates = {non_negative(weight): folder for weight, folder in options.candidate}
    except (ValueError, argparse.ArgumentTypeError) as error:
        parser.error(f"--candidate: {error}")
    choice = choose(options.standard, candidates, options.task, options.gap_allowed)
    output = Path(options.output)
    chosen = output / "chosen.json"
    if choice.chosen is None:
        chosen.unlink(missing_ok=True)
    else:
        write_json(chosen, {"arguments": {"adversarial_weight": choice.chosen}})
    write_choice(output / "choice.json", choice)
    for tried in choice.weights:
        print(
            f"weight {tried.weight:g}: gap {tried.gap_increase:+.4f} +- {tried.gap_increase_se:.4f} nats, accuracy "
            f"{100 * tried.accuracy:.1f}% (standard {100 * tried.standard_accuracy:.1f}%)"
        )
    print(f"chosen: {choice.chosen:g}" if choice.chosen is not None else f"none is chosen: {choice.criterion}")


if __name__ == "__main__":
    run_main(main)
