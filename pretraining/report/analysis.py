"""The analysis of the experiments: tables, findings, correlations, the paper's numbers beside ours; `results.json` has it all.

What is computed: means over seeds with standard errors over seeds where there are several, else the measurement's own (a table
of one says so); the findings (`pretraining.report.findings`); Spearman's and Pearson's correlation of each accuracy with
trace and gap over the models of an experiment (`pretraining.report.intervals`), among those whose loss is equal to the
reference's within the margin, and, to see whether the criterion matters, among those not told apart from it. Lookup tables are
in no correlation: they have no trace, and their features are of another kind.
"""

import dataclasses
from pathlib import Path

from pcfg.common.files import write_json
from pretraining.report import intervals, paper
from pretraining.report.contract import STEPS, Choice, Experiment, Experiments, Status, read_choice
from pretraining.report.experiment_rows import accuracy_names, probe_name, read_experiment_rows, trace_names, why_missing
from pretraining.report.findings import Finding, findings_of
from pretraining.report.intervals import Change, Correlation, correlate, mean_of
from pretraining.report.rows import error_of

RESULTS_FILE = "results.json"
SETS = {"equal": "equal within the margin", "not_told_apart": "not told apart"}  # column of the rows: in words


@dataclasses.dataclass(frozen=True)
class Summary:
    """The mean of a group.

    Attributes:
        mean, error: None where nothing was measured, and where one measurement has no error.
        over: what the error is of: "seeds", or "measurement" (a single model's own).
        n: models.
    """

    mean: float | None = None
    error: float | None = None
    over: str | None = None
    n: int = 0


def summary(rows: list[dict], name: str) -> Summary:
    """Mean over models of one column; over several with the standard error over them, else with the measurement's own."""
    there = [row for row in rows if row.get(name) is not None]
    if not there:
        return Summary()
    if len(there) == 1:
        error = error_of(there[0], name)
        return Summary(there[0][name], error, None if error is None else "measurement", 1)
    mean = mean_of([row[name] for row in there])
    return Summary(mean.value, mean.error, "seeds", mean.n)


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of an experiment's table.

    Attributes:
        kind: of the models; None where none is there.
        models, planned: how many are there, and should be.
        saturated, equal: how many are, and of how many it is known.
        values: by column `gap`, `gap_difference`, traces, accuracies.
        missing: texts.
    """

    group: str
    step: int | None
    kind: str | None
    parameters: int | None
    models: int
    planned: int
    saturated: tuple[int, int]
    equal: tuple[int, int]
    values: dict[str, Summary]
    missing: list[str]


def _count(rows: list[dict], name: str) -> tuple[int, int]:
    known = [row[name] for row in rows if row.get(name) is not None]
    return sum(known), len(known)


def _lines(experiment: Experiment, rows: list[dict], names: list[str]) -> list[Line]:
    """A line a group and step, groups in the experiment's order."""
    lines = []
    for group in experiment.groups():
        of_group = [row for row in rows if row["group"] == group]
        for step in sorted({row["step"] for row in of_group}, key=lambda step: -1 if step is None else step):
            members = [row for row in of_group if row["step"] == step]
            there = [row for row in members if row.get("kind")]
            quantities = ("gap", "gap_difference", *trace_names(experiment), *names)
            texts = [
                text if row["seed"] is None else f"seed {row['seed']}: {text}" for row in members for text in row["missing"]
            ]
            lines.append(
                Line(
                    group=group,
                    step=step,
                    kind=there[0]["kind"] if there else None,
                    parameters=there[0]["parameters"] if there else None,
                    models=len(there),
                    planned=len(members),
                    saturated=_count(members, "saturated"),
                    equal=_count(members, "equal"),
                    values={name: summary(members, name) for name in quantities},
                    missing=texts,
                )
            )
    return lines


@dataclasses.dataclass(frozen=True)
class Correlated:
    """A correlation of accuracy `accuracy` with `against` (gap or a trace) over the models of one of `SETS`."""

    experiment: str
    accuracy: str
    against: str
    among: str
    found: Correlation


def _correlations(experiment: Experiment, rows: list[dict], names: list[str], draws: int) -> list[Correlated]:
    found = []
    for name in names:
        for against in (*trace_names(experiment), "gap"):
            for among in SETS:
                models = {
                    row["folder"]: row  # a model of two groups counts once
                    for row in rows
                    if row.get(among) and row["kind"] == "transformer" and None not in (row.get(name), row.get(against))
                }.values()
                x, y, runs = ([row[column] for row in models] for column in (against, name, "run"))
                purpose = f"{experiment.name}, {name}, {against}, {among}"
                found.append(Correlated(experiment.name, name, against, among, correlate(x, y, runs, purpose, draws)))
    return found


@dataclasses.dataclass(frozen=True)
class Beside:
    """A published number and its counterpart here (in the published unit; None where there is none)."""

    published: paper.Published
    ours: float | None
    error: float | None


@dataclasses.dataclass
class Analysis:
    """Everything that was computed.

    Attributes:
        rows: of `experiments.csv`.
        tables: by experiment its lines.
        choice: how the adversarial weight was chosen; None where that is not told.
        choice_missing: that the file of the choice is not there, and why; else None.
    """

    experiments: Experiments
    statuses: dict[str, Status]
    rows: list[dict]
    names: list[str]
    tables: dict[str, list[Line]]
    findings: list[Finding]
    correlations: list[Correlated]
    beside: list[Beside]
    choice: Choice | None = None
    choice_missing: str | None = None

    def to_json(self) -> dict:
        """The content of `results.json`; of the commands without times, which no two runs share."""
        experiments = self.experiments
        return {
            "schema": 1,
            "scale": experiments.scale,
            "seeds": list(experiments.seeds),
            "criteria": {
                "saturated_nats": experiments.saturated,
                "margin_nats": experiments.margin,
                "reference": experiments.reference,
                "level": intervals.LEVEL,
                "told_apart_errors": intervals.ERRORS,
                "bootstrap_seed": intervals.SEED,
            },
            "findings": [
                {**dataclasses.asdict(finding), "headline": finding.headline(), "sentence": finding.sentence()}
                for finding in self.findings
            ],
            "tables": {name: [dataclasses.asdict(line) for line in lines] for name, lines in self.tables.items()},
            "correlations": [dataclasses.asdict(correlated) for correlated in self.correlations],
            "paper": [dataclasses.asdict(beside) for beside in self.beside],
            "choice": None if self.choice is None else dataclasses.asdict(self.choice),
            "commands": [
                {
                    "name": command.name,
                    "command": command.command,
                    "state": getattr(self.statuses.get(command.name), "state", None),
                    "exit_code": getattr(self.statuses.get(command.name), "exit_code", None),
                }
                for command in experiments.commands
            ],
        }


def _counterpart(published: paper.Published, analysis: Analysis) -> Beside:
    """What stands here for a published number."""
    nothing = Beside(published, None, None)
    lines = analysis.tables.get(published.experiment)
    if not lines:
        return nothing
    is_task = published.quantity in analysis.experiments.tasks
    name = probe_name(analysis.experiments, published.quantity) if is_task else published.quantity
    scale = 100.0 if is_task else 1.0
    if published.role == paper.LATER:
        changes = [finding.changes.get(name) for finding in analysis.findings if finding.experiment == STEPS]
        change: Change | None = changes[0] if changes else None
        return nothing if change is None else Beside(published, change.value * scale, (change.error or 0.0) * scale)
    line = _of_role(published.role, lines)
    value = line.values.get(name, Summary()) if line else Summary()
    if value.mean is None:
        return nothing
    return Beside(published, value.mean * scale, None if value.error is None else value.error * scale)


def _of_role(role: str, lines: list[Line]) -> Line | None:
    """The line that plays a role of the paper's: the first group is the standard one, the next one of models the other."""
    models = [line for line in lines if line.kind == "transformer"]
    groups = list(dict.fromkeys(line.group for line in lines if line.kind in (None, "transformer")))
    if role == paper.TABLE:
        return next((line for line in lines if line.kind not in (None, "transformer")), None)
    if role in (paper.STANDARD, paper.ADVERSARIAL):
        place = (paper.STANDARD, paper.ADVERSARIAL).index(role)
        return next((line for line in models if line.group in groups[place : place + 1]), None)
    sized = sorted(models, key=lambda line: line.parameters or 0)
    return (sized[0] if role == paper.SMALLEST else sized[-1]) if sized else None


def analyse(folder, rows: list[dict], records: list[dict], draws: int = intervals.DRAWS) -> Analysis | None:
    """Analyse the experiments of a folder; None where it has no `experiments.json`.

    Args:
        rows, records: what `pretraining.report.rows.collect` found in `folder`.
        draws: of the bootstrap.

    Raises:
        InputError: a damaged file, or an enlarged model that is not the one it is said to be.
    """
    read = read_experiment_rows(folder, rows, records)
    if read is None:
        return None
    experiments, statuses, of_experiments = read
    names = accuracy_names(experiments)
    analysis = Analysis(experiments, statuses, of_experiments, names, {}, [], [], [])
    for experiment in experiments.experiments:
        members = [row for row in of_experiments if row["experiment"] == experiment.name]
        analysis.tables[experiment.name] = _lines(experiment, members, names)
        analysis.findings += findings_of(experiment, members, names)
        analysis.correlations += _correlations(experiment, members, names, draws)
        if experiment.choice is not None:
            path = Path(folder) / experiment.choice
            if path.exists():
                analysis.choice = read_choice(path)
            else:
                analysis.choice_missing = (
                    f"{experiment.choice}: missing; {why_missing(experiment.choice, experiments, statuses)}"
                )
    analysis.beside = [_counterpart(published, analysis) for published in paper.PUBLISHED]
    return analysis


def write_results(path, analysis: Analysis) -> None:
    """Write `results.json`."""
    write_json(path, analysis.to_json())
