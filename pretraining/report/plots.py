"""The report's plots: PNG files drawn from the rows of `results.csv`, and from nothing else.

A series is one pre-training job; its colour, marker and dashes are the same in every plot. Colours run from dark to light with
the number of parameters (viridis: ordered by lightness, so also in grey and for colour-blind readers), and each series has a
marker of its own. Error bars are one standard error.
"""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pretraining.model.enlarge import TIED_SCALES
from pretraining.report.plotting import (
    DASHES,
    GREY,
    LIGHTEST,
    MARKERS,
    compact,
    draw_points,
    make_figure,
    save_png,
    scale_axis,
    size_axis,
    steps_axis,
)
from pretraining.report.sizes import SizeComparison, across_sizes

SATURATED = 0.05  # nats: models with a gap up to this are drawn filled where accuracies are compared


class Series:
    """The checkpoints of one job, by step, and how they are drawn."""

    def __init__(self, job: str, rows: list[dict], index: int, number: int):
        self.rows = sorted(rows, key=lambda row: row["step"] or 0)
        parameters = rows[0].get("parameters")
        self.label = job if parameters is None else f"{job} ({compact(parameters)} parameters)"
        self.colour = matplotlib.colormaps["viridis"](LIGHTEST * index / max(1, number - 1))
        self.marker, self.dash = MARKERS[index % len(MARKERS)], DASHES[index % len(DASHES)]

    def handle(self) -> Line2D:
        """The series in a legend."""
        return Line2D([], [], color=self.colour, marker=self.marker, linestyle=self.dash, label=self.label)


def make_series(rows: list[dict]) -> list[Series]:
    """The transformers among the rows, one series a job and size, from small to large."""
    groups = {}
    for row in rows:
        if row["kind"] == "transformer":
            groups.setdefault((row.get("parameters") or 0, row["job"]), []).append(row)
    ordered = sorted(groups.items())
    return [Series(job, of_job, index, len(ordered)) for index, ((_, job), of_job) in enumerate(ordered)]


class Quantity:
    """One measured column: its label, its error and its scale.

    Args:
        name: column of the rows.
        label: axis label with unit.
        error: from a row to the standard error or None.
        scale: factor from the column to the axis (100 for per cent).
    """

    def __init__(self, name: str, label: str, error, scale: float = 1.0):
        self.name, self.label, self.error, self.scale = name, label, error, scale

    def of(self, row: dict) -> tuple[float, float] | None:
        """Value and error (0 where unknown) on the axis, or None where it was not measured."""
        value = row.get(self.name)
        return None if value is None else (value * self.scale, (self.error(row) or 0.0) * self.scale)

    def values(self, rows: list[dict]) -> list[float]:
        return [found[0] for row in rows if (found := self.of(row)) is not None]


def _reference_lines(axes, rows: list[dict], quantity: Quantity) -> None:
    """Horizontal lines of an accuracy: the lookup table's, and the majority class."""
    tables = [row for row in rows if row["kind"] != "transformer" and quantity.of(row)]
    for row in tables:
        axes.axhline(quantity.of(row)[0], color="black", linestyle=(0, (6, 3)), linewidth=1.2)
    majorities = {row.get(f"{quantity.name}_majority") for row in rows} - {None}
    for share in sorted(majorities):
        axes.axhline(share * quantity.scale, color=GREY, linestyle=":", linewidth=1.2)


def draw_against_steps(axes, rows: list[dict], quantity: Quantity) -> None:
    """`quantity` against training steps, one line a series."""
    for series in make_series(rows):
        measured = [(row["step"], *quantity.of(row)) for row in series.rows if row["step"] is not None and quantity.of(row)]
        draw_points(axes, series, [(step, value, 0, error) for step, value, error in measured], line=True)
    steps_axis(axes, sorted({row["step"] for row in rows if row["step"] is not None}))
    _finish(axes, rows, quantity)


def draw_against_size(axes, rows: list[dict], quantity: Quantity) -> None:
    """`quantity` against the number of parameters: last checkpoints filled and joined, earlier ones hollow."""
    last_points = []
    for series in make_series(rows):
        measured = [(row["parameters"], *quantity.of(row)) for row in series.rows if quantity.of(row)]
        points = [(size, value, 0, error) for size, value, error in measured]
        draw_points(axes, series, points, line=False, hollow=range(len(points) - 1))
        last_points += points[-1:]
    if last_points:
        axes.plot([p[0] for p in last_points], [p[1] for p in last_points], color=GREY, linewidth=1, zorder=0)
    size_axis(axes, sorted({point[0] for point in last_points}))
    axes.set_xlabel("parameters (filled: last checkpoint)")
    _finish(axes, rows, quantity)


def draw_against_trace(axes, rows: list[dict], quantity: Quantity, trace: Quantity) -> None:
    """An accuracy against the trace; filled where the gap is at most `SATURATED`, since only there is the loss the same."""
    x_values = []
    for series in make_series(rows):
        measured = [row for row in series.rows if trace.of(row) and quantity.of(row)]
        points = [(trace.of(row)[0], quantity.of(row)[0], trace.of(row)[1], quantity.of(row)[1]) for row in measured]
        gaps = [row.get("gap_sentences") for row in measured]
        hollow = {index for index, gap in enumerate(gaps) if gap is None or gap > SATURATED}
        draw_points(axes, series, points, line=False, hollow=hollow)
        x_values += [point[0] for point in points]
    scale_axis(axes.xaxis, x_values)
    axes.set_xlabel(f"{trace.label}  (filled: gap ≤ {SATURATED} nats)")
    _finish(axes, rows, quantity)


def _finish(axes, rows: list[dict], quantity: Quantity) -> None:
    """Scale, label, grid and reference lines of the vertical axis."""
    if f"{quantity.name}_majority" in {key for row in rows for key in row}:
        _reference_lines(axes, rows, quantity)
    else:
        scale_axis(axes.yaxis, quantity.values([row for row in rows if row["kind"] == "transformer"]))
    axes.set_ylabel(quantity.label)
    axes.grid(True, color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)


def _legend(figure: Figure, rows: list[dict], accuracies: list[Quantity]) -> None:
    """One legend below all panels: the series, and the reference lines where accuracies are shown."""
    handles = [series.handle() for series in make_series(rows)]
    if any(quantity.of(row) for quantity in accuracies for row in rows if row["kind"] != "transformer"):
        handles.append(Line2D([], [], color="black", linestyle=(0, (6, 3)), label="lookup table"))
    if accuracies:
        handles.append(Line2D([], [], color=GREY, linestyle=":", label="majority class"))
    columns = 2 if len(handles) == 4 else 3
    figure.legend(handles=handles, loc="outside lower center", ncols=min(columns, len(handles)), frameon=False, fontsize=9)


def _size_and_steps(path: Path, rows: list[dict], quantity: Quantity, accuracies: list[Quantity]) -> None:
    """One figure: `quantity` against size and against steps."""
    figure, axes = make_figure(2, 2)
    draw_against_size(axes[0], rows, quantity)
    draw_against_steps(axes[1], rows, quantity)
    _legend(figure, rows, accuracies)
    save_png(figure, path)


def _overview(path: Path, rows: list[dict], gap: Quantity, trace: Quantity, accuracies: list[Quantity]) -> None:
    """The one picture: gap, trace and an accuracy against steps, and the accuracy against the trace."""
    quantities = [quantity for quantity in (gap, trace, *accuracies[:1]) if quantity.values(rows)]
    against_trace = [accuracy for accuracy in accuracies[:1] if trace.values(rows)]
    figure, axes = make_figure(len(quantities) + len(against_trace), 2)
    for panel, quantity in zip(axes, quantities, strict=False):
        draw_against_steps(panel, rows, quantity)
    for panel, accuracy in zip(axes[len(quantities) :], against_trace, strict=True):
        draw_against_trace(panel, rows, accuracy, trace)
    _legend(figure, rows, accuracies[:1])
    save_png(figure, path)


def _across_sizes(path: Path, comparison: SizeComparison) -> None:
    """Traces in the parameters of one model against the models' own sizes, a line a rule."""
    figure, (axes,) = make_figure(1, 1)
    for index, rule in enumerate(TIED_SCALES):
        rows = [(model.size, model.traces[rule]) for model in comparison.models if rule in model.traces]
        if not rows:
            continue
        colour, marker = matplotlib.colormaps["viridis"](LIGHTEST * index), MARKERS[index]
        x, y, error = zip(*((size, row["trace"], row.get("trace_se") or 0.0) for size, row in rows), strict=True)
        style = {"color": colour, "marker": marker, "linestyle": DASHES[index], "capsize": 2}
        axes.errorbar(x, y, error, label=f"--tied-scale {rule}", **style)
    axes.set_xscale("log")
    sizes = sorted({model.size for model in comparison.models})
    axes.set_xticks(sizes, map(compact, sizes))
    axes.set_xticks([], minor=True)
    axes.set_xlabel("parameters of the model that was enlarged")
    axes.set_ylabel("trace of the Hessian (nats)")
    axes.set_ylim(bottom=0)
    axes.grid(True, color="0.9", linewidth=0.6)
    axes.legend(frameon=False, fontsize=9)
    save_png(figure, path)


def _accuracy_quantity(name: str, error_of) -> Quantity:
    kind, task = name.split("_", 1)
    words = {"probe": "linear probe", "finetune": "fine-tuning"}[kind]
    return Quantity(name, f"accuracy of {words},\n{task} (%)", lambda row: error_of(row, name), 100.0)


def write_plots(output, rows: list[dict], names: list[str], error_of) -> list[tuple[str, str, Path]]:
    """Draw all plots that there are measurements for.

    Args:
        output: folder of the PNG files.
        rows: rows of `results.csv` (see `pretraining.report.rows.collect`).
        names: the accuracies, `probe_TASK` and `finetune_TASK`.
        error_of: from a row and a name to the accuracy's error, or None.

    Returns:
        (title, caption, file) of each plot, the overview first.
    """
    comparisons = across_sizes(rows)
    rows = [row for row in rows if row.get("enlarged_rule") is None]
    output, models = Path(output), [row for row in rows if row["kind"] == "transformer"]
    gap = Quantity("gap_sentences", "gap to the entropy (nats),\nmean over sentences", lambda row: row.get("gap_sentences_se"))
    trace = Quantity("trace", "trace of the Hessian (nats)", lambda row: row.get("trace_se"))
    accuracies = [q for q in (_accuracy_quantity(name, error_of) for name in names) if q.values(models)]
    # Probes of hidden states first: what the overview shows of the accuracies.
    accuracies.sort(key=lambda q: (not q.name.startswith("probe_"), q.name.startswith("probe_conditional_"), q.name))
    plots = []

    def add(file: str, title: str, caption: str, draw, *arguments) -> None:
        draw(output / file, rows, *arguments)
        plots.append((title, caption, output / file))

    bars = "Error bars: one standard error."
    if gap.values(models) or trace.values(models) or accuracies:
        caption = f"Gap, trace and accuracy during training, and accuracy against trace. {bars}"
        add("overview.png", "Overview", caption, _overview, gap, trace, accuracies)
    for quantity, file, title in ((gap, "gap.png", "Gap to the entropy"), (trace, "trace.png", "Trace of the Hessian")):
        if quantity.values(models):
            add(file, title, f"Against size and against training steps. {bars}", _size_and_steps, quantity, [])
    for number, comparison in enumerate(comparisons):
        path = output / f"trace_across_sizes{number or ''}.png"
        _across_sizes(path, comparison)
        plots.append(
            (comparison.title, f"Each model enlarged to the same shape, by both rules where both are there. {bars}", path)
        )
    for accuracy in accuracies:
        caption = "Against size and against training steps. Error bars: one standard error over seeds, with one seed that of "
        caption += "the validation sample."
        title = accuracy.label.replace("\n", " ").removesuffix(" (%)").capitalize()
        add(f"accuracy_{accuracy.name}.png", title, caption, _size_and_steps, accuracy, [accuracy])
    if accuracies and trace.values(models):
        caption = f"Filled markers: models whose gap is at most {SATURATED} nats, the ones with the same loss. {bars}"
        add("accuracy_against_trace.png", "Accuracy against trace", caption, _all_against_trace, trace, accuracies)
    return plots


def _all_against_trace(path: Path, rows: list[dict], trace: Quantity, accuracies: list[Quantity]) -> None:
    """Each accuracy against the trace, a panel each."""
    figure, axes = make_figure(len(accuracies), 2)
    for panel, accuracy in zip(axes, accuracies, strict=True):
        draw_against_trace(panel, rows, accuracy, trace)
    _legend(figure, rows, accuracies)
    save_png(figure, path)
