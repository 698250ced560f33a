"""The tables of the report as texts, for a terminal and for a page."""

import collections
import dataclasses
import math
from collections.abc import Mapping

import pandas as pd

from pretraining.evaluation.records import ComparisonRecord
from pretraining.experiments.study import Decision
from pretraining.report.analysis import Analysis
from pretraining.report.comparisons import Compared, Quantity
from pretraining.report.intervals import Change
from pretraining.report.rows import CONSTANT_SHARE, GAP, GAP_NAME, LOOKUP_TABLE, PARTS, SAMPLED_LOSS, TRACE, TRANSFORMER, losses
from pretraining.report.same_loss import Z
from pretraining.report.sections import LABELS, Line, Section, Summary
from pretraining.report.verdicts import NO_HEADROOM, REFUSALS, Verdict

MOST_DIGITS = 4
OWN = "*"  # marks a measurement's own error
OTHER_READOUT = "†"
UNFINISHED = "‡"
NOT_SURVIVING = "†"
ESTIMATORS = "‡"
NOT_SATURATED = "§"
CONTROL_LABELS = {"lookup": LOOKUP_TABLE}


@dataclasses.dataclass(frozen=True)
class Table:
    """A table as texts; `notes` are sentences below it."""

    title: str
    header: list[str]
    lines: list[list[str]]
    notes: list[str] = dataclasses.field(default_factory=list)

    def text(self) -> str:
        """The table for a terminal."""
        widths = [max(map(len, column)) for column in zip(self.header, *self.lines, strict=True)]
        texts = [self.title] if self.title else []
        for line in (self.header, ["-" * width for width in widths], *self.lines):
            cells = [line[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
            texts.append("  ".join(cells).rstrip())
        return "\n".join([*texts, *self.notes])


def _table(title: str, rows: list[dict[str, str]], notes: list[str], headings: Mapping[str, str] | None = None) -> Table:
    """A table from at least one row; the first has all columns, of which some are shown under headings of their own."""
    columns = list(rows[0])
    lines = [[row.get(column, "") for column in columns] for row in rows]
    return Table(title, [(headings or {}).get(column, column) for column in columns], lines, notes)


def decimals(error: float | None, most: int = 6) -> int:
    """Digits behind the point that show two digits of an error.

    >>> [decimals(error) for error in (12.3, 1.23, 0.0123, None)], decimals(0.0123, most=2)
    ([0, 1, 3, 3], 2)
    """
    return min(most, max(0, 1 - math.floor(math.log10(error)))) if error else min(most, 3)


def _number(
    value: float | None, error: float | None = None, digits: int | None = None, scale: float = 1.0, mark: str = ""
) -> str:
    """`value ± error`, with a mark behind; empty where there is no value.

    `digits` behind the point; None for two digits of the error, but at most `MOST_DIGITS`.
    """
    if value is None or pd.isna(value):
        return ""
    scaled = None if error is None or pd.isna(error) else error * scale
    digits = decimals(scaled, MOST_DIGITS) if digits is None else digits
    text = f"{value * scale:.{digits}f}"
    return f"{text}{mark}" if scaled is None else f"{text} ± {scaled:.{digits}f}{mark}"


def _shown(value: Summary | None, digits: int | None = None, scale: float = 1.0, mark: str = "") -> str:
    """A mean with its error, marked where that is not over seeds."""
    own = OWN if value and value.over == "measurement" else ""
    return "" if value is None else _number(value.mean, value.error, digits, scale, own + mark)


def _integer(value: float | None) -> str:
    return "" if value is None or pd.isna(value) else f"{value:,}"


def _yes(value: object) -> str:
    return "" if pd.isna(value) else "yes" if value else "no"


def _room(exists: bool | None) -> str:
    return "not known" if exists is None else _yes(exists)


def _of(count: tuple[int, int]) -> str:
    """How many of how many: `yes` and `no` where it is all or none."""
    number, known = count
    if not known:
        return ""
    return {known: "yes", 0: "no"}.get(number, f"{number} of {known}")


def enumeration(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def describe_change(change: Change | None, unit: str = "") -> str:
    """A change with its interval as text; of accuracies ("points") in points.

    >>> from pretraining.report.intervals import paired_change
    >>> describe_change(paired_change([0.70, 0.71], [0.72, 0.74]), "points")
    '+2.50 [-3.85, +8.85]'
    """
    if change is None:
        return ""
    scale, most = (100.0, 2) if unit == "points" else (1.0, MOST_DIGITS)
    digits = decimals(None if change.error is None else change.error * scale, most)
    text = f"{change.value * scale:+.{digits}f}"
    if change.low is None or change.high is None:
        return f"{text} (no interval)"
    return f"{text} [{change.low * scale:+.{digits}f}, {change.high * scale:+.{digits}f}]"


def _count(change: Change | None) -> str:
    """How many models a change rests on, and how they were compared."""
    if change is None:
        return ""
    if change.method == "paired":
        return f"{change.n[0]} pair{'s' if change.n[0] > 1 else ''}"
    return f"{change.n[0]} against one number" if change.method == "one sample" else f"{change.n[0]}, {change.n[1]} (Welch)"


def verdict_text(quantity: Quantity) -> str:
    """The verdict on a quantity in words."""
    verdict = quantity.verdict
    if verdict is None:
        return ""
    if verdict.word in REFUSALS:
        return verdict.word
    if quantity.unit == "points":
        return verdict.text(100.0, " points")
    if verdict.reach is None or not quantity.before.mean:
        return verdict.text()
    return verdict.text(100.0 / abs(quantity.before.mean), "%", digits=0 if verdict.reach > 0.1 * quantity.before.mean else 1)


def comparison_block(one: Compared) -> Table:
    """The numbers of one comparison."""
    rows = []
    for quantity in one.quantities:
        scale, digits = (100.0, 1) if quantity.unit == "points" else (1.0, None)
        unit = quantity.unit.replace("points", "%")
        verdict = quantity.verdict or Verdict(word="")
        word = verdict_text(quantity) + (NOT_SURVIVING if verdict.survives is False else "")
        if quantity.kind == "loss":
            word = "not the same loss" if one.obstacle else "the same loss"
        change = describe_change(quantity.change, quantity.unit)
        row = {
            "quantity": f"{quantity.label} ({unit})" if unit else quantity.label,
            "before": _shown(quantity.before, digits, scale),
            "after": _shown(quantity.after, digits, scale),
            "change, 95% interval": f"{change} points" if change and quantity.unit == "points" else change,
            "n": _count(quantity.change),
            "verdict": word,
        }
        if one.primary:
            row["adjusted p"] = "" if verdict.adjusted is None else f"{verdict.adjusted:.2g}"
        rows.append(row)
    reasons = [f"{q.label}: {q.verdict.text()}." for q in one.of("accuracy") if q.verdict and q.verdict.word == NO_HEADROOM]
    notes = [*one.notes, *reasons]
    if any(quantity.verdict and quantity.verdict.survives is False for quantity in one.quantities):
        notes.append(f"{NOT_SURVIVING}: would not survive Holm's correction over the study's primary comparisons.")
    return _table("", rows, notes)


def _columns(section: Section, lines: list[Line], names: list[str]) -> list[str]:
    return [name for name in names if name in section.quantities and any(line.values[name].n for line in lines)]


def _label(lines: list[Line], line: Line) -> dict[str, str]:
    """The first cells of one of several lines, with its step where they differ in it."""
    models = str(line.models) if line.models == line.planned else f"{line.models} of {line.planned}"
    steps = {"step": _integer(line.step)} if len({other.step for other in lines}) > 1 else {}
    return {"group": line.group, **steps, "seeds": models}


def flatness_table(analysis: Analysis, section: Section) -> Table:
    """Loss and flatness of a section: a line per group and step."""
    lines = analysis.lines[section.name]
    traces = _columns(section, lines, [name for name in section.quantities if name in LABELS and name != GAP_NAME])
    differing = {(m.group, m.step) for m in section.members if analysis.tree.estimators_differ(m.model)}
    rows = []
    for line in lines:
        mark = ESTIMATORS if (line.group, line.step) in differing else ""
        mark += NOT_SATURATED if line.saturated[0] < line.saturated[1] else ""
        row = {"group": line.group, "own parameters": _integer(line.parameters)} if section.is_shape else {}
        row |= _label(lines, line)
        if GAP_NAME in section.quantities:
            row["gap (nats)"] = "0 by construction" if line.kind == LOOKUP_TABLE else _shown(line.values[GAP_NAME])
            row["saturated"] = _of(line.saturated)
        for name in traces:
            if name == CONSTANT_SHARE:
                row[f"{LABELS[name]} (%)"] = _shown(line.values[name], 0, 100.0)
            else:
                row[LABELS[name]] = _shown(line.values[name], mark=mark if name.startswith(TRACE) else "")
        rows.append(row)
    notes = [
        "Means over seeds; ± is the standard error over seeds, with * the measurement's own (one model).",
        "Fisher trace: the paper's estimator, from gradients; the Hessian's own where the model is saturated. "
        f"{ESTIMATORS}: Hutchinson's estimator differs by more than two standard errors (paired) for at least one model. "
        f"{NOT_SATURATED}: at least one model is not saturated.",
    ]
    if section.is_shape:
        size = max((line.parameters or 0 for line in lines), default=0)
        rules = "Smaller models were enlarged by each of two rules, on which the trace depends (enlarge.py --tied-scale)."
        return _table(f"Traces in the parameters of one model, {size:,} of them", rows, [*notes, rules])
    if any(member.times != 1 for member in section.members):
        notes.append("Balanced traces are in the parameters of the widest model.")
    return _table("Loss and flatness", rows, notes)


def accuracy_table(analysis: Analysis, section: Section, solver: str, is_first: bool) -> Table | None:
    """The accuracies of a section by one readout, with the controls; None where nothing is measured."""
    lines = analysis.lines[section.name]
    names = [name for name in section.quantities if name.startswith("curve") and name.rsplit("_", 2)[1] == solver]
    names += [name for name in section.quantities if name.startswith("finetune") and is_first]
    names = _columns(section, lines, names)
    if not names:
        return None
    headings = {name: f"{analysis.label(name).replace(f' ({solver})', '')} (%)" for name in names}
    rows = [_label(lines, line) | {name: _shown(line.values[name], 1, 100.0) for name in names} for line in lines]
    majority = {name: Summary(mean=float(analysis.tree.measured[name, "majority"].max())) for name in names}
    controls = {"majority class": majority, **analysis.controls}
    for control, values in controls.items():
        seeds = max((values[name].n for name in names if name in values), default=0)
        row = {"group": f"control: {CONTROL_LABELS.get(control, control)}", "seeds": str(seeds) if seeds > 1 else ""}
        rows.append(row | {name: _shown(values.get(name), 1, 100.0) for name in names})
    notes = [f"Linear probes by {solver}; ± is the standard error over seeds, with * over draws of the labelled sentences."]
    if is_first:
        rows.append({"group": "headroom", **{name: _room(state.exists) for name, state in analysis.headrooms.items()}})
        notes.append(
            "headroom: on the selection seeds the base models lie above words and untrained models, and below 100%, by two "
            "standard errors each. Without it there is no verdict."
        )
    return _table(f"Accuracies ({solver})", rows, notes, headings)


def model_table(analysis: Analysis) -> Table:
    """Every model with its own measurements; accuracies in %."""
    tree = analysis.tree
    measured = tree.measured
    judged = losses(tree, analysis.criterion, analysis.reference)
    # Models measured without true conditionals, or on natural text, have a loss and no gap.
    only_loss = measured[SAMPLED_LOSS]["value"].notna() & measured[GAP]["value"].isna()
    readouts = tree.readouts()
    usual = {}
    for name in tree.accuracies:
        texts = collections.Counter(text for (_, other), text in readouts.items() if other == name)
        usual[name] = max(texts, key=texts.__getitem__, default="")
    flatness = [name for name in LABELS if name not in (GAP_NAME, TRACE, CONSTANT_SHARE) and name in measured.columns.unique(0)]
    flatness = [name for name in flatness if measured[name]["value"].notna().any()]
    parts = [f"trace_{part}" for part in PARTS] if tree.models["enlarged_rule"].notna().any() else []
    headings = LABELS | {part: part.replace("_", ": ", 1).replace("_", " ") for part in parts}
    headings |= {name: f"{analysis.label(name)} (%)" for name in tree.accuracies}
    rows = []
    others = set()
    for model, facts in tree.models.iterrows():
        own = measured.loc[model]
        row = {"model": str(model) if facts["kind"] == TRANSFORMER else f"{model} ({facts['kind']})"}
        row |= {"parameters": _integer(facts["parameters"]), "step": _integer(facts["step"])}
        row["gap (nats)"] = "0 by construction" if facts["kind"] == LOOKUP_TABLE else _cell(own, GAP, 4)
        if only_loss.any():
            row["MLM loss (nats)"] = _cell(own, "sampled_loss_pairs", 4) if only_loss[model] else ""
        row["saturated"] = _yes(judged["saturated"][model])
        if analysis.reference or not analysis.studies:
            row["same loss"] = _yes(judged["same_loss"][model])
        mark = ESTIMATORS if tree.estimators_differ(str(model)) else ""
        mark += NOT_SATURATED if row["saturated"] == "no" else ""
        row[TRACE] = _cell(own, TRACE, 2, mark=mark)
        row |= {name: _cell(own, name, 2) for name in flatness}
        row |= {name: _number(own[name, "value"], None, 2) for name in parts}
        for name in tree.accuracies:
            is_own = pd.isna(own[name, "se"])
            mark = OWN if is_own else ""
            if readouts.get((str(model), name), usual[name]) != usual[name]:
                mark += OTHER_READOUT
                others.add(f"{analysis.label(name)} of {model} by {readouts[str(model), name]}, not {usual[name]}")
            mark += UNFINISHED if own[name, "unfinished"] > 0 else ""
            error = own[name, "sampling_se" if is_own else "se"]
            row[name] = _number(own[name, "value"], error, 1, 100, mark)
        rows.append(row)
    notes = _model_notes(analysis, bool(only_loss.any()))
    if others:
        notes.append(f"{OTHER_READOUT}: read out differently from the rest of its column: {'; '.join(sorted(others))}.")
    if any((measured[name]["unfinished"] > 0).any() for name in tree.accuracies):
        notes.append(f"{UNFINISHED}: an unfinished probe, whose training loss still falls.")
    return _table("All models", rows, notes, headings)


def _cell(own: pd.Series, quantity: str, digits: int, mark: str = "") -> str:
    """A quantity in a row of `measured`, with its error."""
    return _number(own[quantity, "value"], own[quantity, "se"], digits, mark=mark)


def _model_notes(analysis: Analysis, only_loss: bool) -> list[str]:
    reference = analysis.reference
    notes = [
        "gap: KL(P || f), mean over sentences (the mean that --single_mask minimises); ± is one standard error.",
        f"Fisher trace: {ESTIMATORS} where Hutchinson's estimator differs by more than two standard errors (paired), "
        f"{NOT_SATURATED} where the model is not saturated: there it is not the trace of the Hessian.",
        "accuracies: ± is the standard error over seeds, or over draws of the labelled sentences; with * there is one seed and "
        "± is the binomial standard error of the validation sample.",
    ]
    if not analysis.studies:
        notes.append(
            f"same loss: as the reference, {reference}; empty where it is not known."
            if reference
            else "same loss: not known, since no model has a gap; there is no exact entropy of natural text."
        )
    keys = [(f"entropy_{mean}", part) for mean in ("sentences", "pairs") for part in ("value", "se")]
    for a, a_se, b, b_se in sorted(set(analysis.tree.measured[keys].dropna().itertuples(index=False, name=None))):
        entropies = f"{a:.4f} ± {a_se:.4f} nats, mean over sentences; {b:.4f} ± {b_se:.4f} over pairs"
        notes.append(f"minimal loss of the data (entropy): {entropies}.")
    if only_loss:
        notes.append("MLM loss: of models without a known gap, mean over the masked positions of samples.")
    if (analysis.tree.models["kind"] == LOOKUP_TABLE).any():
        notes.append("lookup table: its output is P itself, so its loss is the entropy and its gap 0 by construction.")
    return notes


def choice_table(decision: Decision) -> Table:
    """The values of a choice, tried on the selection seeds."""
    choice = decision.choice
    body = []
    for tried in decision.candidates:
        line = [f"{tried.value:g}", _number(tried.gap, tried.gap_error), _yes(tried.admitted)]
        body.append([*line, _number(tried.accuracy, tried.accuracy_error, 1, 100), _yes(tried.value == decision.chosen)])
    seeds = ", ".join(map(str, decision.seeds))
    notes = [f"Rule: {choice.rule.replace('_', ' ')}, on selection seeds {seeds} of {choice.group}, which no result uses."]
    notes += [] if decision.limit is None else [f"Admitted: gaps up to {decision.limit:.4f} nats."]
    notes += ["No value is admitted."] if decision.chosen is None else []
    return Table(f"Choice of {choice.flag}", [choice.flag, "gap (nats)", "admitted", "accuracy (%)", "chosen"], body, notes)


def headroom_table(analysis: Analysis) -> Table | None:
    """The headroom of each task and number of labels, with its figures; None where no study asks for it."""
    body = [[analysis.label(name), _room(state.exists), state.reason] for name, state in analysis.headrooms.items()]
    return Table("Headroom on the selection seeds", ["accuracy", "headroom", "what"], body) if body else None


def paper_table(analysis: Analysis, study: str) -> Table | None:
    """The paper's numbers next to ours; None for a study that is not the paper's."""
    if study not in analysis.paper:
        return None
    body = []
    for row in analysis.paper[study].itertuples():
        ours = _number(row.ours, row.error, 1 if len(row.quantity) == 1 else None)
        body.append([row.where, row.what, row.value, ours, row.comparable if ours else "no: not measured here"])
    notes = ["Accuracies of ours are those of linear probes with the most labels. Their standard model is trained with AdamW."]
    return Table("Liu et al. (2023) next to ours", ["where", "what", "paper", "ours", "comparable"], body, notes)


def pair_table(analysis: Analysis) -> Table:
    """Every comparison record: two models and the paired difference of their losses."""
    criterion = analysis.criterion
    names = analysis.tree.digests()
    lines = []
    for model, _, record in analysis.tree.records:
        if isinstance(record, ComparisonRecord):
            means = (record.difference.sentences, record.difference.pairs)
            numbers = [f"{mean.mean:.6f} ± {mean.standard_error:.6f}" for mean in means]
            other = names.get(record.inputs["other"]["sha256"], record.models[1])
            equal = _yes(criterion.is_equal(means[0].mean, means[0].standard_error))
            lines.append([model, other, *numbers, equal])
    notes = [
        f"nats, ± one standard error over the same sentences; equal: the difference by sentences ± {Z:.2f} of them lies inside "
        f"±{criterion.margin:g}."
    ]
    header = ["A", "B", "loss, A minus B (by sentences)", "by pairs", "equal"]
    return Table("Losses of two models, compared in pairs", header, lines, notes)


def section_tables(analysis: Analysis, section: Section) -> list[Table]:
    """The tables of a section."""
    if not analysis.studies:
        return [flatness_table(analysis, section) if section.is_shape else model_table(analysis)]
    readouts = analysis.studies.readouts
    tables = [accuracy_table(analysis, section, solver, number == 0) for number, solver in enumerate(readouts)]
    return [flatness_table(analysis, section), *(table for table in tables if table)]
