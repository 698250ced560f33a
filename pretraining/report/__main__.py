"""One report of everything measured under a folder: tables, verdicts, plots and one self-contained page.

    python -m pretraining.report quickstart --output quickstart/report

The report is a pure function of a tree of folders. Each folder with weights, or with records only (a lookup table measured
as a model), is one row of `results.csv`. The numbers come from the measurements' JSON files next to the weights, the facts from
`config.json` and `args.json`; nothing else is read. A measurement that does not exist is an empty cell.

With a `study.json` in the folder (`python -m pretraining.experiments` writes it) the report is about its studies: questions,
comparisons and their verdicts (`pretraining.report.verdicts`), controls and headroom; `comparisons.csv` has one row per
comparison and quantity. Without it all models are shown with a group per job, and models that enlarge.py put into the
parameters of another are compared there.

Two models are compared only at the same loss; `pretraining.report.same_loss` has the criterion and --max-gap and --margin its
thresholds. Gaps are means over sentences of the mean over positions of KL(P || f), in nats: the mean that training with
`--single_mask` minimises. `results.csv` has both means.
"""

if __name__ == "__main__":
    import pcfg.common.start  # noqa: F401  before libraries, whose import takes seconds

import argparse
from pathlib import Path

from pcfg.common.cli import Parser, non_negative, run_main
from pcfg.common.files import AnyPath
from pretraining.report import plots as report_plots
from pretraining.report.analysis import Analysis, analyse, comparison_table, write_results
from pretraining.report.page import printed, write_page
from pretraining.report.rows import collect, results, write_csv
from pretraining.report.same_loss import MARGIN, MAX_GAP


def make_report(
    folder: AnyPath, output: AnyPath, max_gap: float | None = None, margin: float | None = None, records: str | None = None
) -> Analysis:
    """Write the report of everything under `folder` into `output`; returns its content.

    Args:
        max_gap, margin: thresholds of the same loss, nats; by default those of `study.json`, else those of `SameLoss`.
        records: folder with more records, as in `collect`.
    """
    analysis = analyse(collect(folder, records), folder, max_gap, margin)
    output = Path(output)
    identity = analysis.seeds_and_groups()
    write_csv(output / "results.csv", results(analysis.tree, analysis.criterion, analysis.reference, identity))
    if analysis.studies:
        write_csv(output / "comparisons.csv", comparison_table(analysis))
    write_results(output / "results.json", analysis)
    write_page(output / "report.html", analysis, report_plots.write_plots(output, analysis))
    return analysis


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m pretraining.report", description=__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("folder", help="folder whose records are collected, at any depth")
    files.add_argument("--output", help="folder for the tables, the plots and report.html (default: FOLDER/report)")
    files.add_argument("--records-path", help="folder with more records: that of the same flag of the measurements")
    group = parser.add_argument_group("the same loss (default: that of study.json, if there is one)")
    group.add_argument(
        "--max-gap",
        type=non_negative,
        help=f"nats; saturated: the gap + 1.96 standard errors is at most this (default: {MAX_GAP:g})",
    )
    group.add_argument(
        "--margin",
        type=non_negative,
        help=f"nats; equal: the 95%% interval of the difference is in +- this (default: {MARGIN:g})",
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    output = Path(options.output or Path(options.folder) / "report")
    analysis = make_report(options.folder, output, options.max_gap, options.margin, options.records_path)
    print(printed(analysis))
    print(f"report: {output / 'report.html'}  (numbers: {output / 'results.csv'})")


if __name__ == "__main__":
    run_main(main)
