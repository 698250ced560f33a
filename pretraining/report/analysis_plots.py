"""The plots of the analysis, each as PNG and SVG.

A group has one colour and one marker in all plots. The colours are those of Okabe and Ito, which colour-blind readers tell
apart, neighbours of different lightness; in grey the markers do. Means over seeds have error bars of one standard error over
seeds, single models those of their own measurement. Filled: the loss is equal to the reference's within the margin.
"""

import dataclasses
from pathlib import Path

from matplotlib.lines import Line2D

from pretraining.report.analysis import Analysis, Line
from pretraining.report.contract import ALGORITHMS, SIZES, STEPS, Choice
from pretraining.report.experiment_rows import TRACE, accuracy_label, trace_names
from pretraining.report.plotting import (
    DASHES,
    GREY,
    draw_points,
    make_figure,
    save_png_and_pieces,
    save_svg,
    scale_axis,
    size_axis,
    steps_axis,
)
from pretraining.report.rows import LOOKUP_TABLE, error_of

COLOURS = ("#0072B2", "#E69F00", "#000000", "#D55E00", "#56B4E9", "#009E73", "#CC79A7")
MARKERS = "osD^vXP<>*p"
COLUMNS = 2
FILLED = "filled: loss equal to the reference's"
FRONTIER = "adversarial_frontier"


@dataclasses.dataclass(frozen=True)
class Style:
    """How a group is drawn."""

    label: str
    colour: str
    marker: str
    dash: str

    def handle(self, line: bool) -> Line2D:
        """The group in a legend, its markers joined by a line or not."""
        dash = self.dash if line else "none"
        return Line2D([], [], color=self.colour, marker=self.marker, linestyle=dash, label=self.label)


def styles_of(groups: list[str]) -> dict[str, Style]:
    """A style a group, by its place among the groups of all experiments."""
    return {
        group: Style(group, COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], DASHES[i % len(DASHES)])
        for i, group in enumerate(groups)
    }


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A column and its axis: `scale` is the factor from the column to the axis (100 for per cent)."""

    name: str
    label: str
    scale: float = 1.0

    def mean(self, line: Line) -> tuple[float, float] | None:
        """Mean and error of a line, on the axis; None where it was not measured."""
        value = line.values[self.name]
        return None if value.mean is None else (value.mean * self.scale, (value.error or 0.0) * self.scale)

    def own(self, row: dict) -> tuple[float, float] | None:
        """Value and its own error of one model, on the axis; None where it was not measured."""
        value = row.get(self.name)
        return None if value is None else (value * self.scale, (error_of(row, self.name) or 0.0) * self.scale)


def _quantity(name: str) -> Quantity:
    if name == "gap":
        return Quantity(name, "gap to the entropy (nats)")
    if name == TRACE:
        return Quantity(name, "trace of the Hessian (nats)")
    if name.startswith(TRACE):
        return Quantity(name, f"trace in the largest model's\nparameters (nats), rule {name.removeprefix('trace_')}")
    return Quantity(name, f"accuracy of {accuracy_label(name)} (%)", 100.0)


@dataclasses.dataclass
class _Experiment:
    """What the plots of one experiment are drawn from."""

    name: str
    lines: list[Line]
    rows: list[dict]
    styles: dict[str, Style]
    saturated: float
    quantities: list[Quantity]  # gap, traces, accuracies that some model has

    def groups(self) -> list[str]:
        return list(dict.fromkeys(line.group for line in self.lines))

    def accuracies(self) -> list[Quantity]:
        return [quantity for quantity in self.quantities if quantity.scale != 1.0]

    def traces(self) -> list[Quantity]:
        return [quantity for quantity in self.quantities if quantity.name.startswith(TRACE)]


def _experiment(analysis: Analysis, name: str, styles: dict[str, Style]) -> _Experiment:
    [experiment] = [experiment for experiment in analysis.experiments.experiments if experiment.name == name]
    lines = analysis.tables[name]
    names = ("gap", *trace_names(experiment), *analysis.names)
    models = [line for line in lines if line.kind == "transformer"]
    # One group alone is nothing to compare; steps compare within a group.
    fewest = 1 if name == STEPS else 2
    measured = {column: {line.group for line in models if line.values[column].n} for column in names}
    quantities = [_quantity(column) for column, groups in measured.items() if len(groups) >= fewest]
    rows = [row for row in analysis.rows if row["experiment"] == name]
    return _Experiment(name, lines, rows, styles, analysis.experiments.saturated, quantities)


def _is_equal(line: Line) -> bool:
    """Whether the losses of all models of a line are equal to the reference's."""
    number, known = line.equal
    return number == known > 0


def _finish(axes, quantity: Quantity, saturated: float, values: list[float]) -> None:
    axes.set_ylabel(quantity.label)
    axes.grid(True, color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    if quantity.name == "gap":
        axes.axhline(saturated, color=GREY, linestyle=":", linewidth=1.2)
    if quantity.scale == 1.0:
        scale_axis(axes.yaxis, values)


def _against_steps(axes, experiment: _Experiment, quantity: Quantity) -> None:
    shown, values = set(), []
    for group in experiment.groups():
        lines = [line for line in experiment.lines if line.group == group and line.step is not None and quantity.mean(line)]
        points = [(line.step, quantity.mean(line)[0], 0, quantity.mean(line)[1]) for line in lines]
        hollow = {index for index, line in enumerate(lines) if not _is_equal(line)}
        draw_points(axes, experiment.styles[group], points, line=True, hollow=hollow)
        shown |= {line.step for line in lines}
        values += [point[1] for point in points]
    steps_axis(axes, sorted(shown))
    _finish(axes, quantity, experiment.saturated, values)


def _last_lines(experiment: _Experiment, quantity: Quantity) -> list[Line]:
    """Each group at its last measured step."""
    last = {line.group: line for line in experiment.lines if quantity.mean(line)}
    return list(last.values())


def _against_size(axes, experiment: _Experiment, quantity: Quantity) -> None:
    lines = sorted((line for line in _last_lines(experiment, quantity) if line.parameters), key=lambda line: line.parameters)
    means = [quantity.mean(line) for line in lines]
    sizes = [line.parameters for line in lines]
    for line, (value, error) in zip(lines, means, strict=True):
        point = [(line.parameters, value, 0, error)]
        draw_points(axes, experiment.styles[line.group], point, line=False, hollow=() if _is_equal(line) else {0})
    axes.plot(sizes, [value for value, _ in means], color=GREY, linewidth=1, zorder=0)
    size_axis(axes, sorted(set(sizes)))
    axes.set_xlabel("parameters")
    _finish(axes, quantity, experiment.saturated, [value for value, _ in means])


def _by_group(axes, experiment: _Experiment, quantity: Quantity) -> None:
    """Groups side by side: the mean with its error, single models as small points beside it."""
    values, ticks = [], experiment.groups()
    last = {line.group: line for line in _last_lines(experiment, quantity)}
    for place, group in enumerate(ticks):
        if group not in last:
            continue
        line, style = last[group], experiment.styles[group]
        value, error = quantity.mean(line)
        draw_points(axes, style, [(place, value, 0, error)], line=False, hollow=() if _is_equal(line) else {0})
        single = [
            quantity.own(row)[0]
            for row in experiment.rows
            if (row["group"], row["step"]) == (group, line.step) and quantity.own(row)
        ]
        if len(single) > 1:
            axes.plot(
                [place + 0.2] * len(single), single, marker=style.marker, color=style.colour, markersize=3, linestyle="none"
            )
        values += [value, *single]
    axes.set_xlim(-0.5, len(ticks) - 0.5)
    axes.set_xticks(range(len(ticks)), ticks, rotation=20 if len(ticks) > 4 else 0)
    _finish(axes, quantity, experiment.saturated, values)


_AGAINST = {STEPS: _against_steps, SIZES: _against_size, ALGORITHMS: _by_group}


def _against_trace(axes, experiment: _Experiment, accuracy: Quantity, trace: Quantity) -> None:
    """One point a model."""
    x_values = []
    for group in experiment.groups():
        rows = [row for row in experiment.rows if row["group"] == group and trace.own(row) and accuracy.own(row)]
        points = [(trace.own(row)[0], accuracy.own(row)[0], trace.own(row)[1], accuracy.own(row)[1]) for row in rows]
        hollow = {index for index, row in enumerate(rows) if not row.get("equal")}
        draw_points(axes, experiment.styles[group], points, line=False, hollow=hollow)
        x_values += [point[0] for point in points]
    axes.set_xlabel(trace.label)
    scale_axis(axes.xaxis, x_values)
    _finish(axes, accuracy, experiment.saturated, [])


def _legend(figure, experiment: _Experiment, kinds: tuple[str, ...], lines: bool = False) -> None:
    """The groups that have models, and what filled markers mean."""
    groups = [
        group for group in experiment.groups() if any(line.group == group and line.kind in kinds for line in experiment.lines)
    ]
    handles = [experiment.styles[group].handle(lines) for group in groups]
    face = {"markerfacecolor": GREY, "markeredgecolor": GREY, "linestyle": "none"}
    handles.append(Line2D([], [], marker="o", **face, label=FILLED))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)), frameon=False, fontsize=9)


def _draw_frontier(axes, choice: Choice, style: Style) -> None:
    tried = sorted(choice.weights, key=lambda weight: weight.weight)
    points = [
        (weight.gap_increase, 100 * weight.accuracy, weight.gap_increase_se or 0, 100 * (weight.accuracy_se or 0))
        for weight in tried
    ]
    hollow = {index for index, weight in enumerate(tried) if weight.weight != choice.chosen}
    draw_points(axes, style, points, line=True, hollow=hollow)
    for index, (weight, point) in enumerate(zip(tried, points, strict=True)):
        place = {"xytext": (0, 9 if index % 2 == 0 else -15), "textcoords": "offset points", "ha": "center", "fontsize": 8}
        axes.annotate(f"{weight.weight:g}", point[:2], **place)
    for accuracy in sorted({weight.standard_accuracy for weight in tried}):
        axes.axhline(100 * accuracy, color="black", linestyle=(0, (6, 3)), linewidth=1.2)
    axes.axvline(choice.gap_allowed, color=GREY, linestyle=":", linewidth=1.2)
    axes.margins(0.12)
    axes.set_xlabel("gap increase over the standard model (nats)")
    axes.set_ylabel("accuracy (%)")
    axes.grid(True, color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)


@dataclasses.dataclass(frozen=True)
class Plot:
    """A plot as the page shows it.

    Attributes:
        name: of its files, without `.png` and `.svg`.
        panels: (what it shows, PNG file) of each panel, and of the legend.
    """

    name: str
    title: str
    caption: str
    panels: list[tuple[str, bytes]]


CAPTIONS = {
    STEPS: "Means over seeds against training steps, ± one standard error over seeds.",
    SIZES: "Means over seeds against the models' own sizes, ± one standard error over seeds; traces in the parameters of the "
    "largest model, by both rules of enlarging.",
    ALGORITHMS: "Means over seeds, ± one standard error over seeds (a single model: its measurement's own); small points: "
    "single models.",
}
TITLES = {STEPS: "Gap, trace and accuracy against steps", SIZES: "Against size", ALGORITHMS: "By algorithm"}


def write_plots(output, analysis: Analysis) -> dict[str, list[Plot]]:
    """Draw all plots that there are measurements for, each as NAME.png and NAME.svg.

    Returns:
        By experiment the plots, in the order in which they are shown.
    """
    output, styles, plots = Path(output), styles_of(analysis.experiments.groups()), {}

    def add(experiment: str, name: str, title: str, caption: str, figure, axes: list) -> None:
        panels = save_png_and_pieces(figure, output / f"{name}.png", axes, COLUMNS)
        save_svg(figure, output / f"{name}.svg")
        plots.setdefault(experiment, []).append(Plot(name, title, caption, panels))

    for name in analysis.tables:
        experiment = _experiment(analysis, name, styles)
        if experiment.quantities:
            figure, axes = make_figure(len(experiment.quantities), COLUMNS)
            for panel, quantity in zip(axes, experiment.quantities, strict=True):
                _AGAINST[name](panel, experiment, quantity)
            _legend(figure, experiment, ("transformer", LOOKUP_TABLE), lines=name == STEPS)
            add(
                name,
                name,
                TITLES[name],
                f"{CAPTIONS[name]} Dotted: the limit of saturation. {FILLED.capitalize()}.",
                figure,
                axes,
            )
        accuracies, traces = experiment.accuracies(), experiment.traces()
        if accuracies and traces:
            figure, axes = make_figure(len(accuracies) * len(traces), COLUMNS)
            pairs = [(accuracy, trace) for accuracy in accuracies for trace in traces]
            for panel, (accuracy, trace) in zip(axes, pairs, strict=True):
                _against_trace(panel, experiment, accuracy, trace)
            _legend(figure, experiment, ("transformer",))
            caption = f"One point a model, ± its measurement's own standard error. {FILLED.capitalize()}."
            add(name, f"{name}_accuracy_against_trace", "Accuracy against trace", caption, figure, axes)
        if name == ALGORITHMS and analysis.choice is not None:
            figure, (panel,) = make_figure(1, 1)
            groups = experiment.groups()
            _draw_frontier(panel, analysis.choice, styles[groups[min(1, len(groups) - 1)]])
            caption = "What each weight (number at its point) of the adversarial term costs and does; filled: the chosen one. "
            caption += "Dashed: the standard model's accuracy; dotted: the gap increase allowed."
            add(name, FRONTIER, "Gap increase against accuracy over adversarial weights", caption, figure, [panel])
    return plots
