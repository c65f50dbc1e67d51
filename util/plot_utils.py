"""Reading a run's log.txt, and curves of one or several runs."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogFormatterSciNotation, MaxNLocator, NullLocator

from util.errors import UserError

Row = dict[str, Any]

# Okabe and Ito's colours without the yellow, which is too faint for a line on white
RUN_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MAX_MARKERS = 25  # with more epochs, markers would hide the line


@dataclass(frozen=True)
class Panel:
    """One set of axes: the figures drawn solid, dashed and dotted, and what these lines are called in the legend."""

    title: str
    solid: str
    dashed: str | None = None
    dotted: str | None = None
    names: tuple[str, ...] | None = None
    schedule: bool = False  # logarithmic, with lines of several widths, since runs often share theirs


PANELS = (
    Panel("Total loss", "train_loss", "test_loss", names=("training", "validation")),
    Panel("Classification loss", "train_loss_ce", "test_loss_ce"),
    Panel("Average precision (%)", "AP", "AP50", "ema AP", names=("AP", "AP50", "AP, averaged weights")),
    Panel("Box L1 loss", "train_loss_bbox", "test_loss_bbox"),
    Panel("Box GIoU loss", "train_loss_giou", "test_loss_giou"),
    Panel("Learning rate", "train_lr", schedule=True),
)
STYLES = ("-", "--", ":")
# entry of the log and place in it; "ema": of the averaged weights (--ema_decay)
COCO_FIGURES = {"AP": ("test_coco_eval_bbox", 0), "AP50": ("test_coco_eval_bbox", 1), "ema AP": ("test_ema_coco_eval_bbox", 0)}

STYLE = {
    "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "lines.linewidth": 1.6, "lines.markersize": 3.5, "legend.frameon": False, "pdf.fonttype": 42, "savefig.dpi": 200,
}  # fmt: skip


def read_log(path: str | Path) -> list[Row]:
    """The rows of a log.txt, one JSON object a line, in the order of the file; blank lines do not count.

    A last line that is not whole is left out: the run is writing it, or was stopped while it did.

    Raises:
        OSError: the file cannot be read.
        UserError: another line is not a JSON object; the message names file and line.
    """
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    rows = []
    for number, line in lines:
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == lines[-1][0]:
                break
            raise UserError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not a JSON object")
        rows.append(row)
    return rows


def series(rows: Sequence[Row], key: str) -> tuple[np.ndarray, np.ndarray]:
    """One figure over the epochs: epochs (e,) ascending, values (e,), for the rows that have it.

    `key` is a key of the log, or one of COCO_FIGURES in percent. Of an epoch that was run twice, after a resumption from an
    older checkpoint, the later row counts. COCO writes -1 where a figure is undefined; that is NaN here.
    """
    values = {}
    for row in rows:
        epoch, value = _number(row.get("epoch")), _value(row, key)
        if epoch is not None and value is not None:
            values[epoch] = value
    epochs = sorted(values)
    return np.array(epochs, dtype=np.float64), np.array([values[epoch] for epoch in epochs], dtype=np.float64)


def _value(row: Row, key: str) -> float | None:
    if key not in COCO_FIGURES:
        return _number(row.get(key))
    entry, place = COCO_FIGURES[key]
    figures = row.get(entry)
    if not isinstance(figures, list) or len(figures) <= place or (figure := _number(figures[place])) is None:
        return None
    return 100 * figure if figure >= 0 else math.nan


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def plot_run(logs: Mapping[str, Sequence[Row]], output: str | Path) -> None:
    """Draw the curves of runs over each other and write them to `output`, in the format of its suffix.

    Args:
        logs: name of the run -> its rows, as `read_log` gives. A figure that no run has leaves its axes empty.
        output: for example curve.png or curve.pdf; its folder must exist.

    Raises:
        OSError: the file cannot be written.
        UserError: there is no row at all, or matplotlib does not know the suffix.
    """
    if not any(logs.values()):
        raise UserError("there is nothing to plot: no run has a row")
    _check_suffix(Path(output))
    columns, lines = _legend_shape([*logs])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12, 6.2 + 0.22 * lines), layout="constrained")  # pyplot would look for a screen
        colors = dict(zip(logs, _run_colors(len(logs)), strict=True))
        for axes, panel in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
            _draw_panel(axes, panel, logs, colors)
        runs = [Line2D([], [], color=color, linewidth=3) for color in colors.values()]
        figure.legend(runs, [_legend_name(name) for name in logs], loc="outside upper center", ncols=columns)
        figure.savefig(output)


def _check_suffix(output: Path) -> None:
    known = FigureCanvasAgg.get_supported_filetypes()
    if output.suffix.lower().lstrip(".") not in known:
        raise UserError(f"{output} must end in one of {', '.join('.' + suffix for suffix in sorted(known))}")


def _legend_shape(names: Sequence[str]) -> tuple[int, int]:
    """Columns and lines of the legend: as many columns as the longest name lets fit."""
    columns = max(1, min(len(names), 5, 140 // (max(map(len, names)) + 8)))
    return columns, -(-len(names) // columns)


def _legend_name(name: str) -> str:
    """The name as it is: matplotlib would read $ as a formula and leave out what begins with _."""
    name = name if len(name) <= 120 else f"...{name[-117:]}"
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")


def _run_colors(count: int) -> Sequence[Any]:
    if count <= len(RUN_COLORS):
        return RUN_COLORS[:count]
    return mpl.colormaps["turbo"](np.linspace(0.05, 0.95, count))


def _draw_panel(axes: Axes, panel: Panel, logs: Mapping[str, Sequence[Row]], colors: Mapping[str, Any]) -> None:
    drawn = _draw_lines(axes, panel, logs, colors)
    axes.set_title(panel.title)
    if not drawn:
        axes.text(0.5, 0.5, "not in the log", transform=axes.transAxes, ha="center", va="center", color="0.5")
        axes.set(xticks=[], yticks=[])
        return
    epochs, values = (np.concatenate(parts) for parts in zip(*(line for _, *line in drawn), strict=True))
    _label_epochs(axes, epochs)
    if panel.schedule and (values > 0).all():
        _scale_rates(axes, values)
    elif np.nanmin(values) >= 0:  # room below 0 would say that there could be something
        axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))
    if panel.names:
        used = {style for style, *_ in drawn}
        named = [(style, name) for style, name in zip(STYLES, panel.names, strict=False) if style in used]
        axes.legend([Line2D([], [], color="0.3", linestyle=style) for style, _ in named], [name for _, name in named])


def _draw_lines(
    axes: Axes, panel: Panel, logs: Mapping[str, Sequence[Row]], colors: Mapping[str, Any]
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Draw the lines of all runs; the style, epochs and values of those that have any."""
    drawn = []
    for later, (name, rows) in zip(reversed(range(len(logs))), logs.items(), strict=True):
        width = mpl.rcParams["lines.linewidth"] + (later * min(2, 8 / len(logs)) if panel.schedule else 0)
        for key, style in zip((panel.solid, panel.dashed, panel.dotted), STYLES, strict=True):
            epochs, values = series(rows, key) if key else ([], [])
            if np.isfinite(values).any():
                marker = "o" if len(epochs) <= (1 if panel.schedule else MAX_MARKERS) else None
                axes.plot(epochs, values, style, color=colors[name], marker=marker, linewidth=width)
                drawn.append((style, epochs, values))
    return drawn


def _label_epochs(axes: Axes, epochs: np.ndarray) -> None:
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    if epochs.min() == epochs.max():  # matplotlib would zoom in to thousandths of an epoch
        axes.set_xlim(epochs[0] - 0.5, epochs[0] + 0.5)


def _scale_rates(axes: Axes, rates: np.ndarray) -> None:
    """A logarithmic axis. A schedule in steps has its own few rates as ticks, where powers of ten would say nothing."""
    axes.set_yscale("log")
    axes.set_ylim(rates.min() / 1.5, rates.max() * 1.5)
    steps = np.unique([float(f"{rate:.2g}") for rate in rates])  # a rate averaged over an epoch has rounding noise
    if len(steps) <= 4 and (steps[1:] > 1.3 * steps[:-1]).all():  # nearer ticks would overlap
        axes.yaxis.set_major_locator(FixedLocator(steps))
        axes.yaxis.set_major_formatter(LogFormatterSciNotation(minor_thresholds=(math.inf, math.inf)))
        axes.yaxis.set_minor_locator(NullLocator())
