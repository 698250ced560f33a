"""Groups of models as the tables and plots show them: the models of a study, or all models of a tree that nobody planned.

A section has members, each with its group, seed and step. A line of its table is a group at a step: means over seeds with
standard errors over seeds, of a single model with the error of its own measurement.

Without a study the first section has a group per job. For each shape to which models were enlarged there is one more, of the
models that have a trace in its parameters; there each two are compared, by the standard errors of their own measurements and by
both rules of enlarging.
"""

import collections
import dataclasses
import itertools
import math

import pandas as pd

from pcfg.common.schema import Schema
from pretraining.report import rows
from pretraining.report.intervals import Change, Mean, change_of_means, mean_of
from pretraining.report.rows import Number, Tree
from pretraining.report.same_loss import SameLoss

MODELS = "models"  # the section of all models
LARGER = "is larger"
SMALLER = "is smaller"
BY_RULE = "depends on the rule of enlarging"
OPEN = "undecided"
LABELS = {
    rows.GAP_NAME: "gap",
    rows.MLM_LOSS: "MLM loss",
    rows.TRACE: "Fisher trace",
    rows.HUTCHINSON: "Hessian trace (Hutchinson)",
    rows.BALANCED: "balanced trace",
    rows.RELATIVE: "relative flatness R",
    rows.CONSTANT_SHARE: "share of constant directions",
} | {name: f"Fisher trace ({rule})" for rule, name in rows.COMMON_TRACES.items()}


@dataclasses.dataclass(frozen=True)
class Member:
    """A model of a section."""

    group: str  # its name in tables and plots
    seed: int | None
    step: int | None  # of training in total
    model: str  # in the tree, where it may be missing
    times: float = 1.0  # as wide as this is the model in whose parameters balanced traces are
    common: dict[str, str] = dataclasses.field(default_factory=dict)  # by trace of one shape the model that has it

    def number(self, tree: Tree, quantity: str) -> Number:
        """The value of a quantity and its own standard error."""
        if self.common and quantity in rows.COMMON_TRACES.values():
            return tree.number(self.common.get(quantity, ""), rows.TRACE)
        return tree.number(self.model, quantity, self.times)


class Summary(Schema):
    """The mean of a group."""

    mean: float | None = None  # None where nothing was measured
    error: float | None = None  # None where one measurement has no error
    over: str | None = None  # the source of the error: "seeds", or "measurement" (a single model's own)
    n: int = 0  # models


class Line(Schema):
    """One line of a section's table."""

    group: str
    step: int | None
    kind: str | None  # of the models; None where there is none
    parameters: int | None
    models: int  # that exist
    planned: int
    saturated: tuple[int, int]  # how many are, and of how many it is known
    values: dict[str, Summary]  # by quantity


@dataclasses.dataclass(frozen=True)
class Section:
    """Models that are shown together."""

    name: str
    members: list[Member]
    quantities: list[str]  # gap, traces and accuracies
    criterion: SameLoss
    is_shape: bool = False  # whether the traces are those of enlarged models, in the parameters of one shape

    @property
    def groups(self) -> list[str]:
        """The groups, each once, in order."""
        return list(dict.fromkeys(member.group for member in self.members))

    def is_saturated(self, tree: Tree, member: Member) -> bool | None:
        """Whether a model is saturated; None where its gap is not known."""
        gap, error = member.number(tree, rows.GAP_NAME)
        return None if gap is None else self.criterion.is_saturated(gap, error or 0.0)

    def lines(self, tree: Tree) -> list[Line]:
        """A line per group and step, groups in their order."""
        by_line: dict[tuple, list[Member]] = {}
        for member in sorted(self.members, key=lambda member: (self.groups.index(member.group), member.step or 0)):
            by_line.setdefault((member.group, member.step), []).append(member)
        lines = []
        for (group, step), members in by_line.items():
            existing = [member for member in members if member.model in tree.paths]
            sizes = tree.own_sizes[[member.model for member in existing]].dropna()
            known = [state for member in existing if (state := self.is_saturated(tree, member)) is not None]
            line = Line(
                group=group,
                step=step,
                kind=str(tree.models.at[existing[0].model, "kind"]) if existing else None,
                parameters=None if sizes.empty else int(sizes.iloc[0]),
                models=len(existing),
                planned=len(members),
                saturated=(sum(known), len(known)),
                values={name: summary([member.number(tree, name) for member in existing]) for name in self.quantities},
            )
            lines.append(line)
        return lines


def summary(numbers: list[Number]) -> Summary:
    """The mean of values with its standard error; that of a single one is its own."""
    known = [(value, error) for value, error in numbers if value is not None]
    if not known:
        return Summary()
    if len(known) == 1:
        [(value, error)] = known
        return Summary(mean=value, error=error, over=None if error is None else "measurement", n=1)
    mean = mean_of([value for value, _ in known])
    return Summary(mean=mean.value, error=mean.error, over="seeds", n=mean.n)


class EnlargedPair(Schema):
    """Two models in the parameters of one shape, and whether the trace of the first is larger."""

    subject: str
    verdict: str  # LARGER, SMALLER, BY_RULE or OPEN
    reason: str | None  # why they are not compared
    changes: dict[str, Change | None]  # by trace; None where one is missing


def inferred_sections(tree: Tree, criterion: SameLoss) -> list[Section]:
    """The sections of a tree without a study."""
    models = tree.models
    own = models[models["enlarged_rule"].isna()]
    labels = _labels(own)
    members = [Member(str(labels[model]), None, _step(row), str(model)) for model, row in own.iterrows()]
    quantities = [rows.GAP_NAME, rows.TRACE, *tree.accuracies]
    sections = [Section(MODELS, members, quantities, criterion)] if members else []
    with_trace = models[tree.measured[rows.TRACE]["value"].notna() & (models["kind"] == rows.TRANSFORMER)]
    for shape, of_shape in with_trace.groupby(rows.SHAPE):
        if of_shape["enlarged_rule"].notna().any():
            name = f"{MODELS}_of_{shape[0]}_parameters"
            members = _members_of_shape(tree, of_shape, labels)
            sections.append(Section(name, members, [rows.GAP_NAME, *rows.COMMON_TRACES.values()], criterion, is_shape=True))
    return sections


def _step(row: pd.Series) -> int | None:
    return None if pd.isna(row["step"]) else int(row["step"])


def _labels(models: pd.DataFrame) -> pd.Series:
    """Names of the runs: their jobs, else the folders of the checkpoints, else the models, whichever first are distinct."""
    names = models.index.to_series()
    folders = names.where(models["step"].isna() | ~names.str.contains("/"), names.str.rpartition("/")[0])
    jobs = models["job"].where(models["kind"] == rows.TRANSFORMER, names)
    for labels in (jobs, folders):
        if not pd.DataFrame({"label": labels, "step": models["step"]}).duplicated().any():
            return labels
    return names


def _members_of_shape(tree: Tree, models: pd.DataFrame, labels: pd.Series) -> list[Member]:
    """The models of one shape, each run at its last step: own models, and by rule those enlarged to it."""
    digests = tree.digests()
    runs: dict[tuple, Member] = {}
    for model, row in models.sort_values("step", kind="stable", na_position="first").iterrows():
        step = _step(row)
        if pd.isna(row["enlarged_rule"]):
            common = dict.fromkeys(rows.COMMON_TRACES.values(), str(model))
            runs[labels[model], 0] = Member(labels[model], None, step, str(model), common=common)
            continue
        group = f"{row['job']} x {row['enlarged_times']}"
        key = group, int(row["enlarged_heads"])
        before = runs.get(key)
        common = before.common if before and before.step == step else {}
        source = digests.get(row["enlarged_from"]) or (before.model if common and before else str(model))
        runs[key] = Member(group, None, step, source, common={**common, rows.COMMON_TRACES[row["enlarged_rule"]]: str(model)})
    repeated = {group for group, times in collections.Counter(group for group, _ in runs).items() if times > 1}
    named = [
        dataclasses.replace(member, group=f"{group}, {heads} x heads") if group in repeated else member
        for (group, heads), member in runs.items()
    ]
    size = tree.own_sizes
    return sorted(named, key=lambda m: (min(size[model] for model in m.common.values()), m.group))


def compare_enlarged(tree: Tree, section: Section, reference: str | None) -> list[EnlargedPair]:
    """Each two models of one shape, by both rules of enlarging."""
    table = rows.losses(tree, section.criterion, reference)
    pairs = []
    for after, before in itertools.combinations(section.members, 2):
        reasons = []
        for member in (after, before):
            gap, error = table.loc[member.model, ["gap", "gap_se"]]
            if not section.is_saturated(tree, member):
                why = "of unknown gap" if pd.isna(gap) else f"not saturated, gap {gap:.4f} ± {error:.4f} nats"
                reasons.append(f"{_with_step(member)} {why}")
        reason = "; ".join(reasons) or section.criterion.obstacle(table.loc[before.model], table.loc[after.model])
        changes = {} if reason else {name: _change(tree, before, after, name) for name in rows.COMMON_TRACES.values()}
        by_rule = {{1: LARGER, -1: SMALLER, 0: OPEN}[change.sign()] if change else None for change in changes.values()}
        verdict = OPEN if reason or None in by_rule else by_rule.pop() if len(by_rule) == 1 else BY_RULE
        subject = f"{_with_step(after)} against {_with_step(before)}"
        pairs.append(EnlargedPair(subject=subject, verdict=str(verdict), reason=reason, changes=changes))
    return pairs


def _change(tree: Tree, before: Member, after: Member, name: str) -> Change | None:
    (a, a_error), (b, b_error) = (member.number(tree, name) for member in (before, after))
    if a is None or b is None:
        return None
    return change_of_means(Mean(a, a_error, math.inf, 1), Mean(b, b_error, math.inf, 1))


def _with_step(member: Member) -> str:
    return member.group if member.step is None else f"{member.group}, step {member.step:,}"
