"""One report of everything measured under a folder: `results.csv`, plots, `report.html`.

    python -m pretraining.report quickstart/models --output quickstart/report

The report is a pure function of a tree of folders. Each folder with weights, or with records only (a lookup table measured
as a model), is one row; the numbers come from the measurements' JSON files beside the weights (see
`pretraining.evaluation.records`), the facts from `config.json` and `args.json`. Nothing else is read. A measurement that was
not made is an empty cell.

With an `experiments.json` in the folder (`pretraining.report.contract`) the report is an analysis of the experiments:
findings, tables and plots as `pretraining.report.analysis` describes them, `experiments.csv` and `results.json`. Without:

Gaps in the table and the plots are means over sentences of the mean over positions of KL(P || f), in nats: the mean that
training with `--single_mask` minimises. `results.csv` has both means. Models enlarged by enlarge.py are compared with those of
their shape apart (see `pretraining.report.sizes`) and are left out of the other plots: but for the trace, all that
is measured of them is the small model's.
"""

import argparse
from pathlib import Path

from pcfg.common.cli import Parser
from pretraining.report import analysis_plots, experiment_rows
from pretraining.report import plots as report_plots
from pretraining.report.analysis import RESULTS_FILE, Analysis, analyse, write_results
from pretraining.report.analysis_page import write_page
from pretraining.report.analysis_tables import correlation_sentences, experiment_table
from pretraining.report.page import notes, sections, table, table_text, write_html
from pretraining.report.rows import LOOKUP_TABLE, accuracy_names, collect, error_of, write_csv

CSV_FILE, HTML_FILE = "results.csv", "report.html"


def make_report(folder, output) -> tuple[list[dict], list[dict], Analysis | None]:
    """Write `results.csv`, the plots and `report.html` of everything under `folder` into `output`; returns what it holds."""
    rows, records = collect(folder)
    output, analysis = Path(output), analyse(folder, rows, records)
    if analysis is None:
        write_csv(output / CSV_FILE, rows)
        images = report_plots.write_plots(output, rows, accuracy_names(rows), error_of)
        write_html(output / HTML_FILE, rows, records, images)
        return rows, records, None
    experiment_rows.add_to_results(rows, analysis.rows)
    write_csv(output / CSV_FILE, rows, experiment_rows.EXTRA_COLUMNS)
    experiment_rows.write_rows(output / experiment_rows.ROWS_FILE, analysis.experiments, analysis.rows)
    write_results(output / RESULTS_FILE, analysis)
    write_page(output / HTML_FILE, rows, records, analysis, analysis_plots.write_plots(output, analysis))
    return rows, records, analysis


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m pretraining.report", description=__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("folder", help="folder whose records are collected, at any depth")
    files.add_argument("--output", help="folder for results.csv, the plots and report.html (default: FOLDER/report)")
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    output = Path(options.output or Path(options.folder) / "report")
    rows, records, analysis = make_report(options.folder, output)
    if analysis is None:
        further = sections(rows, records)
        print(table_text(*table(rows)))
        print("\n".join(notes(rows)))
    else:
        further = [experiment_table(analysis, name) for name in analysis.tables]
        print("\n\n".join([*(finding.sentence() for finding in analysis.findings), *correlation_sentences(analysis)]))
    for title, header, lines, remarks in further:
        print(f"\n{title}\n{table_text(header, lines)}")
        print("\n".join(remarks))
    if any(row["kind"] == LOOKUP_TABLE for row in rows):
        print("lookup table: its output is P itself, so its loss is the entropy and its gap 0 by construction.")
    print(f"report: {output / HTML_FILE}  (numbers: {output / CSV_FILE})")
