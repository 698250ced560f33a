"""The rows of `results.csv`: one a model folder, with everything that is recorded in it."""

import csv
from pathlib import Path

from pcfg.common.files import InputError, atomic_open, read_json
from pretraining.evaluation.records import read_records
from pretraining.model.checkpoints import CONFIG_FILE, is_model_folder, read_facts
from pretraining.model.config import ModelConfig
from pretraining.report import sizes as report_sizes

LOOKUP_TABLE = "lookup table"  # what args.json of a folder without weights says its model is
FACTS = ("model", "kind", "job", "step", "parameters", "hidden_size", "layers", "heads", "intermediate_size")
ENLARGED = ("enlarged_rule", "enlarged_times", "enlarged_heads", "enlarged_from", "enlarged_from_parameters")
LOSS_PARTS, MEANS = ("gap", "loss", "entropy", "sampled_loss"), ("sentences", "pairs")
# Columns of one measurement; the name of the file that they come from decides the prefix.
LOSS_COLUMNS = tuple(f"{part}_{mean}{end}" for part in LOSS_PARTS for mean in MEANS for end in ("", "_se"))
TRACE_FILES = {"trace": "hessian.json", "trace_hutchinson": "hessian_hutchinson.json"}
ACCURACY_SUFFIXES = ("", "_se", "_sampling_se", "_seeds", "_best", "_n", "_majority")


def folders_to_report(folder) -> list[Path]:
    """All folders at or below `folder` with a model or with records; hidden ones and training states are passed over.

    Raises:
        InputError: there is none.
    """
    root = Path(folder)
    visible = {
        path.parent
        for path in root.rglob("*.json")
        if not any(part.startswith(".") or part == "training_state" for part in path.relative_to(root).parts)
    }
    found = sorted(path for path in visible if is_model_folder(path) or read_records(path))
    if not found:
        raise InputError(f"{root}: no model folder and no records in it; measure something first")
    return found


def _facts(folder: Path, root: Path) -> dict:
    """What is known of a model before any measurement: its name, size and step."""
    facts = read_facts(folder)
    relative = folder.relative_to(root).as_posix()
    row = {
        "model": folder.name if relative == "." else relative,
        "kind": "transformer" if is_model_folder(folder) else LOOKUP_TABLE,
        "job": facts.get("job_name") or (folder.parent if "step" in facts else folder).name,
        "step": facts.get("step"),
    }
    if (folder / CONFIG_FILE).is_file():
        config = ModelConfig.from_transformers(read_json(folder / CONFIG_FILE), folder / CONFIG_FILE)
        row |= {"parameters": config.parameters, "hidden_size": config.hidden_size, "layers": config.num_hidden_layers}
        row |= {"heads": config.num_attention_heads, "intermediate_size": config.intermediate_size}
    if enlarged := report_sizes.enlarged_facts(facts):
        row |= {**enlarged, "trained_as": row["job"]}
        row["job"] += f" x {enlarged['enlarged_times']}, {enlarged['enlarged_rule']}"
    if row["kind"] == LOOKUP_TABLE:
        # Its output is P itself: the gap is 0 by construction, not by measurement.
        row |= {"gap_sentences": 0.0, "gap_pairs": 0.0}
    return row


def _loss_cells(record: dict) -> dict:
    """Cells of `loss.json`: loss, entropy and gap by both means (only the sampled loss without true conditionals)."""
    cells = {}
    for what in LOSS_PARTS:
        for mean in MEANS:
            found = (record.get(what) or {}).get(mean) or {}
            cells[f"{what}_{mean}"] = found.get("mean")
            cells[f"{what}_{mean}_se"] = found.get("standard_error")
    return cells


def _accuracy_cells(name: str, record: dict) -> dict:
    """Cells of a probe's or a fine-tuning's record, under the prefix `name` (`probe_pcfg_B`)."""
    values = (
        record["value"],
        record["standard_error"],
        record["sampling_standard_error"],
        len(record["accuracies"]),
        record["best_accuracy"],
        record["n"],
        record["majority"],
    )
    return {f"{name}{suffix}": value for suffix, value in zip(ACCURACY_SUFFIXES, values, strict=True)}


def collect(folder) -> tuple[list[dict], list[dict]]:
    """Everything that is recorded at or below `folder`.

    Returns:
        rows: one dict a model folder, ordered by kind, parameters, job and step; keys are the columns of `results.csv`, a
            missing key is a measurement that was not made.
        records: one dict a record: `model`, `file`, `record` (the JSON as it is), in the rows' order.

    Raises:
        InputError: nothing to report, or a damaged file.
    """
    root = Path(folder)
    found = []
    for path in folders_to_report(root):
        row = _facts(path, root)
        records = {name: record.model_dump() for name, record in read_records(path).items()}
        for file, record in sorted(records.items()):
            name = Path(file).stem
            if record["measurement"] == "loss":
                row |= _loss_cells(record)
            elif record["measurement"] in ("probe", "finetune"):
                row |= _accuracy_cells(name, record)
            elif record["measurement"] == "hessian":
                for column, trace_file in TRACE_FILES.items():
                    if file == trace_file:
                        row |= {column: record["value"], f"{column}_se": record["standard_error"]}
                if file == TRACE_FILES["trace"]:
                    row |= report_sizes.trace_parts(record, read_facts(path))
        found.append((row, records))
    found.sort(key=lambda pair: _order(pair[0]))
    records = [
        {"model": row["model"], "file": file, "record": record}
        for row, of_model in found
        for file, record in sorted(of_model.items())
    ]
    return [row for row, _ in found], records


def _order(row: dict) -> tuple:
    """Transformers by size, job and step; lookup tables last."""
    return (row["kind"] == LOOKUP_TABLE, row.get("parameters") or 0, row["job"], row["step"] or 0, row["model"])


def accuracy_names(rows: list[dict]) -> list[str]:
    """The accuracies that at least one model has: `probe_pcfg_B`, `finetune_pcfg_B`, ..., sorted."""
    return sorted({key.removesuffix("_majority") for row in rows for key in row if key.endswith("_majority")})


def columns(rows: list[dict], more: tuple[str, ...] = ()) -> list[str]:
    """The columns of `results.csv`, `more` at the end, in an order that depends on the set of measurements only."""
    traces = [column + suffix for column in TRACE_FILES for suffix in ("", "_se")]
    accuracies = [name + suffix for name in accuracy_names(rows) for suffix in ACCURACY_SUFFIXES]
    parts = [f"trace_{name}" for name in report_sizes.PARTS]
    return [*FACTS, *ENLARGED, *LOSS_COLUMNS, *traces, *parts, *accuracies, *more]


def write_csv(path, rows: list[dict], more: tuple[str, ...] = ()) -> None:
    """Write `results.csv`: full precision, no times, no dates, no absolute paths; a missing measurement is empty."""
    with atomic_open(path) as file:
        writer = csv.DictWriter(file, columns(rows, more), restval="", lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows({key: "" if value is None else value for key, value in row.items()} for row in rows)


def error_of(row: dict, name: str) -> float | None:
    """The error that goes with accuracy `name`: over seeds where there are several, else the validation sample's."""
    over_seeds = row.get(f"{name}_se")
    return row.get(f"{name}_sampling_se") if over_seeds is None else over_seeds
