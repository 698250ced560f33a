"""Measurements as JSON files beside the weights: one schema, one writer, one reader.

A record has: `schema`, `measurement` (loss, hessian, probe, finetune), `value` with its `standard_error` and `unit`, `n` (how
many independent units the error is over), `inputs` (name and SHA-256 of every file), `arguments`, `versions`, `seconds`,
`device`, and further keys of the measurement.
"""

import math
from pathlib import Path

from pcfg.artefacts import InputError, read_json, sha256, versions, write_json
from pretraining.model.checkpoints import is_model_folder, weights_sha256

SCHEMA = 1


def describe_file(path) -> dict:
    """What a record keeps of an input file: its name and its hash, not the folder it happened to lie in."""
    return {"name": Path(path).name, "sha256": sha256(path)}


def describe_model(folder) -> dict:
    """What a record keeps of the model it belongs to."""
    return {"sha256": weights_sha256(folder)} if is_model_folder(folder) else {"name": "lookup table"}


def is_measured(folder, name: str, inputs: dict, arguments: dict, overwrite: bool) -> bool:
    """Whether record `name` of `folder` is finished, for the same inputs and arguments.

    Raises:
        InputError: it was measured with others, and `overwrite` is not set.
    """
    path = Path(folder) / name
    if overwrite or not path.exists():
        return False
    record = read_json(path)
    if record.get("inputs") == inputs and record.get("arguments") == arguments:
        return True
    before = {**(record.get("inputs") or {}), **(record.get("arguments") or {})}
    now = {**inputs, **arguments}
    differing = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    changes = ", ".join(f"{key} was {before.get(key)!r}, now {now.get(key)!r}" for key in differing)
    raise InputError(f"{path}: was measured otherwise ({changes}); --overwrite measures again and replaces it")


def write_record(
    folder,
    name: str,
    *,
    measurement: str,
    value: float,
    standard_error: float | None,
    n: int,
    unit: str,
    inputs: dict,
    arguments: dict,
    seconds: float,
    device: str,
    **details,
) -> dict:
    """Write record `name` of `folder`, atomically, and return it.

    Raises:
        InputError: the value is not a finite number: the model is broken and there is nothing to record.
    """
    path = Path(folder) / name
    if not math.isfinite(value):
        raise InputError(f"{path}: the {measurement} is {value}; the model's weights are not finite or overflow")
    record = {
        "schema": SCHEMA,
        "measurement": measurement,
        "value": value,
        "standard_error": standard_error,
        "unit": unit,
        "n": n,
        **details,
        "inputs": inputs,
        "arguments": arguments,
        "versions": versions("torch", "numpy", "transformers"),
        "seconds": round(seconds, 2),
        "device": device,
    }
    write_json(path, record)
    return record


def read_records(folder) -> dict[str, dict]:
    """The records directly in `folder`, by file name.

    Raises:
        InputError: a file that should be a record is damaged or of another schema.
    """
    records = {}
    for path in sorted(Path(folder).glob("*.json")):
        if not path.name.startswith(("loss", "hessian", "probe_", "finetune_")):
            continue
        record = read_json(path)
        if record.get("schema") != SCHEMA:
            raise InputError(f"{path}: not a record of schema {SCHEMA}; delete it and measure again")
        records[path.name] = record
    return records
