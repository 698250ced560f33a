"""The report against a tree of records that the test writes itself, and against numbers recomputed from those JSON files."""

import csv
import hashlib
import html
import json
import re
import shutil

import numpy as np
import pytest

from pcfg.common.files import InputError, write_json
from pretraining.evaluation.records import RECORDS
from pretraining.evaluation.records import write_record as write_any_record
from pretraining.model.config import ModelConfig
from pretraining.report import __main__ as report

PLOTTED = ("test_same_tree_gives", "test_partial_trees", "test_one_model_with", "test_sizes_are_compared")
COMMON = {"inputs": {"data": {"sha256": "ab" * 32}}, "arguments": {"seed": 0}, "seconds": 1.0, "device": "cpu"}


@pytest.fixture(autouse=True)
def only_the_plots_of_some_tests(request, monkeypatch):
    monkeypatch.setattr(report.report_plots, "DPI", 30)
    if not request.node.name.startswith(PLOTTED):
        monkeypatch.setattr(report.report_plots, "write_plots", lambda *_: {})


def write_record(folder, name, measurement, **fields):
    write_any_record(folder, name, RECORDS[measurement](**fields))


def both_means(value, error):
    return {
        "pairs": {"mean": value + 1, "standard_error": error},
        "sentences": {"mean": value, "standard_error": error / 2},
    }


def write_model(folder, hidden, job, step):
    config = ModelConfig(50, hidden, 2, 2, 2 * hidden, max_position_embeddings=10)
    write_json(folder / "config.json", config.to_transformers())
    (folder / "model.safetensors").write_bytes(b"the report reads no weights")
    write_json(folder / "args.json", {"step": step, "job_name": job})
    # tables: words, positions and 2 token types; LayerNorms: 2 a layer, embeddings, final, head
    tables = (50 + 10 + 2) * hidden
    layer = 4 * (hidden * hidden + hidden) + 2 * (2 * hidden * hidden) + 3 * hidden + 4 * hidden
    return tables + 2 * layer + 2 * 3 * hidden + hidden * hidden + hidden + 50


def write_accuracy(folder, name, accuracies, n=400, **details):
    error = float(np.std(accuracies, ddof=1) / len(accuracies) ** 0.5) if len(accuracies) > 1 else None
    write_record(
        folder,
        f"{name}.json",
        measurement=name.split("_")[0],
        value=float(np.mean(accuracies)),
        standard_error=error,
        n=n,
        unit="accuracy",
        accuracies=accuracies,
        best_accuracy=max(accuracies),
        sampling_standard_error=0.02,
        majority=0.3,
        **COMMON,
        **details,
    )


def write_tree(tmp_path):
    """Two jobs of two checkpoints, one of them not measured at all, and a lookup table; returns the folder and sizes."""
    rng = np.random.default_rng(0)
    parameters = {}
    for job, hidden in (("wide", 16), ("narrow", 8)):
        for step in (1000, 0):
            folder = tmp_path / "models" / job / f"step{step:07d}"
            folder.mkdir(parents=True)
            parameters[f"{job}/step{step:07d}"] = write_model(folder, hidden, job, step)
            if (job, step) == ("narrow", 0):
                continue
            gap, trace = float(rng.uniform(0.01, 1)), float(rng.uniform(10, 100))
            parts = {"loss": both_means(3 + gap, 0.1), "entropy": both_means(3.0, 0.1), "gap": both_means(gap, 0.01)}
            sizes = {"value": 3 + gap, "standard_error": 0.1, "n": 100, "unit": "nats"}
            sampled = both_means(3 + gap, 0.2)
            write_record(folder, "loss.json", measurement="loss", sampled_loss=sampled, **parts, **sizes, **COMMON)
            sizes |= {"value": trace, "unit": "nats"}
            write_record(folder, "hessian.json", measurement="hessian", estimator="fisher", **sizes, **COMMON)
            write_accuracy(folder, "probe_pcfg_B", rng.uniform(0.3, 0.6, 3).tolist())
            write_accuracy(folder, "finetune_pcfg_B", rng.uniform(0.3, 0.6, 1).tolist())
    table = tmp_path / "models" / "lookup_table"
    table.mkdir()
    write_json(table / "args.json", {"model": "lookup table"})
    write_accuracy(table, "probe_pcfg_B", [0.5, 0.52])
    # what a kill leaves, and the trainer's own state: no models
    for name in (".step0000500.tmp", "training_state"):
        (tmp_path / "models" / "wide" / name).mkdir()
        write_model(tmp_path / "models" / "wide" / name, 8, "wide", 500)
    return tmp_path / "models", parameters


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A tree with a script among its arguments, and the folder of its report with all plots."""
    root = tmp_path_factory.mktemp("drawn")
    folder, _ = write_tree(root)
    record = folder / "wide" / "step0001000" / "probe_pcfg_B.json"
    write_json(record, {**json.loads(record.read_text()), "arguments": {"note": "<script>alert(1)</script>"}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report.report_plots, "DPI", 30)
        report.main([str(folder), "--output", str(root / "out")])
    return folder, root / "out"


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_csv_agrees_with_the_json_files(tree, tmp_path):
    folder, parameters = tree
    report.main([str(folder), "--output", str(tmp_path / "out")])
    rows = read_csv(tmp_path / "out" / "results.csv")
    assert [row["model"] for row in rows] == [
        "narrow/step0000000",
        "narrow/step0001000",
        "wide/step0000000",
        "wide/step0001000",
        "lookup_table",
    ]
    for row in rows[1:4]:
        assert int(row["parameters"]) == parameters[row["model"]]
        loss = json.loads((folder / row["model"] / "loss.json").read_text())
        for what in ("loss", "entropy", "gap", "sampled_loss"):
            for mean in ("pairs", "sentences"):
                assert float(row[f"{what}_{mean}"]) == loss[what][mean]["mean"]
                assert float(row[f"{what}_{mean}_se"]) == loss[what][mean]["standard_error"]
        trace = json.loads((folder / row["model"] / "hessian.json").read_text())
        assert (float(row["trace"]), float(row["trace_se"])) == (trace["value"], trace["standard_error"])
        probe = json.loads((folder / row["model"] / "probe_pcfg_B.json").read_text())["accuracies"]
        assert float(row["probe_pcfg_B"]) == pytest.approx(np.mean(probe))
        assert float(row["probe_pcfg_B_se"]) == pytest.approx(np.std(probe, ddof=1) / 3**0.5)
        assert (row["probe_pcfg_B_seeds"], row["finetune_pcfg_B_seeds"]) == ("3", "1")
        assert row["finetune_pcfg_B_se"] == "" and float(row["finetune_pcfg_B_sampling_se"]) == 0.02
        assert row["trace_hutchinson"] == ""


def test_missing_measurements_are_empty_cells(tree, tmp_path):
    report.main([str(tree[0]), "--output", str(tmp_path)])
    rows = read_csv(tmp_path / "results.csv")
    known = {key for key, value in rows[0].items() if value}
    shape = {"parameters", "hidden_size", "layers", "heads", "intermediate_size"}
    assert known == {"model", "kind", "job", "group", "step", *shape}
    table = rows[-1]
    assert (table["kind"], table["gap_sentences"], table["trace"], table["parameters"]) == ("lookup table", "0.0", "", "")


def test_same_tree_gives_same_bytes_wherever_it_lies(drawn, tmp_path):
    folder, output = drawn
    shutil.copytree(folder, tmp_path / "elsewhere")
    report.main([str(tmp_path / "elsewhere"), "--output", str(tmp_path / "out")])
    names = sorted(path.name for path in output.iterdir())
    assert {"results.csv", "results.json", "report.html", "overview.png", "overview.svg"} < set(names)
    for name in names:
        assert (output / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name
    assert str(tmp_path) not in (tmp_path / "out" / "results.csv").read_text()


def test_terminal_table(tree, tmp_path, capsys):
    report.main([str(tree[0]), "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("lookup_table"))
    assert "0 by construction" in line and "51.0 ± 1.0" in line
    wide = next(line for line in printed.splitlines() if line.startswith("wide/step0001000"))
    assert wide.count("±") == 4 and wide.count("*") == 1  # the one-seed accuracy is marked
    minimal = [line for line in printed.splitlines() if "minimal loss" in line]  # of the one text that all were measured on
    assert len(minimal) == 1 and "3.0000 ± 0.0500 nats, mean over sentences; 4.0000 ± 0.1000 over pairs" in minimal[0]
    page = (tmp_path / "out" / "report.html").read_text()
    assert html.escape(minimal[0]) in page
    assert "mean over sentences" in printed and "binomial" in printed


def test_html_is_self_contained(drawn):
    page = (drawn[1] / "report.html").read_text()
    assert page.count("<script") == 1 and "<script>alert" not in page  # its own, which sorts tables
    assert "&lt;script&gt;alert" in page
    sources = re.findall(r'src="([^"]{0,30})', page)
    assert len(sources) >= 5 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r'(href|src)="(?!data:)', page)
    assert "torch " in page and "0 by construction" in page


def test_partial_trees_are_reported(tmp_path):
    """Only a lookup table; only a model without steps or measurements: no plots, but a report."""
    for name in ("table", "model"):
        (tmp_path / name).mkdir()
    write_json(tmp_path / "table" / "args.json", {"model": "lookup table"})
    write_accuracy(tmp_path / "table", "probe_pcfg_A", [0.5])
    report.make_report(tmp_path / "table", tmp_path / "out1")
    assert [row["model"] for row in read_csv(tmp_path / "out1" / "results.csv")] == ["table"]
    write_model(tmp_path / "model", 8, "job", 0)
    (tmp_path / "model" / "args.json").unlink()
    report.make_report(tmp_path / "model", tmp_path / "out2")
    [row] = read_csv(tmp_path / "out2" / "results.csv")
    assert row["step"] == "" and row["job"] == "model"
    assert not list((tmp_path / "out2").glob("*.png"))


def test_one_model_with_accuracy_only(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    write_model(folder, 8, "job", 100)
    write_accuracy(folder, "probe_conditional_pcfg_A", [0.5])
    report.make_report(folder, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {
        "overview.png",
        "models_against_size.png",
    }


def write_trace(folder, value, error, parts=None):
    """A trace of `value`, and of the parts `parts`: groups and layers by name."""
    sizes = {"value": value, "standard_error": error, "n": 100, "unit": "nats"}
    if parts:
        sizes["parts"] = {kind: {name: {"value": part} for name, part in parts[kind].items()} for kind in parts}
    write_record(folder, "hessian.json", measurement="hessian", estimator="fisher", **sizes, **COMMON)


def write_gap(folder, gap, error=1e-4):
    sizes = {"value": 3 + gap, "standard_error": 0.1, "n": 100, "unit": "nats"}
    parts = {"sampled_loss": both_means(3 + gap, 0.2), "gap": both_means(gap, error), "entropy": both_means(3.0, 0.1)}
    write_record(folder, "loss.json", measurement="loss", **parts, **sizes, **COMMON)


def enlarged_model(folder, source, rule, times, trace, error=0.1, added=(), gap=0.01):
    """A model of width 16 with two layers that was enlarged, and its trace, of which tables and added layers have 1 each."""
    folder.mkdir(parents=True)
    write_model(folder, 16, source, 1000)
    digest = hashlib.sha256(source.encode()).hexdigest()
    facts = {"rule": rule, "times": times, "heads": times, "added_layers": list(added)}
    facts["from"] = {"weights_sha256": digest, "parameters": 100 * times}
    write_json(folder / "args.json", {"step": 1000, "job_name": source, "enlarged": facts})
    groups = {"word_table": 0.75, "position_table": 0.25, "encoder_matrices": trace - 3, "vectors": 2, "head": 0}
    write_trace(folder, trace, error, {"groups": groups, "layers": {"layer_0": trace - 1, "layer_1": 1}})
    if gap is not None:
        write_gap(folder, gap)


@pytest.fixture
def grown(tmp_path):
    """A model of width 16 with trace 10, and smaller ones enlarged to it, all at the same loss."""
    (tmp_path / "wide").mkdir()
    write_model(tmp_path / "wide", 16, "wide", 1000)
    write_trace(tmp_path / "wide", 10.0, 0.1, {"groups": {"word_table": 4, "encoder_matrices": 6}, "layers": {"layer_0": 10}})
    write_gap(tmp_path / "wide", 0.012)
    enlarged_model(tmp_path / "narrow_tables", "narrow", "tables", 2, 12.0, added=[1])
    enlarged_model(tmp_path / "narrow_head", "narrow", "head", 2, 8.0, added=[1])
    return tmp_path


def test_sizes_are_compared_under_both_rules(grown, capsys):
    enlarged_model(grown / "tiny_tables", "tiny", "tables", 4, 30.0)
    enlarged_model(grown / "tiny_head", "tiny", "head", 4, 20.0)
    enlarged_model(grown / "odd_tables", "odd", "tables", 8, 10.1)
    report.main([str(grown), "--output", str(grown / "out")])
    page, printed = (grown / "out" / "report.html").read_text(), capsys.readouterr().out
    title = "The trace in the parameters of one shape"
    for finding in (
        f"{title} (narrow x 2, step 1,000 against wide, step 1,000): depends on the rule of enlarging",
        f"{title} (tiny x 4, step 1,000 against wide, step 1,000): is larger with both rules of enlarging",
        f"{title} (odd x 8, step 1,000 against wide, step 1,000): undecided",
    ):
        assert finding in printed and finding in html.unescape(page)
    assert "wide, step 1,000): undecided: Fisher trace (tables) +0.10 [-0.18, +0.38]; no Fisher trace (head)." in printed
    table = printed[printed.index("own parameters") :]
    assert re.search(r"narrow x 2 +200 .* 12.00 ± 0.10\* +8.00 ± 0.10\*", table)
    assert re.search(r"wide +[\d,]+ .* 10.00 ± 0.10\* +10.00 ± 0.10\*", table)
    table = printed[printed.index("trace: tables") :]
    assert re.search(r"narrow_tables .* 12.00 ± 0.10 +1.00 +9.00 +2.00 +0.00 +1.00\n", table)
    assert re.search(r"narrow_head .* 8.00 ± 0.10 +1.00 +5.00 +2.00 +0.00 +1.00\n", table)
    assert re.search(r"wide .* 10.00 ± 0.10 +4.00 +6.00", table)
    assert len(list((grown / "out").glob("models_of_*_parameters_against_size.png"))) == 1
    rows = {row["model"]: row for row in read_csv(grown / "out" / "results.csv")}
    assert rows["narrow_head"]["enlarged_rule"] == "head" and rows["narrow_head"]["trace_added_layers"] == "1.0"
    assert rows["narrow_head"]["job"] == "narrow x 2, head" and rows["wide"]["enlarged_rule"] == ""


@pytest.mark.parametrize(
    "gap, reason",
    [
        (0.03, "narrow x 2, step 1,000 not saturated, gap 0.0300 ± 0.0001 nats"),
        (0.001, "not the same loss, mean gaps differ by -0.0110 ± 0.0001 nats, margin ±0.01"),
        (None, "narrow x 2, step 1,000 of unknown gap"),
    ],
)
def test_no_verdict_without_the_same_loss(grown, gap, reason, capsys):
    for rule in ("tables", "head"):
        path = grown / f"narrow_{rule}" / "loss.json"
        path.unlink()
        if gap is not None:
            write_gap(path.parent, gap)
    report.main([str(grown)])
    printed = capsys.readouterr().out
    assert f"(narrow x 2, step 1,000 against wide, step 1,000): undecided, {reason}." in printed
    assert "depends on the rule" not in printed
    report.main([str(grown), "--max-gap", "0.04", "--margin", "0.05"])
    assert ("depends on the rule" in capsys.readouterr().out) == (gap is not None)
    criteria = json.loads((grown / "report" / "results.json").read_text())["criteria"]
    assert (criteria["max_gap_nats"], criteria["margin_nats"], criteria["reference"]) == (0.04, 0.05, "wide")


def test_no_comparison_without_an_enlarged_model(tree, tmp_path):
    analysis = report.make_report(tree[0], tmp_path / "out")
    assert analysis.pairs == {} and list(analysis.lines) == ["models"]


def test_only_the_last_step_is_compared(grown):
    for step, trace in ((500, 99.0), (2000, 50.0)):
        folder = grown / f"wide{step}"
        folder.mkdir()
        write_model(folder, 16, "wide", step)
        write_trace(folder, trace, 0.1)
        write_gap(folder, 0.01)
    [[pair]] = report.make_report(grown, grown / "out").pairs.values()
    assert (pair.subject, pair.verdict) == ("narrow x 2, step 1,000 against wide, step 2,000", "is smaller")


def test_jobs_of_one_name_are_groups_of_their_own(tmp_path):
    for run in ("a", "b"):
        folder = tmp_path / run / "seed0" / "step0000010"
        folder.mkdir(parents=True)
        write_model(folder, 8, "seed0", 10)
    analysis = report.make_report(tmp_path, tmp_path / "out")
    assert [line.group for line in analysis.lines["models"]] == ["a/seed0", "b/seed0"]


def test_paired_comparisons_are_shown(tree, tmp_path, capsys):
    folder, other = tree[0] / "wide" / "step0001000", tree[0] / "narrow" / "step0001000"
    hashes = {"model": {"sha256": "1" * 64}, "other": {"sha256": "2" * 64}}
    for number, (difference, error) in enumerate(((0.01, 0.001), (0.001, 0.001), (-4e-8, 1e-9))):
        means = {kind: {"mean": difference, "standard_error": error} for kind in ("pairs", "sentences")}
        sizes = {"value": difference, "standard_error": error, "n": 100, "unit": "nats"}
        details = {"difference": means, "models": ["a step 1", "b step 2"]}
        common = {**COMMON, "inputs": hashes if number else {**hashes, "other": {"sha256": "3" * 64}}}
        write_record(folder, f"comparison_{number}.json", measurement="comparison", **sizes, **details, **common)
    path = other / "loss.json"
    record = json.loads(path.read_text())
    write_json(path, {**record, "inputs": {"model": {"sha256": "2" * 64}}})
    report.main([str(tree[0]), "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert re.search(r"wide/step0001000 +b step 2 +0.010000 ± 0.001000 +0.010000 ± 0.001000 +no\n", printed)
    assert re.search(r"wide/step0001000 +narrow/step0001000 +0.001000 ± 0.001000 .* +yes\n", printed)
    assert re.search(r"-0.000000 ± 0.000000 +yes\n", printed)  # rounding
    assert "compared in pairs" in (tmp_path / "out" / "report.html").read_text()


def test_probes_of_other_solvers_and_unfinished_ones_are_marked(tree, tmp_path, capsys):
    for folder in ("wide/step0000000", "wide/step0001000", "narrow/step0001000", "lookup_table"):
        path = tree[0] / folder / "probe_pcfg_B.json"
        record = json.loads(path.read_text())
        record["arguments"] = {"solver": "lbfgs"} if folder == "lookup_table" else {"solver": "adamw", "learning_rate": 1e-3}
        write_json(path, record | ({"unfinished": 1} if folder == "narrow/step0001000" else {}))
    report.main([str(tree[0]), "--output", str(tmp_path / "out")])
    lines = capsys.readouterr().out.splitlines()
    marks = {
        line.split()[0]: "".join(mark for mark in "†‡" if mark in line) for line in lines if re.match(r"\w+/step|lookup_", line)
    }
    assert marks["lookup_table"] == "†" and marks["narrow/step0001000"] == "‡" and marks["wide/step0001000"] == ""
    assert any("read out differently" in line and "lookup_table by lbfgs, not adamw, rate 0.001" in line for line in lines)


def test_errors(tmp_path):
    with pytest.raises(InputError, match="no model folder and no records"):
        report.main([str(tmp_path)])
    with pytest.raises(InputError, match="no model folder"):
        report.main([str(tmp_path / "missing")])
    assert not (tmp_path / "report").exists()
    (tmp_path / "loss.json").write_text('{"value": 1}')
    with pytest.raises(InputError, match="not a record"):
        report.main([str(tmp_path)])
