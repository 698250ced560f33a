"""The choice of the adversarial weight from made-up records."""

import pytest

from pcfg.common.files import InputError, read_json, sha256
from pretraining.evaluation.records import ComparisonRecord, ProbeRecord, write_record
from pretraining.experiments import choose
from pretraining.report.contract import read_choice

COMMON = {"inputs": {"data": {"sha256": "ab" * 32}}, "arguments": {}, "seconds": 1.0, "device": "cpu"}


def means(value, error):
    return {by: {"mean": value, "standard_error": error} for by in ("pairs", "sentences")}


@pytest.fixture
def model(tmp_path):
    """Writes a model folder with a probe's record, and a comparison with the standard model."""

    def write(name, accuracy, increase=None, error=0.001, gap=0.001):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").write_text(name)
        details = {"accuracies": [accuracy], "best_accuracy": accuracy, "sampling_standard_error": 0.01, "majority": 0.3}
        kinds = {"value": accuracy, "standard_error": 0.004, "n": 100, "unit": "accuracy"}
        write_record(folder, "probe_pcfg_B.json", ProbeRecord(**kinds, **details, **COMMON))
        if increase is not None:
            inputs = {"model": {"sha256": sha256(folder / "model.safetensors")}}
            inputs["other"] = {"sha256": sha256(tmp_path / "standard/model.safetensors")}
            kinds = {"value": increase, "standard_error": error, "n": 100, "unit": "nats", "models": ["a", "b"]}
            rest = {**COMMON, "inputs": inputs}
            if gap is not None:
                kinds |= {"gap_a": means(gap + increase, 1e-4), "gap_b": means(gap, 1e-4)}
            record = ComparisonRecord(difference=means(increase, error), **kinds, **rest)
            write_record(folder, "comparison_0.json", record)
        return str(folder)

    return write


def run(tmp_path, standard, candidates, *flags):
    words = ["--standard", standard, "--task", "pcfg_B", "--gap-allowed", "0.02", "--output", str(tmp_path / "out"), *flags]
    for weight, folder in candidates.items():
        words += ["--candidate", weight, folder]
    choose.main(words)
    return read_choice(tmp_path / "out/choice.json")


def test_the_lowest_accuracy_among_the_weights_that_keep_the_gap(tmp_path, model, capsys):
    standard = model("standard", 0.9)
    candidates = {
        "3": model("w3", 0.3, 0.1),
        "1": model("w1", 0.5, 0.0195, 0.001),  # less than 0.02, but not certainly
        "0.3": model("w0.3", 0.6, 0.017),
        "0.1": model("w0.1", 0.8, 0.001),
    }
    choice = run(tmp_path, standard, candidates, "--max-gap", "1")
    assert [tried.same_loss for tried in choice.weights] == [True, True, False, False]
    assert choice.chosen == 0.3 and "chosen: 0.3" in capsys.readouterr().out
    assert [tried.weight for tried in choice.weights] == [0.1, 0.3, 1.0, 3.0]
    assert (choice.weights[1].gap_increase, choice.weights[1].accuracy, choice.weights[1].standard_accuracy) == (
        0.017,
        0.6,
        0.9,
    )
    assert read_json(tmp_path / "out/chosen.json") == {"arguments": {"adversarial_weight": 0.3}}


def test_none_where_the_gap_grows_or_the_accuracy_does(tmp_path, model, capsys):
    standard = model("standard", 0.9)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/chosen.json").write_text("{}")  # of an earlier choice
    choice = run(tmp_path, standard, {"1": model("w1", 0.5, 0.3), "0.1": model("w0.1", 0.91, 0.0)})
    assert choice.chosen is None and not (tmp_path / "out/chosen.json").exists()
    assert "none is chosen" in capsys.readouterr().out


def test_both_models_must_be_saturated(tmp_path, model):
    standard = model("standard", 0.9)
    candidates = {"1": model("w1", 0.5, 0.004, gap=0.017), "0.1": model("w0.1", 0.8, 0.001, gap=0.017)}
    assert run(tmp_path, standard, candidates).chosen == 0.1
    assert run(tmp_path, standard, candidates, "--max-gap", "0.01").chosen is None
    assert run(tmp_path, standard, candidates, "--max-gap", "0.03").chosen == 1.0
    unknown = {"1": model("natural", 0.5, 0.0, gap=None)}
    with pytest.raises(InputError, match="natural: .* no gaps.*--condprobfile or --rule-path"):
        run(tmp_path, standard, unknown)


def test_missing_measurements(tmp_path, model):
    standard = model("standard", 0.9)
    alone = model("w1", 0.5)
    with pytest.raises(InputError, match="w1: no comparison with .*standard.*--compare-with"):
        run(tmp_path, standard, {"1": alone})
    (tmp_path / "standard/probe_pcfg_B.json").unlink()
    with pytest.raises(InputError, match="no probe_pcfg_B.json; measure"):
        run(tmp_path, standard, {"1": alone})
    with pytest.raises(SystemExit) as error:
        run(tmp_path, standard, {"much": alone})
    assert error.value.code == 2
