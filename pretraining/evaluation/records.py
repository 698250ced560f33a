"""Measurements as JSON files beside the weights: one schema, one writer, one reader. Both check every record.

| field | type | meaning |
| --- | --- | --- |
| `schema` | 2 | this table's number |
| `measurement` | text | what was measured: loss, comparison (of two losses), hessian, probe, finetune |
| `value` | number | the result |
| `standard_error` | number or null | its standard error; null where one run can't have one |
| `unit` | text | of both |
| `n` | integer, 1 or more | independent units that were measured on, mostly sentences |
| `seeds` | list of integers | of everything drawn at random; empty where nothing is |
| `inputs` | object of objects | each file or model by its SHA-256 (`sha256`, `grammar_sha256`), files by their `name` too |
| `arguments` | object | the flags that the value depends on |
| `versions` | object of texts | of Python and the libraries |
| `seconds` | number | the measurement took |
| `device` | text | it ran on |

and what a measurement adds to these:

| measurement | field | type | meaning |
| --- | --- | --- | --- |
| loss | `sampled_loss`; with conditionals `loss`, `entropy`, `gap` | means | see `pretraining.evaluation.loss` |
| comparison | `difference`; `gap_a`, `gap_b` or `loss_a`, `loss_b` | means | A's minus B's, and each |
| | `models` | list of two texts | A and B: job and step |
| hessian | `parts` | object | "groups" and "layers": {name: {"value", "standard_error"}}, each sums to the value |
| probe, finetune | `accuracies` | list of numbers | one a seed |
| | `best_accuracy` | number | mean over seeds of the best on the way |
| | `sampling_standard_error` | number | of the accuracy of another validation sample of that size |
| | `majority` | number | share of the majority class |

A hessian's `parts` may be left out. Means are {"pairs": {"mean", "standard_error"}, "sentences": {...}}. Further fields are a
measurement's own and are not checked. All numbers are finite: JSON has no others.
"""

import math
import re
from pathlib import Path

from pcfg.common.files import InputError, atomic_open, read_json, versions, write_json

SCHEMA = 2
PREFIXES = ("loss", "comparison", "hessian", "probe_", "finetune_")  # of the files' names
SHA256 = re.compile(r"[0-9a-f]{64}")


def _is_text(value) -> bool:
    return isinstance(value, str) and value != ""


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_error(value) -> bool:
    return _is_number(value) and value >= 0


def _is_list(value, is_entry) -> bool:
    return isinstance(value, list) and all(map(is_entry, value))


def _is_hashed(entry) -> bool:
    """Whether an entry of `inputs` says by a SHA-256 what it was."""
    hashes = [value for key, value in entry.items() if key.endswith("sha256")] if isinstance(entry, dict) else []
    return bool(hashes) and all(isinstance(value, str) and SHA256.fullmatch(value) for value in hashes)


def _is_means(value) -> bool:
    return isinstance(value, dict) and all(
        isinstance(mean, dict) and _is_number(mean.get("mean")) and _is_error(mean.get("standard_error"))
        for mean in (value.get("pairs"), value.get("sentences"))
    )


def _is_parts(value) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(kind), dict)
        and all(isinstance(part, dict) and _is_number(part.get("value")) for part in value[kind].values())
        for kind in ("groups", "layers")
    )


FIELDS = {
    "measurement": _is_text,
    "value": _is_number,
    "standard_error": lambda value: value is None or _is_error(value),
    "unit": _is_text,
    "n": lambda value: _is_integer(value) and value >= 1,
    "seeds": lambda value: _is_list(value, _is_integer),
    "inputs": lambda value: isinstance(value, dict) and all(map(_is_hashed, value.values())),
    "arguments": lambda value: isinstance(value, dict),
    "versions": lambda value: isinstance(value, dict) and value != {} and all(map(_is_text, value.values())),
    "seconds": _is_error,
    "device": _is_text,
}
ACCURACY_FIELDS = {
    "accuracies": lambda value: _is_list(value, _is_number) and value != [],
    "best_accuracy": _is_number,
    "sampling_standard_error": _is_error,
    "majority": _is_number,
}
# What each measurement adds; a field that is optional is checked where it is there.
ADDED = {
    "loss": {"sampled_loss": _is_means},
    "comparison": {"difference": _is_means, "models": lambda value: _is_list(value, _is_text) and len(value) == 2},
    "hessian": {},
    "probe": ACCURACY_FIELDS,
    "finetune": ACCURACY_FIELDS,
}
OPTIONAL = dict.fromkeys(("loss", "entropy", "gap", "gap_a", "gap_b", "loss_a", "loss_b"), _is_means) | {"parts": _is_parts}


def wrong_field(record: dict) -> str | None:
    """The first field of a record that is missing or is not what the table above says; None if the record is whole."""
    measurement = record.get("measurement")
    if not isinstance(measurement, str) or measurement not in ADDED:
        return "measurement"
    optional = {name: is_right for name, is_right in OPTIONAL.items() if name in record}
    for name, is_right in (FIELDS | ADDED[measurement] | optional).items():
        if name not in record or not is_right(record[name]):
            return name
    return None


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
    seeds: list[int] | tuple[int, ...] = (),
    number_file: bool = False,
    **details,
) -> dict:
    """Write record `name` of `folder`, atomically, and return it.

    Args:
        measurement .. seeds: the fields of the module's table.
        number_file: write the value alone into a .txt of the same name too, as the released code did.
        details: what the measurement adds.

    Raises:
        InputError: the value is not a finite number: the model is broken and there is nothing to record.
        ValueError: another field is not what the table says.
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
        "seeds": list(seeds),
        **details,
        "inputs": inputs,
        "arguments": arguments,
        "versions": versions("torch", "numpy", "transformers"),
        "seconds": round(seconds, 2),
        "device": device,
    }
    if wrong := wrong_field(record):
        raise ValueError(f"{path}: field {wrong!r} of a record can't be {record.get(wrong)!r}")
    if number_file:  # before the record, whose presence says that the measurement is whole
        with atomic_open(path.with_suffix(".txt")) as file:
            file.write(f"{value:.6f}\n")
    write_json(path, record)
    return record


def read_record(path) -> dict:
    """The record in a file, with all fields that readers rely on.

    Raises:
        InputError: the file is missing or damaged, or is a record of another schema.
    """
    record = read_json(path)
    if record.get("schema") != SCHEMA:
        raise InputError(f"{path}: not a record of schema {SCHEMA}; delete it and measure again")
    if wrong := wrong_field(record):
        raise InputError(f"{path}: not a whole record, {wrong!r} is missing or damaged; delete it and measure again")
    return record


def read_records(folder) -> dict[str, dict]:
    """The records directly in `folder`, by file name.

    Raises:
        InputError: a file that should be a record is damaged or of another schema.
    """
    return {path.name: read_record(path) for path in sorted(Path(folder).glob("*.json")) if path.name.startswith(PREFIXES)}
