"""Measurements as JSON files beside the weights: one schema, one writer, one reader.

A record has: `schema`, `measurement` (loss, hessian, probe, finetune), `value` with its `standard_error` and `unit`, `n` (how
many independent units the error is over), `inputs` (name and SHA-256 of every file), `arguments`, `versions`, `seconds`,
`device`, and further keys of the measurement.
"""

import math
from pathlib import Path

from pcfg.artefacts import InputError, atomic_open, read_json, sha256, versions, write_json
from pretraining.model.checkpoints import is_model_folder, weights_sha256

SCHEMA = 1
NUMBER = (int, float)
# What readers rely on, and its types.
FIELDS = {
    **{"measurement": str, "value": NUMBER, "standard_error": (*NUMBER, type(None)), "unit": str, "n": int},
    **{"inputs": dict, "arguments": dict},
}
ACCURACY_FIELDS = {"sampling_standard_error": NUMBER, "accuracies": list, "best_accuracy": NUMBER, "majority": NUMBER}
LOSS_PARTS = ("loss", "entropy", "gap", "sampled_loss")


def describe_file(path) -> dict:
    """What a record keeps of an input file: its name and its hash, not the folder it happened to lie in."""
    return {"name": Path(path).name, "sha256": sha256(path)}


def describe_model(folder) -> dict:
    """What a record keeps of the model it belongs to."""
    return {"sha256": weights_sha256(folder)} if is_model_folder(folder) else {"name": "lookup table"}


def is_measured(folder, name: str, inputs: dict, arguments: dict, overwrite: bool) -> bool:
    """Whether record `name` of `folder` is finished, for the same inputs and arguments.

    Raises:
        InputError: it was measured with others, or the record is damaged, and `overwrite` is not set.
    """
    path = Path(folder) / name
    if overwrite or not path.exists():
        return False
    record = read_record(path)
    if record["inputs"] == inputs and record["arguments"] == arguments:
        return True
    before = {**record["inputs"], **record["arguments"]}
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
    number_file: bool = False,
    **details,
) -> dict:
    """Write record `name` of `folder`, atomically, and return it.

    Args:
        number_file: write the value alone into a .txt of the same name too, as the released code did.

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
    if number_file:  # before the record, whose presence says that the measurement is whole
        with atomic_open(path.with_suffix(".txt")) as file:
            file.write(f"{value:.6f}\n")
    write_json(path, record)
    return record


def _wrong_field(record: dict) -> str | None:
    """The first field of a record that is missing or of another type."""
    fields = FIELDS | (ACCURACY_FIELDS if record.get("measurement") in ("probe", "finetune") else {})
    for name, kinds in fields.items():
        if name not in record or not isinstance(record[name], kinds):
            return name
    for name in LOSS_PARTS if record["measurement"] == "loss" else ():
        means = record.get(name, {})
        if not isinstance(means, dict) or not all(
            isinstance(mean, dict) and isinstance(mean.get(key), NUMBER)
            for mean in means.values()
            for key in ("mean", "standard_error")
        ):
            return name
    return None


def read_record(path) -> dict:
    """The record in a file, with all fields that readers rely on.

    Raises:
        InputError: the file is missing or damaged, or is a record of another schema.
    """
    record = read_json(path)
    if record.get("schema") != SCHEMA:
        raise InputError(f"{path}: not a record of schema {SCHEMA}; delete it and measure again")
    if wrong := _wrong_field(record):
        raise InputError(f"{path}: not a whole record, {wrong!r} is missing or damaged; delete it and measure again")
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
        records[path.name] = read_record(path)
    return records
