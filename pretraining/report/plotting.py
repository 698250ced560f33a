"""What all plots share: figures of panels, axes, points with error bars, files that are a function of what they show."""

import io
import math
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave

from pcfg.common.files import atomic_open, atomic_path

MARKERS = "os^Dv<>phX"
DASHES = ("-", "--", "-.", ":")
LIGHTEST = 0.78  # of the colour map, whose end is too light for white paper
PANEL = (4.6, 3.4)  # inches
GREY = "0.45"
DPI = 130
MARGIN = 6  # pixels below the lowest panel of a picture in pieces


def compact(number: float) -> str:
    """A number of steps or parameters in at most a few characters.

    >>> [compact(n) for n in (0, 250, 1500, 40000, 2000000)]
    ['0', '250', '1.5k', '40k', '2M']
    """
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:g}"


def scale_axis(axis, values: list[float]) -> None:
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


def steps_axis(axes, steps: list[int]) -> None:
    """The horizontal axis of training steps: `steps` are those that are shown, sorted."""
    positive = [step for step in steps if step > 0]
    if positive and max(positive) / min(positive) > 3:
        axes.set_xscale("symlog", linthresh=min(positive), linscale=0.5)
    if len(steps) <= 6:
        axes.set_xticks(steps, [compact(step) for step in steps])
        axes.set_xticks([], minor=True)
    axes.set_xlabel("training steps")


def size_axis(axes, sizes: list[int]) -> None:
    """The horizontal axis of numbers of parameters: `sizes` are those that are shown, sorted."""
    if len(sizes) > 1:
        axes.set_xscale("log")
        axes.margins(x=0.12)
    if len(sizes) <= 6 and all(b / a > 1.25 for a, b in zip(sizes, sizes[1:], strict=False)):
        axes.set_xticks(sizes, [compact(size) for size in sizes])
        axes.set_xticks([], minor=True)


def draw_points(axes, series, points: list[tuple], line: bool, hollow=()) -> None:
    """Points (x, y, x error, y error) with error bars, joined by the series' line; those in `hollow` are not filled.

    Args:
        series: has a `colour`, a `marker` and a `dash`.
        hollow: indices of points.
    """
    if not points:
        return
    x, y, x_error, y_error = zip(*points, strict=True)
    axes.errorbar(x, y, y_error, x_error, color=series.colour, linestyle="none", capsize=2, elinewidth=1)
    if line:
        axes.plot(x, y, color=series.colour, linestyle=series.dash, linewidth=1.3)
    for index, point in enumerate(points):
        face = "white" if index in hollow else series.colour
        style = {"marker": series.marker, "markerfacecolor": face, "markeredgecolor": series.colour, "linestyle": "none"}
        axes.plot(point[0], point[1], **style)


def make_figure(panels: int, columns: int) -> tuple[Figure, list]:
    """A figure with `panels` axes in rows of `columns`."""
    columns = min(columns, panels)
    lines = math.ceil(panels / columns)
    size = (PANEL[0] * max(columns, 1.25), PANEL[1] * lines + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.09, h_pad=0.06)  # inches around each panel
    axes = figure.subplots(lines, columns, squeeze=False).ravel().tolist()
    for unused in axes[panels:]:
        unused.remove()
    return figure, axes[:panels]


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as a picture."""
    with atomic_path(path) as temporary:
        # No software version in the file: the same numbers give the same picture.
        figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})


def save_svg(figure: Figure, path: Path) -> None:
    """Write a figure that has been drawn before as a drawing for a paper; text as paths, which look the same everywhere."""
    figure.set_layout_engine("none")  # it is laid out
    # The names of what is drawn more than once are random unless there is a salt.
    with atomic_path(path) as temporary, matplotlib.rc_context({"svg.hashsalt": "report", "svg.fonttype": "path"}):
        figure.savefig(temporary, format="svg", metadata={"Date": None, "Creator": None})


def _borders(low: np.ndarray, high: np.ndarray, end: float) -> list[int]:
    """Where to cut between boxes low[i] .. high[i] along one direction, in order: from 0 to `end`."""
    middles = (np.maximum.accumulate(high)[:-1] + np.minimum.accumulate(low[::-1])[::-1][1:]) / 2
    return [0, *np.round(middles).astype(int).tolist(), round(end)]


def save_png_and_pieces(figure: Figure, path: Path, axes: list, columns: int) -> list[tuple[str, bytes]]:
    """Write a figure of `make_figure` as a picture, and give its pieces, for pages too narrow for the whole.

    Args:
        axes, columns: the panels and the columns that they stand in.

    Returns:
        (what it shows, PNG file) of each panel, then of the legend.
    """
    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture, renderer = np.asarray(canvas.buffer_rgba()), canvas.get_renderer()
    with atomic_open(path, "wb") as file:
        file.write(_png(picture))
    height = len(picture)
    columns = min(columns, len(axes))
    # Matplotlib counts from the bottom, pictures from the top.
    boxes = np.array([panel.get_tightbbox(renderer).extents for panel in axes])  # (panels, 4): left, bottom, right, top
    place = np.arange(len(axes))
    in_column, in_row = ([boxes[group == i] for i in range(group.max() + 1)] for group in (place % columns, place // columns))
    across = _borders(*(np.array([f(b[:, i]) for b in in_column]) for f, i in ((np.min, 0), (np.max, 2))), picture.shape[1])
    lowest = height - min(box[1] for box in boxes)
    down = _borders(*(np.array([f(height - b[:, i]) for b in in_row]) for f, i in ((np.min, 3), (np.max, 1))), lowest + MARGIN)
    pieces = []
    for index, panel in enumerate(axes):
        row, column = divmod(index, columns)
        piece = picture[down[row] : down[row + 1], across[column] : across[column + 1]]
        pieces.append((" ".join(f"{panel.get_ylabel()} against {panel.get_xlabel() or 'groups'}".split()), _png(piece)))
    for legend in figure.legends:
        left, bottom, right, top = legend.get_window_extent(renderer).extents
        piece = picture[round(height - top) : round(height - bottom), max(0, round(left)) : round(right)]
        pieces.append(("legend", _png(piece)))
    return pieces


def _png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    imsave(file, picture, format="png", dpi=DPI, metadata={"Software": None})
    return file.getvalue()
