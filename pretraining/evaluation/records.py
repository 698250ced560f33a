"""Measurements as JSON files next to the weights: one model per kind of record, one writer, one reader.

A record is strict: each field has the type below, whatever wrote the file. Further fields belong to one measurement and are
not checked. All numbers in a file are finite, since JSON has no others. Optional fields without a value are left out.
"""

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from annotated_types import Len, MinLen

from pcfg.common.files import InputError, atomic_open, check_writable, read_json, versions
from pcfg.common.schema import Schema, parse_schema, write_schema

PREFIXES = ("loss", "comparison", "hessian", "spectrum", "probe_", "curve_", "finetune_")  # of the files' names
SHA256 = re.compile(r"[0-9a-f]{64}")
ADVICE = "delete it and measure again"


def _check_number(number: float, info: pydantic.ValidationInfo) -> float:
    # In memory it may be NaN, so that `write_record` can name the file that it refuses to write.
    if info.mode == "json" and not math.isfinite(number):
        raise ValueError("a number is finite")
    return number


def _check_error(error: float) -> float:
    if error < 0:
        raise ValueError("a standard error or a duration is 0 or more")
    return error


def _check_hashes(entry: dict) -> dict:
    hashes = [value for key, value in entry.items() if key.endswith("sha256")]
    if not hashes or not all(isinstance(value, str) and SHA256.fullmatch(value) for value in hashes):
        raise ValueError("an input needs its SHA-256, 64 hexadecimal digits")
    return entry


Text = Annotated[str, MinLen(1)]
Number = Annotated[float, pydantic.AfterValidator(_check_number)]
Error = Annotated[Number, pydantic.AfterValidator(_check_error)]
Versions = Annotated[dict[str, Text], MinLen(1)]
Input = Annotated[dict[str, Any], pydantic.AfterValidator(_check_hashes)]
Seconds = Annotated[Error, pydantic.AfterValidator(lambda seconds: round(seconds, 2))]


class _Part(Schema):
    model_config = pydantic.ConfigDict(extra="allow", allow_inf_nan=True, ser_json_inf_nan="constants", serialize_by_alias=True)

    @pydantic.model_serializer(mode="wrap")
    def _without_absent_fields(self, handler: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None or name in self.model_fields_set}


class Mean(_Part):
    mean: Number
    standard_error: Error


class Means(_Part):
    pairs: Mean  # over all (sentence, position) pairs
    sentences: Mean  # over sentences of the mean over positions


class TracePart(_Part):
    value: Number
    standard_error: Error | None = None


class TraceParts(_Part):
    """Two partitions of a trace, by the name of the part; the values of each sum to the trace."""

    groups: dict[str, TracePart]
    layers: dict[str, TracePart]


class TensorTrace(_Part):
    """The trace of one parameter tensor."""

    value: Number
    squared_norm: Error  # of the tensor, after the shift convention of `pretraining.evaluation.flatness`
    size: int  # how many numbers it has


class BalancedTrace(_Part):
    """2 sqrt(T H) + M + V at K = 1, and the four parts that sum to the trace: `pretraining.evaluation.flatness`."""

    value: Number | None  # null where it is not defined
    standard_error: Error | None
    tables: Number  # T
    head_norm: Number  # H
    matrices: Number  # M
    vectors: Number  # V
    covariance: Annotated[list[Annotated[list[Number], Len(4, 4)]], Len(4, 4)]  # of the means T, H, M, V
    reason: Text | None = None  # why it is not defined


class OtherTrace(TracePart):
    """The trace in another way, on the sentences of the record or some of them."""

    difference: TracePart | None = None  # Fisher minus the other, or minus Hutchinson; paired by sentence or block


class Bootstrap(_Part):
    """The standard error of an accuracy over resampled training and validation sentences."""

    replicates: int
    standard_error: Error


class CurvePoint(_Part):
    """The accuracy of probes that are fitted to `labels` sentences, drawn from the training file; one draw per probe."""

    labels: int = pydantic.Field(ge=2)  # sentences per draw
    draws: int = pydantic.Field(ge=2)  # the same ones for every model and for all features
    accuracy: Mean  # on all validation sentences; the standard error is over draws
    missing_classes: int = pydantic.Field(ge=0)  # draws that lack a class of the task
    sampling_standard_error: Error  # of the mean over draws, on another validation sample of the same size
    strengths: list[Number]  # of the penalty: one per draw (ridge), or the one of all draws (lbfgs)


class Record(_Part):
    """The fields of all records."""

    schema_number: Literal[2] = pydantic.Field(2, alias="schema")  # number of this format
    measurement: str  # the quantity: loss, comparison (of two losses), hessian, spectrum, probe, curve, finetune
    value: Number  # the result
    standard_error: Error | None  # of the value; null where one run cannot have one
    unit: Text  # of both
    n: int = pydantic.Field(ge=1)  # number of independent units, mostly sentences
    seeds: list[int] = []  # of everything that is drawn at random
    inputs: dict[str, Input]  # each file or model by its SHA-256 (`sha256`, `grammar_sha256`), files by their `name` too
    arguments: dict[str, Any]  # the flags that the value depends on
    versions: Versions = pydantic.Field(default_factory=lambda: versions("torch", "numpy", "transformers"))  # with Python's
    seconds: Seconds  # duration of the measurement
    device: Text  # `cpu`, `cuda`, ...


class LossRecord(Record):
    """The loss in nats, as `pretraining.evaluation.loss` defines it. Without true conditionals: `sampled_loss` only."""

    measurement: Literal["loss"] = "loss"
    sampled_loss: Means  # mean of -log f[w] over the words w of the text
    loss: Means | None = None  # exact
    entropy: Means | None = None  # exact
    gap: Means | None = None  # loss minus entropy


class ComparisonRecord(Record):
    """The paired difference of the losses of models A and B, in nats."""

    measurement: Literal["comparison"] = "comparison"
    difference: Means  # A minus B
    models: Annotated[list[Text], Len(2, 2)]  # A and B, by job and step
    gap_a: Means | None = None  # of A, with true conditionals
    gap_b: Means | None = None  # of B
    loss_a: Means | None = None  # of A, without true conditionals
    loss_b: Means | None = None  # of B


class HessianRecord(Record):
    """The trace of the Hessian of the loss by one estimator, as `pretraining.evaluation.hessian` defines it."""

    measurement: Literal["hessian"] = "hessian"
    estimator: Text | None = None  # fisher or hutchinson
    quantity: Text | None = None  # Fisher trace, or Hessian trace (Hutchinson)
    loss: Text | None = None  # of Hutchinson: exact (true conditionals), or words of the text
    parts: TraceParts | None = None  # by groups of parameters, and by layers
    tensors: dict[str, TensorTrace] | None = None  # by parameter tensor; the values sum to the trace
    balanced: BalancedTrace | None = None  # least trace over the scale of tables against head norm
    relative: TracePart | None = None  # R, the sum over tensors of squared norm times trace
    constant_share: TracePart | None = None  # share of the trace in constant directions
    true_labels: OtherTrace | None = None  # of a Fisher record: with labels from the true conditionals
    hutchinson: OtherTrace | None = None  # of a Fisher record
    fisher: OtherTrace | None = None  # of a Hutchinson record


class Eigenvalue(_Part):
    value: Number
    residual: Error  # || H u - value u || of its unit vector u


class Density(_Part):
    """A spectral density on a grid, the mean over probes; it integrates to 1."""

    grid: list[Number]  # eigenvalues, nats
    values: list[Number]  # per nat
    standard_errors: list[Error]  # over probes
    width: Error  # standard deviation of the Gaussian that each node became


class SpectrumRecord(Record):
    """The spectrum of the Hessian of the loss; the value is the largest eigenvalue. See `pretraining.evaluation.spectrum`."""

    measurement: Literal["spectrum"] = "spectrum"
    loss: Text  # as in `HessianRecord`
    parameters: int  # side of the Hessian
    eigenvalues: Annotated[list[Eigenvalue], MinLen(1)]  # the largest, descending
    density: Density  # of all eigenvalues
    trace: TracePart  # parameters times the density's mean


class AccuracyRecord(Record):
    """The accuracy on a downstream task; value and standard error are over seeds."""

    accuracies: Annotated[list[Number], MinLen(1)]  # one per seed
    best_accuracy: Number  # mean over seeds of the best accuracy during training
    sampling_standard_error: Error  # of the accuracy on another validation sample of the same size
    majority: Number  # share of the majority class


class ProbeRecord(AccuracyRecord):
    measurement: Literal["probe"] = "probe"
    bootstrap: Bootstrap | None = None  # with --bootstrap
    gradient_norms: list[Error] | None = None  # of adamw: of the mean training loss at the end, one per seed
    unfinished: int | None = pydantic.Field(None, ge=0)  # of adamw: seeds whose training loss still falls at the end


class CurveRecord(Record):
    """The accuracy of a linear probe by the number of labelled sentences; value and standard error are those of the most."""

    measurement: Literal["curve"] = "curve"
    task: Text  # name of the training file, without .csv
    points: Annotated[list[CurvePoint], MinLen(1)]  # by ascending number of labels
    majority: Number  # share of the majority class
    features: Text  # those of `--features`: hidden, words, conditional
    pool: Text  # concat, mean, cls
    solver: Text  # ridge or lbfgs
    layer: int | None = None  # whose hidden states; null for the last
    position: int | None = None  # the one word that is read, from 1; null for all


class FinetuneRecord(AccuracyRecord):
    measurement: Literal["finetune"] = "finetune"


_KINDS = (LossRecord, ComparisonRecord, HessianRecord, SpectrumRecord, ProbeRecord, CurveRecord, FinetuneRecord)
RECORDS: dict[str, type[Record]] = {kind.model_fields["measurement"].default: kind for kind in _KINDS}


def record_folder(folder: Path, root: Path | str, records_path: Path | str | None) -> Path:
    """Where the records of a model go: into its folder, or to its path relative to `root` in `records_path`."""
    return folder if records_path is None else Path(records_path) / folder.relative_to(root)


def is_measured(folder: Path | str, name: str, inputs: dict, arguments: dict, overwrite: bool) -> bool:
    """Whether record `name` of `folder` is complete, for the same inputs and arguments.

    A record with other inputs or arguments, or a damaged one, is an error unless `overwrite` is set. So is a folder in which
    the record could not be written.
    """
    path = Path(folder) / name
    if overwrite or not path.exists():
        check_writable(folder, "--records-path writes the records elsewhere")
        return False
    record = read_record(path)
    if record.inputs == inputs and record.arguments == arguments:
        return True
    before = {**record.inputs, **record.arguments}
    now = {**inputs, **arguments}
    differing = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    changes = ", ".join(f"{key} was {before.get(key)!r}, now {now.get(key)!r}" for key in differing)
    raise InputError(f"{path}: was measured with other settings ({changes}); --overwrite measures again and replaces it")


def write_record(folder: Path | str, name: str, record: Record, number_file: bool = False) -> None:
    """Write record `name` of `folder`, atomically; with `number_file` also the value alone, as a .txt of the same name."""
    path = Path(folder) / name
    try:
        json.dumps(record.model_dump(mode="json"), allow_nan=False)
    except ValueError:
        raise InputError(
            f"{path}: not written, the {record.measurement} (value {record.value}) has a number that is not finite; the model "
            "has diverged or overflows"
        ) from None
    if number_file:  # before the record, whose presence says that the measurement is complete
        with atomic_open(path.with_suffix(".txt")) as file:
            file.write(f"{record.value:.6f}\n")
    write_schema(path, record)


def read_record(path: Path | str) -> Record:
    """The record in a file; one of a measurement's own class."""
    content = read_json(path)
    if content.get("schema") != 2:
        raise InputError(f"{path}: not a record of schema 2; {ADVICE}")
    measurement = content.get("measurement")
    if not isinstance(measurement, str) or measurement not in RECORDS:
        raise InputError(f"{path}: 'measurement': {measurement!r} is none of {', '.join(RECORDS)}; {ADVICE}")
    for field in ("seeds", "versions"):  # their defaults are for new records only
        if field not in content:
            raise InputError(f"{path}: {field!r}: Field required; {ADVICE}")
    return parse_schema(RECORDS[measurement], content, path, ADVICE)


def read_records(folder: Path | str) -> dict[str, Record]:
    """The records directly in `folder`, by file name."""
    return {path.name: read_record(path) for path in sorted(Path(folder).glob("*.json")) if path.name.startswith(PREFIXES)}
