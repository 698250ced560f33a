"""The plots of the report, each as PNG and SVG, drawn from the analysis and from nothing else.

A group has one colour and one marker in all plots. The colours are those of Okabe and Ito, which colour-blind readers can
distinguish, neighbours of different lightness; in grey the markers differ. Means over seeds have error bars of one standard
error over seeds, single models those of their own measurement. Filled markers have one meaning: the same loss as the reference.
"""

import base64
import dataclasses
import io
import itertools
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from pcfg.common.files import atomic_open, atomic_path
from pretraining.report.analysis import Analysis, Line
from pretraining.report.contract import ALGORITHMS, MODELS, SIZES, STEPS, Choice
from pretraining.report.rows import COMMON_TRACES, LOOKUP_TABLE, TRACE, TRANSFORMER, accuracy_label, own_error, trace_names
from pretraining.report.same_loss import is_true

COLOURS = ("#0072B2", "#E69F00", "#000000", "#D55E00", "#56B4E9", "#009E73", "#CC79A7")
MARKERS = "osD^vXP<>*p"
DASHES = ("-", "--", "-.", ":")
GREY = "0.45"
PANEL = (4.6, 3.4)  # inches
COLUMNS = 2
DPI = 130
FILLED = "filled: same loss as the reference"
FRONTIER = "adversarial_frontier"
Point = tuple[float, float, float, float, bool]  # x, y, error of x, error of y, whether the marker is filled


@dataclasses.dataclass(frozen=True)
class Style:
    """The appearance of a group."""

    label: str
    colour: str
    marker: str
    dash: str

    def handle(self, line: bool) -> Line2D:
        """The group in a legend, its markers joined by a line or not."""
        dash: Any = self.dash if line else "none"
        return Line2D([], [], color=self.colour, marker=self.marker, linestyle=dash, label=self.label)


def styles_of(groups: list[str]) -> dict[str, Style]:
    """A style per group, by its place among the groups of all experiments."""
    return {
        group: Style(group, COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], DASHES[i % len(DASHES)])
        for i, group in enumerate(groups)
    }


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A quantity and its axis: `scale` is the factor to the unit of the axis (100 for per cent)."""

    name: str
    label: str
    scale: float = 1.0

    def is_in(self, line: Line) -> bool:
        """Whether it was measured for a line."""
        return line.values[self.name].mean is not None

    def point(self, x: float | None, line: Line) -> Point:
        """A line's mean at `x`; filled if all its models have the same loss as the reference."""
        value = line.values[self.name]
        number, known = line.same_loss
        return x or 0, (value.mean or 0.0) * self.scale, 0.0, (value.error or 0.0) * self.scale, number == known > 0


def _quantity(name: str) -> Quantity:
    if name == "gap":
        return Quantity(name, "gap to the entropy (nats)")
    if name == TRACE:
        return Quantity(name, "trace of the Hessian (nats)")
    if name in COMMON_TRACES.values():
        return Quantity(name, f"trace in the largest model's\nparameters (nats), rule {name.removeprefix('trace_by_')}")
    return Quantity(name, f"accuracy of {accuracy_label(name)} (%)", 100.0)


@dataclasses.dataclass(frozen=True)
class Plot:
    """A plot of the page."""

    name: str  # of its files, without `.png` and `.svg`
    title: str
    caption: str
    panels: list[tuple[str, str]]  # (description, PNG file in base64) of each panel, and of the legend


class ExperimentPlots:
    """Draws the plots of one experiment.

    Attributes:
        quantities: gap, traces and accuracies of at least one model (of two groups where groups are compared).
    """

    def __init__(self, analysis: Analysis, name: str, styles: dict[str, Style]):
        self.analysis = analysis
        self.styles = styles
        self.experiment = analysis.experiment(name)
        self.models = analysis.of(name)
        self.lines = analysis.tables[name]
        traces = trace_names(self.experiment)
        is_shape = self.experiment.rule == MODELS and self.experiment.has_common_traces
        names = traces if is_shape else ["gap", *traces, *analysis.names]
        # One group alone is nothing to compare; steps compare within a group.
        fewest = 1 if self.experiment.rule in (STEPS, MODELS) else 2
        lines = [line for line in self.lines if line.kind == TRANSFORMER]
        measured = {name: {line.group for line in lines if line.values[name].n} for name in names}
        self.quantities = [_quantity(name) for name, groups in measured.items() if len(groups) >= fewest]
        self.accuracies = [quantity for quantity in self.quantities if quantity.scale != 1.0]
        self.traces = [quantity for quantity in self.quantities if quantity.name.startswith(TRACE)]

    def against_steps(self, axes: Axes, quantity: Quantity) -> None:
        """Means against training steps, a line per group."""
        steps = set()
        values = []
        for group in self.experiment.groups:
            lines = [line for line in self.lines if line.group == group and line.step is not None and quantity.is_in(line)]
            points = [quantity.point(line.step, line) for line in lines]
            _draw_points(axes, self.styles[group], points, line=True)
            steps |= {line.step for line in lines if line.step is not None}
            values += [point[1] for point in points]
        _steps_axis(axes, sorted(steps))
        self._finish(axes, quantity, values)

    def against_size(self, axes: Axes, quantity: Quantity) -> None:
        """Means against the number of parameters, each group at its last measured step."""
        last = {line.group: line for line in self.lines if quantity.is_in(line) and line.parameters}
        lines = sorted(last.values(), key=lambda line: line.parameters or 0)
        points = [quantity.point(line.parameters, line) for line in lines]
        for line, point in zip(lines, points, strict=True):
            _draw_points(axes, self.styles[line.group], [point])
        axes.plot([point[0] for point in points], [point[1] for point in points], color=GREY, linewidth=1, zorder=0)
        _size_axis(axes, sorted({line.parameters for line in lines if line.parameters}))
        self._finish(axes, quantity, [point[1] for point in points])

    def by_group(self, axes: Axes, quantity: Quantity) -> None:
        """Groups side by side: the mean with its error, and single models as small points next to it."""
        values: list[float] = []
        last = {line.group: line for line in self.lines if quantity.is_in(line)}
        groups = self.experiment.groups
        for place, group in enumerate(groups):
            if group not in last:
                continue
            style = self.styles[group]
            point = quantity.point(place, last[group])
            _draw_points(axes, style, [point])
            rows = self.models.rows
            of_line = rows["group"].eq(group) & (rows["step"].eq(last[group].step).fillna(False) | rows["step"].isna())
            single = (self.models.select(of_line).of(quantity.name)["value"].dropna() * quantity.scale).tolist()
            if len(single) > 1:
                x = [place + 0.2] * len(single)
                axes.plot(x, single, marker=style.marker, color=style.colour, markersize=3, linestyle="none")
            values += [point[1], *single]
        axes.set_xlim(-0.5, len(groups) - 0.5)
        axes.set_xticks(range(len(groups)), groups, rotation=20 if len(groups) > 4 else 0)
        self._finish(axes, quantity, values)

    def against_trace(self, axes: Axes, accuracy: Quantity, trace: Quantity) -> None:
        """An accuracy against a trace, one point per model."""
        x_values: list[float] = []
        for group in self.experiment.groups:
            models = self.models.select(self.models.rows["group"].eq(group) & self.models.rows["kind"].eq(TRANSFORMER))
            numbers = {}
            for axis, quantity in (("x", trace), ("y", accuracy)):
                of_quantity = models.of(quantity.name)
                numbers[axis] = of_quantity["value"] * quantity.scale
                numbers[f"{axis}_error"] = own_error(of_quantity).fillna(0.0) * quantity.scale
            points = pd.DataFrame(numbers).dropna()
            points["is_filled"] = is_true(models.rows["same_loss"].reindex(points.index))
            columns = [points[name].tolist() for name in ("x", "y", "x_error", "y_error", "is_filled")]
            _draw_points(axes, self.styles[group], list(zip(*columns, strict=True)))
            x_values += points["x"].tolist()
        axes.set_xlabel(trace.label)
        _scale_axis(axes.xaxis, x_values)
        self._finish(axes, accuracy, [])

    def _finish(self, axes: Axes, quantity: Quantity, values: list[float]) -> None:
        """Label, grid, scale and reference lines of the vertical axis."""
        axes.set_ylabel(quantity.label)
        if quantity.name == "gap":
            axes.axhline(self.analysis.experiments.saturated, color=GREY, linestyle=":", linewidth=1.2)
        if quantity.scale == 1.0:
            _scale_axis(axes.yaxis, values)
            return
        of_quantity = self.analysis.tree.measured[quantity.name]
        for share in sorted(of_quantity["majority"].dropna().unique()):
            axes.axhline(share * quantity.scale, color=GREY, linestyle=":", linewidth=1.2)
        if self.experiment.rule != ALGORITHMS:  # where the table is a group itself
            for value in of_quantity["value"][self.analysis.tree.models["kind"] == LOOKUP_TABLE].dropna():
                axes.axhline(value * quantity.scale, color="black", linestyle=(0, (6, 3)), linewidth=1.2)

    def legend(self, quantities: Collection[Quantity], lines: bool = False) -> list[Line2D]:
        """The groups that have models, the meaning of filled markers, and reference lines where accuracies are shown."""
        own = self.experiment.rule == ALGORITHMS
        drawn = {line.group for line in self.lines if line.kind == TRANSFORMER or (own and line.kind)}
        handles = [self.styles[group].handle(lines) for group in self.experiment.groups if group in drawn]
        face: dict[str, Any] = {"markerfacecolor": GREY, "markeredgecolor": GREY, "linestyle": "none"}
        handles.append(Line2D([], [], marker="o", **face, label=FILLED))
        if any(quantity.scale != 1.0 for quantity in quantities):
            handles.append(Line2D([], [], color=GREY, linestyle=":", label="majority class"))
            if not own and (self.analysis.tree.models["kind"] == LOOKUP_TABLE).any():
                handles.append(Line2D([], [], color="black", linestyle=(0, (6, 3)), label="lookup table"))
        return handles


SEEDS = "Means over seeds, ± one standard error over seeds; a single model has the error of its own measurement."
AGAINST = {
    STEPS: [("", "Gap, trace and accuracy against training steps", ExperimentPlots.against_steps)],
    SIZES: [("", "Gap, trace and accuracy against the models' own sizes", ExperimentPlots.against_size)],
    ALGORITHMS: [("", "Gap, trace and accuracy by algorithm, small points: single models", ExperimentPlots.by_group)],
    MODELS: [
        ("_against_steps", "Gap, trace and accuracy against training steps", ExperimentPlots.against_steps),
        ("_against_size", "Last checkpoints: gap, trace and accuracy against size", ExperimentPlots.against_size),
    ],
}


def write_plots(output: Path | str, analysis: Analysis) -> dict[str, list[Plot]]:
    """Draw all plots that there are measurements for, each as NAME.png and NAME.svg.

    Returns:
        By experiment the plots, in the order in which they are shown.
    """
    styles = styles_of(analysis.experiments.groups)
    plots: dict[str, list[Plot]] = {}

    def add(experiment: str, name: str, title: str, caption: str, draw: list[Callable[[Axes], None]], legend: list) -> None:
        figure, axes = _make_figure(len(draw))
        panels = []
        for panel, draw_panel in zip(axes, draw, strict=True):
            draw_panel(panel)
            # On a page each panel is a picture of its own, which narrow screens show below each other.
            single, (alone,) = _make_figure(1)
            draw_panel(alone)
            label = f"{panel.get_ylabel()} against {panel.get_xlabel() or 'groups'}"
            panels.append((" ".join(label.split()), base64.b64encode(_png(single)).decode()))
        if legend:
            options = {"handles": legend, "ncols": min(3, len(legend)), "frameon": False, "fontsize": 9}
            figure.legend(loc="outside lower center", **options)
            alone_legend = Figure(figsize=(2 * PANEL[0], 1))
            alone_legend.legend(loc="center", **options)
            panels.append(("legend", base64.b64encode(_png(alone_legend, bbox_inches="tight")).decode()))
        with atomic_open(Path(output) / f"{name}.png", "wb") as file:
            file.write(_png(figure))
        _save_svg(figure, Path(output) / f"{name}.svg")
        plots.setdefault(experiment, []).append(Plot(name, title, caption, panels))

    def bind(function: Callable, *of: Any) -> Callable[[Axes], None]:
        return lambda axes: function(axes, *of)

    for name in analysis.tables:
        own = ExperimentPlots(analysis, name, styles)
        is_shape = own.experiment.rule == MODELS and own.experiment.has_common_traces
        pairs = [] if is_shape else [(accuracy, trace) for accuracy in own.accuracies for trace in own.traces]
        reading = f"{SEEDS} {FILLED.capitalize()}. Dotted: the limit of saturation (gap), the majority class (accuracy)."
        if own.experiment.rule == MODELS and not is_shape and own.quantities:
            shown = [q for q in own.quantities if q.scale == 1.0] + own.accuracies[:1]
            draw = [bind(own.against_steps, quantity) for quantity in shown]
            draw += [bind(own.against_trace, *pair) for pair in pairs[:1]]
            title = "Gap, trace and accuracy during training, and accuracy against trace"
            add(name, "overview", title, f"{title}. {reading}", draw, own.legend(shown, lines=True))
        for suffix, title, function in AGAINST[own.experiment.rule]:
            if own.quantities and not (is_shape and function is ExperimentPlots.against_steps):
                draw = [bind(function.__get__(own), quantity) for quantity in own.quantities]
                has_lines = function is ExperimentPlots.against_steps
                if own.experiment.has_common_traces:
                    title += "; traces in the parameters of the largest model, by both rules of enlarging"
                add(name, name + suffix, title, f"{title}. {reading}", draw, own.legend(own.quantities, has_lines))
        if pairs:
            title = "Accuracy against trace, one point per model"
            caption = (
                f"{title}, ± the standard errors of its own measurements. {FILLED.capitalize()}. Dotted: the majority class."
            )
            draw = [bind(own.against_trace, *pair) for pair in pairs]
            add(name, f"{name}_accuracy_against_trace", title, caption, draw, own.legend(own.accuracies))
        if own.experiment.rule == ALGORITHMS and analysis.choice is not None:
            groups = own.experiment.groups
            style = styles[groups[min(1, len(groups) - 1)]]
            caption = "What each weight (number at its point) of the adversarial term costs and does; filled: the chosen one. "
            caption += "Dashed: the standard model's accuracy; dotted: the margin of the same loss."
            title = "Gap increase against accuracy over adversarial weights"
            add(name, FRONTIER, title, caption, [bind(_draw_frontier, analysis.choice, style)], [])
    return plots


def _draw_frontier(axes: Axes, choice: Choice, style: Style) -> None:
    tried = sorted(choice.weights, key=lambda weight: weight.weight)
    x = [weight.gap_increase for weight in tried]
    x_error = [weight.gap_increase_se or 0 for weight in tried]
    y = [100 * weight.accuracy for weight in tried]
    y_error = [100 * (weight.accuracy_se or 0) for weight in tried]
    points = list(zip(x, y, x_error, y_error, [weight.weight == choice.chosen for weight in tried], strict=True))
    _draw_points(axes, style, points, line=True)
    for index, (weight, point) in enumerate(zip(tried, points, strict=True)):
        offset = (0, 9 if index % 2 == 0 else -15)
        axes.annotate(f"{weight.weight:g}", point[:2], offset, textcoords="offset points", ha="center", fontsize=8)
    for accuracy in sorted({weight.standard_accuracy for weight in tried}):
        axes.axhline(100 * accuracy, color="black", linestyle=(0, (6, 3)), linewidth=1.2)
    axes.axvline(choice.gap_allowed, color=GREY, linestyle=":", linewidth=1.2)
    axes.margins(0.12)
    axes.set_xlabel("gap increase over the standard model (nats)")
    axes.set_ylabel("accuracy (%)")


def compact(number: float) -> str:
    """A number of steps or parameters in at most a few characters.

    >>> [compact(n) for n in (0, 250, 1500, 40000, 2000000)]
    ['0', '250', '1.5k', '40k', '2M']
    """
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:g}"


def _scale_axis(axis: Axis, values: list[float]) -> None:
    """A logarithmic axis for positive values that span more than a factor of 10; a symmetric one if some are not positive."""
    positive = [value for value in values if value > 0]
    if not positive or max(positive) / min(positive) <= 10:
        return
    owner = axis.axes
    set_scale = owner.set_yscale if axis is owner.yaxis else owner.set_xscale
    if len(positive) == len(values):
        set_scale("log", nonpositive="clip")
    else:
        set_scale("symlog", linthresh=min(positive), linscale=0.4)
    formatter = matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}")
    axis.set_major_formatter(formatter)
    if max(positive) / min(positive) < 100:  # few decades: the tens alone would leave an axis with one number
        axis.set_minor_locator(matplotlib.ticker.LogLocator(subs=(2.0, 5.0)))
        axis.set_minor_formatter(formatter)
    else:
        axis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def _steps_axis(axes: Axes, steps: list[int]) -> None:
    """The horizontal axis of training steps: `steps` are those that are shown, sorted."""
    positive = [step for step in steps if step > 0]
    if positive and max(positive) / min(positive) > 3:
        axes.set_xscale("symlog", linthresh=min(positive), linscale=0.5)
    _few_ticks(axes, steps)
    axes.set_xlabel("training steps")


def _size_axis(axes: Axes, sizes: list[int]) -> None:
    """The horizontal axis of numbers of parameters: `sizes` are those that are shown, sorted."""
    if len(sizes) > 1:
        axes.set_xscale("log")
        axes.margins(x=0.12)
    if all(b / a > 1.25 for a, b in itertools.pairwise(sizes)):
        _few_ticks(axes, sizes)
    axes.set_xlabel("parameters")


def _few_ticks(axes: Axes, numbers: list[int]) -> None:
    """Ticks at the numbers themselves, if they are few."""
    if len(numbers) <= 6:
        axes.set_xticks(numbers, [compact(number) for number in numbers])
        axes.set_xticks([], minor=True)


def _draw_points(axes: Axes, style: Style, points: list[Point], line: bool = False) -> None:
    """Points with error bars, joined by the group's line if `line`."""
    if not points:
        return
    x, y, x_error, y_error, filled = zip(*points, strict=True)
    axes.errorbar(x, y, y_error, x_error, color=style.colour, linestyle="none", capsize=2, elinewidth=1)
    if line:
        axes.plot(x, y, color=style.colour, linestyle=style.dash, linewidth=1.3)
    for x_of, y_of, is_filled in zip(x, y, filled, strict=True):
        colours: dict[str, Any] = {"markerfacecolor": style.colour if is_filled else "white", "markeredgecolor": style.colour}
        axes.plot(x_of, y_of, marker=style.marker, linestyle="none", **colours)


def _make_figure(panels: int) -> tuple[Figure, list[Axes]]:
    """A figure with `panels` axes in rows of `COLUMNS`."""
    columns = min(COLUMNS, panels)
    lines = math.ceil(panels / columns)
    layout = ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.06)  # inches around each panel
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * lines + 0.6), layout=layout)
    axes = figure.subplots(lines, columns, squeeze=False).ravel().tolist()
    for unused in axes[panels:]:
        unused.remove()
    for panel in axes[:panels]:
        panel.grid(True, color="0.9", linewidth=0.6)
        panel.set_axisbelow(True)
    return figure, axes[:panels]


def _save_svg(figure: Figure, path: Path) -> None:
    """Write a figure that has been drawn before as a drawing for a paper; text as paths, which look the same everywhere."""
    figure.set_layout_engine("none")  # it is laid out
    # The names of what is drawn more than once are random unless there is a salt.
    with atomic_path(path) as temporary, matplotlib.rc_context({"svg.hashsalt": "report", "svg.fonttype": "path"}):
        figure.savefig(temporary, format="svg", metadata={"Date": None, "Creator": None})


def _png(figure: Figure, **options: Any) -> bytes:
    file = io.BytesIO()
    # No software version in the file: the same numbers give the same picture.
    figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None}, **options)
    return file.getvalue()
