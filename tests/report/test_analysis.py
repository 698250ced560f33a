"""The analysis of a made-up laboratory, in files; its numbers computed again from the CSV files by code of their own."""

import csv
import hashlib
import html
import json
import re
import shutil

import numpy as np
import pytest
from scipy import stats

from pcfg.common.files import InputError, write_json
from pretraining.evaluation import records
from pretraining.evaluation.records import RECORDS, write_record
from pretraining.model.config import ModelConfig
from pretraining.report import __main__ as report
from pretraining.report import contract, plots
from pretraining.report.contract import Choice, Command, Entry, Experiment, Experiments, Status, Weight
from pretraining.report.rows import runs_of

TASKS, SEEDS, STEPS = ("A", "B"), (0, 1, 2), (500, 1000, 2000)
REFERENCE = "models/medium/seed0/step0002000"
UNPROBED = "models/adversarial/seed2/step0002000/probe_pcfg_B.json"
WIDTHS = {"small": 8, "medium": 16, "large": 32}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def weights(folder: str) -> bytes:
    return folder.encode()  # the report reads none, but for the reference's hash


def record(root, folder, name, measurement, value, error, unit="nats", **details):
    inputs = {"data": {"sha256": digest("data")}, "model": {"sha256": hashlib.sha256(weights(folder)).hexdigest()}}
    inputs |= details.pop("inputs", {})
    common = {"inputs": inputs, "arguments": {}, "seconds": 1.0, "device": "cpu", "n": 500, "unit": unit}
    written = RECORDS[measurement](value=value, standard_error=error, **common, **details)
    write_record(root / folder, name, written)


def means(value, error):
    return {"pairs": {"mean": value + 1, "standard_error": error}, "sentences": {"mean": value, "standard_error": error}}


def write_model(root, folder, hidden, step, **facts):
    (root / folder).mkdir(parents=True)
    config = ModelConfig(50, hidden, 2, 2, 2 * hidden, max_position_embeddings=10)
    write_json(root / folder / "config.json", config.to_transformers())
    (root / folder / "model.safetensors").write_bytes(weights(folder))
    write_json(root / folder / "args.json", {"step": step, "job_name": folder.split("/")[1], **facts})


def accuracies(root, folder, rng, **values):
    for name, value in values.items():
        runs = (value + rng.normal(0, 0.003, 2)).tolist()
        kind = name.split("_")[0]
        details = {"accuracies": runs, "best_accuracy": max(runs), "sampling_standard_error": 0.01, "majority": 0.3}
        error = float(np.std(runs, ddof=1) / 2**0.5)
        record(root, folder, f"{name}.json", kind, float(np.mean(runs)), error, "accuracy", **details)


def measured(root, folder, rng, gap, trace, accuracy, finetune=True):
    """Everything that is measured of a model whose gap to the entropy is `gap`."""
    parts = {"loss": means(3 + gap, 0.01), "entropy": means(3.0, 0.01), "gap": means(gap, 0.0005)}
    record(root, folder, "loss.json", "loss", 3 + gap, 0.01, sampled_loss=means(3 + gap, 0.02), **parts)
    record(root, folder, "hessian.json", "hessian", trace, 0.02 * trace)
    if folder != REFERENCE:
        other = hashlib.sha256(weights(REFERENCE)).hexdigest()
        details = {"difference": means(gap - 0.01, 0.0004), "gap_a": means(gap, 0.0005), "gap_b": means(0.01, 0.0005)}
        details |= {"models": ["a", "b"], "inputs": {"other": {"sha256": other}}}
        record(root, folder, f"comparison_{other[:12]}.json", "comparison", gap - 0.01, 0.0004, **details)
    values = {f"probe_pcfg_{task}": accuracy - 0.05 * index for index, task in enumerate(TASKS)}
    accuracies(root, folder, rng, **values, **({"finetune_pcfg_B": accuracy + 0.05} if finetune else {}))


def parameters(hidden):
    """As tests/report/test_report.py counts them."""
    layer = 4 * (hidden * hidden + hidden) + 2 * (2 * hidden * hidden) + 3 * hidden + 4 * hidden
    return 62 * hidden + 2 * layer + 2 * 3 * hidden + hidden * hidden + hidden + 50


def write_steps(root, rng) -> list[Entry]:
    """Two optimizers: AdamW converges at the second checkpoint, SGD, which starts at its first one, never does."""
    entries = []
    for seed in SEEDS:
        for index, step in enumerate(STEPS):
            for group, job, gap in (("AdamW", "medium", 0.01 + 0.05 * 0.1**index), ("SGD", "sgd", 0.3 - 0.02 * index)):
                folder = f"models/{job}/seed{seed}/step{step:07d}"
                if (group, index) == ("SGD", 0):
                    folder = folder.replace("sgd", "medium")
                entries.append(Entry(group=group, seed=seed, step=step, folder=folder))
                if (root / folder).exists():
                    continue
                write_model(root, folder, 16, step)
                gap = 0.01 if folder == REFERENCE else gap + rng.uniform(0, 1e-3)
                accuracy = 0.7 + 0.03 * index + rng.normal(0, 0.002)
                measured(root, folder, rng, gap, 100 - 10 * index + rng.normal(), accuracy)
    return entries


def write_sizes(root, rng) -> list[Entry]:
    """The trace falls with the size by one rule of enlarging and rises by the other; one large model is missing."""
    entries = []
    for seed in SEEDS:
        for group, hidden in WIDTHS.items():
            folder, common = f"models/{group}/seed{seed}/step0002000", {}
            if group != "medium" and (group, seed) != ("large", 1):
                write_model(root, folder, hidden, 2000)
                accuracy = 0.7 + hidden / 200 + rng.normal(0, 0.003)
                measured(root, folder, rng, rng.uniform(0.011, 0.013), 60 + rng.normal(), accuracy, finetune=False)
            for rule in ("tables", "head") if group != "large" else ():
                common[rule] = f"enlarged/{rule}/{group}/seed{seed}"
                source = {"weights_sha256": digest(folder), "parameters": parameters(hidden)}
                facts = {"rule": rule, "times": 2, "heads": 2, "added_layers": [], "from": source}
                write_model(root, common[rule], 32, 2000, enlarged=facts)
                trace = 60 + (32 - hidden) * (2 if rule == "tables" else -1) + rng.normal()
                record(root, common[rule], "hessian.json", "hessian", trace, 1.0)
            entries.append(Entry(group=group, seed=seed, step=2000, folder=folder, common=common))
    return entries


def write_algorithms(root, rng) -> list[Entry]:
    """The adversarial models are worse at a larger trace; of one the probe of B is missing."""
    entries = [Entry(group="standard", seed=seed, step=2000, folder=f"models/medium/seed{seed}/step0002000") for seed in SEEDS]
    for seed in SEEDS:
        folder = f"models/adversarial/seed{seed}/step0002000"
        entries.append(Entry(group="adversarial", seed=seed, step=2000, folder=folder))
        write_model(root, folder, 16, 2000)
        measured(root, folder, rng, rng.uniform(0.014, 0.016), 140 + rng.normal(), 0.65 + rng.normal(0, 0.003))
    (root / UNPROBED).unlink()
    entries.append(Entry(group="lookup table", seed=None, step=None, folder="models/lookup_table"))
    (root / "models" / "lookup_table").mkdir()
    write_json(root / "models" / "lookup_table" / "args.json", {"model": "lookup table"})
    accuracies(root, "models/lookup_table", rng, **{f"probe_pcfg_{task}": 0.5 for task in TASKS})
    costs = ((0.01, 0.001, 0.755), (0.1, 0.005, 0.65), (1.0, 0.06, 0.5))
    tried = tuple(
        Weight(weight=weight, gap_increase=gap, gap_increase_se=0.001, accuracy=of, accuracy_se=None, standard_accuracy=0.76)
        for weight, gap, of in costs
    )
    choice = Choice(criterion="the lowest accuracy within the gap allowed", gap_allowed=0.02, weights=tried, chosen=0.1)
    contract.write_choice(root / "adversarial" / "choice.json", choice)
    return entries


def write_laboratory(root) -> Experiments:
    """A laboratory with something of everything: findings that hold, depend on the rule, are undecided; two failures."""
    rng = np.random.default_rng(3)
    plan = Experiments(
        scale="made up",
        seeds=SEEDS,
        tasks=TASKS,
        finetune_tasks=("B",),
        saturated=0.02,
        margin=0.015,
        reference=REFERENCE,
        experiments=(
            Experiment(name="steps", entries=tuple(write_steps(root, rng))),
            Experiment(name="sizes", entries=tuple(write_sizes(root, rng))),
            Experiment(name="algorithms", entries=tuple(write_algorithms(root, rng)), choice="adversarial/choice.json"),
        ),
        commands=(
            Command(name="train large seed1", command="python run_pretraining.py --seed 1", makes=("models/large/seed1",)),
            Command(name="probe B", command="python run_lp.py --train_file data/pcfg_B.csv", makes=(UNPROBED,)),
        ),
    )
    contract.write_experiments(root, plan)
    failed = Status(state="failed", exit_code=1, seconds=3.5, log="logs/train_large_seed1.log")
    blocked = Status(state="blocked", why="needs <the labelled sentences> of B")
    contract.write_statuses(root, {"train large seed1": failed, "probe B": blocked})
    return plan


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    """The laboratory, and its report in OUT/report."""
    root = tmp_path_factory.mktemp("laboratory")
    found = records.versions("torch")
    with pytest.MonkeyPatch.context() as patch:  # hundreds of records: looked up once
        patch.setattr(records, "versions", lambda *_: found)
        write_laboratory(root)
    report.main([str(root)])
    return root


def read_csv(path):
    """The rows of a CSV file, numbers as numbers and yes and no as booleans."""

    def parse(text):
        try:
            return float(text)
        except ValueError:
            return {"yes": True, "no": False, "": None}.get(text, text)

    with open(path, newline="", encoding="utf-8") as file:
        return [{key: parse(value) for key, value in row.items()} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def numbers(laboratory):
    """The rows of experiments.csv and the content of results.json."""
    rows = read_csv(laboratory / "report" / "experiments.csv")
    return rows, json.loads((laboratory / "report" / "results.json").read_text())


def of(rows, experiment, group=None, step=None):
    wanted = {"experiment": experiment} | ({"group": group} if group else {}) | ({"step": step} if step else {})
    return [row for row in rows if wanted.items() <= row.items()]


def test_criteria_from_the_csv(numbers):
    rows, results = numbers
    assert len(rows) == 18 + 9 + 7 and results["criteria"]["margin_nats"] == 0.015
    for row in rows:
        if row["gap"] is not None and row["kind"] == "transformer":
            assert row["saturated"] == (stats.norm(row["gap"], row["gap_se"]).ppf(0.975) <= 0.02)
            low, high = stats.norm(row["gap_difference"], max(row["gap_difference_se"], 1e-12)).interval(0.95)
            assert row["equal"] == (-0.015 <= low and high <= 0.015)
            assert row["same_loss"] == (row["saturated"] and row["equal"]) and row["paired"]
    [table] = of(rows, "algorithms", "lookup table")
    reference = next(row for row in rows if row["folder"] == REFERENCE)
    assert (table["gap"], table["gap_difference"], table["gap_difference_se"]) == (0, -reference["gap"], reference["gap_se"])
    assert reference["gap_difference"] == 0 and reference["equal"] is True
    assert {row["saturated"] for row in of(rows, "steps", "AdamW", 500)} == {False}


def test_results_csv_has_what_the_analysis_adds(laboratory, numbers):
    rows = {row["model"]: row for row in read_csv(laboratory / "report" / "results.csv")}
    for row in numbers[0]:
        if row["kind"]:
            assert rows[row["folder"]]["gap_difference"] == row["gap_difference"]
            assert (rows[row["folder"]]["equal"], rows[row["folder"]]["seed"]) == (row["equal"], row["seed"])
    assert rows["enlarged/head/small/seed0"]["equal"] is None


def test_correlations_from_the_csv(numbers):
    rows, results = numbers
    told = 0
    for found in results["correlations"]:
        wanted = [found["accuracy"], found["against"]]
        models = {
            row["folder"]: row
            for row in of(rows, found["experiment"])
            if row["same_loss"] and row["kind"] == "transformer" and None not in map(row.get, wanted)
        }.values()
        y, x = ([row[name] for row in models] for name in wanted)
        correlation = found["found"]
        assert correlation["n"] == len(models) and correlation["runs"] == len({row["run"] for row in models})
        if len(models) < 4:
            assert correlation["spearman"] is None
            continue
        told += 1
        for name, theirs in (("spearman", stats.spearmanr(x, y)[0]), ("pearson", stats.pearsonr(x, y)[0])):
            low, high = correlation[f"{name}_interval"]
            assert correlation[name] == pytest.approx(theirs) and -1 <= low <= high <= 1
    assert told >= 10
    [steps] = [
        found["found"] for found in results["correlations"] if list(found.values())[:3] == ["steps", "probe_pcfg_A", "trace"]
    ]
    assert (steps["n"], steps["runs"]) == (6, 3) and steps["pearson_interval"][1] < 0


def test_groups_that_share_a_model_are_one_run(numbers):
    assert {row["run"] for row in of(numbers[0], "steps")} == {f"AdamW seed {seed}" for seed in SEEDS}
    assert len({row["run"] for row in of(numbers[0], "algorithms")}) == 7
    chain = [("a", "1"), ("b", "2"), ("c", "3"), ("c", "2"), ("b", "1"), ("d", "4")]  # c and b share 2, b and a share 1
    entries = tuple(Entry(group=group, seed=None, step=index, folder=folder) for index, (group, folder) in enumerate(chain))
    runs = runs_of(Experiment(name="steps", entries=entries))
    assert runs == {("a", None): "a", ("b", None): "a", ("c", None): "a", ("d", None): "d"}


def test_changes_from_the_csv(numbers):
    """Paired t, Welch, and the lookup table as a mean with the error of its own probe's seeds."""
    rows, results = numbers
    steps, sgd, sizes, adversarial, table = results["findings"]
    for name in ("trace", "gap", "probe_pcfg_A", "finetune_pcfg_B"):
        before, after = ([row[name] for row in of(rows, "steps", "AdamW", step)] for step in (1000, 2000))
        theirs = stats.ttest_rel(after, before).confidence_interval()
        assert [steps["changes"][name][end] for end in ("low", "high")] == pytest.approx(list(theirs))
    for finding, groups, names in (
        (sizes, ("small", "large"), ("trace_by_tables", "trace_by_head", "probe_pcfg_B")),
        (adversarial, ("standard", "adversarial"), ("trace", "probe_pcfg_A", "probe_pcfg_B", "finetune_pcfg_B")),
    ):
        for name in names:
            values = [
                [row[name] for row in of(rows, finding["experiment"], group) if row[name] is not None] for group in groups
            ]
            theirs = stats.ttest_ind(*values[::-1], equal_var=False).confidence_interval()
            assert [finding["changes"][name][end] for end in ("low", "high")] == pytest.approx(list(theirs))
    standard = [row["probe_pcfg_A"] for row in of(rows, "algorithms", "standard")]
    [lookup] = of(rows, "algorithms", "lookup table")
    errors = np.var(standard, ddof=1) / 3, lookup["probe_pcfg_A_se"] ** 2
    degrees = sum(errors) ** 2 / (errors[0] ** 2 / 2 + errors[1] ** 2 / (lookup["probe_pcfg_A_seeds"] - 1))
    theirs = stats.t(degrees, lookup["probe_pcfg_A"] - np.mean(standard), sum(errors) ** 0.5).interval(0.95)
    assert [table["changes"]["probe_pcfg_A"][end] for end in ("low", "high")] == pytest.approx(list(theirs))
    assert sgd["verdicts"] == dict.fromkeys(sgd["verdicts"], "undecided")


def test_tables_are_means_over_seeds(numbers):
    rows, results = numbers
    [line] = [line for line in results["tables"]["steps"] if (line["group"], line["step"]) == ("SGD", 1000)]
    values = [row["trace"] for row in of(rows, "steps", "SGD", 1000)]
    mean = {"mean": np.mean(values), "error": stats.sem(values), "over": "seeds", "n": 3}
    assert line["values"]["trace"] == pytest.approx(mean) and line["saturated"] == [0, 3]
    table = results["tables"]["algorithms"][-1]["values"]["probe_pcfg_A"]
    assert (table["over"], table["n"]) == ("measurement", 1)


def test_the_page_opens_with_the_findings(laboratory, numbers):
    page = html.unescape((laboratory / "report" / "report.html").read_text())
    verdicts = [finding["verdicts"]["probe_pcfg_A"] for finding in numbers[1]["findings"]]
    assert verdicts == ["holds", "undecided", "depends on the rule of enlarging", "holds", "holds"]
    places = [page.index(finding["headline"]) for finding in numbers[1]["findings"]]
    assert places == sorted(places) and places[-1] < page.index("<table>")
    for text in (
        "seed 1: missing; `train large seed1` failed with exit code 1, see logs/train_large_seed1.log",
        "seed 2: no probe B; `probe B` is blocked (needs <the labelled sentences> of B)",
        "python run_pretraining.py --seed 1",
        "failed, exit code 1",
        "large seed 1 (missing)",
        "0 by construction",
        "49.2",  # the paper's
        "Seeds of pre-training: 0, 1, 2.",
        "torch ",
    ):
        assert text in page, text
    raw = (laboratory / "report" / "report.html").read_text()
    assert "needs <the" not in raw and not re.search(r'(href|src)="(?!data:)', raw) and str(laboratory) not in raw
    assert raw.count("<script") == 1 and "http" not in raw.split("<script")[1].split("</script>")[0]


def test_correlations_in_words(laboratory, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(plots, "write_plots", lambda *_: {})
    report.main([str(laboratory), "--output", str(tmp_path)])
    printed, page = capsys.readouterr().out, html.unescape((tmp_path / "report.html").read_text())
    for trace, side in (("tables", "as in"), ("head", "against")):
        pattern = rf"with trace \({trace}\) in 'sizes', among models of equal loss: "
        pattern += rf"probe A [-+]0\.\d\d \[.*?\] over 8 models of 8 runs, {side} the paper;"
        assert re.search(pattern, printed) and re.search(pattern, page)
    assert re.search(
        r"trace in 'steps', .*: probe A -.* over 6 models of 3 runs, the interval of so few runs is rough;", printed
    )
    assert "fine-tuning B is undecided (fewer than 4 models)." in printed


def test_plots_are_there_in_both_formats(laboratory):
    names = ["steps", "sizes", "algorithms", "adversarial_frontier"]
    names += [f"{name}_accuracy_against_trace" for name in names[:3]]
    plots = {path.name for path in (laboratory / "report").iterdir() if path.suffix in (".png", ".svg")}
    assert plots == {f"{name}.{end}" for name in names for end in ("png", "svg")}


def test_a_group_looks_the_same_everywhere_and_like_no_other():
    styles = plots.styles_of([f"group {i}" for i in range(11)])
    assert len({(style.colour, style.marker) for style in styles.values()}) == 11
    assert len({style.marker for style in styles.values()}) >= 10


def test_same_tree_gives_same_bytes_wherever_it_lies(laboratory, tmp_path):
    """One experiment, one task: what else there is is drawn by the same code."""
    shutil.copytree(laboratory, tmp_path / "one", ignore=shutil.ignore_patterns("report"))
    plan = contract.read_experiments(tmp_path / "one")
    plan = plan.model_copy(update={"tasks": ("A",), "finetune_tasks": (), "experiments": plan.experiments[2:]})
    contract.write_experiments(tmp_path / "one", plan)
    report.main([str(tmp_path / "one"), "--output", str(tmp_path / "out1")])
    (tmp_path / "one").rename(tmp_path / "two")
    report.main([str(tmp_path / "two"), "--output", str(tmp_path / "out2")])
    names = sorted(path.name for path in (tmp_path / "out1").iterdir())
    assert {"results.csv", "experiments.csv", "results.json", "report.html", "algorithms.svg", "algorithms.png"} < set(names)
    for name in names:
        assert (tmp_path / "out1" / name).read_bytes() == (tmp_path / "out2" / name).read_bytes(), name


def test_an_enlarged_model_must_be_the_one(laboratory, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "write_plots", lambda *_: {})
    shutil.copytree(laboratory, tmp_path / "lab", ignore=shutil.ignore_patterns("report"))
    facts = tmp_path / "lab/enlarged/head/small/seed0/args.json"
    content = json.loads(facts.read_text())
    write_json(facts, {**content, "enlarged": {**content["enlarged"], "rule": "tables"}})
    with pytest.raises(InputError, match="group 'small': enlarged/head/small/seed0 is not models/small/.* --tied-scale head"):
        report.main([str(tmp_path / "lab")])
    assert not (tmp_path / "lab/report").exists()
    (tmp_path / "lab/adversarial/choice.json").unlink()
    shutil.rmtree(tmp_path / "lab/enlarged/head/small")
    report.main([str(tmp_path / "lab")])
    page = (tmp_path / "lab/report/report.html").read_text()
    assert "adversarial/choice.json: missing; no command of the plan makes it" in page
    assert "seed 0: no trace (head); no command of the plan makes it" in page


def test_nothing_is_there_yet(laboratory, tmp_path, capsys):
    """All but the enlarged models is missing."""
    shutil.copytree(laboratory / "enlarged", tmp_path / "enlarged")
    shutil.copy(laboratory / "experiments.json", tmp_path)
    report.main([str(tmp_path)])
    assert not list((tmp_path / "report").glob("*.png"))
    printed = capsys.readouterr().out
    assert printed.count("): undecided, ") == 5 and "`train large seed1` has not run" in printed
