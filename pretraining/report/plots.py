"""The plots of the report, each as PNG and SVG, drawn from the analysis and from nothing else.

A group has one colour and one marker in all plots. The colours are those of Okabe and Ito, which colour-blind readers can
distinguish, neighbours of different lightness; in grey the markers differ. Every seed is a small point. Means over seeds have
error bars of one standard error over seeds, single models those of their own measurement. Filled markers have one meaning:
saturated models.
"""

import base64
import dataclasses
import io
import itertools
import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from pcfg.common.files import atomic_open, atomic_path
from pretraining.experiments.study import Studies
from pretraining.report.analysis import Analysis
from pretraining.report.comparisons import Compared, Quantity
from pretraining.report.rows import BALANCED, CONSTANT_SHARE, GAP_NAME, LOOKUP_TABLE, MLM_LOSS, RELATIVE, TRACE, TRANSFORMER
from pretraining.report.sections import LABELS, Line, Section

COLOURS = ("#0072B2", "#E69F00", "#000000", "#D55E00", "#56B4E9", "#009E73", "#CC79A7")
MARKERS = "osD^vXP<>*p"
DASHES = ("-", "--", "-.", ":")
GREY = "0.45"
CONTROLS: dict[str, Any] = {"majority class": ":", "words": "--", "untrained": "-.", LOOKUP_TABLE: (0, (6, 3))}  # their dashes
PANEL = (4.6, 3.4)  # inches
COLUMNS = 2
DPI = 130
FILLED = "filled: saturated"
OVERVIEW = "overview"
SEEDS = "Means over seeds, ± one standard error over seeds; a single model has the error of its own measurement."
READING = f"{SEEDS} {FILLED.capitalize()}. Dotted: the limit of saturation (gap), the majority class (accuracy)."
Point = tuple[float, float, float, float, bool]  # x, y, error of x, error of y, whether the marker is filled


class Style(NamedTuple):
    """The appearance of a group."""

    colour: str
    marker: str
    dash: str


def _is_accuracy(name: str) -> bool:
    return name not in LABELS


@dataclasses.dataclass(frozen=True)
class Plot:
    """A plot of the page."""

    name: str  # of its files, without `.png` and `.svg`
    title: str
    caption: str
    panels: list[tuple[str, str]]  # (description, PNG file in base64) of each panel, and of the legend
    whole: str = ""  # the PNG file in base64 of a plot that wide screens show as a whole


class SectionPlots:
    """Draws the plots of one section into a folder.

    Attributes:
        quantities: gap, traces and accuracies of at least one model.
        plots: in the order in which they are shown.
    """

    def __init__(self, analysis: Analysis, section: Section, output: Path):
        self.analysis = analysis
        self.tree = analysis.tree
        self.section = section
        self.output = output
        self.plots: list[Plot] = []
        groups = list(dict.fromkeys(group for each in analysis.sections for group in each.groups))
        looks = zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS), itertools.cycle(DASHES), strict=False)
        self.styles = {group: Style(*look) for group, look in zip(groups, looks, strict=False)}
        self.lines = [line for line in analysis.lines[section.name] if line.kind == TRANSFORMER]
        names = [name for name in section.quantities if not (section.is_shape and name == GAP_NAME)]
        self.quantities = [name for name in names if any(line.values[name].n for line in self.lines)]
        self.accuracies = [name for name in self.quantities if _is_accuracy(name)]

    def axis_label(self, name: str) -> str:
        """A quantity with its unit."""
        if _is_accuracy(name):
            return f"accuracy, {self.analysis.label(name).partition(' (')[0]} (%)"
        unit = "" if name in (RELATIVE, CONSTANT_SHARE) else " (nats)"
        return f"{LABELS[name]}{' to the entropy' if name == GAP_NAME else ''}{unit}"

    def curves(self, solver: str) -> dict[str, list[str]]:
        """The accuracies of each label curve of a readout, by `curve_TASK_SOLVER`."""
        curves: dict[str, list[str]] = {}
        for name in self.accuracies:
            stem = name.rpartition("_")[0]
            if name.startswith("curve_") and stem.endswith(f"_{solver}"):
                curves.setdefault(stem, []).append(name)
        return curves

    def _point(self, name: str, line: Line, x: float) -> Point:
        """A line's mean at `x`; filled if all its models are saturated."""
        value = line.values[name]
        number, known = line.saturated
        scale = 100.0 if _is_accuracy(name) else 1.0
        return x, (value.mean or 0.0) * scale, 0.0, (value.error or 0.0) * scale, number == known > 0

    def by_line(self, axes: Axes, name: str) -> None:
        """Groups below each other: every seed as a small point, and the mean with its error."""
        values: list[float] = []
        scale = 100.0 if _is_accuracy(name) else 1.0  # per cent
        for place, line in enumerate(self.lines):
            if not line.values[name].n:
                continue
            style = self.styles[line.group]
            x, y, _, error, filled = self._point(name, line, place)
            _draw_points(axes, style, [(y, x, error, 0.0, filled)])
            members = [member for member in self.section.members if (member.group, member.step) == (line.group, line.step)]
            numbers = [member.number(self.tree, name)[0] for member in members]
            single = [number * scale for number in numbers if number is not None]
            if len(single) > 1:
                below = [place + 0.25] * len(single)
                axes.plot(single, below, marker=style.marker, color=style.colour, markersize=2.5, alpha=0.6, linestyle="none")
            values += [y, *single]
        several = len({line.step for line in self.lines}) > 1
        names = [f"{line.group}\nstep {line.step:,}" if several and line.step else line.group for line in self.lines]
        _name_rows(axes, names)
        self._finish(axes.xaxis, name, values, fontsize=9)
        if name == GAP_NAME:
            axes.set_xlim(left=0)

    def controls(self, name: str, majority: bool = False) -> dict[str, float]:
        """The controls of an accuracy in %, by their names in legends.

        `majority`: also that of the majority class, which in a study lies far below and would hide differences of models.
        """
        measured = self.tree.measured[name]
        values = {"majority class": measured["majority"].max()} if majority or not self.analysis.studies else {}
        for control, of_control in self.analysis.controls.items():
            if name in of_control:
                values[LOOKUP_TABLE if control == "lookup" else control] = of_control[name].mean
        if not self.analysis.studies and (table := measured["value"][self.tree.models["kind"] == LOOKUP_TABLE].dropna()).size:
            values[LOOKUP_TABLE] = table.iloc[0]
        return {control: value * 100 for control, value in values.items() if value is not None}

    def label_curve(self, axes: Axes, names: list[str]) -> None:
        """Accuracies against the number of labelled sentences, a line per group, with the controls."""
        labels = [int(name.rpartition("_")[2]) for name in names]
        pairs = list(zip(labels, names, strict=True))
        for line in self.lines:
            points = [self._point(name, line, x) for x, name in pairs if line.values[name].mean is not None]
            _draw_points(axes, self.styles[line.group], points, line=True)
        of_controls = [(x, self.controls(name, majority=True)) for x, name in pairs]
        for control, dash in CONTROLS.items():
            if curve := [(x, values[control]) for x, values in of_controls if control in values]:
                axes.plot(*zip(*curve, strict=True), color=GREY, linestyle=dash, linewidth=1.2)
        axes.set_xscale("log")
        _few_ticks(axes, labels)
        axes.set_xlabel("labelled sentences")
        axes.set_ylabel(f"accuracy of {self.analysis.label(names[0]).partition(',')[0]} (%)")

    def changes(self, axes: Axes, name: str) -> None:
        """The changes of a quantity with their intervals, comparisons below each other, and the margin."""
        compared = self.compared_with(name)
        for place, (_, quantity) in enumerate(compared):
            change = quantity.change
            scale = 100.0 if _is_accuracy(name) else 100.0 / abs(quantity.before.mean or 1.0)
            if change is None:
                continue
            if change.low is not None and change.high is not None:
                axes.plot([change.low * scale, change.high * scale], [place, place], color="black", linewidth=1.3)
            face = "black" if change.sign() else "white"
            axes.plot(change.value * scale, place, marker="o", markerfacecolor=face, markeredgecolor="black", linestyle="none")
        if self.analysis.studies:
            criteria = self.analysis.studies.criteria
            margin = 100 * (criteria.accuracy_margin if _is_accuracy(name) else criteria.trace_margin)
            axes.axvspan(-margin, margin, color="0.9", zorder=0)
        axes.axvline(0, color=GREY, linewidth=1)
        _name_rows(axes, [one.name for one, _ in compared])
        label = self.analysis.label(name) if _is_accuracy(name) else LABELS[name]
        axes.set_xlabel(f"change of {label} ({'points' if _is_accuracy(name) else '% of before'})")

    def compared_with(self, name: str) -> list[tuple[Compared, Quantity]]:
        """The comparisons that have a quantity."""
        compared = self.analysis.compared.get(self.section.name, [])
        return [(one, quantity) for one in compared for quantity in one.quantities if quantity.name == name]

    def against_steps(self, axes: Axes, name: str) -> None:
        """Means against training steps, a line per group."""
        steps = set()
        values = []
        for group in self.section.groups:
            lines = [line for line in self.lines if line.group == group and line.step is not None and line.values[name].n]
            points = [self._point(name, line, line.step or 0) for line in lines]
            _draw_points(axes, self.styles[group], points, line=True)
            steps |= {line.step for line in lines if line.step is not None}
            values += [point[1] for point in points]
        positive = [step for step in steps if step > 0]
        if positive and max(positive) / min(positive) > 3:
            axes.set_xscale("symlog", linthresh=min(positive), linscale=0.5)
        _few_ticks(axes, sorted(steps))
        axes.set_xlabel("training steps")
        self._finish(axes.yaxis, name, values)

    def against_size(self, axes: Axes, name: str) -> None:
        """Means against the number of parameters, each group at its last measured step."""
        last = {line.group: line for line in self.lines if line.values[name].n and line.parameters}
        lines = sorted(last.values(), key=lambda line: line.parameters or 0)
        points = [self._point(name, line, line.parameters or 0) for line in lines]
        for line, point in zip(lines, points, strict=True):
            _draw_points(axes, self.styles[line.group], [point])
        axes.plot([point[0] for point in points], [point[1] for point in points], color=GREY, linewidth=1, zorder=0)
        sizes = sorted({line.parameters for line in lines if line.parameters})
        if len(sizes) > 1:
            axes.set_xscale("log")
            axes.margins(x=0.12)
        if all(b / a > 1.25 for a, b in itertools.pairwise(sizes)):
            _few_ticks(axes, sizes)
        axes.set_xlabel("parameters")
        self._finish(axes.yaxis, name, [point[1] for point in points])

    def against_trace(self, axes: Axes, pair: tuple[str, str]) -> None:
        """An accuracy against a trace, one point per model."""
        accuracy, trace = pair
        by_group: dict[str, list[Point]] = {}
        for member in self.section.members:
            (x, x_error), (y, y_error) = (member.number(self.tree, name) for name in (trace, accuracy))
            if x is not None and y is not None:
                filled = bool(self.section.is_saturated(self.tree, member))
                errors = (0.0, 0.0) if self.analysis.studies else (x_error or 0.0, 100 * (y_error or 0.0))
                by_group.setdefault(member.group, []).append((x, 100 * y, *errors, filled))
        for group, points in by_group.items():
            _draw_points(axes, self.styles[group], points)
        axes.set_xlabel(self.axis_label(trace))
        _scale_axis(axes.xaxis, [point[0] for points in by_group.values() for point in points])
        self._finish(axes.yaxis, accuracy, [])

    def during_training(self, axes: Axes, what: str | tuple[str, str]) -> None:
        """A quantity against training steps, or an accuracy against a trace."""
        if isinstance(what, tuple):
            self.against_trace(axes, what)
        else:
            self.against_steps(axes, what)

    def _finish(self, axis: Axis, name: str, values: list[float], **font: Any) -> None:
        """Label, scale and reference lines of the axis of a quantity."""
        axis.set_label_text(self.axis_label(name), **font)
        draw_line = axis.axes.axhline if axis is axis.axes.yaxis else axis.axes.axvline
        if name == GAP_NAME:
            draw_line(self.analysis.criterion.max_gap, color=GREY, linestyle=":", linewidth=1.2)
        if not _is_accuracy(name):
            _scale_axis(axis, values)
            return
        for control, value in self.controls(name).items():
            draw_line(value, color=GREY, linestyle=CONTROLS[control], linewidth=1.2)

    def legend(self, names: Collection[str], lines: bool = False, groups: bool = True, majority: bool = False) -> list[Line2D]:
        """The groups that have models, the meaning of filled markers, and the controls where accuracies are shown."""
        handles = []
        for group in dict.fromkeys(line.group for line in self.lines) if groups else ():
            style = self.styles[group]
            dash: Any = style.dash if lines else "none"
            handles.append(Line2D([], [], color=style.colour, marker=style.marker, linestyle=dash, label=group))
        face: dict[str, Any] = {"markerfacecolor": GREY, "markeredgecolor": GREY, "linestyle": "none"}
        handles.append(Line2D([], [], marker="o", **face, label=FILLED))
        controls = {control for name in names if _is_accuracy(name) for control in self.controls(name, majority)}
        dashes = [(control, dash) for control, dash in CONTROLS.items() if control in controls]
        return handles + [Line2D([], [], color=GREY, linestyle=dash, label=control) for control, dash in dashes]

    def add(
        self,
        name: str,
        title: str,
        text: str,
        draw: Callable[[Axes, Any], None],
        what: Sequence,
        columns: int = COLUMNS,
        size: tuple[float, float] = PANEL,
        has_legend: bool = True,
        **legend: bool,
    ) -> None:
        """Write NAME.png and NAME.svg, a panel for each of `what`, next to each other in `columns`, each of `size` inches.

        `text` is the caption after the title, `legend` the arguments of the method.
        """
        figure, axes = _make_figure(len(what), columns, size)
        panels = []
        for place, (panel, of_panel) in enumerate(zip(axes, what, strict=True)):
            draw(panel, of_panel)
            # On a page each panel is a picture of its own, which narrow screens show below each other.
            single, (alone,) = _make_figure(1, 1, PANEL if columns == COLUMNS else (PANEL[0], size[1]))
            draw(alone, of_panel)
            label = f"{panel.get_ylabel() or 'groups'} against {panel.get_xlabel()}"
            panels.append((" ".join(label.split()), _in_base64(_png(single))))
            if columns > COLUMNS and place % columns:  # the groups are named once
                panel.set_yticklabels([])
        if has_legend:
            names = [name for of_panel in what for name in ([of_panel] if isinstance(of_panel, str) else of_panel)]
            handles = self.legend(names, **legend)
            options: dict[str, Any] = {"handles": handles, "ncols": min(3, len(handles)), "frameon": False, "fontsize": 9}
            figure.legend(loc="outside lower center", **options)
            alone_legend = Figure(figsize=(2 * PANEL[0], 1))
            alone_legend.legend(loc="center", **options)
            panels.append(("legend", _in_base64(_png(alone_legend, bbox_inches="tight"))))
        picture = _png(figure)
        with atomic_open(self.output / f"{name}.png", "wb") as file:
            file.write(picture)
        _save_svg(figure, self.output / f"{name}.svg")
        self.plots.append(Plot(name, title, title + text, panels, _in_base64(picture) if columns > COLUMNS else ""))

    def draw_study(self, studies: Studies) -> None:
        """The plots of a study: overview, changes, label curves, accuracy against balanced trace."""
        suffix = "" if len(self.analysis.sections) == 1 else f"_{self.section.name}"
        curves = self.curves(studies.readouts[0])
        ends = [name for names in curves.values() for name in dict.fromkeys([names[-1], names[0]])]
        loss = [name for name in (GAP_NAME, MLM_LOSS, TRACE, BALANCED) if name in self.quantities]
        names = loss + ends[1::-1]
        height = 1.1 + 0.42 * len(self.lines)
        reading = f"; every small point is one seed. {SEEDS} {FILLED.capitalize()}."
        probes = f" Accuracies: linear probes by {studies.readouts[0]}."
        title = "Loss, flatness and accuracy"
        text = f"{reading}{' Dotted line of the gap: the limit.' if GAP_NAME in loss else ''}{probes}"
        self.add(f"{OVERVIEW}{suffix}", title, text, self.by_line, names, len(names), (2.7, height), groups=False)
        if further := [name for name in self.quantities if name in LABELS and name not in loss] + ends[2:]:
            title = "Further measures of flatness, and further accuracies"
            size = (PANEL[0], height)
            self.add(f"further{suffix}", title, reading + probes, self.by_line, further, size=size, groups=False)
        changes = [name for name in (TRACE, BALANCED, RELATIVE, *ends) if any(q.change for _, q in self.compared_with(name))]
        if changes:
            title = "Changes with their 95% intervals"
            text = "; grey: the margin. Filled: the interval lies off 0."
            size = (PANEL[0], 1.1 + 0.3 * max(len(self.compared_with(name)) for name in changes))
            self.add(f"changes{suffix}", title, text, self.changes, changes, size=size, has_legend=False)
        if curves:
            title = "Accuracy against the number of labelled sentences"
            what = [*curves.values()]
            self.add(f"curves{suffix}", title, f". {SEEDS}", self.label_curve, what, lines=True, majority=True)
        if ends and BALANCED in self.quantities:
            title = "Accuracy against balanced trace, one point per model"
            pairs = [(name, BALANCED) for name in ends]
            self.add(f"accuracy_against_balanced{suffix}", title, f". {FILLED.capitalize()}.", self.against_trace, pairs)

    def draw_models(self) -> None:
        """The plots of models that nobody planned."""
        name = self.section.name
        pairs = []
        title = "Trace in the parameters of the largest model, by both rules of enlarging, against size"
        if not self.section.is_shape:
            traces = [trace for trace in self.quantities if trace.startswith(TRACE)]
            pairs = list(itertools.product(self.accuracies, traces))
            title = "Gap, trace and accuracy during training, and accuracy against trace"
            self.add(OVERVIEW, title, f". {READING}", self.during_training, [*self.quantities, *pairs[:1]], lines=True)
            title = "Last checkpoints: gap, trace and accuracy against size"
        self.add(f"{name}_against_size", title, f". {READING}", self.against_size, self.quantities)
        if pairs:
            title = "Accuracy against trace, one point per model"
            text = f", ± the standard errors of its own measurements. {FILLED.capitalize()}. Dotted: the majority class."
            self.add(f"{name}_accuracy_against_trace", title, text, self.against_trace, pairs)


def write_plots(output: Path | str, analysis: Analysis) -> dict[str, list[Plot]]:
    """Draw all plots that there are measurements for; returns them by section, in the order in which they are shown."""
    plots = {}
    for section in analysis.sections:
        own = SectionPlots(analysis, section, Path(output))
        if own.quantities:
            own.draw_study(analysis.studies) if analysis.studies else own.draw_models()
        plots[section.name] = own.plots
    return plots


def _name_rows(axes: Axes, names: list[str]) -> None:
    """A vertical axis with names below each other."""
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)


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
    for state, face in ((True, style.colour), (False, "white")):
        if of_state := [(a, b) for a, b, is_filled in zip(x, y, filled, strict=True) if is_filled == state]:
            colours: dict[str, Any] = {"markerfacecolor": face, "markeredgecolor": style.colour}
            axes.plot(*zip(*of_state, strict=True), marker=style.marker, linestyle="none", **colours)


def _make_figure(panels: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure with `panels` axes of `size` inches in rows of at most `columns`."""
    columns = min(columns, panels)
    lines = math.ceil(panels / columns)
    layout = ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.06)  # inches around each panel
    figure = Figure(figsize=(size[0] * columns, size[1] * lines + 0.6), layout=layout)
    axes = [figure.add_subplot(lines, columns, place + 1) for place in range(panels)]
    for panel in axes:
        panel.grid(True, color="0.9", linewidth=0.6)
        panel.set_axisbelow(True)
    return figure, axes


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


def _in_base64(picture: bytes) -> str:
    return base64.b64encode(picture).decode()
