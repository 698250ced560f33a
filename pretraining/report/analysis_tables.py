"""The tables of the analysis as texts, for a terminal and for the page."""

import numpy as np

from pretraining.report.analysis import SETS, Analysis, Line, Summary
from pretraining.report.contract import ALGORITHMS, SIZES, STEPS
from pretraining.report.experiment_rows import accuracy_label, loss_label, trace_names
from pretraining.report.findings import decimals
from pretraining.report.intervals import FEWEST, Correlation
from pretraining.report.page import Section

TITLES = {
    STEPS: "Training on after the loss has converged",
    SIZES: "Sizes of models",
    ALGORITHMS: "Algorithms of pre-training, and the lookup table",
}
MOST_DIGITS = 4
MISSING = "missing"  # the last column, where something is
OWN = "*"  # marks a measurement's own error


def shown(value: Summary, digits: int | None = None, scale: float = 1.0) -> str:
    """A mean with its error, marked where that is not over seeds.

    Args:
        digits: behind the point; None for two digits of the error, but at most `MOST_DIGITS`.
    """
    if value.mean is None:
        return ""
    error = None if value.error is None else value.error * scale
    digits = decimals(error, MOST_DIGITS) if digits is None else digits
    text = f"{value.mean * scale:.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}{OWN if value.over == 'measurement' else ''}"


def _of(count: tuple[int, int]) -> str:
    """How many of how many: `yes` and `no` where it is all or none."""
    number, known = count
    if not known:
        return ""
    return {known: "yes", 0: "no"}.get(number, f"{number} of {known}")


def experiment_table(analysis: Analysis, name: str) -> Section:
    """The table of one experiment, in the form of the paper's."""
    [experiment] = [experiment for experiment in analysis.experiments.experiments if experiment.name == name]
    lines = analysis.tables[name]
    has_steps = len({line.step for line in lines if line.step is not None}) > 1
    sized = name == SIZES
    accuracies = [column for column in analysis.names if any(line.values[column].n for line in lines)]
    traces = trace_names(experiment)
    header = ["group", *(["step"] if has_steps else []), *(["parameters"] if sized else []), "seeds", "gap (nats)", "saturated"]
    header += ["less the reference's (nats)", "equal", *map(loss_label, traces)]
    header += [f"{accuracy_label(column)} (%)" for column in accuracies]
    some_missing = any(line.missing for line in lines)
    body = []
    for line in lines:
        cells = [line.group]
        cells += ["" if line.step is None else f"{line.step:,}"] if has_steps else []
        cells += ["" if line.parameters is None else f"{line.parameters:,}"] if sized else []
        cells += [_seeds(line), _gap(line), _of(line.saturated), shown(line.values["gap_difference"]), _of(line.equal)]
        cells += [shown(line.values[trace]) for trace in traces]
        cells += [shown(line.values[column], 1, 100.0) for column in accuracies]
        body.append(cells + (["; ".join(line.missing)] if some_missing else []))
    return TITLES[name], header + ([MISSING] if some_missing else []), body, _notes(analysis, name)


def _seeds(line: Line) -> str:
    if line.kind not in (None, "transformer"):
        return "no seed"
    return str(line.models) if line.models == line.planned else f"{line.models} of {line.planned}"


def _gap(line: Line) -> str:
    return shown(line.values["gap"]) if line.kind in (None, "transformer") else "0 by construction"


def _notes(analysis: Analysis, name: str) -> list[str]:
    experiments = analysis.experiments
    notes = [
        "Means over seeds; ± is the standard error over seeds, with * the measurement's own (one model): of gaps and traces "
        "over sentences, of accuracies over the seeds of probe or fine-tuning, or of the validation sample where there is one.",
        f"saturated: the 95% interval of the gap lies at or below {experiments.saturated:g} nats. equal: that of the paired "
        f"difference to {experiments.reference} lies inside ±{experiments.margin:g} nats. Both by sentences, for each model.",
    ]
    if name == SIZES:
        notes.append(
            "Traces are in the parameters of the largest model: smaller models were enlarged by each of two rules, on which "
            "the trace depends (enlarge.py --tied-scale tables, head)."
        )
    return notes


def _interval(interval: tuple[float, float] | None) -> str:
    return "no interval" if interval is None else f"[{interval[0]:+.2f}, {interval[1]:+.2f}]"


def correlation_sentences(analysis: Analysis) -> list[str]:
    """One sentence an experiment and trace: how accuracy goes with it among models of equal loss (in the paper it falls)."""
    sentences, of_trace = {}, [found for found in analysis.correlations if found.among == "equal" and found.against != "gap"]
    for correlated in of_trace:
        found, label = correlated.found, accuracy_label(correlated.accuracy)
        if found.spearman is None:
            text = f"{label} can't be told ({_unknown(found)})"
        else:
            side = 0 if found.spearman_interval is None else sum(np.sign(found.spearman_interval))
            standing = {-2: "as in the paper", 2: "against the paper"}.get(side, "not told from 0")
            if found.runs < FEWEST:  # too few to draw from: the interval comes out too short
                standing = "the interval of so few runs is rough"
            of_models = f"{found.n} models of {found.runs} runs"
            text = f"{label} {found.spearman:+.2f} {_interval(found.spearman_interval)} over {of_models}, {standing}"
        sentences.setdefault((correlated.experiment, correlated.against), []).append(text)
    return [
        f"Rank correlation of accuracy with {loss_label(against)} in {experiment!r}, among models of equal loss: "
        + "; ".join(texts)
        + "."
        for (experiment, against), texts in sentences.items()
    ]


def _unknown(found: Correlation) -> str:
    return f"fewer than {FEWEST} models" if found.n < FEWEST else "no spread"


def correlation_table(analysis: Analysis) -> Section:
    """Every correlation, a line each."""
    header = ["experiment", "accuracy", "against", "models", "n", "runs", "Spearman", "Pearson"]
    body = []
    for correlated in analysis.correlations:
        found = correlated.found
        line = [correlated.experiment, accuracy_label(correlated.accuracy), loss_label(correlated.against)]
        line += [SETS[correlated.among], str(found.n), str(found.runs)]
        if found.spearman is None:
            body.append([*line, f"can't be told: {_unknown(found)}", ""])
        else:
            line += [f"{found.spearman:+.2f} {_interval(found.spearman_interval)}"]
            body.append([*line, f"{found.pearson:+.2f} {_interval(found.pearson_interval)}"])
    notes = [
        "95% percentile intervals of a bootstrap that draws whole runs (all checkpoints of a group and seed together, and of "
        "groups that share one); with few runs they are rough. Among models whose loss is equal to the reference's within the "
        "margin, and, as a check, among those not told apart from it.",
    ]
    return "Correlations of accuracy with trace and gap, over models", header, body, notes


def paper_table(analysis: Analysis) -> Section:
    """The paper's numbers beside ours."""
    body = []
    for beside in analysis.beside:
        published = beside.published
        ours = shown(Summary(beside.ours, beside.error), 1 if published.quantity in analysis.experiments.tasks else None)
        is_known = beside.ours is not None or published.experiment is None
        comparable = published.comparable if is_known else "no: not measured here"
        body.append([published.where, published.what, published.value, ours, comparable])
    notes = ["Accuracies of ours are those of linear probes. Their standard model is trained with AdamW."]
    return "Liu et al. (2023) beside ours", ["where", "what", "paper", "ours", "comparable"], body, notes


def choice_table(analysis: Analysis) -> Section | None:
    """The adversarial weights that were tried; None where nothing is told of them."""
    title, choice = "Choice of the adversarial weight", analysis.choice
    if choice is None:
        return None if analysis.choice_missing is None else (title, ["weight"], [], [analysis.choice_missing])
    body = []
    for tried in choice.weights:
        increase = Summary(tried.gap_increase, tried.gap_increase_se, None, 1)
        accuracy = Summary(tried.accuracy, tried.accuracy_se, None, 1)
        chosen = "chosen" if tried.weight == choice.chosen else ""
        body.append(
            [f"{tried.weight:g}", shown(increase), shown(accuracy, 1, 100), f"{100 * tried.standard_accuracy:.1f}", chosen]
        )
    header = ["weight", "gap increase (nats)", "accuracy (%)", "standard accuracy (%)", "chosen"]
    notes = [f"{choice.criterion.rstrip('.')}. Gap increase allowed: {choice.gap_allowed:g} nats."]
    return title, header, body, notes + ([] if choice.chosen is not None else ["No weight met the criterion."])


def command_table(analysis: Analysis) -> Section:
    """The exact commands, and how each ended."""
    body = []
    for command in analysis.experiments.commands:
        status = analysis.statuses.get(command.name)
        state = "has not run" if status is None else status.state
        if status is not None and status.exit_code:
            state += f", exit code {status.exit_code}"
        body.append([command.name, state, command.command])
    return "Commands", ["name", "state", "command"], body, []


def further_tables(analysis: Analysis) -> list[Section]:
    """The tables that are not an experiment's."""
    choice = choice_table(analysis)
    return [*([choice] if choice else []), correlation_table(analysis), paper_table(analysis)]
