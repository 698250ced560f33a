"""The analysis of the experiments: tables, findings, correlations, the paper's numbers next to ours; `results.json` has it all.

Every comparison is between models at the same loss (`pretraining.report.same_loss`); others are left out, with the reason. The
findings are those of Liu et al. (2023), as sentences computed from numbers:

| experiment | compared | holds if, by 95% intervals |
| --- | --- | --- |
| steps, per group | the first checkpoint at the loss of the run's last one with that; paired | trace falls, accuracy rises |
| sizes | smallest with largest group (Welch over seeds), by both rules of enlarging | trace falls, accuracy rises |
| algorithms, per group | the first group with this one (Welch over seeds) | trace rises, accuracy falls |
| algorithms, lookup table | the first group with it | accuracy falls |

The rule was fixed beforehand, and is applied to each accuracy (task and kind) on its own; none is the headline's:

- holds: the intervals of the changes of both trace and accuracy lie on the paper's side of 0;
- does not hold: one of them lies on the other side;
- depends on the rule of enlarging: the verdicts with --tied-scale tables and head differ, and both traces exist;
- can't be told: otherwise; also where a group is missing or has one seed.

The last checkpoint is the last one of the plan. Groups of models take two models at least. There is no correction for the
number of comparisons. Models of an inferred contract are compared in pairs, each by the standard errors of its own
measurements, and only their traces in the parameters of one shape: whether one is larger, by both rules.

Means over seeds have standard errors over seeds, single models their measurement's own. Correlations of each accuracy with
trace and gap are over the models of an experiment at the same loss as the reference. Lookup tables are in no correlation: they
have no trace, and their features are of another kind.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from pcfg.common.files import write_json
from pcfg.common.schema import Schema
from pretraining.report import intervals
from pretraining.report.contract import (
    ALGORITHMS,
    MODELS,
    SIZES,
    STEPS,
    Choice,
    Experiment,
    Experiments,
    Status,
    read_choice,
    read_experiments,
    read_statuses,
)
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
from pretraining.report.same_loss import SameLoss

SCHEMA = 2  # of results.json
HOLDS, HOLDS_NOT, BY_RULE, OPEN = "holds", "does not hold", "depends on the rule of enlarging", "can't be told"
LARGER, SMALLER = "is larger", "is smaller"
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

    def to_json(self) -> dict:
        """The content of `results.json`; of the commands without times, which no two runs share."""
        experiments = self.experiments
        statuses = [self.statuses.get(command.name) for command in experiments.commands]
        return {
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
            "findings": [finding.model_dump(mode="json") for finding in self.findings],
            "tables": {name: [line.model_dump(mode="json") for line in lines] for name, lines in self.tables.items()},
            "correlations": [correlated.model_dump(mode="json") for correlated in self.correlations],
            "paper": json.loads(self.paper.to_json(orient="records", double_precision=15)),
            "choice": None if self.choice is None else self.choice.model_dump(mode="json"),
            "commands": [
                {
                    "name": command.name,
                    "command": command.command,
                    "state": status and status.state,
                    "exit_code": status and status.exit_code,
                }
                for command, status in zip(experiments.commands, statuses, strict=True)
            ],
        }


def analyse(tree: Tree, folder: Path | str, max_gap: float | None = None, margin: float | None = None) -> Analysis:
    """Analyse the experiments of a folder, or its models where it has no `experiments.json`.

    Args:
        tree: of `folder`.
        max_gap, margin: thresholds of the same loss, nats; by default those of `experiments.json`, else those of `SameLoss`.
    """
    experiments = read_experiments(folder) or infer_experiments(tree)
    thresholds = {"saturated": max_gap, "margin": margin}
    experiments = experiments.model_copy(update={name: value for name, value in thresholds.items() if value is not None})
    statuses = read_statuses(folder)
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
                analysis.choice = read_choice(path)
            else:
                reason = why_missing(experiment.choice, experiments, statuses)
                analysis.choice_missing = f"{experiment.choice}: missing; {reason}"
    if not experiments.inferred:
        analysis.paper = _paper(analysis)
    return analysis


def write_results(path: Path | str, analysis: Analysis) -> None:
    """Write `results.json`."""
    write_json(path, analysis.to_json())


def _lines(experiment: Experiment, models: Joined, names: list[str]) -> list[Line]:
    """A line per group and step, groups in the experiment's order."""
    lines = []
    quantities = ["gap", "gap_difference", *trace_names(experiment), *names]
    for group in experiment.groups:
        of_group = models.select(models.rows["group"] == group)
        for step in sorted(of_group.rows["step"].unique(), key=lambda step: -1 if pd.isna(step) else step):
            members = of_group.select(of_group.rows["step"].isna() if pd.isna(step) else of_group.rows["step"].eq(step))
            rows = members.rows
            existing = rows[rows["kind"].notna()]
            sizes = existing["parameters"].dropna()
            texts = [
                text if pd.isna(row.seed) else f"seed {row.seed}: {text}" for row in rows.itertuples() for text in row.missing
            ]
            lines.append(
                Line(
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
                    missing=tuple(texts),
                )
            )
    return lines


def _count(column: pd.Series) -> tuple[int, int]:
    known = column.dropna()
    return int(known.sum()), len(known)


def _summary(of_quantity: pd.DataFrame) -> Summary:
    """Mean over models; over several with the standard error over them, else with the measurement's own."""
    known = of_quantity[of_quantity["value"].notna()]
    if known.empty:
        return Summary()
    if len(known) == 1:
        error = _number(own_error(known).iloc[0])
        return Summary(mean=float(known["value"].iloc[0]), error=error, over=None if error is None else "measurement", n=1)
    mean = mean_of(known["value"])
    return Summary(mean=mean.value, error=mean.error, over="seeds", n=mean.n)


def _number(value: float) -> float | None:
    return None if pd.isna(value) else float(value)


def _correlations(experiment: Experiment, models: Joined, names: list[str]) -> list[Correlated]:
    correlations = []
    compared = models.select(models.rows["same_loss"].fillna(False).astype(bool) & models.rows["kind"].eq(TRANSFORMER))
    for name, against in itertools.product(names, (*trace_names(experiment), "gap")):
        columns = {"run": compared.rows["run"], "folder": compared.rows["folder"]}
        columns |= {"x": compared.of(against)["value"], "y": compared.of(name)["value"]}
        points = pd.DataFrame(columns).dropna().drop_duplicates("folder")  # a model of two groups counts once
        purpose = f"{experiment.name}, {name}, {against}, equal"
        found = correlate(points["x"], points["y"], points["run"].tolist(), purpose)
        correlations.append(Correlated(experiment=experiment.name, accuracy=name, against=against, found=found))
    return correlations


# findings


def findings_of(experiment: Experiment, models: Joined, names: list[str], criterion: SameLoss) -> list[Finding]:
    """The findings of one experiment.

    Args:
        models: those of the experiment.
        names: the accuracies; those that no model has are left out.
    """
    measured = [name for name in names if models.of(name)["value"].notna().any()]
    rules = {STEPS: _steps, SIZES: _sizes, ALGORITHMS: _algorithms, MODELS: _pairs_of_models}
    return rules[experiment.rule](experiment, models, measured or names, criterion)


def _steps(experiment: Experiment, models: Joined, names: list[str], criterion: SameLoss) -> list[Finding]:
    """One finding per optimizer."""
    findings = []
    traces = trace_names(experiment)
    for group in experiment.groups:
        of_group = models.rows[models.rows["group"] == group]
        left_out = []
        pairs = []
        runs = [run.sort_values("step") for _, run in of_group.groupby("seed", sort=False, dropna=False)]
        for run in runs:
            last = run.iloc[[-1]]
            saturated = run.iloc[:-1][run.iloc[:-1]["saturated"].fillna(False).astype(bool)]
            same = [index for index in saturated.index if criterion.obstacle(run.loc[[index]], last) is None]
            if not _is_true(last["saturated"].iloc[0]):
                left_out.append(f"{_who(last.iloc[0])} (last checkpoint {_loss_of(last.iloc[0])})")
            elif same:
                pairs.append((same[0], last.index[0]))
            else:
                state = "is saturated" if saturated.empty else "has the same loss as the last"
                left_out.append(f"{_who(last.iloc[0])} (no earlier checkpoint {state})")
        if len(pairs) < FEWEST:
            reason = f"{len(pairs)} of {len(runs)} runs can be compared, an interval takes {FEWEST}"
            findings.append(_finding(experiment, TITLES[STEPS], group, names, traces, {}, "", reason, left_out))
            continue
        before, after = (models.select(list(side)) for side in zip(*pairs, strict=True))
        steps = [_steps_text(side.rows["step"]) for side in (before, after)]
        basis = f"From the first checkpoint at the same loss ({steps[0]}) to the last ({steps[1]}), {len(pairs)} seeds"
        changes = {}
        for name in (*traces, "gap", *names):
            both = pd.DataFrame({"a": before.of(name)["value"].array, "b": after.of(name)["value"].array}).dropna()
            changes[name] = paired_change(both["a"], both["b"]) if len(both) else None
        findings.append(_finding(experiment, TITLES[STEPS], group, names, traces, changes, basis, None, left_out))
    return findings


def _sizes(experiment: Experiment, models: Joined, names: list[str], criterion: SameLoss) -> list[Finding]:
    """Smallest against largest."""
    traces = trace_names(experiment)
    compared, left_out = _at_same_loss(models)
    groups = {group: compared.select(compared.rows["group"] == group) for group in experiment.groups}
    sized = [(int(of.rows["parameters"].iloc[0]), name) for name, of in groups.items() if len(of.rows) >= FEWEST]
    (few, small), (many, large) = (min(sized), max(sized)) if sized else ((0, ""), (0, ""))
    if few == many:
        reason = f"no two sizes have {FEWEST} models at the same loss each"
        return [_finding(experiment, TITLES[SIZES], "no two sizes", names, traces, {}, "", reason, left_out)]
    before, after = groups[small], groups[large]
    obstacle = criterion.obstacle(before.rows, after.rows)
    basis = f"From {small} ({few:,} parameters, {len(before.rows)} seeds) to {large} ({many:,}, {len(after.rows)} seeds)"
    changes = {} if obstacle else _group_changes(before, after, (*traces, "gap", *names))
    subject = f"{large} against {small}"
    return [_finding(experiment, TITLES[SIZES], subject, names, traces, changes, basis, obstacle, left_out)]


def _algorithms(experiment: Experiment, models: Joined, names: list[str], criterion: SameLoss) -> list[Finding]:
    """Each group against the first."""
    standard, *others = experiment.groups
    findings = []
    for group in others:
        compared, left_out = _at_same_loss(models.select(models.rows["group"].isin([standard, group])))
        kinds = models.rows.loc[models.rows["group"] == group, "kind"].dropna()
        is_table = bool((kinds != TRANSFORMER).any())
        title = TABLE_TITLE if is_table else TITLES[ALGORITHMS]
        subject = f"{group} against {standard}"
        before, after = (compared.select(compared.rows["group"] == name) for name in (standard, group))
        wanted = [name for name in names if not (is_table and name.startswith("finetune"))]
        sides = ((standard, before, FEWEST), (group, after, 1 if is_table else FEWEST))
        few = [f"{name} has {len(side.rows)}" for name, side, needed in sides if len(side.rows) < needed]
        reason = f"models at the same loss are too few: {_and(few)}" if few else criterion.obstacle(before.rows, after.rows)
        seeds = "" if is_table else f" ({len(after.rows)} seeds)"
        basis = f"From {standard} ({len(before.rows)} seeds) to {group}{seeds}"
        traces = [] if is_table else trace_names(experiment)
        changes = {} if reason else _group_changes(before, after, (*traces, "gap", *wanted))
        findings.append(_finding(experiment, title, subject, wanted, traces, changes, basis, reason, left_out))
    return findings


def _pairs_of_models(experiment: Experiment, models: Joined, _: list[str], criterion: SameLoss) -> list[Finding]:
    """The traces of each two models in the parameters of one shape."""
    findings = []
    traces = trace_names(experiment)
    pairs = itertools.combinations(models.rows.index, 2) if experiment.has_common_traces else ()
    for pair in pairs:
        after, before = (models.select([index]) for index in pair)
        rows = [side.rows.iloc[0] for side in (after, before)]
        subject = " against ".join(map(_with_step, rows))
        reasons = [f"{_with_step(row)} {_loss_of(row)}" for row in rows if not _is_true(row["saturated"])]
        reason = "; ".join(reasons) or criterion.obstacle(before.rows, after.rows)
        changes = {} if reason else _group_changes(before, after, traces)
        findings.append(_finding(experiment, TITLES[MODELS], subject, [TRACE], traces, changes, "", reason))
    return findings


def _at_same_loss(models: Joined) -> tuple[Joined, list[str]]:
    """The models at the same loss as the reference, each run at its last step; and those that are not, with the reason."""
    last = models.rows.sort_values("step", kind="stable", na_position="first").groupby(["group", "seed"], dropna=False).tail(1)
    at_end = models.select(models.rows.index.isin(last.index))
    is_same = at_end.rows["same_loss"].fillna(False).astype(bool)
    return at_end.select(is_same), [f"{_who(row)} ({_loss_of(row)})" for _, row in at_end.rows[~is_same].iterrows()]


def _group_mean(models: Joined, name: str) -> Mean | None:
    """The mean of a group over its models; a lookup table, or a single model, has the errors of its own measurements."""
    of_quantity = models.of(name)
    known = of_quantity[of_quantity["value"].notna()]
    if known.empty:
        return None
    if len(models.rows) > 1:
        return mean_of(known["value"])
    error = own_error(known).iloc[0]
    over_seeds = "seeds" in known and not pd.isna(known["se"].iloc[0])
    degrees = known["seeds"].iloc[0] - 1 if over_seeds else math.inf
    return Mean(float(known["value"].iloc[0]), _number(error), degrees, 1)


def _group_changes(before: Joined, after: Joined, names: Iterable[str]) -> dict[str, Change | None]:
    means = {name: (_group_mean(before, name), _group_mean(after, name)) for name in names}
    return {name: change_of_means(a, b) if a and b else None for name, (a, b) in means.items()}


def _finding(
    experiment: Experiment,
    title: str,
    subject: str,
    names: list[str],
    traces: list[str],
    changes: dict[str, Change | None],
    basis: str,
    reason: str | None = None,
    left_out: Iterable[str] = (),
) -> Finding:
    """A finding with its verdicts; without traces (a lookup table's) accuracy decides alone, without accuracies the trace."""
    trace_side, accuracy_side = SIDES[experiment.rule]
    verdicts = dict.fromkeys(names, OPEN)
    for name in names if reason is None else ():
        signs = {trace: change.sign() if (change := changes[trace]) else 0 for trace in traces}
        if name == TRACE:
            by_trace = {{1: LARGER, -1: SMALLER, 0: OPEN}[sign] for sign in signs.values()}
        elif change := changes[name]:
            accuracy = change.sign() * accuracy_side
            by_trace = {_verdict(sign * trace_side, accuracy) for sign in signs.values()} or {_verdict(accuracy)}
        else:
            by_trace = {OPEN}
        is_complete = None not in [changes[trace] for trace in traces]
        if len(by_trace) == 1 and (is_complete or name != TRACE):
            verdicts[name] = by_trace.pop()
        elif is_complete:
            verdicts[name] = BY_RULE
    headline = f"{title} ({subject}): {OPEN}, {reason}" if reason else f"{title} ({subject}): {_in_words(verdicts)}"
    numbers = []
    for name, change in changes.items():
        if name == "gap":
            numbers.append(describe_change("gap", change, " nats"))
        elif name in traces:
            numbers.append(describe_change(trace_label(name), change, "", trace_side or None))
        else:
            numbers.append(describe_change(accuracy_label(name), change, " points", accuracy_side))
    omissions = f"Left out: {'; '.join(left_out)}." if left_out else ""
    body = f"{'. ' if basis else ''}{basis}: {'; '.join(numbers)}" if numbers else ""
    return Finding(
        experiment=experiment.name,
        title=title,
        subject=subject,
        basis=basis,
        changes=changes,
        verdicts=verdicts,
        reason=reason,
        left_out=tuple(left_out),
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


def _is_true(value: object) -> bool:
    return not pd.isna(value) and bool(value)


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
    low, high = steps.min(), steps.max()
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
STANDARD, ADVERSARIAL, TABLE = "standard", "adversarial", "lookup table"  # roles of groups; the first group is the standard one
SMALLEST, LATER = "smallest", "later"


def _paper(analysis: Analysis) -> pd.DataFrame:
    """The numbers of Liu et al. (2023) in published.csv, with our counterparts in the published unit (`ours`, `error`).

    The columns `experiment`, `role` and `quantity` say whose counterpart a number is; they are empty where there is none here.
    A quantity is a gap, a trace, or a task, which stands for its probe.
    """
    table = pd.read_csv(Path(__file__).with_name("published.csv"), dtype=str)
    counterparts = [_counterpart(row.experiment, row.role, row.quantity, analysis) for row in table.itertuples()]
    return table.assign(**pd.DataFrame(counterparts, columns=["ours", "error"]))


def _counterpart(experiment: str, role: str, quantity: str, analysis: Analysis) -> tuple[float | None, float | None]:
    lines = analysis.tables.get(experiment)
    if not lines:
        return None, None
    is_task = quantity in analysis.experiments.tasks
    name = f"{analysis.experiments.probe}_pcfg_{quantity}" if is_task else quantity
    if role == LATER:
        changes = [finding.changes.get(name) for finding in analysis.findings if finding.experiment == STEPS]
        change = changes[0] if changes else None
        mean, error = (change.value, change.error or 0.0) if change else (None, None)
    else:
        line = _of_role(role, lines)
        value = line.values.get(name, Summary()) if line else Summary()
        mean, error = value.mean, value.error
    scale = 100.0 if is_task else 1.0
    return None if mean is None else mean * scale, None if error is None else error * scale


def _of_role(role: str, lines: list[Line]) -> Line | None:
    """The line with a role of the paper's: the first group is the standard one, the next one of models the other."""
    models = [line for line in lines if line.kind == TRANSFORMER]
    groups = list(dict.fromkeys(line.group for line in lines if line.kind in (None, TRANSFORMER)))
    if role == TABLE:
        return next((line for line in lines if line.kind not in (None, TRANSFORMER)), None)
    if role in (STANDARD, ADVERSARIAL):
        place = (STANDARD, ADVERSARIAL).index(role)
        return next((line for line in models if line.group in groups[place : place + 1]), None)
    sized = sorted(models, key=lambda line: line.parameters or 0)
    return (sized[0] if role == SMALLEST else sized[-1]) if sized else None
