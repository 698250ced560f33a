"""Decide on the value of a flag by models of the selection seeds, which nothing else is reported of.

    python -m pretraining.experiments.choose OUT weight

A study's [choices.weight] says which group is trained with which values, and the rule (`pretraining.experiments.study.Choice`).
Reads `study.json` and the records of loss and label curves next to the weights. Writes choices/weight.json in OUT: gap and
accuracy of every value, and the decision.
"""

if __name__ == "__main__":
    import pcfg.common.start  # noqa: F401  before libraries, whose import takes seconds

import argparse

from pcfg.common.cli import Parser, run_main
from pcfg.common.files import InputError
from pcfg.common.schema import write_schema
from pretraining.evaluation.records import CurveRecord, LossRecord, read_records
from pretraining.experiments.study import Candidate, Choice, Decision, Studies, decision_file, read_studies
from pretraining.report.intervals import mean_of

Values = dict[float, list[float]]  # by value of a choice, a number per selection seed


def gap_of(folder: str) -> float:
    """The gap of a model in nats; without true conditionals its loss, which differs by the same entropy for all models."""
    record = read_records(folder).get("loss.json")
    if not isinstance(record, LossRecord):
        raise InputError(f"{folder}: has no loss.json; run the study again, which measures it")
    return record.gap.sentences.mean if record.gap else record.value


def accuracy_of(folder: str, task: str, solver: str, labels: int) -> float:
    """The mean accuracy of a model on a task with so many labelled sentences."""
    name = f"curve_{task}_{solver}.json"
    record = read_records(folder).get(name)
    points = record.points if isinstance(record, CurveRecord) else []
    for point in points:
        if point.labels == labels:
            return point.accuracy.mean
    raise InputError(f"{folder}: {name} has no accuracy with {labels} labels; run the study again, which measures it")


def decide(choice: Choice, seeds: tuple[int, ...], gaps: Values, accuracies: Values, reference: list[float] | None) -> Decision:
    """The decision of a choice; `accuracies`: only for the rule `lowest_accuracy`; `reference`: gaps of the choice's."""
    means = {value: mean_of(gaps[value]) for value in sorted(gaps)}
    start = min(mean.value for mean in means.values()) if reference is None else mean_of(reference).value
    limit = None if choice.rule == "lowest_gap" else start + choice.tolerance
    candidates = []
    for value, gap in means.items():
        candidate = Candidate(value=value, gap=gap.value, gap_error=gap.error, admitted=limit is None or gap.value <= limit)
        if value in accuracies:
            accuracy = mean_of(accuracies[value])
            candidate = candidate.model_copy(update={"accuracy": accuracy.value, "accuracy_error": accuracy.error})
        candidates.append(candidate)
    orders = {
        "lowest_gap": lambda candidate: candidate.gap,
        "largest": lambda candidate: -candidate.value,
        "lowest_accuracy": lambda candidate: candidate.accuracy,
    }
    best = min((candidate for candidate in candidates if candidate.admitted), key=orders[choice.rule], default=None)
    return Decision(
        choice=choice,
        seeds=seeds,
        reference_gap=None if reference is None else start,
        limit=limit,
        candidates=tuple(candidates),
        chosen=best.value if best else None,
    )


def read_and_decide(out: str, studies: Studies, choice: Choice) -> Decision:
    """The decision from the records in a folder of results."""
    seeds = studies.selection.seeds
    group = studies.groups[choice.group]
    folders = {
        value: [f"{out}/{group.folder(seed, group.steps[-1], f'choices/{choice.name}/{value:g}')}" for seed in seeds]
        for value in choice.values
    }
    gaps = {value: [gap_of(folder) for folder in of_seeds] for value, of_seeds in folders.items()}
    accuracies: Values = {}
    if choice.rule == "lowest_accuracy" and choice.task and choice.labels:
        for value, of_seeds in folders.items():
            accuracies[value] = [accuracy_of(folder, choice.task, studies.readouts[0], choice.labels) for folder in of_seeds]
    reference = None
    if choice.reference:
        group = studies.groups[choice.reference.group]
        above = f"selection/{group.name}"
        reference = [gap_of(f"{out}/{group.folder(seed, choice.reference.step, above)}") for seed in seeds]
    return decide(choice, seeds, gaps, accuracies, reference)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m pretraining.experiments.choose", description=__doc__)
    parser.add_argument("out", metavar="OUT", help="folder of results of a study")
    parser.add_argument("name", metavar="CHOICE", help="name of the choice in the study file")
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    studies = read_studies(options.out)
    choices = {choice.name: choice for choice in studies.choices} if studies else {}
    if studies is None or options.name not in choices:
        raise InputError(f"{options.out}: no study with a choice {options.name!r} there; it has {', '.join(choices) or 'none'}")
    choice = choices[options.name]
    decision = read_and_decide(options.out, studies, choice)
    write_schema(f"{options.out}/{decision_file(choice.name)}", decision)
    for candidate in decision.candidates:
        accuracy = "" if candidate.accuracy is None else f", accuracy {100 * candidate.accuracy:.1f}%"
        print(
            f"{choice.flag} {candidate.value:g}: gap {candidate.gap:.4f} +- {candidate.gap_error or 0:.4f} nats{accuracy}, "
            f"{'admitted' if candidate.admitted else 'not admitted'}"
        )
    print("none is admitted" if decision.chosen is None else f"chosen: {decision.chosen:g}")


if __name__ == "__main__":
    run_main(main)
