"""The report as text for a terminal and as a self-contained page: questions and verdicts in words, then numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

from pcfg.common.files import atomic_open
from pretraining.experiments.study import Criteria, Study
from pretraining.report import tables
from pretraining.report.analysis import Analysis, is_fixed_beforehand
from pretraining.report.comparisons import Compared, Quantity
from pretraining.report.intervals import FEWEST
from pretraining.report.plots import OVERVIEW, Plot
from pretraining.report.sections import LABELS, LARGER, SMALLER
from pretraining.report.verdicts import HOLDS, HOLDS_NOT, NOT_SAME_LOSS

TEXTS = ("command", "comparable", "what", "models", "verdict", "quantity", "value", "file")  # columns of words
RULE = (
    "A verdict is the first of these that applies: not at the same loss; no headroom (accuracies only); holds or does not "
    "hold, where the 95% interval lies off 0; no effect beyond X, where it lies inside the margin. Else it is undecided, "
    "with the number of seeds that would decide it for the same mean and spread. The margins are {accuracy:g} points of "
    "accuracy and {trace:g}% of the trace before. Adjusted p-values are Holm's, over all verdicts of a study's primary "
    "comparisons. That of no effect belongs to a difference outside the margin. Verdicts use the unadjusted intervals."
)
SYMMETRIES = (
    "A trace depends on how a function is written in parameters, not on the function alone.",
    "The balanced trace removes one freedom: the embedding tables divided by s and the MLM head's norm multiplied by s are the "
    "same function, up to the embedding norm's epsilon. It is the smallest trace over s. It keeps the scale of queries against "
    "keys, of values against outputs, and of the residual stream, and constant shifts between the tables.",
    "R, the sum over tensors of squared norm times trace, removes every scale of whole tensors against each other: queries "
    "against keys, values against outputs, tables against the head's norm. Its convention for the means of the tables removes "
    "their constant shifts. It keeps scales of parts of a tensor, such as one head or one unit, and all other shifts.",
    "Neither number is the only canonical one.",
)


def accuracies_in_words(names: list[str]) -> str:
    """Labels of accuracies by task, with their numbers of labelled sentences.

    >>> accuracies_in_words(["A, 100 labels (ridge)", "A, 1,000 labels (ridge)", "C, 100 labels (ridge)"])
    'A (100, 1,000 labels) and C (100 labels)'
    """
    by_task: dict[str, list[str]] = {}
    for name in names:
        task, _, labels = name.partition(" (")[0].partition(", ")
        by_task.setdefault(task, []).append(labels.removesuffix(" labels"))
    return tables.enumeration([f"{task} ({', '.join(labels)} labels)" for task, labels in by_task.items()])


def _grouped(one: Compared, word_of: Callable[[Quantity], str]) -> str:
    """The accuracies of a comparison by what is said of them."""
    words: dict[str, list[str]] = {}
    for quantity in one.of("accuracy"):
        words.setdefault(word_of(quantity), []).append(quantity.label)
    return "; ".join(f"{word} for {accuracies_in_words(names)}" for word, names in words.items() if word)


def headline(one: Compared) -> str:
    """A comparison's claim, or its name, and its verdict in words."""
    if one.obstacle:
        words = f"no verdict, {NOT_SAME_LOSS}: {one.obstacle}"
    else:
        words = _grouped(one, lambda quantity: quantity.claim or "") or sides(one)
    return f"{one.claim.rstrip('.') or one.name}: {words or 'nothing was measured'}"


def sides(one: Compared) -> str:
    """The verdicts on flatness and on accuracies in words; empty where nothing is compared."""
    if one.obstacle:
        return ""
    flatness = [f"{quantity.label}: {tables.verdict_text(quantity)}" for quantity in one.of("flatness")]
    accuracy = _grouped(one, tables.verdict_text)
    return "; ".join([*flatness, *([f"accuracy: {accuracy}"] if accuracy else [])])


def basis(one: Compared) -> str:
    """The verdicts of both sides, the compared models and the method in words."""
    words = {
        "paired": "differences are paired by seed",
        "Welch": "the groups share no two seeds, so intervals are Welch's",
        "one sample": "the table is one number, and the interval is that of the models' mean",
    }
    methods: dict[str, dict[str, None]] = {}  # by method the numbers of models, each once
    for quantity in one.quantities:
        if quantity.change and quantity.verdict:
            methods.setdefault(quantity.change.method, {})[" and ".join(map(str, quantity.change.n))] = None
    kind = "Primary comparison" if one.primary else "Comparison"
    texts = [f"{words[method]} (n = {', '.join(counts)})" for method, counts in methods.items()]
    method = tables.enumeration(texts) if texts else "nothing was measured on both sides"
    return f"{kind} “{one.name}”, from {one.before} to {one.after}; {method}."


def correlation_sentences(analysis: Analysis, section: str) -> list[str]:
    """How accuracies go with the balanced trace over the saturated models of a study."""
    texts = []
    for accuracy, r in analysis.correlations.get(section, {}).items():
        label = analysis.label(accuracy)
        if r.spearman is not None:
            bounds = "[{:+.2f}, {:+.2f}]".format(*r.spearman_interval) if r.spearman_interval else "no interval"
            rough = ", rough with so few runs" if r.runs < FEWEST else ""
            texts.append(f"{label} {r.spearman:+.2f} {bounds} ({r.n} models of {r.runs} runs{rough})")
        elif r.n:
            texts.append(f"{label}: not defined ({f'fewer than {FEWEST} models' if r.n < FEWEST else 'no spread'})")
    start = "Rank correlation with the balanced trace over all saturated models, 95% by bootstrap of whole runs: "
    return [f"{start}{'; '.join(texts)}."] if texts else []


def enlarged_sentences(analysis: Analysis, section: str) -> list[str]:
    """One sentence per pair of models in the parameters of one shape."""
    sentences = []
    for pair in analysis.pairs.get(section, []):
        both = " with both rules of enlarging" if pair.verdict in (LARGER, SMALLER) else ""
        numbers = [
            f"{LABELS[name]} {tables.describe_change(change)}" if change else f"no {LABELS[name]}"
            for name, change in pair.changes.items()
        ]
        reason = f", {pair.reason}" if pair.reason else f": {'; '.join(numbers)}"
        sentences.append(f"The trace in the parameters of one shape ({pair.subject}): {pair.verdict}{both}{reason}.")
    return sentences


def rule(criteria: Criteria) -> str:
    """How verdicts come about, with the studies' margins."""
    return RULE.format(accuracy=100 * criteria.accuracy_margin, trace=100 * criteria.trace_margin)


def registration(analysis: Analysis, study: Study) -> str:
    """What a study's hash says, and whether the study was fixed before the first accuracy was measured."""
    fixed = is_fixed_beforehand(analysis, study)
    when = f"{'Fixed' if fixed else 'Not fixed'} beforehand: this hash was {'' if fixed else 'not '}recorded before"
    return f"{when} the first accuracy of a reported seed was measured (sha256 {study.sha256[:12]})."


def printed(analysis: Analysis) -> str:
    """The report for a terminal."""
    texts = []
    if analysis.studies:
        for study, section in zip(analysis.studies.studies, analysis.sections, strict=True):
            texts += [f"{study.title}\n{study.question}\n{registration(analysis, study)}"]
            for one in analysis.compared[study.name]:
                both = sides(one)
                texts.append(f"{headline(one)}." + ("" if not both or both in headline(one) else f"\n{both}."))
            for one in analysis.compared[study.name]:
                texts.append(f"{basis(one)}\n{tables.comparison_block(one).text()}")
            texts += [table.text() for table in tables.section_tables(analysis, section)]
            texts += correlation_sentences(analysis, study.name)
        return "\n\n".join([*texts, analysis.criterion.statement(analysis.tree.has_gaps), rule(analysis.studies.criteria)])
    for section in analysis.sections:
        texts += enlarged_sentences(analysis, section.name)
    shown = [table for section in analysis.sections for table in tables.section_tables(analysis, section)]
    shown = [*(shown or [tables.model_table(analysis)]), tables.pair_table(analysis)]
    texts += [table.text() for table in shown if table.lines]
    return "\n\n".join([*texts, analysis.criterion.statement(analysis.tree.has_gaps)])


def _mark(one: Compared) -> str:
    """The CSS class of a comparison."""
    words = {quantity.claim for quantity in one.of("accuracy")}
    return "holds" if words == {HOLDS} else "not" if words == {HOLDS_NOT} else ""


def page_sections(analysis: Analysis, plots: dict[str, list[Plot]]) -> list[dict[str, Any]]:
    """What the page shows of each study, or of each section of models without one, in order; keys as in the template."""
    sections = []
    studies = {study.name: study for study in analysis.studies.studies} if analysis.studies else {}
    for section in analysis.sections:
        name = section.name
        study = studies.get(name)
        overview = next((plot for plot in plots.get(name, []) if study and plot.name.startswith(OVERVIEW)), None)
        compared = analysis.compared.get(name, [])
        shown = (*tables.section_tables(analysis, section), tables.paper_table(analysis, name))
        content = {
            "study": study,
            "registration": study and registration(analysis, study),
            "comparisons": [
                (headline(one), sides(one), basis(one), tables.comparison_block(one), _mark(one)) for one in compared
            ],
            "sentences": correlation_sentences(analysis, name) + enlarged_sentences(analysis, name),
            "overview": overview,
            "tables": [table for table in shown if table],
            "plots": [plot for plot in plots.get(name, []) if plot is not overview],
        }
        sections.append(content)
    return sections


def write_page(path: Path | str, analysis: Analysis, plots: dict[str, list[Plot]]) -> None:
    """Write the self-contained page, with the plots of each section."""
    studies = analysis.studies
    choices = [tables.choice_table(decision) for decision in analysis.decisions]
    further = [tables.headroom_table(analysis), *choices, tables.pair_table(analysis)]
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, loader=loader)
    records = analysis.tree.records
    failures = [
        f"{name}: {status.state}{f', exit code {status.exit_code}' if status.exit_code else ''}"
        f"{f', see {status.log}' if status.log and status.state == 'failed' else ''}{f', {status.why}' if status.why else ''}"
        for name, status in analysis.statuses.items()
        if status.state in ("failed", "blocked")
    ]
    page = environment.get_template("report.html.jinja").render(
        criterion=analysis.criterion.statement(analysis.tree.has_gaps),
        rule=rule(studies.criteria) if studies else "",
        symmetries=SYMMETRIES if studies else (),
        sections=page_sections(analysis, plots),
        further=[table for table in further if table and table.lines],
        texts=TEXTS,
        models=tables.model_table(analysis) if studies or not analysis.sections else None,
        scale=f"{studies.scale}{', seeds stacked in one process' if studies.stacked else ''}" if studies else "",
        missing=[*failures, *analysis.missing],
        commands=sorted(studies.commands.items()) if studies else [],
        records=[(model, file, record, json.dumps(record.arguments, sort_keys=True)) for model, file, record in records],
        versions=sorted({f"{name} {version}" for _, _, record in records for name, version in record.versions.items()}),
    )
    with atomic_open(path) as file:
        file.write(page)
