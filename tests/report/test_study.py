"""The report of studies: a made-up folder of results, its numbers computed again from the JSON files."""

import csv
import html
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats

from pcfg.common.files import InputError, write_json
from pretraining.experiments.study import Models, Registration, read_studies, write_studies
from pretraining.report import __main__ as report
from pretraining.report import plots
from pretraining.report.analysis import analyse
from pretraining.report.rows import collect

spec = importlib.util.spec_from_file_location("study_tree", Path(__file__).with_name("study_tree.py"))
study_tree = importlib.util.module_from_spec(spec)
spec.loader.exec_module(study_tree)


@pytest.fixture(scope="module", autouse=True)
def small_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "DPI", 30)
        yield


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    """The folder, and the analysis of its report in OUT/report."""
    root = tmp_path_factory.mktemp("laboratory")
    study_tree.write_laboratory(root)
    return root, report.make_report(root, root / "report")


def read_json(path):
    return json.loads(path.read_text())


def comparisons(root):
    with open(root / "report" / "comparisons.csv", newline="") as file:
        return {(row["comparison"], row["quantity"]): row for row in csv.DictReader(file)}


def accuracy(folder, task="pcfg_A", labels=1000, solver="ridge"):
    points = read_json(folder / f"curve_{task}_{solver}.json")["points"]
    return next(point["accuracy"]["mean"] for point in points if point["labels"] == labels)


def sides(root, before, after, number, seeds=study_tree.SEEDS):
    return [[number(root / f"models/{side[0]}/seed{seed}/step{side[1]:07d}") for seed in seeds] for side in (before, after)]


def test_changes_are_paired_by_seed(laboratory):
    root, _ = laboratory
    rows = comparisons(root)
    numbers = {
        "gap": lambda folder: read_json(folder / "loss.json")["gap"]["sentences"]["mean"],
        "trace": lambda folder: read_json(folder / "hessian.json")["value"],
        "trace_hutchinson": lambda folder: read_json(folder / "hessian.json")["hutchinson"]["value"],
        "balanced": lambda folder: read_json(folder / "hessian.json")["balanced"]["value"],
        "relative": lambda folder: read_json(folder / "hessian.json")["relative"]["value"],
        "mine": lambda folder: read_json(folder / "mine.json")["number"],
        "curve_pcfg_A_ridge_1000": accuracy,
        "curve_pcfg_C_lbfgs_100": lambda folder: accuracy(folder, "pcfg_C", 100, "lbfgs"),
    }
    for name, number in numbers.items():
        a, b = sides(root, ("base", 8000), ("sgd", 12000), number)
        theirs = stats.ttest_rel(b, a).confidence_interval(0.95)
        row = rows["sgd", name]
        assert (float(row["low"]), float(row["high"])) == pytest.approx(tuple(theirs)), name
        assert (row["method"], row["pairs"], row["before_n"]) == ("paired", "8", "8")
        assert float(row["before_mean"]) == pytest.approx(np.mean(a))


def test_other_seeds_are_compared_by_welch(laboratory):
    root, _ = laboratory
    a = [accuracy(root / f"models/base/seed{seed}/step0008000") for seed in study_tree.SEEDS]
    b = [accuracy(root / f"models/other_seeds/seed{seed}/step0008000") for seed in range(200, 206)]
    theirs = stats.ttest_ind(b, a, equal_var=False).confidence_interval(0.95)
    row = comparisons(root)["seeds", "curve_pcfg_A_ridge_1000"]
    assert (float(row["low"]), float(row["high"])) == pytest.approx(tuple(theirs))
    assert (row["method"], row["pairs"], row["before_n"], row["after_n"]) == ("Welch", "", "8", "6")


def test_balanced_trace_and_rules_are_in_the_parameters_of_the_wider_model(laboratory):
    root, _ = laboratory
    rows = comparisons(root)

    def parts(folder):
        balanced = read_json(folder / "hessian.json")["balanced"]
        return [balanced[name] for name in ("tables", "head_norm", "matrices", "vectors")]

    small, wide = sides(root, ("base", 16000), ("wide", 16000), parts, study_tree.SEEDS[:4])
    before = {seed: parts(root / f"models/base/seed{seed}/step0016000") for seed in study_tree.SEEDS}
    t, h, m, v = np.array(list(before.values())).T
    expected = {
        "balanced": 2 * np.sqrt(t * h) + m + v / 2,
        "trace_by_tables": 2 * t + h / 2 + m + v / 2,
        "trace_by_head": t / 2 + 2 * h + m + v / 2,
        "trace": t + h + m + v,
    }
    for name, values in expected.items():
        assert float(rows["sizes", name]["before_mean"]) == pytest.approx(values.mean()), name
    own = [2 * np.sqrt(t * h) + m + v for t, h, m, v in wide]
    changes = np.array(own) - expected["balanced"][:4]
    assert float(rows["sizes", "balanced"]["value"]) == pytest.approx(changes.mean())
    assert rows["sizes", "balanced"]["verdict"] == "holds" and rows["sizes", "trace"]["verdict"] == ""
    assert ("sgd", "trace_by_head") not in rows and len(small) == 4


def test_verdicts_of_the_laboratory(laboratory):
    root, analysis = laboratory
    rows = comparisons(root)
    assert [rows[name, "trace"]["verdict"] for name in ("sgd", "adamw", "adversarial")] == ["holds", "holds", "no effect"]
    name = "curve_pcfg_A_ridge_1000"
    of_task = {comparison: rows[comparison, name] for comparison, quantity in rows if quantity == name}
    verdicts = {comparison: (row["verdict"], row["claim"]) for comparison, row in of_task.items()}
    assert verdicts == {
        "sgd": ("holds", "holds"),
        "adamw": ("no effect", "does not hold"),
        "adversarial": ("holds", "does not hold"),
        "sizes": ("holds", "holds"),
        "unsaturated": ("not at the same loss", ""),
        "seeds": ("no effect", ""),
        "lookup table": ("falls", ""),
    }
    assert rows["lookup table", "curve_pcfg_A_ridge_100"]["verdict"] == "rises"
    values = [accuracy(root / f"models/base/seed{seed}/step0008000") for seed in study_tree.SEEDS]
    theirs = stats.ttest_1samp(values, study_tree.LOOKUP["pcfg_A"][1]).confidence_interval(0.95)
    ends = [study_tree.LOOKUP["pcfg_A"][1] - end for end in (theirs.high, theirs.low)]
    assert [float(of_task["lookup table"][end]) for end in ("low", "high")] == pytest.approx(ends)
    # The family: flatness and four accuracies of three primary comparisons.
    p_values = {key: float(row["p_value"]) for key, row in rows.items() if row["primary"] == "yes" and row["verdict"]}
    assert len(p_values) == 15
    largest = max(p_values, key=p_values.get)
    assert float(rows[largest]["adjusted"]) >= p_values[largest]
    smallest = min(p_values, key=p_values.get)
    assert float(rows[smallest]["adjusted"]) == pytest.approx(15 * p_values[smallest])
    assert rows["sizes", name]["adjusted"] == "" and analysis.headrooms[name].exists


def test_words_first_then_numbers(laboratory):
    root, analysis = laboratory
    printed = report.printed(analysis)
    page = html.unescape((root / "report" / "report.html").read_text())
    for text in (
        "Does it?",
        "Fixed beforehand: this hash was recorded before the first accuracy of a reported seed was measured",
        "Claim of adversarial: does not hold for A (100, 1,000 labels) and third word (100, 1,000 labels).",
        "Claim of unsaturated: no verdict, not at the same loss: models/unsaturated/seed",
        "from AdamW, step 8,000 to SGD 0.4, step 20,000; differences are paired by seed (n = 8).",
        "the groups share no two seeds, so intervals are Welch's (n = 8 and 6).",
        "The heads differ in size",
        "Fisher and Hutchinson traces differ by more than two standard errors (paired) for 8 of 16 models",
        "Rank correlation with the balanced trace over all saturated models",
        "The margins are 1.5 points of accuracy and 10% of the trace before.",
    ):
        assert text in printed and text in page, text
    assert "Liu et al" not in page and "lookup table" in page
    assert page.index("Claim of sgd") < page.index("The comparisons in numbers") < page.index("Loss and flatness")
    assert "Choice of adversarial_weight" in page and "Admitted: gaps up to 0.0197 nats" in page
    assert "models/base/seed107/step0016000/curve_pcfg_C_lbfgs.json: python run_lp.py" in page
    assert "probe C: failed, exit code 3, see logs/probe_C.txt" in page
    assert "Neither number is the only canonical one." in page and "queries against keys" in page
    table = printed[printed.index("Accuracies (ridge)") :]
    for control, cell in (("majority class", "39.0"), ("words", "80.2"), ("untrained", "80.4"), ("lookup table", "86.1")):
        assert re.search(rf"control: {control} .* {cell}", table), control
    assert re.search(r"headroom +yes +yes +yes +yes", table)
    assert re.search(r"unsaturated +8,000 +8 .* no +[\d.]+ ± [\d.]+‡§ ", printed)
    assert re.search(r"AdamW +8,000 +8 .* yes +[\d.]+ ± [\d.]+ +[\d.]+ ± ", printed)


def test_correlation_is_over_saturated_models(laboratory):
    root, analysis = laboratory
    [found] = [of_section["curve_pcfg_A_ridge_1000"] for of_section in analysis.correlations.values()]
    # 8 base seeds at two steps, SGD from them, 8 adversarial, 4 wide, 6 of other seeds; not the 8 unsaturated ones
    assert (found.n, found.runs) == (8 * 2 + 8 + 8 + 4 + 6, 8 + 8 + 4 + 6)
    x, y = [], []
    for folder in sorted(root.glob("models/*/seed*/step*")):
        if "unsaturated" not in str(folder):
            t, h, m, v = (
                read_json(folder / "hessian.json")["balanced"][name] for name in ("tables", "head_norm", "matrices", "vectors")
            )
            x.append(2 * (t * h) ** 0.5 + m + v / (1 if "wide" in str(folder) else 2))
            y.append(accuracy(folder))
    assert found.spearman == pytest.approx(stats.spearmanr(x, y)[0])
    low, high = found.spearman_interval
    assert low < found.spearman < high < 0


def test_every_seed_is_a_point(laboratory, tmp_path):
    _, analysis = laboratory
    section = analysis.sections[0]
    own = plots.SectionPlots(analysis, section, tmp_path)
    axes = Figure().subplots()
    own.by_line(axes, "trace")
    small = [line.get_xdata() for line in axes.lines if line.get_alpha() == 0.6]
    drawn = sorted(float(x) for data in small for x in data)
    assert drawn == pytest.approx(sorted(analysis.tree.value(member.model, "trace") for member in section.members))
    axes = Figure().subplots()
    own.by_line(axes, "curve_pcfg_A_ridge_1000")
    lines = {round(line.get_xdata()[0], 1) for line in axes.lines if len(line.get_xdata()) == 2}
    assert {80.2, 86.1} <= lines  # words, lookup table
    axes = Figure().subplots()
    own.label_curve(axes, own.curves("ridge")["curve_pcfg_A_ridge"])
    curves = [np.asarray(line.get_ydata(), float) for line in axes.lines if len(line.get_xdata()) == 2]
    for control in ([39.0, 39.0], [64.9, 80.2], [80.2, 86.1]):
        assert any(curve == pytest.approx(control) for curve in curves), control


def test_equal_trees_have_equal_reports(laboratory, tmp_path):
    root, _ = laboratory
    report.make_report(root, tmp_path / "again")
    names = sorted(path.name for path in (root / "report").iterdir())
    assert {"results.csv", "comparisons.csv", "results.json", "report.html", "overview.png", "changes.svg"} < set(names)
    for name in names:
        assert (root / "report" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


# analyses without a page


def small_study(root, before, after, base=study_tree.BASE, words=study_tree.WORDS, **fields):
    """Two groups of 4 seeds with gap, trace and accuracies each, and one comparison; returns its analysis."""
    rng = np.random.default_rng(3)
    options = fields.pop("comparison", {"flatness": "falls", "accuracy": "rises", "primary": True})
    seeds = study_tree.SEEDS[:4]
    groups = [study_tree.group(name, seeds=seeds) for name in ("base", "other")]
    for group, (gap, trace, accuracies) in zip(groups, (before, after), strict=True):
        for folder in group.folders.values():
            study_tree.write_measured(root / folder, rng, gap, trace, accuracies)
    study_tree.write_controls(root, words, study_tree.UNTRAINED, study_tree.LOOKUP, base)
    comparison = study_tree.comparison("one", "base", "other", **options)
    studies = study_tree.studies_of(groups, [comparison], Models(group="base", step=8000), **fields)
    write_studies(root, studies)
    return analyse(collect(root), root)


def verdict_of(analysis, name, comparison=0):
    [compared] = analysis.compared.values()
    return next(quantity.verdict for quantity in compared[comparison].quantities if quantity.name == name)


def test_no_verdict_without_headroom(tmp_path):
    """Words reach what the models reach: a clear rise of 10 points gets no verdict."""
    before, after = (0.015, 30.0, study_tree.BASE), (0.013, 20.0, study_tree.shifted(study_tree.BASE, 0.1))
    analysis = small_study(tmp_path, before, after, words={**study_tree.WORDS, "pcfg_A": (0.649, 0.912)})
    assert verdict_of(analysis, "curve_pcfg_A_ridge_100").word == "holds"
    refused = verdict_of(analysis, "curve_pcfg_A_ridge_1000")
    assert refused.word == "no headroom" and "words 91.2%" in refused.text()
    assert verdict_of(analysis, "curve_pcfg_A_ridge_1000", comparison=1).word == "no headroom"  # of the lookup table
    text = "holds for A (100 labels) and third word (100, 1,000 labels); no headroom for A (1,000 labels)"
    assert text in report.printed(analysis)


def test_the_same_loss_is_asked_over_seeds_and_sentences(tmp_path):
    accuracies = study_tree.BASE
    analysis = small_study(tmp_path / "far", (0.004, 30.0, accuracies), (0.0185, 20.0, accuracies))
    [one, _] = analysis.compared["mine"]
    assert "nats over seeds, margin ±0.01" in one.obstacle and verdict_of(analysis, "trace").word == "not at the same loss"
    root = tmp_path / "noisy"
    rng = np.random.default_rng(0)
    small_study(root, (0.010, 30.0, accuracies), (0.010, 20.0, accuracies))
    for path in sorted(root.glob("models/*/*/*/loss.json")):
        study_tree.write_loss(path.parent, 0.010 + rng.normal(0, 3e-4), error=0.004)
    [one, _] = analyse(collect(root), root).compared["mine"]
    assert "nats over sentences, margin ±0.01" in one.obstacle


def test_natural_text_is_compared_by_its_loss(tmp_path):
    """No gap is known: the MLM losses decide, paired by seed; with comparison records their errors count too."""
    before, after = (None, 30.0, study_tree.BASE), (None, 20.0, study_tree.shifted(study_tree.BASE, 0.03))
    analysis = small_study(
        tmp_path, before, after, controls=study_tree.studies_of([], [], Models(group="base", step=8000)).controls[:2]
    )
    rng = np.random.default_rng(0)
    for path in sorted(tmp_path.glob("models/*/*/*/loss.json")):
        record = read_json(path)
        record["sampled_loss"]["sentences"]["mean"] += rng.normal(0, 0.001)
        write_json(path, record)
    [one] = analyse(collect(tmp_path), tmp_path).compared["mine"]
    assert one.obstacle is None and one.quantities[0].label == "MLM loss"
    printed = report.printed(analyse(collect(tmp_path), tmp_path))
    table = printed[printed.index("Loss and flatness") :].partition("Accuracies")[0]
    assert "MLM loss" in table and "gap (nats)" not in table and "saturated " not in table.splitlines()[1]
    assert "No entropy is known. Two groups of models have the same loss if" in printed
    assert analysis.headrooms["curve_pcfg_A_ridge_1000"].exists
    for seed in study_tree.SEEDS[:4]:
        inputs = {"other": read_json(tmp_path / f"models/base/seed{seed}/step0008000/hessian.json")["inputs"]["model"]}
        fields = {"difference": study_tree.means(0.004, 0.004), "models": ["a", "b"], "inputs": inputs}
        folder = tmp_path / f"models/other/seed{seed}/step0008000"
        study_tree.record(folder, "comparison_1.json", "comparison", 0.004, 0.004, **fields)
    [one] = analyse(collect(tmp_path), tmp_path).compared["mine"]
    assert one.obstacle == "the difference of the losses is +0.0040 ± 0.0040 nats over sentences, margin ±0.01"


def test_a_study_that_was_changed_is_not_called_fixed_beforehand(tmp_path):
    both = (0.015, 30.0, study_tree.BASE)
    analysis = small_study(tmp_path, both, both)
    assert "Fixed beforehand" in report.printed(analysis)
    studies = read_studies(tmp_path)
    late = Registration(time="2026-11-28T00:00:00Z", sha256={"mine": study_tree.SHA256}, accuracies=3)
    other = Registration(time="2026-11-28T00:00:00Z", sha256={"mine": "0" * 64}, accuracies=0)
    write_studies(tmp_path, studies.model_copy(update={"registrations": (late, other)}))
    printed = report.printed(analyse(collect(tmp_path), tmp_path))
    assert "Not fixed beforehand" in printed and "Fixed beforehand" not in printed


def test_the_papers_table_is_shown_for_its_own_studies(tmp_path, monkeypatch):
    monkeypatch.setattr(report.report_plots, "write_plots", lambda *_: {})  # only the table is of interest
    before, after = (0.015, 30.0, study_tree.BASE), (0.014, 30.0, study_tree.shifted(study_tree.BASE, -0.07))
    small_study(tmp_path, before, after)
    studies = read_studies(tmp_path)
    study = studies.studies[0].model_copy(update={"paper": "algorithms"})
    write_studies(tmp_path, studies.model_copy(update={"studies": (study,)}))
    report.main([str(tmp_path)])
    page = html.unescape((tmp_path / "report" / "report.html").read_text())
    assert "Liu et al. (2023) next to ours" in page
    table = analyse(collect(tmp_path), tmp_path).paper["mine"]
    ours = table[table["quantity"] == "A"].set_index("role")["ours"]
    mean = np.mean([accuracy(tmp_path / f"models/base/seed{seed}/step0008000") for seed in study_tree.SEEDS[:4]])
    assert ours["standard"] == pytest.approx(100 * mean) and ours["lookup table"] == pytest.approx(86.1)
    assert ours["adversarial"] == pytest.approx(100 * mean - 7, abs=0.5)


def test_a_measurement_without_its_number_is_refused(laboratory, tmp_path):
    root, _ = laboratory
    studies = read_studies(root)
    measurement = studies.measurements[0].model_copy(update={"value": "nothing"})
    write_studies(tmp_path, studies.model_copy(update={"measurements": (measurement,)}))
    (tmp_path / "models").symlink_to(root / "models")
    with pytest.raises(InputError, match=r"mine.json: no number in 'nothing'"):
        analyse(collect(root), tmp_path)
