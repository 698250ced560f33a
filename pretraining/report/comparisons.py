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
from pretraining.report import rows
from pretraining.report.intervals import Change, change_of_means, change_to_number, mean_of, paired_change
from pretraining.report.rows import Number, Tree
from pretraining.report.same_loss import SameLoss
from pretraining.report.sections import LABELS, Member, Section, Summary, summary
from pretraining.report.verdicts import HOLDS, NO_HEADROOM, NOT_SAME_LOSS, Headroom, Verdict, adjust, combine, decide, headroom

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
        self.studies = studies
        self.criterion = criterion
        self.tasks = {task.name: task.label for task in studies.tasks}
        self.controls = {control.name: control.folders for control in studies.controls}
        self.own = self._own_measurements(folder)
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

    def folders(self, models: Models, group: Group | None = None) -> dict[int, str]:
        """By seed the models that exist; `group` instead of the study's group of that name."""
        group = group or self.studies.groups[models.group]
        folders = {seed: group.folders.get(f"{seed}@{models.step}", "") for seed in group.seeds}
        return {seed: folder for seed, folder in folders.items() if folder in self.tree.paths}

    def _own_measurements(self, folder: Path) -> dict[tuple[str, str], Number]:
        """The user's own measurements by name and model."""
        numbers: dict[tuple[str, str], Number] = {}
        for measurement, group in itertools.product(self.studies.measurements, self.studies.groups.values()):
            keys = [key for key in (measurement.value, measurement.error) if key]
            for model in group.folders.values():
                path = folder / model / f"{measurement.name}.json"
                if path.exists():
                    record = read_json(path)
                    if missing := [key for key in keys if not isinstance(record.get(key), int | float)]:
                        raise InputError(f"{path}: no number in {missing[0]!r}; correct the measurement's value or error")
                    number, *error = (float(record[key]) for key in keys)
                    numbers[measurement.name, model] = number, error[0] if error else None
        return numbers

    def number(self, model: str, name: str, times: float = 1.0) -> Number:
        """A quantity of a model, or a measurement of the user's own; `times` as in `Tree.number`."""
        return self.own.get((name, model)) or self.tree.number(model, name, times)

    def _width(self, models: Models) -> int | None:
        widths = self.tree.models["hidden_size"].reindex(list(self.folders(models).values())).dropna()
        return None if widths.empty else int(widths.iloc[0])

    def section(self, study: Study) -> Section:
        """All models of the groups of a study, with balanced traces in the parameters of the widest."""
        wanted = [side for comparison in study.comparisons for side in (comparison.before, comparison.after)]
        groups = [self.studies.groups[name] for name in dict.fromkeys(side.group for side in wanted)]
        cells = [(group, Models(group=group.name, step=step)) for group in groups for step in group.steps]
        widths = [self._width(models) for _, models in cells]
        widest = max((width for width in widths if width), default=0)
        members = []
        for (group, models), width in zip(cells, widths, strict=True):
            total = group.total(models.step, self.studies.groups)
            times = widest / width if width else 1.0
            members += [Member(group.label, seed, total, group.folders[f"{seed}@{models.step}"], times) for seed in group.seeds]
        loss = rows.GAP_NAME if self.tree.has_gaps else rows.MLM_LOSS
        names = [loss, rows.TRACE, rows.HUTCHINSON, rows.BALANCED, rows.RELATIVE, rows.CONSTANT_SHARE]
        names += [name for solver in self.studies.readouts for name in self.accuracies(solver, self.studies.label_counts)]
        names += [f"finetune_{task}" for task in self.studies.finetuned]
        return Section(study.name, members, names, self.criterion)

    # comparisons

    def compare_all(self, study: Study) -> list[Compared]:
        """The comparisons of a study; its primary ones are the family of Holm's correction."""
        compared = [self._compare(study, comparison) for comparison in study.comparisons]
        adjusted = iter(adjust([q.verdict for one in compared if one.primary for q in one.quantities if q.verdict]))
        for index, one in enumerate(compared):
            if one.primary:
                quantities = [q.model_copy(update={"verdict": next(adjusted)}) if q.verdict else q for q in one.quantities]
                compared[index] = one.model_copy(update={"quantities": tuple(quantities)})
        # The paper's algorithms, else the first study, have the lookup table.
        studies = self.studies.studies
        if self.controls.get("lookup") and study is next((s for s in studies if s.paper == "algorithms"), studies[0]):
            compared.append(self._compare_lookup(study))
        return compared

    def _change(self, comparison: Comparison, name: str, kind: str, unit: str) -> Quantity:
        """A quantity of both sides, and its change."""
        sides = (comparison.before, comparison.after)
        widths = [self._width(side) for side in sides]
        widest = max((width for width in widths if width), default=1)
        numbers: list[dict[int, tuple[float, float | None]]] = []
        for side, width in zip(sides, widths, strict=True):
            times = widest / (width or widest)
            of_seeds = {seed: self.number(model, name, times) for seed, model in self.folders(side).items()}
            numbers.append({seed: (value, error) for seed, (value, error) in of_seeds.items() if value is not None})
        before, after = numbers
        first, second = ([value for value, _ in side.values()] for side in numbers)
        common = [seed for seed in before if seed in after]
        change = None
        if len(common) >= FEWEST_PAIRS or (common and min(len(first), len(second)) < FEWEST_PAIRS):
            change = paired_change([before[seed][0] for seed in common], [after[seed][0] for seed in common])
        elif first and second:
            change = change_of_means(mean_of(first), mean_of(second))
        return self._quantity(name, kind, unit, [*before.values()], [*after.values()], change)

    def _quantity(
        self, name: str, kind: str, unit: str, before: list[Number], after: list[Number], change: Change | None
    ) -> Quantity:
        """A quantity from the numbers of the models of both sides."""
        label = LABELS.get(name) or (rows.accuracy_label(name, self.tasks) if kind == "accuracy" else name)
        means = summary(before), summary(after)
        return Quantity(name=name, label=label, kind=kind, unit=unit, before=means[0], after=means[1], change=change)

    def _obstacle(self, comparison: Comparison, loss: Quantity) -> str | None:
        """Why two sides are not at the same loss."""
        sides = [self.folders(side) for side in (comparison.before, comparison.after)]
        if not all(sides):
            return "models are missing"
        gaps: dict[str, tuple[float, float]] = {}
        for model in (model for side in sides for model in side.values()):
            value, error = self.number(model, loss.name)
            if value is None:
                return f"the loss of {model} is not measured"
            gaps[model] = value, error or 0.0
        change = loss.change
        over_seeds = None if change is None or change.low is None or change.high is None else (change.low, change.high)
        over_sentences = self._over_sentences(sides[0], sides[1])
        if over_sentences is None and loss.name == rows.GAP_NAME and change is not None:
            errors = [sum(gaps[model][1] for model in side.values()) / len(side) for side in sides]
            over_sentences = change.value, sum(errors)  # a bound
        return self.criterion.obstacle_of_groups(gaps if loss.name == rows.GAP_NAME else None, over_seeds, over_sentences)

    def _over_sentences(self, before: dict[int, str], after: dict[int, str]) -> tuple[float, float] | None:
        """Mean difference of the losses and a bound of its error, from comparison records; None unless all pairs have one."""
        digests = self.tree.digests()
        records = {
            (model, digests.get(record.inputs["other"]["sha256"])): record.difference.sentences
            for model, _, record in self.tree.records
            if isinstance(record, ComparisonRecord)
        }
        pairs = [(after[seed], before[seed]) for seed in before if seed in after]
        if not pairs or not records.keys() >= set(pairs):
            return None
        means = [records[pair] for pair in pairs]
        return sum(mean.mean for mean in means) / len(means), sum(mean.standard_error for mean in means) / len(means)

    def _compare(self, study: Study, comparison: Comparison) -> Compared:
        loss = self._change(comparison, rows.GAP_NAME, "loss", "nats")
        if not loss.before.n and not loss.after.n:
            loss = self._change(comparison, rows.MLM_LOSS, "loss", "nats")
        obstacle = self._obstacle(comparison, loss)
        refusal = None if obstacle is None else Verdict(word=NOT_SAME_LOSS, reason=obstacle)
        quantities = [loss]
        flatness: Verdict | None = None
        widths = {self._width(side) for side in (comparison.before, comparison.after)}
        common = rows.COMMON_TRACES.values() if len(widths) > 1 else ()
        for name in (rows.TRACE, rows.HUTCHINSON, rows.BALANCED, *common, rows.RELATIVE):
            quantity = self._change(comparison, name, "flatness", "" if name == rows.RELATIVE else "nats")
            if name == comparison.trace:
                margin = self.studies.criteria.trace_margin * abs(quantity.before.mean or 0.0)
                flatness = decide(quantity.change, margin, comparison.flatness, refusal)
                quantity = quantity.model_copy(update={"verdict": flatness})
            quantities.append(quantity)
        quantities += [self._change(comparison, m.name, "own", m.unit) for m in self.studies.measurements]
        for number, solver in enumerate(self.studies.readouts):
            for name in self.accuracies(solver, comparison.labels, comparison.tasks):
                quantity = self._change(comparison, name, "accuracy", "points")
                if number == 0:
                    expected = flatness if comparison.flatness else None
                    quantity = self._decided(quantity, comparison.accuracy, refusal, expected)
                quantities.append(quantity)
        finetuned = [f"finetune_{task}" for task in self.studies.finetuned if task in comparison.tasks]
        quantities += [self._change(comparison, name, "accuracy", "points") for name in finetuned]
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

    def _decided(
        self, quantity: Quantity, expected: Direction | None, refusal: Verdict | None, flatness: Verdict | None
    ) -> Quantity:
        """An accuracy with its verdict, and with that on the claim where both sides are expected to change.

        `flatness` is its verdict; None where no direction is expected of it.
        """
        state = self.headrooms.get(quantity.name, Headroom(None, "not known"))
        if refusal is None and not state.exists:
            refusal = Verdict(word=NO_HEADROOM, reason=state.reason)
        verdict = decide(quantity.change, self.studies.criteria.accuracy_margin, expected, refusal)
        claim = combine(flatness, verdict) if expected and flatness else None
        return quantity.model_copy(update={"verdict": verdict, "claim": claim})

    def _notes(self, comparison: Comparison) -> list[str]:
        """What a reader has to know of two sides."""
        notes = []
        folders = [model for side in (comparison.before, comparison.after) for model in self.folders(side).values()]
        models = self.tree.models.reindex(folders)
        if models["hidden_size"].nunique() > 1:
            notes.append("Balanced trace and both rules of enlarging (tables, head) are in the parameters of the wider model.")
            if (models["hidden_size"] // models["heads"]).nunique() > 1:
                notes.append("The heads differ in size: enlarging changes the scale of queries, which these numbers ignore.")
            if models["layers"].nunique() > 1:
                notes.append("The numbers of layers differ: output biases of added layers would add to an enlarged trace.")
        if differing := [model for model in folders if self.tree.estimators_differ(model)]:
            notes.append(
                f"Fisher and Hutchinson traces differ by more than two standard errors (paired) for {len(differing)} of "
                f"{len(models)} models, for example {differing[0]}."
            )
        return notes

    # controls

    def _headroom(self, name: str) -> Headroom:
        base = self.folders(self.studies.base, self.studies.selection).values()
        folders = (base, self.controls.get("words", ()), self.controls.get("untrained", ()))
        values = [[value for model in of if (value := self.tree.value(model, name)) is not None] for of in folders]
        return headroom(values[0], values[1][0] if values[1] else None, values[2])

    def _compare_lookup(self, study: Study) -> Compared:
        """The lookup table against the base models."""
        [folder, *_] = self.controls["lookup"]
        base = self.folders(self.studies.base).values()
        expected: Direction | None = "falls" if study.paper == "algorithms" else None
        gaps = {model: self.number(model, rows.GAP_NAME) for model in base}
        known = {model: (value, error or 0.0) for model, (value, error) in gaps.items() if value is not None}
        obstacle: str | None = "the gap of the base models is not measured"
        if known and len(known) == len(base):
            obstacle = self.criterion.obstacle_of_groups(known, (0.0, 0.0), None)
        refusal = Verdict(word=NOT_SAME_LOSS, reason=obstacle) if obstacle else None
        quantities = []
        for name in self.accuracies(self.studies.readouts[0], self.studies.label_counts):
            numbers = [self.number(model, name) for model in base]
            values = [value for value, _ in numbers if value is not None]
            table = self.number(folder, name)
            change = None if not values or table[0] is None else change_to_number(values, table[0])
            quantity = self._quantity(name, "accuracy", "points", numbers, [table], change)
            quantities.append(self._decided(quantity, expected, refusal, Verdict(word=HOLDS)))
        gap = summary([*gaps.values()]).mean
        note = "" if gap is None else f"The table's loss is the entropy; the base models are {gap:.4f} nats above it."
        return Compared(
            study=study.name,
            name=rows.LOOKUP_TABLE,
            claim="The lookup table has a lower accuracy than models of (almost) its loss" if expected else "",
            before=self.label(self.studies.base),
            after=rows.LOOKUP_TABLE,
            primary=False,
            expected={"flatness": None, "accuracy": expected},
            obstacle=obstacle,
            quantities=tuple(quantities),
            notes=(note,) if note else (),
        )
