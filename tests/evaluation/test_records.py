import json

import pytest

from pcfg.artefacts import InputError
from pretraining.evaluation.records import is_measured, read_records, write_record

RECORD = {
    "measurement": "loss",
    "value": 1.5,
    "standard_error": 0.1,
    "n": 10,
    "unit": "nats",
    "inputs": {"data": {"name": "test0.txt", "sha256": "ab"}},
    "arguments": {"seed": 0},
    "seconds": 0.5,
    "device": "cpu",
}


def test_what_is_written_is_read(tmp_path):
    written = write_record(tmp_path, "loss.json", **RECORD, extra=[1, 2])
    assert read_records(tmp_path) == {"loss.json": written}
    assert written["extra"] == [1, 2] and written["schema"] == 1 and "torch" in written["versions"]


def test_only_records_are_read(tmp_path):
    (tmp_path / "args.json").write_text("{}")
    assert read_records(tmp_path) == {}
    (tmp_path / "probe_x.json").write_text('{"schema": 0}')
    with pytest.raises(InputError, match="probe_x.json: not a record of schema 1"):
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


def test_a_broken_model_leaves_no_record(tmp_path):
    with pytest.raises(InputError, match="the loss is nan"):
        write_record(tmp_path, "loss.json", **{**RECORD, "value": float("nan")})
    assert not list(tmp_path.iterdir())


def test_records_hold_no_folders(tmp_path):
    write_record(tmp_path, "loss.json", **RECORD)
    assert str(tmp_path) not in json.dumps(read_records(tmp_path))
