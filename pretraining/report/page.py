"""The report's tables, for a terminal and for its self-contained page."""

import base64
import json
from pathlib import Path

import jinja2

from pcfg.common.files import atomic_open
from pretraining.report import sizes as report_sizes
from pretraining.report.rows import LOOKUP_TABLE, accuracy_names, error_of


def _number(value, error, digits: int, scale: float = 1.0, mark: str = "") -> str:
    """`value ± error` for a table; empty when there is no value."""
    if value is None:
        return ""
    shown = f"{value * scale:.{digits}f}"
    return shown if error is None else f"{shown} ± {error * scale:.{digits}f}{mark}"


def table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """The report's table as texts: header and one list a model. Accuracies in %; `*` marks a sampling error (one seed)."""
    header = ["model", "parameters", "step", "gap (nats)", "trace"]
    only_loss = _has_only_loss(rows)
    if any(only_loss):
        header.insert(4, "MLM loss (nats)")
    names = accuracy_names(rows)
    header += [f"{name.replace('_', ' ', 1)} (%)" for name in names]
    lines = []
    for row, is_only_loss in zip(rows, only_loss, strict=True):
        line = [
            row["model"] if row["kind"] != LOOKUP_TABLE else f"{row['model']} (lookup table)",
            "" if row.get("parameters") is None else f"{row['parameters']:,}",
            "" if row["step"] is None else f"{row['step']:,}",
            _number(row.get("gap_sentences"), row.get("gap_sentences_se"), 4),
            _number(row.get("trace"), row.get("trace_se"), 2),
        ]
        if row["kind"] == LOOKUP_TABLE:
            line[3] = "0 by construction"
        if any(only_loss):
            loss = _number(row.get("sampled_loss_pairs"), row.get("sampled_loss_pairs_se"), 4)
            line.insert(4, loss if is_only_loss else "")
        for name in names:
            mark = "*" if row.get(f"{name}_se") is None else ""
            line.append(_number(row.get(name), error_of(row, name), 1, 100, mark))
        lines.append(line)
    return header, lines


def _has_only_loss(rows: list[dict]) -> list[bool]:
    """Of each model, whether a loss was measured and no gap: no true conditionals were given, or nobody knows them."""
    return [row.get("sampled_loss_pairs") is not None and row.get("gap_pairs") is None for row in rows]


def table_text(header: list[str], lines: list[list[str]]) -> str:
    """A table for a terminal."""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    texts = []
    for line in (header, ["-" * width for width in widths], *lines):
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        texts.append("  ".join(cells).rstrip())
    return "\n".join(texts)


GAP_AND_ACCURACIES = (
    "gap: KL(P || f), mean over sentences (the mean that --single_mask minimises); ± is one standard error.",
    "accuracies: ± is the standard error over seeds; with * there is one seed and ± is the binomial standard error of the "
    "validation sample.",
)


MLM_LOSS = (
    "MLM loss: of models measured without true conditionals, mean over the masked positions of samples; natural text has no "
    "exact entropy.",
)


def minimal_losses(rows: list[dict]) -> tuple[str, ...]:
    """The entropy of each text that losses were measured on: the least that any model can have."""
    keys = [f"entropy_{mean}{error}" for mean in ("sentences", "pairs") for error in ("", "_se")]
    entropies = {tuple(row[key] for key in keys) for row in rows if row.get(keys[0]) is not None}
    return tuple(
        f"minimal loss of the data (entropy): {a:.4f} ± {a_se:.4f} nats, mean over sentences; {b:.4f} ± {b_se:.4f} over pairs."
        for a, a_se, b, b_se in sorted(entropies)
    )


def notes(rows: list[dict]) -> tuple[str, ...]:
    """What the table's columns are, and the minimal loss."""
    return GAP_AND_ACCURACIES + minimal_losses(rows) + (MLM_LOSS if any(_has_only_loss(rows)) else ())


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


def embedded(images: list[tuple[str, str, Path]]) -> list[tuple[str, str, str]]:
    """(title, caption, base64 of the file) of (title, caption, PNG file)."""
    return [(title, caption, base64.b64encode(file.read_bytes()).decode()) for title, caption, file in images]


def render(path, template: str, records: list[dict], **content) -> None:
    """Write a page from a template beside this module: `content`, and each record with its arguments and versions."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, loader=loader)
    page = environment.get_template(template).render(
        **content,
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


def write_html(path, rows: list[dict], records: list[dict], images: list[tuple[str, str, Path]]) -> None:
    """Write the self-contained page: tables, plots (embedded), and each record with its arguments and versions.

    Args:
        images: (title, caption, PNG file) of each plot.
    """
    tables = [("", *table(rows), notes(rows)), *sections(rows, records)]
    render(path, "report.html.jinja", records, tables=tables, images=embedded(images))
