"""One report of everything measured under a folder: `results.csv`, plots, `report.html`.

    python -m pretraining.evaluation.report quickstart/models --output quickstart/report

The report is a pure function of a tree of folders. Each folder with weights, or with records only (a lookup table measured
as a model), is one row; the numbers come from the measurements' JSON files beside the weights (see
`pretraining.evaluation.records`), the facts from `config.json` and `args.json`. Nothing else is read. A measurement that was
not made is an empty cell.

Gaps in the table and the plots are means over sentences of the mean over positions of KL(P || f), in nats: the mean that
training with `--single_mask` minimises. `results.csv` has both means. Models enlarged by enlarge.py are compared with those of
their shape apart (see `pretraining.evaluation.report_sizes`) and are left out of the other plots: but for the trace, all that
is measured of them is the small model's.
"""

import argparse
import base64
import csv
import json
from pathlib import Path

import jinja2
import torch

from pcfg.artefacts import InputError, atomic_open, read_json
from pcfg.cli import run_main
from pretraining.evaluation import report_plots, report_sizes
from pretraining.evaluation.records import read_records
from pretraining.model.bert import MaskedLM
from pretraining.model.checkpoints import CONFIG_FILE, is_model_folder, read_facts
from pretraining.model.config import ModelConfig

CSV_FILE, HTML_FILE = "results.csv", "report.html"
TEMPLATE = Path(__file__).with_name("report.html.jinja")
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
        with torch.device("meta"):  # shapes only: nothing is allocated
            row["parameters"] = MaskedLM(config).number_of_parameters()
        row |= {"hidden_size": config.hidden_size, "layers": config.num_hidden_layers}
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
        row, records = _facts(path, root), read_records(path)
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


def columns(rows: list[dict]) -> list[str]:
    """The columns of `results.csv`, in an order that depends on the set of measurements only."""
    traces = [column + suffix for column in TRACE_FILES for suffix in ("", "_se")]
    accuracies = [name + suffix for name in accuracy_names(rows) for suffix in ACCURACY_SUFFIXES]
    parts = [f"trace_{name}" for name in report_sizes.PARTS]
    return [*FACTS, *ENLARGED, *LOSS_COLUMNS, *traces, *parts, *accuracies]


def write_csv(path, rows: list[dict]) -> None:
    """Write `results.csv`: full precision, no times, no dates, no absolute paths; a missing measurement is empty."""
    with atomic_open(path) as file:
        writer = csv.DictWriter(file, columns(rows), restval="", lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows({key: "" if value is None else value for key, value in row.items()} for row in rows)


def error_of(row: dict, name: str) -> float | None:
    """The error that goes with accuracy `name`: over seeds where there are several, else the validation sample's."""
    over_seeds = row.get(f"{name}_se")
    return row.get(f"{name}_sampling_se") if over_seeds is None else over_seeds


def _number(value, error, digits: int, scale: float = 1.0, mark: str = "") -> str:
    """`value ± error` for a table; empty when there is no value."""
    if value is None:
        return ""
    shown = f"{value * scale:.{digits}f}"
    return shown if error is None else f"{shown} ± {error * scale:.{digits}f}{mark}"


def table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """The report's table as texts: header and one list a model. Accuracies in %; `*` marks a sampling error (one seed)."""
    header = ["model", "parameters", "step", "gap (nats)", "trace"]
    names = accuracy_names(rows)
    header += [f"{name.replace('_', ' ', 1)} (%)" for name in names]
    lines = []
    for row in rows:
        line = [
            row["model"] if row["kind"] != LOOKUP_TABLE else f"{row['model']} (lookup table)",
            "" if row.get("parameters") is None else f"{row['parameters']:,}",
            "" if row["step"] is None else f"{row['step']:,}",
            _number(row.get("gap_sentences"), row.get("gap_sentences_se"), 4),
            _number(row.get("trace"), row.get("trace_se"), 2),
        ]
        if row["kind"] == LOOKUP_TABLE:
            line[3] = "0 by construction"
        for name in names:
            mark = "*" if row.get(f"{name}_se") is None else ""
            line.append(_number(row.get(name), error_of(row, name), 1, 100, mark))
        lines.append(line)
    return header, lines


def table_text(header: list[str], lines: list[list[str]]) -> str:
    """A table for a terminal."""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    texts = []
    for line in (header, ["-" * width for width in widths], *lines):
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        texts.append("  ".join(cells).rstrip())
    return "\n".join(texts)


NOTES = (
    "gap: KL(P || f), mean over sentences (the mean that --single_mask minimises); ± is one standard error.",
    "accuracies: ± is the standard error over seeds; with * there is one seed and ± is the binomial standard error of the "
    "validation sample.",
)


Section = tuple[str, list[str], list[list[str]], list[str]]


def sections(rows: list[dict], records: list[dict]) -> list[Section]:
    """The further tables: title, header, lines, notes."""
    found = []
    for comparison in report_sizes.across_sizes(rows):
        found.append((comparison.title, list(comparison.HEADER), comparison.lines(), comparison.findings))
    if lines := report_sizes.paired_comparisons(records):
        note = (
            "nats, ± one standard error over the same sentences; told apart: by more than "
            f"{report_sizes.ERRORS:g} of them, and more than rounding."
        )
        found.append(("Losses of two models, compared in pairs", list(report_sizes.PAIR_HEADER), lines, [note]))
    return found


def write_html(path, rows: list[dict], records: list[dict], images: list[tuple[str, str, Path]]) -> None:
    """Write the self-contained page: tables, plots (embedded), and each record with its arguments and versions.

    Args:
        images: (title, caption, PNG file) of each plot.
    """
    header, lines = table(rows)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    page = template.render(
        tables=[("", header, lines, NOTES), *sections(rows, records)],
        images=[(title, caption, base64.b64encode(file.read_bytes()).decode()) for title, caption, file in images],
        records=[
            {
                "model": entry["model"],
                "file": entry["file"],
                "measurement": entry["record"]["measurement"],
                "arguments": json.dumps(entry["record"].get("arguments"), sort_keys=True),
                "text": json.dumps(entry["record"], indent=2),
            }
            for entry in records
        ],
        versions=sorted({f"{k} {v}" for entry in records for k, v in (entry["record"].get("versions") or {}).items()}),
    )
    with atomic_open(path) as file:
        file.write(page)


def make_report(folder, output) -> tuple[list[dict], list[dict]]:
    """Write `results.csv`, the plots and `report.html` of everything under `folder` into `output`; returns what it holds."""
    rows, records = collect(folder)
    output = Path(output)
    write_csv(output / CSV_FILE, rows)
    images = report_plots.write_plots(output, rows, accuracy_names(rows), error_of)
    write_html(output / HTML_FILE, rows, records, images)
    return rows, records


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pretraining.evaluation.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    files = parser.add_argument_group("files")
    files.add_argument("folder", help="folder whose records are collected, at any depth")
    files.add_argument("--output", help="folder for results.csv, the plots and report.html (default: FOLDER/report)")
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    output = Path(options.output or Path(options.folder) / "report")
    rows, records = make_report(options.folder, output)
    print(table_text(*table(rows)))
    print("\n".join(NOTES))
    for title, header, lines, notes in sections(rows, records):
        print(f"\n{title}\n{table_text(header, lines)}")
        print("\n".join(notes))
    if any(row["kind"] == LOOKUP_TABLE for row in rows):
        print("lookup table: its output is P itself, so its loss is the entropy and its gap 0 by construction.")
    print(f"report: {output / HTML_FILE}  (numbers: {output / CSV_FILE})")


if __name__ == "__main__":
    run_main(main)
