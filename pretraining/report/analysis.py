"""The analysis of a folder of results, of which `results.json` has everything.

With a `study.json` (`pretraining.experiments.study`) it is about the comparisons of its studies, under their own names
(`pretraining.report.comparisons`): verdicts, controls, headroom, choices, and each accuracy against the balanced trace. Without
one its models are described by `pretraining.report.sections`.
"""

import dataclasses
import itertools
import json
from pathlib import Path

import pandas as pd
import pydantic_core

from pcfg.common.files import AnyPath, write_json
from pretraining.experiments.study import Criteria, Decision, Status, Studies, Study, read_decision, read_statuses, read_studies
from pretraining.report import intervals
from pretraining.report.comparisons import Compared, Comparer
from pretraining.report.intervals import Correlation, correlate
from pretraining.report.rows import BALANCED, LOOKUP_TABLE, Number, Tree, accuracy_label
from pretraining.report.same_loss import SameLoss
from pretraining.report.sections import EnlargedPair, Line, Section, Summary, compare_enlarged, inferred_sections, summary
from pretraining.report.verdicts import Headroom

SCHEMA = 3  # of results.json


@dataclasses.dataclass
class Analysis:
    """Everything that was computed."""

    tree: Tree
    criterion: SameLoss
    reference: str | None  # of differences of gaps, where there is no study
    sections: list[Section]
    lines: dict[str, list[Line]]  # by section
    pairs: dict[str, list[EnlargedPair]] = dataclasses.field(default_factory=dict)  # by section
    studies: Studies | None = None
    compared: dict[str, list[Compared]] = dataclasses.field(default_factory=dict)  # by study
    # correlations: by section and accuracy, with the balanced trace over the saturated models
    correlations: dict[str, dict[str, Correlation]] = dataclasses.field(default_factory=dict)
    headrooms: dict[str, Headroom] = dataclasses.field(default_factory=dict)  # by accuracy
    controls: dict[str, dict[str, Summary]] = dataclasses.field(default_factory=dict)  # by control and accuracy
    decisions: list[Decision] = dataclasses.field(default_factory=list)
    statuses: dict[str, Status] = dataclasses.field(default_factory=dict)
    missing: list[str] = dataclasses.field(default_factory=list)
    paper: dict[str, pd.DataFrame] = dataclasses.field(default_factory=dict)  # by study: published numbers next to ours

    def label(self, accuracy: str) -> str:
        """The name of an accuracy for people."""
        return accuracy_label(accuracy, {task.name: task.label for task in self.studies.tasks} if self.studies else None)

    def seeds_and_groups(self) -> pd.DataFrame:
        """By model its group and seed."""
        members = [member for section in self.sections for member in section.members if not section.is_shape]
        rows = {member.model: (member.group, member.seed) for member in members}
        return pd.DataFrame.from_dict(rows, orient="index", columns=["group", "seed"]).astype({"seed": "Int64"})


def analyse(tree: Tree, folder: AnyPath, max_gap: float | None = None, margin: float | None = None) -> Analysis:
    """Analyse the studies of a folder, or its models where it has no `study.json`; thresholds as in `make_report`."""
    studies = read_studies(folder)
    criteria = studies.criteria if studies else Criteria()
    criterion = SameLoss(criteria.max_gap if max_gap is None else max_gap, criteria.margin if margin is None else margin)
    if studies:
        return analyse_studies(tree, Path(folder), studies, criterion)
    sections = inferred_sections(tree, criterion)
    reference = tree.reference()
    lines = {section.name: section.lines(tree) for section in sections}
    pairs = {section.name: compare_enlarged(tree, section, reference) for section in sections if section.is_shape}
    return Analysis(tree, criterion, reference, sections, lines, pairs)


def analyse_studies(tree: Tree, folder: Path, studies: Studies, criterion: SameLoss) -> Analysis:
    """The analysis of the studies of one folder."""
    comparer = Comparer(tree, folder, studies, criterion)
    sections = [comparer.section(study) for study in studies.studies]
    compared = {study.name: comparer.compare_all(study) for study in studies.studies}
    return Analysis(
        tree,
        criterion,
        None,
        sections,
        {section.name: section.lines(tree) for section in sections},
        studies=studies,
        compared=compared,
        correlations={section.name: _correlations(tree, comparer, section) for section in sections},
        headrooms=comparer.headrooms,
        controls={
            name: {accuracy: summary([comparer.number(of, accuracy) for of in folders]) for accuracy in comparer.headrooms}
            for name, folders in comparer.controls.items()
        },
        decisions=[decision for choice in studies.choices if (decision := read_decision(folder, choice.name))],
        statuses=read_statuses(folder),
        missing=_missing(folder, studies, sections),
        paper={study.name: _paper(study, studies, compared[study.name]) for study in studies.studies if study.paper},
    )


def _correlations(tree: Tree, comparer: Comparer, section: Section) -> dict[str, Correlation]:
    """Each accuracy of the first readout against the balanced trace, over the saturated models."""
    studies = comparer.studies
    roots = {group.label: group.root(studies.groups) for group in studies.groups.values()}
    saturated = {m.model: m for m in section.members if section.is_saturated(tree, m)}
    correlations = {}
    for name in comparer.accuracies(studies.readouts[0], studies.label_counts):
        points = [
            (member.number(tree, BALANCED)[0], member.number(tree, name)[0], f"{roots[member.group]} seed {member.seed}")
            for member in saturated.values()
        ]
        x, y, runs = pd.DataFrame(points, columns=["x", "y", "run"]).dropna().T.to_numpy()
        correlations[name] = correlate(x, y, runs.tolist(), f"{section.name}, {name}, {BALANCED}")
    return correlations


def _missing(folder: Path, studies: Studies, sections: list[Section]) -> list[str]:
    """The planned models and records that do not exist, each with its command."""
    shown = {member.model for section in sections for member in section.members}
    return [
        f"{path}: {command}"
        for path, command in studies.commands.items()
        if path in shown or (path.endswith(".json") and path.rpartition("/")[0] in shown)
        if not (folder / path).exists()
    ]


def _paper(study: Study, studies: Studies, compared: list[Compared]) -> pd.DataFrame:
    """The numbers of Liu et al. (2023) for a study, with our counterparts in the published unit (`ours`, `error`)."""
    published = pd.read_csv(Path(__file__).with_name("published.csv"), dtype=str)
    published = published[published["experiment"] == study.paper]
    tasks = {task.label: f"curve_{task.name}_{studies.readouts[0]}_{max(studies.label_counts)}" for task in studies.tasks}
    first = next((one for one in compared if one.primary), compared[0])
    table = next((one for one in compared if one.name == LOOKUP_TABLE), None)
    ours = []
    for row in published.itertuples():
        one = table if row.role == LOOKUP_TABLE else first
        name = tasks.get(row.quantity, row.quantity)
        quantity = next((quantity for quantity in one.quantities if quantity.name == name), None) if one else None
        number: Number = (None, None)
        if quantity and row.role == "later":
            number = (quantity.change.value, quantity.change.error) if quantity.change else number
        elif quantity:
            side = quantity.before if row.role in ("standard", "smallest") else quantity.after
            number = (side.mean, side.error)
        ours.append(number)
    numbers = pd.DataFrame(ours, columns=["ours", "error"], dtype=float, index=published.index)
    numbers.loc[published["quantity"].isin(tasks)] *= 100.0
    return published.join(numbers).reset_index(drop=True)


def is_fixed_beforehand(analysis: Analysis, study: Study) -> bool:
    """Whether a registration has the study's hash at a time when no accuracy of a reported seed was on the disk."""
    registrations = analysis.studies.registrations if analysis.studies else ()
    return any(entry.sha256.get(study.name) == study.sha256 and not entry.accuracies for entry in registrations)


def write_results(path: Path | str, analysis: Analysis) -> None:
    """Write `results.json`; it has no times, which no two runs share."""
    studies = analysis.studies
    content = {
        "schema": SCHEMA,
        "criteria": {
            "max_gap_nats": analysis.criterion.max_gap,
            "margin_nats": analysis.criterion.margin,
            "accuracy_margin": studies and studies.criteria.accuracy_margin,
            "trace_margin": studies and studies.criteria.trace_margin,
            "reference": analysis.reference,
            "level": intervals.LEVEL,
            "bootstrap_seed": intervals.SEED,
        },
        "scale": studies and studies.scale,
        "studies": [
            study.model_dump(exclude={"comparisons"})
            | {"fixed_beforehand": is_fixed_beforehand(analysis, study), "comparisons": analysis.compared[study.name]}
            for study in (studies.studies if studies else ())
        ],
        "headroom": analysis.headrooms,
        "controls": analysis.controls,
        "choices": analysis.decisions,
        "lines": analysis.lines,
        "enlarged": analysis.pairs,
        "correlations": [
            {"section": section, "accuracy": accuracy, "against": BALANCED, "correlation": correlation}
            for section, of_section in analysis.correlations.items()
            for accuracy, correlation in of_section.items()
        ],
        "paper": {
            name: json.loads(frame.to_json(orient="records", double_precision=15)) for name, frame in analysis.paper.items()
        },
    }
    write_json(path, pydantic_core.to_jsonable_python(content))


def comparison_table(analysis: Analysis) -> pd.DataFrame:
    """The content of `comparisons.csv`: one row per comparison and quantity."""
    rows = []
    for one in itertools.chain.from_iterable(analysis.compared.values()):
        for quantity in one.quantities:
            change = quantity.change
            verdict = quantity.verdict
            row = {"study": one.study, "comparison": one.name, "before": one.before, "after": one.after, "primary": one.primary}
            row |= {"quantity": quantity.name, "before_mean": quantity.before.mean, "after_mean": quantity.after.mean}
            row |= {"before_n": quantity.before.n, "after_n": quantity.after.n, "method": change and change.method}
            row |= {"pairs": change.n[0] if change and change.method == "paired" else None}
            row |= {name: change and getattr(change, name) for name in ("value", "error", "low", "high", "degrees")}
            row |= {"verdict": verdict and verdict.word, "reason": verdict and verdict.reason, "claim": quantity.claim}
            row |= {name: verdict and getattr(verdict, name) for name in ("p_value", "adjusted", "survives")}
            rows.append(row | {"required_seeds": verdict and verdict.seeds})
    return pd.DataFrame(rows).astype(dict.fromkeys(("pairs", "required_seeds"), "Int64") if rows else {})
