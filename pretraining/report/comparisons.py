"""The comparisons of studies: changes of each quantity, the same loss, headroom, verdicts.

Changes are paired by seed where both groups have at least two seeds in common, else Welch's. Each comparison has the changes of
gap, Fisher trace, Hessian trace (Hutchinson), balanced trace, relative flatness R, the user's own measurements and each
accuracy. `pretraining.report.verdicts` has the rules of the verdicts, `pretraining.report.same_loss` that of the same loss.

The lookup table is compared with the base models: one number against the mean over seeds. Its loss is the entropy itself, so
the models' gap is the difference of the losses, and what can be asked of them is that they are saturated.
"""

import itertools
from pathlib import Path

from pcfg.common.files import InputError, read_json
from pcfg.common.schema import Schema
from pretraining.evaluation.records import ComparisonRecord
from pretraining.experiments.study import Comparison, Direction, Group, Models, Studies, Study
from pretraining.report.intervals import Change, change_of_means, change_to_number, mean_of, paired_change
from pretraining.report.rows import (
    BALANCED,
    CONSTANT_SHARE,
    DIFFERENCE,
    GAP,
    HUTCHINSON,
    RELATIVE,
    SAMPLED_LOSS,
    TRACE,
    Tree,
    accuracy_label,
)
from pretraining.report.same_loss import SameLoss
from pretraining.report.sections import COMMON_TRACES, GAP_NAME, LABELS, Member, Section, Summary, summary
from pretraining.report.verdicts import HOLDS, NO_HEADROOM, NOT_SAME_LOSS, Headroom, Verdict, adjust, combine, decide, headroom

LOOKUP = "lookup table"
MLM_LOSS = "MLM loss"
FEWEST_PAIRS = 2  # seeds in common for a paired change


class Quantity(Schema):
    """One quantity of one comparison."""

    name: str  # as in results.csv
    label: str
    kind: str  # loss, flatness, own or accuracy
    unit: str
    before: Summary
    after: Summary
    change: Change | None  # None where one side was not measured
    verdict: Verdict | None = None  # of the flatness and the accuracies that decide
    claim: str | None = None  # of an accuracy: the verdict on the claim about flatness and accuracy together


class Compared(Schema):
    """A comparison of a study with its numbers and verdicts."""

    study: str
    name: str
    claim: str
    before: str  # label of the group and its steps in total
    after: str
    primary: bool
    expected: dict[str, str | None]  # of flatness and accuracy
    obstacle: str | None  # why the models are not at the same loss; None if they are
    quantities: tuple[Quantity, ...]
    notes: tuple[str, ...]

    def of(self, kind: str) -> list[Quantity]:
        """The quantities of a kind that have a verdict."""
        return [quantity for quantity in self.quantities if quantity.kind == kind and quantity.verdict]


class Comparer:
    """Compares the groups of the studies of one folder, whose seeds, folders and numbers it knows."""

    def __init__(self, tree: Tree, folder: Path, studies: Studies, criterion: SameLoss):
        self.tree = tree
        self.folder = folder
        self.studies = studies
        self.criterion = criterion
        self.digests = tree.digests()
        self.tasks = {task.name: task.label for task in studies.tasks}
        self.controls = {control.name: control.folders for control in studies.controls}
        self.own = {(name, model): number for name, model, number in self._own_measurements()}
        self.headrooms = {
            name: self._headroom(name) for solver in studies.readouts for name in self.accuracies(solver, studies.label_counts)
        }

    # names and numbers

    def accuracies(self, solver: str, labels: tuple[int, ...], tasks: tuple[str, ...] | None = None) -> list[str]:
        """The names of accuracies of a readout, by task and number of labels."""
        names = [task.name for task in self.studies.tasks if tasks is None or task.name in tasks]
        return [f"curve_{task}_{solver}_{number}" for task, number in itertools.product(names, labels)]

    def label(self, models: Models) -> str:
        """A group with its steps in total, as tables and plots name it."""
        group = self.studies.groups[models.group]
        return f"{group.label}, step {group.total(models.step, self.studies.groups):,}"

    def folders(self, models: Models) -> dict[int, str]:
        """By seed the models that exist."""
        return _existing(self.tree, self.studies.groups[models.group], models.step)

    def _own_measurements(self) -> list[tuple[str, str, tuple[float, float | None]]]:
        """The user's own measurements: name, model, and the number with its error."""
        numbers = []
        for measurement, group in itertools.product(self.studies.measurements, self.studies.groups.values()):
            for model in group.folders.values():
                path = self.folder / model / f"{measurement.name}.json"
                if path.exists():
                    record = read_json(path)
                    keys = [key for key in (measurement.value, measurement.error) if key]
                    if missing := [key for key in keys if not isinstance(record.get(key), int | float)]:
                        raise InputError(f"{path}: no number in {missing[0]!r}; correct the measurement's value or error")
                    number, *error = (float(record[key]) for key in keys)
                    numbers.append((measurement.name, model, (number, error[0] if error else None)))
        return numbers

    def number(self, model: str, name: str) -> tuple[float | None, float | None]:
        """A number of a model that does not depend on others, and its own error."""
        if (name, model) in self.own:
            return self.own[name, model]
        name = {GAP_NAME: GAP, MLM_LOSS: SAMPLED_LOSS}.get(name, name)
        return self.tree.value(model, name), self.tree.value(model, name, "se")

    def _width(self, models: Models) -> int | None:
        widths = self.tree.models["hidden_size"].reindex(list(self.folders(models).values())).dropna()
        return None if widths.empty else int(widths.iloc[0])

    def section(self, study: Study) -> Section:
        """All models of the groups of a study, with balanced traces in the parameters of the widest."""
        wanted = [side for comparison in study.comparisons for side in (comparison.before, comparison.after)]
        groups = [self.studies.groups[name] for name in dict.fromkeys(side.group for side in wanted)]
        cells = [(group, Models(group=group.name, step=step)) for group in groups for step in group.steps]
        widest = max((self._width(models) or 0 for _, models in cells), default=0)
        members = []
        for group, models in cells:
            width = self._width(models)
            for seed in group.seeds:
                model = group.folders[f"{seed}@{models.step}"]
                total = group.total(models.step, self.studies.groups)
                members.append(Member(group.label, seed, total, model, widest / width if width else 1.0))
        accuracies = [name for solver in self.studies.readouts for name in self.accuracies(solver, self.studies.label_counts)]
        accuracies += [f"finetune_{task}" for task in self.studies.finetuned]
        return Section(
            study.name, members, [GAP_NAME, TRACE, HUTCHINSON, BALANCED, RELATIVE, CONSTANT_SHARE, *accuracies], self.criterion
        )

    # comparisons

    def compare_all(self, study: Study) -> list[Compared]:
        """The comparisons of a study; its primary ones are the family of Holm's correction."""
        result = [self._compare(study, comparison) for comparison in study.comparisons]
        primary = [one for one in result if one.primary]
        adjusted = iter(adjust([quantity.verdict for one in primary for quantity in one.quantities if quantity.verdict]))
        for index, one in enumerate(result):
            if one.primary:
                quantities = tuple(
                    quantity.model_copy(update={"verdict": next(adjusted)}) if quantity.verdict else quantity
                    for quantity in one.quantities
                )
                result[index] = one.model_copy(update={"quantities": quantities})
        if self.controls.get("lookup") and study is self._study_of_lookup():
            result.append(self._compare_lookup(study))
        return result

    def _study_of_lookup(self) -> Study:
        """The study with the lookup table: the paper's algorithms, else the first."""
        by_paper = [study for study in self.studies.studies if study.paper == "algorithms"]
        return (by_paper or list(self.studies.studies))[0]

    def _change(self, comparison: Comparison, name: str, kind: str, unit: str) -> Quantity:
        """A quantity of both sides, and its change."""
        sides = (comparison.before, comparison.after)
        widths = [self._width(side) for side in sides]
        widest = max((width for width in widths if width), default=1)
        numbers: list[dict[int, tuple[float, float | None]]] = []
        for side, width in zip(sides, widths, strict=True):
            of_side = {}
            for seed, model in self.folders(side).items():
                value, error = self._of_member(Member("", seed, None, model, widest / (width or widest)), name)
                if value is not None:
                    of_side[seed] = value, error
            numbers.append(of_side)
        before, after = numbers
        first, second = ([value for value, _ in side.values()] for side in numbers)
        common = [seed for seed in before if seed in after]
        change = None
        if len(common) >= FEWEST_PAIRS or (common and min(len(first), len(second)) < FEWEST_PAIRS):
            change = paired_change([before[seed][0] for seed in common], [after[seed][0] for seed in common])
        elif first and second:
            change = change_of_means(mean_of(first), mean_of(second))
        label = LABELS.get(name) or (accuracy_label(name, self.tasks) if kind == "accuracy" else name)
        means = summary([*before.values()]), summary([*after.values()])
        return Quantity(name=name, label=label, kind=kind, unit=unit, before=means[0], after=means[1], change=change)

    def _of_member(self, member: Member, name: str) -> tuple[float | None, float | None]:
        if name == BALANCED or name in COMMON_TRACES.values():
            return Section("", [], [], self.criterion).number(self.tree, member, name)
        return self.number(member.model, name)

    def _obstacle(self, comparison: Comparison, loss: Quantity) -> str | None:
        """Why two sides are not at the same loss."""
        sides = [self.folders(side) for side in (comparison.before, comparison.after)]
        models = [model for side in sides for model in side.values()]
        if not all(sides):
            return "models are missing"
        numbers = {model: self.number(model, loss.name) for model in models}
        if unknown := [model for model, (value, _) in numbers.items() if value is None]:
            return f"the loss of {unknown[0]} is not measured"
        gaps = {model: (value or 0.0, error or 0.0) for model, (value, error) in numbers.items()}
        change = loss.change
        over_seeds = None if change is None or change.low is None or change.high is None else (change.low, change.high)
        paired = self._over_sentences(sides[0], sides[1])
        if paired is None and loss.name == GAP_NAME and change is not None:
            errors = [sum(gaps[model][1] for model in side.values()) / len(side) for side in sides]
            paired = change.value, sum(errors)  # a bound
        return self.criterion.obstacle_of_groups(gaps if loss.name == GAP_NAME else None, over_seeds, paired)

    def _over_sentences(self, before: dict[int, str], after: dict[int, str]) -> tuple[float, float] | None:
        """Mean difference of the losses and a bound of its error, from comparison records; None unless all pairs have one."""
        records = {
            (model, self.digests.get(record.inputs["other"]["sha256"])): record.difference.sentences
            for model, _, record in self.tree.records
            if isinstance(record, ComparisonRecord)
        }
        means = [records.get((after[seed], before[seed])) for seed in before if seed in after]
        if not means or None in means:
            return None
        return sum(m.mean for m in means if m) / len(means), sum(m.standard_error for m in means if m) / len(means)

    def _compare(self, study: Study, comparison: Comparison) -> Compared:
        criteria = self.studies.criteria
        loss = self._change(comparison, GAP_NAME, "loss", "nats")
        if not loss.before.n and not loss.after.n:
            loss = self._change(comparison, MLM_LOSS, "loss", "nats")
        obstacle = self._obstacle(comparison, loss)
        refusal = None if obstacle is None else Verdict(word=NOT_SAME_LOSS, reason=obstacle)
        widths = {self._width(side) for side in (comparison.before, comparison.after)}
        names = [TRACE, HUTCHINSON, BALANCED, *(COMMON_TRACES.values() if len(widths) > 1 else ()), RELATIVE]
        quantities = [loss]
        flatness: Verdict | None = None
        for name in names:
            quantity = self._change(comparison, name, "flatness", "" if name == RELATIVE else "nats")
            if name == comparison.trace:
                margin = criteria.trace_margin * abs(quantity.before.mean or 0.0)
                flatness = decide(quantity.change, margin, comparison.flatness, refusal)
                quantity = quantity.model_copy(update={"verdict": flatness})
            quantities.append(quantity)
        quantities += [self._change(comparison, m.name, "own", m.unit) for m in self.studies.measurements]
        for number, solver in enumerate(self.studies.readouts):
            for name in self.accuracies(solver, comparison.labels, comparison.tasks):
                quantity = self._change(comparison, name, "accuracy", "points")
                if number == 0:
                    verdict = decide(
                        quantity.change, criteria.accuracy_margin, comparison.accuracy, refusal or self._no_headroom(name)
                    )
                    both = comparison.flatness and comparison.accuracy and flatness
                    claim = combine(flatness, verdict) if both and flatness else None
                    quantity = quantity.model_copy(update={"verdict": verdict, "claim": claim})
                quantities.append(quantity)
        for task in self.studies.finetuned:
            if task in comparison.tasks:
                quantities.append(self._change(comparison, f"finetune_{task}", "accuracy", "points"))
        return Compared(
            study=study.name,
            name=comparison.name,
            claim=comparison.claim,
            before=self.label(comparison.before),
            after=self.label(comparison.after),
            primary=comparison.primary,
            expected={"flatness": comparison.flatness, "accuracy": comparison.accuracy},
            obstacle=obstacle,
            quantities=tuple(quantity for quantity in quantities if quantity.verdict or quantity.before.n or quantity.after.n),
            notes=tuple(self._notes(comparison)),
        )

    def _notes(self, comparison: Comparison) -> list[str]:
        """What a reader has to know of two sides."""
        notes = []
        sides = [list(self.folders(side).values()) for side in (comparison.before, comparison.after)]
        models = self.tree.models.reindex([model for side in sides for model in side])
        sizes = models["hidden_size"] // models["heads"]
        if models["hidden_size"].nunique() > 1:
            notes.append("Balanced trace and both rules of enlarging (tables, head) are in the parameters of the wider model.")
            if sizes.nunique() > 1:
                notes.append("The heads differ in size: enlarging changes the scale of queries, which these numbers ignore.")
            if models["layers"].nunique() > 1:
                notes.append("The numbers of layers differ: output biases of added layers would add to an enlarged trace.")
        differing = [model for side in sides for model in side if estimators_differ(self.tree, model)]
        if differing:
            notes.append(
                f"Fisher and Hutchinson traces differ by more than two standard errors (paired) for {len(differing)} of "
                f"{len(models)} models, for example {differing[0]}."
            )
        return notes

    # controls

    def _headroom(self, name: str) -> Headroom:
        folders = _existing(self.tree, self.studies.selection, self.studies.base.step)
        models = [self.tree.value(model, name) for model in folders.values()]
        words = [self.tree.value(folder, name) for folder in self.controls.get("words", ())]
        untrained = [self.tree.value(folder, name) for folder in self.controls.get("untrained", ())]
        known = [[value for value in values if value is not None] for values in (models, words, untrained)]
        return headroom(known[0], known[1][0] if known[1] else None, known[2])

    def _no_headroom(self, name: str) -> Verdict | None:
        state = self.headrooms.get(name, Headroom(None, "not known"))
        return None if state.exists else Verdict(word=NO_HEADROOM, reason=state.reason)

    def _compare_lookup(self, study: Study) -> Compared:
        """The lookup table against the base models."""
        [folder, *_] = self.controls["lookup"]
        base = self.folders(self.studies.base)
        expected: Direction | None = "falls" if study.paper == "algorithms" else None
        gap = summary([self.number(model, GAP_NAME) for model in base.values()])
        gaps = {model: self.number(model, GAP_NAME) for model in base.values()}
        known = {model: (value, error or 0.0) for model, (value, error) in gaps.items() if value is not None}
        obstacle: str | None = "the gap of the base models is not measured"
        if known and len(known) == len(base):
            obstacle = self.criterion.obstacle_of_groups(known, (0.0, 0.0), None)
        refusal = Verdict(word=NOT_SAME_LOSS, reason=obstacle) if obstacle else None
        quantities = []
        for name in self.accuracies(self.studies.readouts[0], self.studies.label_counts):
            values = [self.number(model, name) for model in base.values()]
            of_models = [value for value, _ in values if value is not None]
            table = self.number(folder, name)
            change = None if not of_models or table[0] is None else change_to_number(of_models, table[0])
            verdict = decide(change, self.studies.criteria.accuracy_margin, expected, refusal or self._no_headroom(name))
            quantities.append(
                Quantity(
                    name=name,
                    label=accuracy_label(name, self.tasks),
                    kind="accuracy",
                    unit="points",
                    before=summary(values),
                    after=summary([table]),
                    change=change,
                    verdict=verdict,
                    claim=combine(Verdict(word=HOLDS), verdict) if expected else None,
                )
            )
        note = "" if gap.mean is None else f"The table's loss is the entropy; the base models are {gap.mean:.4f} nats above it."
        return Compared(
            study=study.name,
            name=LOOKUP,
            claim="The lookup table has a lower accuracy than models of (almost) its loss" if expected else "",
            before=self.label(self.studies.base),
            after=LOOKUP,
            primary=False,
            expected={"flatness": None, "accuracy": expected},
            obstacle=obstacle,
            quantities=tuple(quantities),
            notes=(note,) if note else (),
        )


def _existing(tree: Tree, group: Group, step: int) -> dict[int, str]:
    """By seed the models of a group at a step that exist."""
    folders = {seed: group.folders.get(f"{seed}@{step}", "") for seed in group.seeds}
    return {seed: folder for seed, folder in folders.items() if folder in tree.paths}


def estimators_differ(tree: Tree, model: str) -> bool:
    """Whether the Fisher and Hutchinson traces of a model differ by more than two standard errors, paired by sentences."""
    value = tree.value(model, DIFFERENCE)
    error = tree.value(model, DIFFERENCE, "se")
    return value is not None and error is not None and abs(value) > 2 * error
