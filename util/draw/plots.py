"""The curves of one or several runs as a picture."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from util.draw.curves import MAX_MARKERS, Curve, Panel, Row, panels_of, run_colors
from util.errors import UserError

LINE_STYLES: tuple[Literal["-", "--", ":"], ...] = ("-", "--", ":")
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "pdf.fonttype": 42,
    "savefig.dpi": 200,
}


def plot_run(logs: Mapping[str, Sequence[Row]], output: str | Path) -> None:
    """Draw the curves of runs over each other into a picture, in the format of its suffix.

    Args:
        logs: name of the run -> its rows, as `read_log` gives. A panel without a value stays empty.
        output: for example curve.png or curve.pdf; its folder must exist.

    Raises:
        OSError: the file cannot be written.
        UserError: there is no row at all, or matplotlib does not know the suffix.
    """
    # Matplotlib's own messages would not say what to do.
    if not any(logs.values()):
        raise UserError("there is nothing to plot: no run has a row")
    check_format(output)

    # The legend has as many columns as fit with the longest name.
    names, colors = [_legend_name(name) for name in logs], run_colors(len(logs))
    columns = max(1, min(len(names), 6, 180 // (max(map(len, names)) + 8)))
    legend_rows = math.ceil(len(names) / columns)
    panels = panels_of(list(logs.values()))

    with mpl.rc_context(STYLE):
        # a Figure of its own: pyplot would look for a screen
        rows = math.ceil(len(panels) / 3)
        figure = Figure(figsize=(15, 3 * rows + 0.2 + 0.22 * legend_rows), layout="constrained")
        places = figure.subplots(rows, 3).flat
        for (panel, curves), axes in zip(panels, places, strict=False):
            _draw_panel(axes, panel, curves, colors)
        # the last row may have places over
        for axes in places:
            axes.set_axis_off()
        samples = [Line2D([], [], color=color, linewidth=3) for color in colors]
        figure.legend(samples, names, loc="outside upper center", ncols=columns)
        figure.savefig(output)


def check_format(output: str | Path) -> None:
    """Raise UserError if matplotlib does not know the suffix of a picture."""
    known = FigureCanvasAgg.get_supported_filetypes()
    if Path(output).suffix.lower().lstrip(".") not in known:
        raise UserError(f"{output} must end in one of {', '.join('.' + suffix for suffix in sorted(known))}")


class Chart(NamedTuple):
    """Lines over one axis. lines: name in the legend -> x, y."""

    title: str
    axis: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]


def plot_charts(charts: Sequence[Chart], output: str | Path) -> None:
    """Draw charts in rows of two into a picture. Raises as `plot_run` does."""
    check_format(output)
    rows = math.ceil(len(charts) / 2)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.6 * rows), layout="constrained")
        places = figure.subplots(rows, 2, squeeze=False).flat
        for chart, axes in zip(charts, places, strict=False):
            for color, (name, (x, y)) in zip(run_colors(len(chart.lines)), chart.lines.items(), strict=True):
                axes.plot(x, y, color=color, marker="o", label=name)
                axes.set_xticks(x)
            axes.set(title=chart.title, xlabel=chart.axis)
            # the ratio of two values must show
            axes.set_ylim(0, 1.05 * max(max(y) for _, y in chart.lines.values()))
            if len(chart.lines) > 1:
                axes.legend()
        # an odd number leaves a place over
        for axes in places:
            axes.set_axis_off()
        figure.savefig(output)


def _legend_name(name: str) -> str:
    """Escaped: matplotlib takes $ for a formula, and leaves out names that begin with _."""
    if len(name) > 120:
        name = f"...{name[-117:]}"
    if name.startswith("_"):
        name = f"\u200b{name}"
    return name.replace("$", r"\$")


def _draw_panel(axes: Axes, panel: Panel, curves: Sequence[Curve], colors: Sequence[str]) -> None:
    axes.set_title(f"{panel.title} ({panel.unit})" if panel.unit else panel.title)
    if not curves:
        axes.text(0.5, 0.5, "not in the log", transform=axes.transAxes, ha="center", va="center", color="0.5")
        axes.set(xticks=[], yticks=[])
        return

    for curve in curves:
        marker = "o" if len(curve.epochs) <= MAX_MARKERS else None
        style = LINE_STYLES[curve.style]
        axes.plot(curve.epochs, curve.values, style, color=colors[curve.run], marker=marker)
    _scale(axes, panel, curves)

    # The colours are in the figure's legend; a panel's own says what the line styles mean.
    names = {curve.style: curve.name for curve in curves}
    if len(names) > 1:
        styles = sorted(names)
        samples = [Line2D([], [], color="0.3", linestyle=LINE_STYLES[style]) for style in styles]
        axes.legend(samples, [names[style] for style in styles])


def _scale(axes: Axes, panel: Panel, curves: Sequence[Curve]) -> None:
    # whole epochs only
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    epochs = np.concatenate([curve.epochs for curve in curves])
    if epochs.min() == epochs.max():  # matplotlib would zoom in to thousandths of an epoch
        axes.set_xlim(epochs[0] - 0.5, epochs[0] + 0.5)
    if panel.logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:.0e}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:  # no room below 0 for what is never negative
        axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))
