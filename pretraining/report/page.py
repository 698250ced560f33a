"""The tables of the report, for a terminal and for its self-contained page."""

import dataclasses
import json
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd

from pcfg.common.files import atomic_open
from pretraining.evaluation.records import ComparisonRecord
from pretraining.report.analysis import HOLDS, HOLDS_NOT, Analysis, Summary, decimals
from pretraining.report.contract import ALGORITHMS, MODELS, SIZES, STEPS
from pretraining.report.intervals import FEWEST, Correlation
from pretraining.report.plots import Plot
from pretraining.report.rows import (
    GAP,
    LOOKUP_TABLE,
    PARTS,
    TRACE,
    TRANSFORMER,
    accuracy_label,
    losses,
    own_error,
    trace_label,
    trace_names,
)
from pretraining.report.same_loss import Z

TITLES = {
    STEPS: "Training on after the loss has converged",
    SIZES: "Sizes of models",
    ALGORITHMS: "Algorithms of pre-training, and the lookup table",
    MODELS: "All models",
}
RULE = (
    "A finding holds for an accuracy if the 95% intervals of the changes of both trace and accuracy lie on the paper's side of "
    "0. It does not hold if one of them lies on the other side. Otherwise it is undecided. This rule was fixed beforehand; "
    "nothing is corrected for the number of comparisons."
)
TEXTS = ("missing", "command", "comparable", "what", "name", "models", "against", "accuracy", "state")  # columns of words
MOST_DIGITS = 4
MISSING = "missing"  # the last column, where something is
OWN = "*"  # marks a measurement's own error


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


def _table(title: str, lines: list[list[tuple[str, str]]], notes: list[str]) -> Table:
    """A table from at least one line of columns and cells."""
    return Table(title, [column for column, _ in lines[0]], [[cell for _, cell in line] for line in lines], notes)


def _number(
    value: float | None, error: float | None = None, digits: int | None = None, scale: float = 1.0, mark: str = ""
) -> str:
    """`value ± error`, with a mark behind the error; empty where there is no value.

    Args:
        digits: behind the point; None for two digits of the error, but at most `MOST_DIGITS`.
    """
    if value is None or pd.isna(value):
        return ""
    scaled = None if error is None or pd.isna(error) else error * scale
    digits = decimals(scaled, MOST_DIGITS) if digits is None else digits
    text = f"{value * scale:.{digits}f}"
    return text if scaled is None else f"{text} ± {scaled:.{digits}f}{mark}"


def _shown(value: Summary, digits: int | None = None, scale: float = 1.0) -> str:
    """A mean with its error, marked where that is not over seeds."""
    return _number(value.mean, value.error, digits, scale, OWN if value.over == "measurement" else "")


def _integer(value: float | None) -> str:
    return "" if pd.isna(value) else f"{value:,}"


def _yes(value: object) -> str:
    return "" if pd.isna(value) else "yes" if value else "no"


def _of(count: tuple[int, int]) -> str:
    """How many of how many: `yes` and `no` where it is all or none."""
    number, known = count
    if not known:
        return ""
    return {known: "yes", 0: "no"}.get(number, f"{number} of {known}")


def model_table(analysis: Analysis) -> Table:
    """Every model with its own measurements; accuracies in %, a mark at errors of the validation sample (one seed)."""
    tree = analysis.tree
    measured = tree.measured
    rows = losses(tree, analysis.experiments)
    # Models measured without true conditionals, or on natural text, have a loss and no gap.
    only_loss = measured["sampled_loss_pairs"]["value"].notna() & measured[GAP]["value"].isna()
    parts = PARTS if tree.models["enlarged_rule"].notna().any() else []
    errors = {name: own_error(measured[name]) for name in tree.accuracies}
    lines = []
    for model, facts in tree.models.iterrows():
        is_table = facts["kind"] == LOOKUP_TABLE
        own = measured.loc[model]
        gap = "0 by construction" if is_table else _number(own[GAP, "value"], own[GAP, "se"], 4)
        cells = [("model", f"{model} (lookup table)" if is_table else str(model))]
        cells += [("parameters", _integer(facts["parameters"])), ("step", _integer(facts["step"])), ("gap (nats)", gap)]
        if only_loss.any():
            cells.append(
                (
                    "MLM loss (nats)",
                    _number(own["sampled_loss_pairs", "value"], own["sampled_loss_pairs", "se"], 4) if only_loss[model] else "",
                )
            )
        cells += [("saturated", _yes(rows["saturated"][model])), ("same loss", _yes(rows["same_loss"][model]))]
        cells.append(("trace", _number(own[TRACE, "value"], own[TRACE, "se"], 2)))
        cells += [(f"trace: {part.replace('_', ' ')}", _number(own[f"trace_{part}", "value"], None, 2)) for part in parts]
        for name, error in errors.items():
            mark = OWN if pd.isna(own[name, "se"]) else ""
            cells.append((f"{accuracy_label(name)} (%)", _number(own[name, "value"], error[model], 1, 100, mark)))
        lines.append(cells)
    return _table(TITLES[MODELS], lines, _model_notes(analysis, bool(only_loss.any())))


def _model_notes(analysis: Analysis, only_loss: bool) -> list[str]:
    reference = analysis.experiments.reference
    notes = [
        "gap: KL(P || f), mean over sentences (the mean that --single_mask minimises); ± is one standard error.",
        "accuracies: ± is the standard error over seeds; with * there is one seed and ± is the binomial standard error of the "
        "validation sample.",
        f"same loss: as the reference, {reference}; empty where it is not known."
        if reference
        else "same loss: not known, since no model has a gap; there is no exact entropy of natural text.",
    ]
    keys = [(f"entropy_{mean}", part) for mean in ("sentences", "pairs") for part in ("value", "se")]
    for a, a_se, b, b_se in sorted(set(analysis.tree.measured[keys].dropna().itertuples(index=False, name=None))):
        entropies = f"{a:.4f} ± {a_se:.4f} nats, mean over sentences; {b:.4f} ± {b_se:.4f} over pairs"
        notes.append(f"minimal loss of the data (entropy): {entropies}.")
    if only_loss:
        notes.append("MLM loss: of models without a known gap, mean over the masked positions of samples.")
    if (analysis.tree.models["kind"] == LOOKUP_TABLE).any():
        notes.append("lookup table: its output is P itself, so its loss is the entropy and its gap 0 by construction.")
    return notes


def group_table(analysis: Analysis, name: str) -> Table:
    """The table of one experiment, in the form of the paper's: a line per group and step."""
    experiment = analysis.experiment(name)
    lines = analysis.tables[name]
    has_steps = len({line.step for line in lines if line.step is not None}) > 1
    sized = experiment.has_common_traces
    accuracies = [column for column in analysis.names if any(line.values[column].n for line in lines)]
    traces = trace_names(experiment)
    some_missing = any(line.missing for line in lines)
    body = []
    for line in lines:
        is_table = line.kind not in (None, TRANSFORMER)
        models = str(line.models) if line.models == line.planned else f"{line.models} of {line.planned}"
        cells = [("group", line.group)]
        cells += [("step", _integer(line.step))] if has_steps else []
        cells += [("own parameters", _integer(line.parameters))] if sized else []
        cells.append(("seeds", "no seed" if is_table else models))
        cells.append(("gap (nats)", "0 by construction" if is_table else _shown(line.values["gap"])))
        cells += [("saturated", _of(line.saturated)), ("less the reference's (nats)", _shown(line.values["gap_difference"]))]
        cells += [("equal", _of(line.equal)), *((trace_label(trace), _shown(line.values[trace])) for trace in traces)]
        cells += [(f"{accuracy_label(column)} (%)", _shown(line.values[column], 1, 100.0)) for column in accuracies]
        body.append(cells + ([(MISSING, "; ".join(line.missing))] if some_missing else []))
    notes = [
        "Means over seeds; ± is the standard error over seeds, with * the measurement's own (one model): of gaps and traces "
        "over sentences, of accuracies over the seeds of probe or fine-tuning, or of the validation sample where there is one.",
        f"saturated and equal: as the criterion of the same loss says, for each model; the reference is "
        f"{analysis.experiments.reference}.",
    ]
    if sized:
        notes.append(
            "Traces are in the parameters of the largest model: smaller models were enlarged by each of two rules, on which "
            "the trace depends (enlarge.py --tied-scale tables, head)."
        )
    size = max((line.parameters or 0 for line in lines), default=0)
    default = f"Traces in the parameters of one model, {size:,} of them" if sized else TITLES[MODELS]
    return _table(default if experiment.rule == MODELS else TITLES[experiment.rule], body, notes)


def _interval(interval: tuple[float, float] | None) -> str:
    return "no interval" if interval is None else f"[{interval[0]:+.2f}, {interval[1]:+.2f}]"


def _unknown(found: Correlation) -> str:
    return f"fewer than {FEWEST} models" if found.n < FEWEST else "no spread"


def correlation_sentences(analysis: Analysis) -> list[str]:
    """One sentence per experiment and trace: how accuracy goes with it among models of equal loss (in the paper it falls)."""
    sentences: dict[tuple[str, str], list[str]] = {}
    for correlated in [correlated for correlated in analysis.correlations if correlated.against != "gap"]:
        found = correlated.found
        label = accuracy_label(correlated.accuracy)
        if found.spearman is None:
            text = f"{label} is undecided ({_unknown(found)})"
        else:
            side = 0 if found.spearman_interval is None else sum(np.sign(found.spearman_interval))
            standing = {-2: "as in the paper", 2: "against the paper"}.get(side, "not distinguishable from 0")
            if found.runs < FEWEST:  # too few to draw from: the interval comes out too short
                standing = "the interval of so few runs is rough"
            of_models = f"{found.n} models of {found.runs} runs"
            text = f"{label} {found.spearman:+.2f} {_interval(found.spearman_interval)} over {of_models}, {standing}"
        sentences.setdefault((correlated.experiment, correlated.against), []).append(text)
    return [
        f"Rank correlation of accuracy with {trace_label(against)} in {experiment!r}, among models of equal loss: "
        + "; ".join(texts)
        + "."
        for (experiment, against), texts in sentences.items()
    ]


def correlation_table(analysis: Analysis) -> Table:
    """Every correlation, one per line."""
    body = []
    for correlated in analysis.correlations:
        found = correlated.found
        line = [correlated.experiment, accuracy_label(correlated.accuracy), trace_label(correlated.against)]
        line += [str(found.n), str(found.runs)]
        if found.spearman is None:
            body.append([*line, f"undecided: {_unknown(found)}", ""])
        else:
            line += [f"{found.spearman:+.2f} {_interval(found.spearman_interval)}"]
            body.append([*line, f"{found.pearson:+.2f} {_interval(found.pearson_interval)}"])
    notes = [
        "Over the models at the same loss as the reference. 95% percentile intervals of a bootstrap that draws whole runs (all "
        "checkpoints of a group and seed together, and of groups that share one); with few runs they are rough."
    ]
    header = ["experiment", "accuracy", "against", "n", "runs", "Spearman", "Pearson"]
    return Table("Correlations of accuracy with trace and gap, over models", header, body, notes)


def paper_table(analysis: Analysis) -> Table:
    """The paper's numbers next to ours."""
    body = []
    for row in analysis.paper.itertuples():
        ours = _number(row.ours, row.error, 1 if row.quantity in analysis.experiments.tasks else None)
        is_known = ours or pd.isna(row.experiment)
        body.append([row.where, row.what, row.value, ours, row.comparable if is_known else "no: not measured here"])
    notes = ["Accuracies of ours are those of linear probes. Their standard model is trained with AdamW."]
    return Table("Liu et al. (2023) next to ours", ["where", "what", "paper", "ours", "comparable"], body, notes)


def choice_table(analysis: Analysis) -> Table | None:
    """The adversarial weights that were tried; None where nothing is known of them."""
    title = "Choice of the adversarial weight"
    choice = analysis.choice
    if choice is None:
        return None if analysis.choice_missing is None else Table(title, ["weight"], [], [analysis.choice_missing])
    body = []
    for tried in choice.weights:
        increase = _number(tried.gap_increase, tried.gap_increase_se)
        accuracy = _number(tried.accuracy, tried.accuracy_se, 1, 100)
        chosen = "chosen" if tried.weight == choice.chosen else ""
        body.append(
            [f"{tried.weight:g}", increase, _yes(tried.same_loss), accuracy, f"{100 * tried.standard_accuracy:.1f}", chosen]
        )
    header = ["weight", "gap increase (nats)", "same loss", "accuracy (%)", "standard accuracy (%)", "chosen"]
    notes = [f"{choice.criterion.rstrip('.')}. Margin of the gap: {choice.gap_allowed:g} nats."]
    return Table(title, header, body, notes + ([] if choice.chosen is not None else ["No weight met the criterion."]))


def command_table(analysis: Analysis) -> Table:
    """The exact commands, and how each ended."""
    body = []
    for command in analysis.experiments.commands:
        status = analysis.statuses.get(command.name)
        code = f", exit code {status.exit_code}" if status and status.exit_code else ""
        body.append([command.name, f"{status.state}{code}" if status else "has not run", command.command])
    return Table("", ["name", "state", "command"], body)


def pair_table(analysis: Analysis) -> Table:
    """Every comparison record: two models and the paired difference of their losses."""
    criterion = analysis.experiments.criterion
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


def main_tables(analysis: Analysis) -> list[tuple[str, Table]]:
    """The table of each experiment; an inferred experiment has its models in its table, one per line."""
    return [
        (name, model_table(analysis) if name == MODELS and analysis.experiments.inferred else group_table(analysis, name))
        for name in analysis.tables
    ] or [("", model_table(analysis))]


def further_tables(analysis: Analysis) -> list[Table]:
    """The tables that are not an experiment's, as far as they have content."""
    tables = [choice_table(analysis), correlation_table(analysis), paper_table(analysis), pair_table(analysis)]
    return [table for table in tables if table and (table.lines or table.notes == [analysis.choice_missing])]


def printed(analysis: Analysis) -> str:
    """The report for a terminal."""
    sentences = [finding.sentence for finding in analysis.findings] + correlation_sentences(analysis)
    tables = [table for _, table in main_tables(analysis)]
    pairs = pair_table(analysis)
    if analysis.experiments.inferred and pairs.lines:
        tables.append(pairs)
    return "\n\n".join([*sentences, *(table.text() for table in tables), analysis.experiments.criterion.statement()])


def write_page(path: Path | str, analysis: Analysis, plots: dict[str, list[Plot]]) -> None:
    """Write the self-contained page.

    Args:
        plots: those of each experiment.
    """
    experiments = analysis.experiments
    sections = [(table, plots.get(name, [])) for name, table in main_tables(analysis)]
    sections += [(table, []) for table in further_tables(analysis)]
    marks = {frozenset([HOLDS]): "holds", frozenset([HOLDS_NOT]): "not"}
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, loader=loader)
    records = analysis.tree.records
    page = environment.get_template("report.html.jinja").render(
        criterion=experiments.criterion.statement(),
        findings=[(finding, marks.get(frozenset(finding.verdicts.values()), "")) for finding in analysis.findings],
        correlations=correlation_sentences(analysis),
        rule="" if experiments.inferred else RULE,
        sections=sections,
        texts=TEXTS,
        models=None if experiments.inferred else model_table(analysis),
        scale=experiments.scale,
        seeds=experiments.seeds,
        commands=command_table(analysis),
        records=[(model, file, record, json.dumps(record.arguments, sort_keys=True)) for model, file, record in records],
        versions=sorted({f"{name} {version}" for _, _, record in records for name, version in record.versions.items()}),
    )
    with atomic_open(path) as file:
        file.write(page)
