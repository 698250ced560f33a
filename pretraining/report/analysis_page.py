"""The page of the analysis: findings first, then tables and plots, then the commands and every record."""

import base64

from pretraining.report.analysis import Analysis
from pretraining.report.analysis_plots import Plot
from pretraining.report.analysis_tables import command_table, correlation_sentences, experiment_table, further_tables
from pretraining.report.findings import HOLDS, HOLDS_NOT, Finding
from pretraining.report.page import notes, render, table

RULE = (
    "A finding holds for an accuracy if the 95% intervals of the changes of both trace and accuracy lie on the paper's side of "
    "0; it does not hold if one of them lies on the other side; else it can't be told. This rule was fixed beforehand; nothing "
    "is corrected for the number of comparisons."
)
TEXTS = ("missing", "command", "comparable", "what", "name", "models", "against", "accuracy", "state")  # columns of words


def _finding(finding: Finding) -> dict:
    """A finding as the template takes it."""
    verdicts = set(finding.verdicts.values())
    return {
        "headline": finding.headline(),
        "basis": finding.basis,
        "numbers": finding.numbers(),
        "omissions": finding.omissions(),
        "mark": "holds" if verdicts == {HOLDS} else "not" if verdicts == {HOLDS_NOT} else "",
    }


def _plot(plot: Plot) -> dict:
    """A plot as the template takes it."""
    panels = [(text, base64.b64encode(picture).decode()) for text, picture in plot.panels]
    return {"name": plot.name, "title": plot.title, "caption": plot.caption, "panels": panels}


def write_page(path, rows: list[dict], records: list[dict], analysis: Analysis, plots: dict[str, list[Plot]]) -> None:
    """Write the self-contained page.

    Args:
        rows, records: what `pretraining.report.rows.collect` found.
        plots: those of each experiment.
    """
    sections = [(*experiment_table(analysis, name), [_plot(plot) for plot in plots.get(name, [])]) for name in analysis.tables]
    _, *commands = command_table(analysis)
    render(
        path,
        "analysis.html.jinja",
        records,
        findings=[_finding(finding) for finding in analysis.findings],
        correlations=correlation_sentences(analysis),
        rule=RULE,
        sections=sections + [(*section, []) for section in further_tables(analysis)],
        texts=TEXTS,
        models=table(rows),
        model_notes=notes(rows),
        scale=analysis.experiments.scale,
        seeds=analysis.experiments.seeds,
        commands=commands[:2],
    )
