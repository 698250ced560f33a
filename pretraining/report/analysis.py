"""The analysis of the experiments: tables, findings, correlations, the paper's numbers next to ours; `results.json` has it all.

Every comparison is between models at the same loss (`pretraining.report.same_loss`); others are left out, with the reason. The
findings are those of Liu et al. (2023), as sentences computed from numbers:

| experiment | compared | the paper's side, by 95% intervals |
| --- | --- | --- |
| steps, per group | the first checkpoint at the loss of the run's last one with that; paired | trace falls, accuracy rises |
| sizes | smallest with largest group (Welch over seeds), by both rules of enlarging | trace falls, accuracy rises |
| algorithms, per group | the first group with this one (Welch over seeds) | trace rises, accuracy falls |
| algorithms, lookup table | the first group with it | accuracy falls |

The README says when a finding holds. The rule was fixed beforehand, and is applied to each accuracy (task and kind) on its own,
without a correction for the number of comparisons. Nothing can be told where a group is missing or has one seed. A finding
depends on the rule of enlarging only where both traces exist. The last checkpoint is the last one of the plan.

Models of an inferred contract are compared in pairs, each by the standard errors of its own measurements, and only their traces
in the parameters of one shape: whether one is larger, by both rules.

Means over seeds have standard errors over seeds, single models their measurement's own. Correlations of each accuracy with
trace and gap are over the models of an experiment at the same loss as the reference. Lookup tables are in no correlation: they
have no trace, and their features are of another kind.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from pcfg.common.files import write_json
from pcfg.common.schema import Schema
from pretraining.report import contract, intervals
from pretraining.report.contract import ALGORITHMS, MODELS, SIZES, STEPS, Choice, Experiment, Experiments, Status
from pretraining.report.intervals import Change, Correlation, Mean, change_of_means, correlate, mean_of, paired_change
from pretraining.report.rows import (
    TRACE,
    TRANSFORMER,
    Joined,
    Tree,
    accuracy_label,
    accuracy_names,
    infer_experiments,
    join,
    own_error,
    trace_label,
    trace_names,
    why_missing,
)
from pretraining.report.same_loss import SameLoss, is_true

SCHEMA = 2  # of results.json
HOLDS = "holds"
HOLDS_NOT = "does not hold"
BY_RULE = "depends on the rule of enlarging"
OPEN = "undecided"
LARGER = "is larger"
SMALLER = "is smaller"
TITLES = {
    STEPS: "Training on after the loss has converged lowers the trace and raises the accuracy",
    SIZES: "A larger model at the same loss has a smaller trace and a higher accuracy",
    ALGORITHMS: "Another algorithm at the same loss has a larger trace and a lower accuracy",
    MODELS: "The trace in the parameters of one shape",
}
TABLE_TITLE = "The lookup table, at the same loss, has a lower accuracy"
# The paper's sides of 0: of the trace's change, and of the accuracy's.
SIDES = {STEPS: (-1, 1), SIZES: (-1, 1), ALGORITHMS: (1, -1), MODELS: (0, 0)}
FEWEST = 2  # models of a group, or pairs: the minimum for an interval


class Summary(Schema):
    """The mean of a group."""

    mean: float | None = None  # None where nothing was measured
    error: float | None = None  # None where one measurement has no error
    over: str | None = None  # the source of the error: "seeds", or "measurement" (a single model's own)
    n: int = 0  # models


class Line(Schema):
    """One line of an experiment's table."""

    group: str
    step: int | None
    kind: str | None  # of the models; None where there is none
    parameters: int | None
    models: int  # that exist
    planned: int
    saturated: tuple[int, int]  # how many are, and of how many it is known; so for the next two
    equal: tuple[int, int]
    same_loss: tuple[int, int]
    values: dict[str, Summary]  # by quantity: gap, gap_difference, traces, accuracies
    missing: tuple[str, ...]


class Finding(Schema):
    """One comparison: the claim and its verdict in words, and the numbers."""

    experiment: str
    title: str  # the claim
    subject: str  # the groups
    basis: str  # the compared models, in words
    changes: dict[str, Change | None]  # by quantity (traces, gap, accuracies); None where a side is missing
    # By accuracy HOLDS, HOLDS_NOT, BY_RULE or OPEN; of single models by "trace" LARGER, SMALLER, BY_RULE or OPEN.
    verdicts: dict[str, str]
    reason: str | None  # why nothing can be compared
    left_out: tuple[str, ...]  # models that are not compared, and why
    numbers: tuple[str, ...]  # the changes as texts
    omissions: str  # `left_out` as a sentence
    headline: str  # the finding without its numbers
    sentence: str  # and with them


class Correlated(Schema):
    """A correlation of `accuracy` with `against` (gap or a trace) over the models at the same loss."""

    experiment: str
    accuracy: str
    against: str
    found: Correlation


@dataclasses.dataclass
class Analysis:
    """Everything that was computed."""

    tree: Tree
    experiments: Experiments
    statuses: dict[str, Status]
    joined: Joined
    names: list[str]  # of the accuracies
    tables: dict[str, list[Line]]  # by experiment
    findings: list[Finding]
    correlations: list[Correlated]
    paper: pd.DataFrame  # published numbers next to ours; empty for an inferred contract
    choice: Choice | None = None  # how the adversarial weight was chosen
    choice_missing: str | None = None  # that the file of the choice does not exist, and why

    def experiment(self, name: str) -> Experiment:
        [experiment] = [experiment for experiment in self.experiments.experiments if experiment.name == name]
        return experiment

    def of(self, name: str) -> Joined:
        """The models of one experiment."""
        return self.joined.select(self.joined.rows["experiment"] == name)


def analyse(tree: Tree, folder: Path | str, max_gap: float | None = None, margin: float | None = None) -> Analysis:
    """Analyse the experiments of a folder, or its models where it has no `experiments.json`.

    Args:
        tree: of `folder`.
        max_gap, margin: thresholds of the same loss, nats; by default those of `experiments.json`, else those of `SameLoss`.
    """
    experiments = contract.read_experiments(folder) or infer_experiments(tree)
    thresholds = {"saturated": max_gap, "margin": margin}
    experiments = experiments.model_copy(update={name: value for name, value in thresholds.items() if value is not None})
    statuses = contract.read_statuses(folder)
    joined = join(tree, experiments, statuses)
    names = accuracy_names(tree, experiments)
    analysis = Analysis(tree, experiments, statuses, joined, names, {}, [], [], pd.DataFrame())
    for experiment in experiments.experiments:
        models = analysis.of(experiment.name)
        analysis.tables[experiment.name] = _lines(experiment, models, names)
        analysis.findings += findings_of(experiment, models, names, experiments.criterion)
        if experiment.rule != MODELS:
            analysis.correlations += _correlations(experiment, models, names)
        if experiment.choice is not None:
            path = Path(folder) / experiment.choice
            if path.exists():
                analysis.choice = contract.read_choice(path)
            else:
                reason = why_missing(experiment.choice, experiments, statuses)
                analysis.choice_missing = f"{experiment.choice}: missing; {reason}"
    if not experiments.inferred:
        analysis.paper = _paper(analysis)
    return analysis


def write_results(path: Path | str, analysis: Analysis) -> None:
    """Write `results.json`; of the commands it has no times, which no two runs share."""
    experiments = analysis.experiments
    ended = [(command, analysis.statuses.get(command.name)) for command in experiments.commands]
    content = {
        "schema": SCHEMA,
        "scale": experiments.scale,
        "seeds": list(experiments.seeds),
        "criteria": {
            "saturated_nats": experiments.saturated,
            "margin_nats": experiments.margin,
            "reference": experiments.reference,
            "level": intervals.LEVEL,
            "bootstrap_seed": intervals.SEED,
        },
        "findings": [finding.model_dump(mode="json") for finding in analysis.findings],
        "tables": {name: [line.model_dump(mode="json") for line in lines] for name, lines in analysis.tables.items()},
        "correlations": [correlated.model_dump(mode="json") for correlated in analysis.correlations],
        "paper": json.loads(analysis.paper.to_json(orient="records", double_precision=15)),
        "choice": analysis.choice and analysis.choice.model_dump(mode="json"),
        "commands": [
            {"name": command.name, "command": command.command}
            | {"state": status and status.state, "exit_code": status and status.exit_code}
            for command, status in ended
        ],
    }
    write_json(path, content)


def _lines(experiment: Experiment, models: Joined, names: list[str]) -> list[Line]:
    """A line per group and step, groups in the experiment's order."""
    lines = []
    quantities = ["gap", "gap_difference", *trace_names(experiment), *names]
    by_step = models.rows.sort_values("step", kind="stable", na_position="first")
    for (group, step), rows in by_step.groupby(["group", "step"], sort=False, dropna=False):
        members = models.select(rows.index)
        existing = rows[rows["kind"].notna()]
        sizes = existing["parameters"].dropna()
        line = Line(
            group=group,
            step=None if pd.isna(step) else int(step),
            kind=None if existing.empty else existing["kind"].iloc[0],
            parameters=None if sizes.empty else int(sizes.iloc[0]),
            models=len(existing),
            planned=len(rows),
            saturated=_count(rows["saturated"]),
            equal=_count(rows["equal"]),
            same_loss=_count(rows["same_loss"]),
            values={name: _summary(members.of(name)) for name in quantities},
            missing=tuple(
                text if pd.isna(row.seed) else f"seed {row.seed}: {text}" for row in rows.itertuples() for text in row.missing
            ),
        )
        lines.append(line)
    return sorted(lines, key=lambda line: experiment.groups.index(line.group))


def _count(column: pd.Series) -> tuple[int, int]:
    known = column.dropna()
    return int(known.sum()), len(known)


def _mean(of_quantity: pd.DataFrame, with_own_error: bool) -> Mean | None:
    """Mean over models; of a single one with the error of its own measurement, if `with_own_error`, else with none."""
    known = of_quantity[of_quantity["value"].notna()]
    if len(known) != 1 or not with_own_error:
        return None if known.empty else mean_of(known["value"])
    error = own_error(known).iloc[0]
    over_seeds = "seeds" in known and not pd.isna(known["se"].iloc[0])
    degrees = known["seeds"].iloc[0] - 1 if over_seeds else math.inf
    return Mean(float(known["value"].iloc[0]), None if pd.isna(error) else float(error), degrees, 1)


def _summary(of_quantity: pd.DataFrame) -> Summary:
    mean = _mean(of_quantity, with_own_error=True)
    if mean is None:
        return Summary()
    over = "seeds" if mean.n > 1 else None if mean.error is None else "measurement"
    return Summary(mean=mean.value, error=mean.error, over=over, n=mean.n)


def _correlations(experiment: Experiment, models: Joined, names: list[str]) -> list[Correlated]:
    correlations = []
    compared = models.select(is_true(models.rows["same_loss"]) & models.rows["kind"].eq(TRANSFORMER))
    for name, against in itertools.product(names, (*trace_names(experiment), "gap")):
        columns = {"run": compared.rows["run"], "folder": compared.rows["folder"]}
        columns |= {"x": compared.of(against)["value"], "y": compared.of(name)["value"]}
        points = pd.DataFrame(columns).dropna().drop_duplicates("folder")  # a model of two groups counts once
        purpose = f"{experiment.name}, {name}, {against}, equal"
        found = correlate(points["x"], points["y"], points["run"].tolist(), purpose)
        correlations.append(Correlated(experiment=experiment.name, accuracy=name, against=against, found=found))
    return correlations


# findings


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two groups of models, or two models, and the outcome of the search for them."""

    subject: str
    sides: tuple[Joined, Joined] | None  # before and after; None where there is a reason
    reason: str | None = None  # why they are not compared
    basis: str = ""  # in words
    left_out: tuple[str, ...] = ()  # models that are not compared, and why
    is_paired: bool = False  # run by run
    is_table: bool = False  # whether the second side is the lookup table


def findings_of(experiment: Experiment, models: Joined, names: list[str], criterion: SameLoss) -> list[Finding]:
    """The findings of one experiment.

    Args:
        models: those of the experiment.
        names: the accuracies; those that no model has are left out.
    """
    measured = [name for name in names if models.of(name)["value"].notna().any()]
    rules = {STEPS: _steps, SIZES: _sizes, ALGORITHMS: _algorithms, MODELS: _pairs_of_models}
    return [_finding(experiment, pair, measured or names) for pair in rules[experiment.rule](experiment, models, criterion)]


def _steps(experiment: Experiment, models: Joined, criterion: SameLoss) -> Iterator[Pair]:
    """One pair per optimizer."""
    for group in experiment.groups:
        of_group = models.rows[models.rows["group"] == group]
        left_out = []
        pairs = []
        runs = [run.sort_values("step") for _, run in of_group.groupby("seed", sort=False, dropna=False)]
        for run in runs:
            last = run.iloc[[-1]]
            saturated = run.iloc[:-1][is_true(run.iloc[:-1]["saturated"])]
            same = [index for index in saturated.index if criterion.obstacle(run.loc[[index]], last) is None]
            if not is_true(last["saturated"]).item():
                left_out.append(f"{_who(last.iloc[0])} (last checkpoint {_loss_of(last.iloc[0])})")
            elif same:
                pairs.append((same[0], last.index[0]))
            else:
                state = "is saturated" if saturated.empty else "has the same loss as the last"
                left_out.append(f"{_who(last.iloc[0])} (no earlier checkpoint {state})")
        if len(pairs) < FEWEST:
            reason = f"{len(pairs)} of {len(runs)} runs can be compared, an interval takes {FEWEST}"
            yield Pair(group, None, reason, left_out=tuple(left_out))
            continue
        before, after = (models.select(list(side)) for side in zip(*pairs, strict=True))
        steps = [_steps_text(side.rows["step"]) for side in (before, after)]
        basis = f"From the first checkpoint at the same loss ({steps[0]}) to the last ({steps[1]}), {len(pairs)} seeds"
        yield Pair(group, (before, after), None, basis, tuple(left_out), is_paired=True)


def _sizes(experiment: Experiment, models: Joined, criterion: SameLoss) -> Iterator[Pair]:
    """Smallest against largest."""
    compared, left_out = _at_same_loss(models)
    groups = {group: compared.select(compared.rows["group"] == group) for group in experiment.groups}
    sized = [(int(of.rows["parameters"].iloc[0]), name) for name, of in groups.items() if len(of.rows) >= FEWEST]
    (few, small), (many, large) = (min(sized), max(sized)) if sized else ((0, ""), (0, ""))
    if few == many:
        yield Pair("no two sizes", None, f"no two sizes have {FEWEST} models at the same loss each", left_out=left_out)
        return
    before = groups[small]
    after = groups[large]
    basis = f"From {small} ({few:,} parameters, {len(before.rows)} seeds) to {large} ({many:,}, {len(after.rows)} seeds)"
    reason = criterion.obstacle(before.rows, after.rows)
    yield Pair(f"{large} against {small}", (before, after), reason, basis, left_out)


def _algorithms(experiment: Experiment, models: Joined, criterion: SameLoss) -> Iterator[Pair]:
    """Each group against the first."""
    standard, *others = experiment.groups
    for group in others:
        compared, left_out = _at_same_loss(models.select(models.rows["group"].isin([standard, group])))
        kinds = models.rows.loc[models.rows["group"] == group, "kind"].dropna()
        is_table = bool((kinds != TRANSFORMER).any())
        before, after = (compared.select(compared.rows["group"] == name) for name in (standard, group))
        sides = ((standard, before, FEWEST), (group, after, 1 if is_table else FEWEST))
        few = [f"{name} has {len(side.rows)}" for name, side, needed in sides if len(side.rows) < needed]
        reason = f"models at the same loss are too few: {_and(few)}" if few else criterion.obstacle(before.rows, after.rows)
        basis = f"From {standard} ({len(before.rows)} seeds) to {group}" + ("" if is_table else f" ({len(after.rows)} seeds)")
        yield Pair(f"{group} against {standard}", (before, after), reason, basis, left_out, is_table=is_table)


def _pairs_of_models(experiment: Experiment, models: Joined, criterion: SameLoss) -> Iterator[Pair]:
    """Each two models of one shape."""
    for pair in itertools.combinations(models.rows.index, 2) if experiment.has_common_traces else ():
        after, before = (models.select([index]) for index in pair)
        rows = [side.rows.iloc[0] for side in (after, before)]
        not_saturated = ~is_true(models.rows["saturated"].loc[list(pair)])
        reasons = [f"{_with_step(row)} {_loss_of(row)}" for row, is_not in zip(rows, not_saturated, strict=True) if is_not]
        reason = "; ".join(reasons) or criterion.obstacle(before.rows, after.rows)
        yield Pair(" against ".join(map(_with_step, rows)), (before, after), reason)


def _at_same_loss(models: Joined) -> tuple[Joined, tuple[str, ...]]:
    """The models at the same loss as the reference, each run at its last step; and those that are not, with the reason."""
    last = models.rows.sort_values("step", kind="stable", na_position="first").groupby(["group", "seed"], dropna=False).tail(1)
    at_end = models.select(models.rows.index.isin(last.index))
    is_same = is_true(at_end.rows["same_loss"])
    return at_end.select(is_same), tuple(f"{_who(row)} ({_loss_of(row)})" for _, row in at_end.rows[~is_same].iterrows())


def _change(name: str, before: Joined, after: Joined, is_paired: bool) -> Change | None:
    """The change of a quantity from one side to the other; None where it was not measured on both."""
    if is_paired:
        both = pd.DataFrame({"a": before.of(name)["value"].array, "b": after.of(name)["value"].array}).dropna()
        return paired_change(both["a"], both["b"]) if len(both) else None
    # A lookup table, or a single model, has the errors of its own measurements.
    a, b = (_mean(side.of(name), with_own_error=len(side.rows) == 1) for side in (before, after))
    return change_of_means(a, b) if a and b else None


def _finding(experiment: Experiment, pair: Pair, names: list[str]) -> Finding:
    """A finding with its verdicts; without traces (a lookup table's) accuracy decides alone, without accuracies the trace."""
    title = TABLE_TITLE if pair.is_table else TITLES[experiment.rule]
    traces = trace_names(experiment)
    if pair.is_table:
        traces = []
        names = [name for name in names if not name.startswith("finetune")]
    quantities = [*traces, "gap", *names]
    if experiment.rule == MODELS:
        names = [TRACE]
        quantities = traces
    trace_side, accuracy_side = SIDES[experiment.rule]
    changes: dict[str, Change | None] = {}
    if pair.sides and not pair.reason:
        changes = {name: _change(name, *pair.sides, pair.is_paired) for name in quantities}
    verdicts = dict.fromkeys(names, OPEN)
    for name in names if changes else ():
        signs = {change.sign() if (change := changes[trace]) else 0 for trace in traces}
        if name == TRACE:
            by_trace = {{1: LARGER, -1: SMALLER, 0: OPEN}[sign] for sign in signs}
        elif change := changes[name]:
            accuracy = change.sign() * accuracy_side
            by_trace = {_verdict(sign * trace_side, accuracy) for sign in signs} or {_verdict(accuracy)}
        else:
            by_trace = {OPEN}
        is_complete = None not in [changes[trace] for trace in traces]
        if len(by_trace) == 1 and (is_complete or name != TRACE):
            verdicts[name] = by_trace.pop()
        elif is_complete:
            verdicts[name] = BY_RULE
    headline = f"{title} ({pair.subject}): {f'{OPEN}, {pair.reason}' if pair.reason else _in_words(verdicts)}"
    numbers = []
    for name, change in changes.items():
        if name == "gap":
            numbers.append(describe_change("gap", change, " nats"))
        elif name in traces:
            numbers.append(describe_change(trace_label(name), change, "", trace_side or None))
        else:
            numbers.append(describe_change(accuracy_label(name), change, " points", accuracy_side))
    omissions = f"Left out: {'; '.join(pair.left_out)}." if pair.left_out else ""
    body = f"{'. ' if pair.basis else ''}{pair.basis}: {'; '.join(numbers)}" if numbers else ""
    return Finding(
        experiment=experiment.name,
        title=title,
        subject=pair.subject,
        basis=pair.basis,
        changes=changes,
        verdicts=verdicts,
        reason=pair.reason,
        left_out=pair.left_out,
        numbers=tuple(numbers),
        omissions=omissions,
        headline=headline,
        sentence=f"{headline}{body}. {omissions}".strip(),
    )


def _in_words(verdicts: dict[str, str]) -> str:
    """The verdicts, each with its accuracies; a trace's alone."""
    if verdict := verdicts.get(TRACE):
        return f"{verdict} with both rules of enlarging" if verdict in (LARGER, SMALLER) else verdict
    parts = []
    for verdict in (HOLDS, HOLDS_NOT, BY_RULE, OPEN):
        if labels := [accuracy_label(name) for name, other in verdicts.items() if other == verdict]:
            parts.append(f"{verdict} for {_and(labels)}")
    return "; ".join(parts)


def _verdict(*sides: int) -> str:
    """The verdict of changes on the paper's side (1), on the other one (-1), or on neither (0)."""
    return HOLDS_NOT if -1 in sides else OPEN if 0 in sides else HOLDS


def _and(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _who(row: pd.Series) -> str:
    return row["group"] if pd.isna(row["seed"]) else f"{row['group']} seed {row['seed']}"


def _with_step(row: pd.Series) -> str:
    return _who(row) if pd.isna(row["step"]) else f"{_who(row)}, step {row['step']:,}"


def _loss_of(row: pd.Series) -> str:
    """Why a model does not count as at the same loss."""
    if pd.isna(row["gap"]):
        return "missing" if pd.isna(row["kind"]) else "of unknown gap"
    if not row["saturated"]:
        return f"not saturated, gap {row['gap']:.4f} ± {row['gap_se']:.4f} nats"
    if pd.isna(row["equal"]):
        return "not compared with the reference"
    if row["equal"]:
        return "the reference is not saturated"
    difference = f"{row['gap_difference']:+.4f} ± {row['gap_difference_se']:.4f} nats"
    return f"not equal to the reference within the margin, {difference}"


def _steps_text(steps: pd.Series) -> str:
    low = steps.min()
    high = steps.max()
    return f"step {low:,}" if low == high else f"steps {low:,} to {high:,}"


def decimals(error: float | None, most: int = 6) -> int:
    """Digits behind the point that show two digits of an error.

    >>> [decimals(error) for error in (12.3, 1.23, 0.0123, None)], decimals(0.0123, most=2)
    ([0, 1, 3, 3], 2)
    """
    return min(most, max(0, 1 - math.floor(math.log10(error)))) if error else min(most, 3)


def describe_change(label: str, change: Change | None, unit: str = "", side: int | None = None) -> str:
    """A change as text: `trace -12.3 [-15.0, -9.6], as in the paper`.

    Args:
        unit: of the text: " nats", or " points" for accuracies, which are fractions.
        side: the paper's side of 0; None where the paper says nothing.
    """
    if change is None:
        return f"no {label}"
    scale, most = (100.0, 2) if unit == " points" else (1.0, 6)
    digits = decimals(None if change.error is None else change.error * scale, most)
    text = f"{label} {change.value * scale:+.{digits}f}"
    if change.low is None or change.high is None:
        return f"{text}{unit} (no interval: no spread over seeds, or one only)"
    text += f" [{change.low * scale:+.{digits}f}, {change.high * scale:+.{digits}f}]{unit}"
    if side is None:
        return text
    return text + {0: ", not distinguishable from 0", side: ", as in the paper", -side: ", against the paper"}[change.sign()]


# The paper's numbers are those of its PCFG data with 235M-parameter transformers, but for Figure 5, which compares sizes. The
# grammar that was published with its code is another, shallower one, and other grammars have other entropies, classes and
# traces: values can't be compared, directions can. Gaps are the published losses less the published minimum, 3.196 nats.
# roles
SMALLEST = "smallest"
LARGEST = "largest"
TABLE = "lookup table"
LATER = "later"
BY_PLACE = ("standard", "adversarial")  # roles of the first two groups


def _paper(analysis: Analysis) -> pd.DataFrame:
    """The numbers of Liu et al. (2023) in published.csv, with our counterparts in the published unit (`ours`, `error`).

    The columns `experiment`, `role` and `quantity` say whose counterpart a number is; they are empty where there is none here.
    A quantity is a gap, a trace, or a task, which stands for its probe.
    """
    ours: dict[tuple, tuple[float | None, float | None]] = {}
    for experiment, lines in analysis.tables.items():
        for role, line in _lines_by_role(lines).items():
            ours |= {(experiment, role, name): (value.mean, value.error) for name, value in line.values.items()}
    for finding in [finding for finding in analysis.findings if finding.experiment == STEPS][:1]:
        changes = {name: change for name, change in finding.changes.items() if change}
        ours |= {(STEPS, LATER, name): (change.value, change.error or 0.0) for name, change in changes.items()}
    published = pd.read_csv(Path(__file__).with_name("published.csv"), dtype=str)
    probes = {task: f"{analysis.experiments.probe}_pcfg_{task}" for task in analysis.experiments.tasks}
    counterparts = [
        ours.get((row.experiment, row.role, probes.get(row.quantity, row.quantity)), (None, None))
        for row in published.itertuples()
    ]
    scale = published["quantity"].isin(list(probes)).map({True: 100.0, False: 1.0})
    return published.join(pd.DataFrame(counterparts, columns=["ours", "error"], dtype=float).mul(scale, axis=0))


def _lines_by_role(lines: list[Line]) -> dict[str, Line]:
    """The lines with a role of the paper's: the first group is the standard one, the next one of models the other."""
    models = [line for line in lines if line.kind == TRANSFORMER]
    groups = dict.fromkeys(line.group for line in lines if line.kind in (None, TRANSFORMER))
    sized = sorted(models, key=lambda line: line.parameters or 0)
    of_role = {SMALLEST: sized, LARGEST: sized[::-1], TABLE: [line for line in lines if line.kind not in (None, TRANSFORMER)]}
    of_role |= {role: [line for line in models if line.group == group] for role, group in zip(BY_PLACE, groups, strict=False)}
    return {role: of[0] for role, of in of_role.items() if of}
