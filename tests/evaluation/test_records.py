import json
import re

import pytest

from pcfg.common.files import InputError
from pretraining.evaluation import records
from pretraining.evaluation.records import is_measured, read_records, write_record

MEANS = {kind: {"mean": 0.1, "standard_error": 0.1} for kind in ("pairs", "sentences")}
ACCURACY = {"accuracies": [0.5], "best_accuracy": 0.5, "sampling_standard_error": 0.1, "majority": 0.2}
COMPARISON = {"difference": MEANS, "models": ["a", "b"]}
RECORD = {
    "measurement": "loss",
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
    written = write_record(tmp_path, "loss.json", **RECORD, extra=[1, 2])
    assert read_records(tmp_path) == {"loss.json": written}
    assert written["extra"] == [1, 2] and written["schema"] == 2 and "torch" in written["versions"]


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
    write_record(tmp_path, "loss.json", **RECORD)
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
    ("comparison", "difference", None),
    ("comparison", "models", ["a"]),
    ("probe", "accuracies", None),
    ("probe", "accuracies", []),
    ("finetune", "majority", "half"),
]


@pytest.mark.parametrize("measurement, field, damaged", DAMAGED)
def test_damaged_fields_are_named(tmp_path, measurement, field, damaged):
    path = tmp_path / f"{measurement}_x.json"
    record = write_record(tmp_path, path.name, **{**RECORD, "measurement": measurement}, gap=MEANS, **ACCURACY, **COMPARISON)
    assert read_records(tmp_path) == {path.name: record}
    missing = {key: value for key, value in record.items() if key != field}
    for broken in ({**record, field: damaged}, *([missing] if field != "gap" else [])):  # a loss on masked samples has no gap
        path.write_text(json.dumps(broken))
        with pytest.raises(InputError, match=f"{path.name}: not a whole record, '{field}' is missing or damaged"):
            read_records(tmp_path)
        with pytest.raises(InputError, match=path.name):
            is_measured(tmp_path, path.name, RECORD["inputs"], {"seed": 1}, overwrite=False)
        assert not is_measured(tmp_path, path.name, RECORD["inputs"], {"seed": 1}, overwrite=True)


@pytest.mark.parametrize("field, wrong", [("inputs", {"data": "ab"}), ("seeds", [0.5]), ("n", 0), ("unit", None), ("gap", 1.0)])
def test_what_is_not_a_record_is_not_written(tmp_path, field, wrong):
    with pytest.raises(ValueError, match=f"loss.json: field '{field}'"):
        write_record(tmp_path, "loss.json", **{**RECORD, field: wrong}, number_file=True)
    assert not list(tmp_path.iterdir())


def test_the_documented_fields_are_the_checked_ones():
    documented = re.findall(r"`([a-z_]+)`", re.sub(r"`[a-z]+\.[a-z.]+`", "", records.__doc__))
    added = {name for fields in records.ADDED.values() for name in fields}
    checked = {"schema", *records.FIELDS, *added, *records.OPTIONAL}
    assert set(documented) - {"sha256", "grammar_sha256", "name"} == checked


def test_a_record_is_written_after_its_number(tmp_path):
    (tmp_path / "loss.txt").mkdir()
    with pytest.raises(InputError, match="loss.txt"):
        write_record(tmp_path, "loss.json", **RECORD, number_file=True)
    assert not (tmp_path / "loss.json").exists()
    (tmp_path / "loss.txt").rmdir()
    write_record(tmp_path, "loss.json", **RECORD, number_file=True)
    assert (tmp_path / "loss.txt").read_text() == "1.500000\n"


def test_a_broken_model_leaves_no_record(tmp_path):
    with pytest.raises(InputError, match="the loss is nan"):
        write_record(tmp_path, "loss.json", **{**RECORD, "value": float("nan")})
    assert not list(tmp_path.iterdir())


def test_records_hold_no_folders(tmp_path):
    write_record(tmp_path, "loss.json", **RECORD)
    assert str(tmp_path) not in json.dumps(read_records(tmp_path))
