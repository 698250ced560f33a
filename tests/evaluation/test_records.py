import inspect
import json
import math
import re

import pytest

from pcfg.common.files import InputError
from pretraining.evaluation import records
from pretraining.evaluation.records import RECORDS, LossRecord, is_measured, read_records, write_record

MEANS = {kind: {"mean": 0.1, "standard_error": 0.1} for kind in ("pairs", "sentences")}
ACCURACY = {"accuracies": [0.5], "best_accuracy": 0.5, "sampling_standard_error": 0.1, "majority": 0.2}
POINT = {"labels": 50, "draws": 2, "accuracy": MEANS["pairs"], "missing_classes": 0, "strengths": [0.1]}
CURVE = {
    **{"task": "pcfg_A", "features": "hidden", "pool": "concat", "solver": "ridge"},
    "points": [{**POINT, "sampling_standard_error": 0.1}],
}
COMPARISON = {"difference": MEANS, "models": ["a", "b"]}
RECORD = {
    "value": 1.5,
    "standard_error": 0.1,
    "n": 10,
    "unit": "nats",
    "inputs": {"data": {"name": "test0.txt", "sha256": "ab" * 32}},
    "arguments": {"seed": 0},
    "sampled_loss": MEANS,
    "seconds": 0.5,
    "device": "cpu",
}


def test_what_is_written_is_read(tmp_path):
    written = LossRecord(**RECORD, extra=[1, 2])
    write_record(tmp_path, "loss.json", written)
    (read,) = read_records(tmp_path).values()
    assert read == written and read.extra == [1, 2] and read.sampled_loss.pairs.mean == 0.1 and read.gap is None
    content = json.loads((tmp_path / "loss.json").read_text())
    assert content["schema"] == 2 and "torch" in content["versions"] and content["seeds"] == []
    assert content.keys() == {*RECORD, "schema", "measurement", "seeds", "versions", "extra"}


def test_a_missing_standard_error_is_null(tmp_path):
    write_record(tmp_path, "loss.json", LossRecord(**{**RECORD, "standard_error": None}))
    assert json.loads((tmp_path / "loss.json").read_text())["standard_error"] is None


def test_only_records_are_read(tmp_path):
    (tmp_path / "args.json").write_text("{}")
    assert read_records(tmp_path) == {}
    (tmp_path / "probe_x.json").write_text('{"schema": 0}')
    with pytest.raises(InputError, match="probe_x.json: not a record of schema 2"):
        read_records(tmp_path)
    (tmp_path / "probe_x.json").write_text("{")
    with pytest.raises(InputError, match="probe_x.json: not a JSON file"):
        read_records(tmp_path)


def test_finished_ones_are_known(tmp_path):
    asked = (RECORD["inputs"], RECORD["arguments"])
    assert not is_measured(tmp_path, "loss.json", *asked, overwrite=False)
    write_record(tmp_path, "loss.json", LossRecord(**RECORD))
    assert is_measured(tmp_path, "loss.json", *asked, overwrite=False)
    assert not is_measured(tmp_path, "loss.json", *asked, overwrite=True)
    with pytest.raises(InputError, match=r"seed was 0, now 1.*--overwrite"):
        is_measured(tmp_path, "loss.json", RECORD["inputs"], {"seed": 1}, overwrite=False)


DAMAGED = [
    ("loss", "measurement", "lost"),
    ("loss", "inputs", [1]),
    ("loss", "inputs", {"data": {"name": "test0.txt"}}),
    ("loss", "inputs", {"data": {"sha256": "ab"}}),
    ("loss", "value", "1.5"),
    ("loss", "value", True),
    ("loss", "value", math.nan),
    ("loss", "seconds", math.inf),
    ("loss", "gap", {**MEANS, "pairs": {"mean": math.nan, "standard_error": 0.1}}),
    ("loss", "n", 0),
    ("loss", "n", 1.5),
    ("loss", "unit", ""),
    ("loss", "seeds", 0),
    ("loss", "seeds", ["0"]),
    ("loss", "arguments", None),
    ("loss", "versions", {}),
    ("loss", "seconds", -1),
    ("loss", "device", 0),
    ("loss", "sampled_loss", {"pairs": MEANS["pairs"]}),
    ("loss", "gap", {**MEANS, "pairs": {"mean": "0.1", "standard_error": 0.1}}),
    ("loss", "gap", [0.1]),
    ("hessian", "standard_error", "0.1"),
    ("hessian", "standard_error", -0.1),
    ("hessian", "standard_error", math.nan),
    ("comparison", "difference", None),
    ("comparison", "models", ["a"]),
    ("probe", "accuracies", None),
    ("probe", "accuracies", []),
    ("finetune", "majority", "half"),
    ("curve", "points", []),
    ("curve", "points", [POINT]),
    ("curve", "points", [{**CURVE["points"][0], "draws": 1}]),
    ("curve", "features", ""),
]


@pytest.mark.parametrize("measurement, field, damaged", DAMAGED)
def test_damaged_fields_are_named(tmp_path, measurement, field, damaged):
    path = tmp_path / f"{measurement}_x.json"
    record = RECORDS[measurement](**RECORD, gap=MEANS, **ACCURACY, **COMPARISON, **CURVE)
    write_record(tmp_path, path.name, record)
    assert read_records(tmp_path) == {path.name: record}
    content = json.loads(path.read_text())
    missing = {key: value for key, value in content.items() if key != field}
    for broken in ({**content, field: damaged}, *([missing] if field != "gap" else [])):  # a loss on masked samples has no gap
        path.write_text(json.dumps(broken))
        with pytest.raises(InputError, match=f"{path.name}: '{field}.*; delete it and measure again"):
            read_records(tmp_path)
        with pytest.raises(InputError, match=path.name):
            is_measured(tmp_path, path.name, RECORD["inputs"], {"seed": 1}, overwrite=False)
        assert not is_measured(tmp_path, path.name, RECORD["inputs"], {"seed": 1}, overwrite=True)


@pytest.mark.parametrize("field, wrong", [("inputs", {"data": "ab"}), ("seeds", [0.5]), ("n", 0), ("unit", None), ("gap", 1.0)])
def test_what_is_not_a_record_is_not_made(field, wrong):
    with pytest.raises(ValueError, match=field):
        LossRecord(**{**RECORD, field: wrong})


@pytest.mark.parametrize("field", ["standard_error", "gap"])
def test_infinite_numbers_are_not_written(tmp_path, field):
    wrong = {"standard_error": math.inf, "gap": {**MEANS, "pairs": {"mean": math.nan, "standard_error": 0.1}}}[field]
    with pytest.raises(InputError, match="loss.json: not written, .*a number that is not finite"):
        write_record(tmp_path, "loss.json", LossRecord(**{**RECORD, field: wrong}), number_file=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("schema", [records.Record, *RECORDS.values(), records.AccuracyRecord])
def test_fields_are_documented(schema):
    """A comment says what each field is that a class adds to its parent's."""
    documented = set(re.findall(r"^    (\w+): .*  # \S", inspect.getsource(schema), re.M))
    assert documented == schema.model_fields.keys() - schema.__base__.model_fields.keys()


def test_a_record_is_written_after_its_number(tmp_path):
    (tmp_path / "loss.txt").mkdir()
    with pytest.raises(InputError, match="loss.txt"):
        write_record(tmp_path, "loss.json", LossRecord(**RECORD), number_file=True)
    assert not (tmp_path / "loss.json").exists()
    (tmp_path / "loss.txt").rmdir()
    write_record(tmp_path, "loss.json", LossRecord(**RECORD), number_file=True)
    assert (tmp_path / "loss.txt").read_text() == "1.500000\n"


def test_a_broken_model_leaves_no_record(tmp_path):
    with pytest.raises(InputError, match="the loss .value nan. has a number that is not finite"):
        write_record(tmp_path, "loss.json", LossRecord(**{**RECORD, "value": math.nan, "standard_error": math.nan}))
    assert not list(tmp_path.iterdir())


def test_records_hold_no_folders(tmp_path):
    write_record(tmp_path, "loss.json", LossRecord(**RECORD))
    assert str(tmp_path) not in (tmp_path / "loss.json").read_text()
