"""The page's charts as plotly figures: curves over the epochs, and precision by recall.

A chart has panels, and a panel has curves of each run. A curve carries the number of its run as
`meta`; page.js arranges the panels in columns and gives them fonts and colours. Names of runs are
escaped, because plotly reads some HTML in text.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.report_page.content import results_of
from tools.report_page.runs import Run
from util.draw.curves import MAX_MARKERS, Curve, Panel, panels_of, run_colors

# of the curves, and how headings show them
DASHES, SIGNS = ("solid", "dash", "dot", "dashdot"), ("—", "- -", "···", "-·-")
MAX_READ = 9  # curves whose values are shown together; more would not fit beside a panel
MAX_VALUES = 800  # results x classes; with more, every fourth recall is kept, or the page takes megabytes
PR_IOUS = {"IoU 0.5": slice(0, 1), "IoU 0.75": slice(5, 6), "IoU 0.5 to 0.95 (mean)": slice(None)}
PR_STYLES = ("weights", "averaged", "masks", "masks averaged")
Drawn = tuple[Panel, list[Curve]]
Banded = tuple[int, str, str, Sequence[tuple[float, float, float, float]]]


def curves(runs: Sequence[Run]) -> dict[str, Any] | None:
    """A chart of the panels that have a curve; None if no run has finished an epoch."""
    panels = [(panel, found) for panel, found in panels_of([run.rows for run in runs]) if found]
    if not panels:
        return None
    axes: dict[str, dict[str, Any]] = {"xaxis": {}, "yaxis": {}}
    if max(curve.epochs.max() for _, found in panels for curve in found) < 6:
        axes["xaxis"] = {"dtick": 1}  # plotly would write halves of an epoch
    return _chart("epoch", axes, panels, runs)


def precision_recall(runs: Sequence[Run], classes: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """A chart of the results that have tables, for all classes; None if there is none.

    `choices`: [name, the values of every curve] of all classes and of each; [] if it has no objects.
    """
    results = [(i, result) for i, _, result in results_of(runs) if result.tables]
    if not results:
        return None
    step = 1 if len(results) * len(classes) <= MAX_VALUES else 4
    recalls = np.linspace(0, 100, 101)[::step]
    all_ids = [one["id"] for one in classes]

    # One panel for each IoU, one curve for each result.
    panels, precisions = [], []
    for title, ious in PR_IOUS.items():
        found = []
        for run, result in results:
            assert result.tables is not None
            ids = result.tables.category_ids
            precision = 100 * result.tables.precision[ious, ::step, :, 0, -1].mean(axis=0)  # [R, K]
            precisions.append((precision, ids))
            style = 2 * result.masks + bool(result.weights)
            found.append(Curve(run, PR_STYLES[style], style, recalls, _mean(precision, ids, all_ids)))
        panels.append((Panel(title, {}, "%"), found))
    axes: dict[str, dict[str, Any]] = {"xaxis": {"range": [0, 100]}, "yaxis": {"range": [0, 100.5]}}

    # The page replaces the values of all curves when another class is chosen.
    choices = [("all classes", all_ids)]
    choices += [(one["name"], [one["id"]]) for one in sorted(classes, key=lambda one: one["name"])]
    values = []
    for name, wanted in choices:
        values.append([name, [_mean(precision, ids, wanted).tolist() for precision, ids in precisions]])
    return _chart("recall in %", axes, panels, runs) | {"choices": values}


def _mean(precision: NDArray[np.float64], ids: Sequence[int], wanted: Sequence[int]) -> NDArray[np.float64]:
    """The mean [R] of precision [R, K] over the wanted ones of `ids` [K] that have objects; [] if
    none has.
    """
    chosen = (precision[0] >= 0) & np.isin(ids, wanted)
    if not chosen.any():
        return np.array([])
    return precision[:, chosen].mean(axis=1).round(1)


def _chart(
    over: str, axes: dict[str, dict[str, Any]], panels: list[Drawn], runs: Sequence[Run]
) -> dict[str, Any]:
    """A plotly figure. over: what the x axis shows; axes: settings of all "xaxis" and "yaxis"."""
    # With many curves a list of all values would cover the panels.
    hover = "closest"
    if max(len(found) for _, found in panels) <= MAX_READ:
        hover = "x unified"
    layout: dict[str, Any] = {"over": over, "axes": axes, "hovermode": hover, "annotations": []}
    data: list[dict[str, Any]] = []
    colors, names = run_colors(len(runs)), [_shown_name(run.name) for run in runs]
    for i, (panel, found) in enumerate(panels, start=1):
        number = "" if i == 1 else str(i)  # plotly calls the first axes x and y, the next x2 and y2
        styles = {curve.style: curve.name for curve in found}
        layout["annotations"].append(_heading(panel.title, styles, number))
        layout[f"xaxis{number}"] = {"matches": "x"} if number else {}  # all are zoomed together
        layout[f"yaxis{number}"] = {"ticksuffix": panel.unit}
        if panel.logarithmic:
            layout[f"yaxis{number}"] |= {"type": "log", "dtick": "D2", "tickformat": ".0e"}
        for curve in found:
            line = _line(curve, colors, names, number)
            if len(styles) > 1:
                line["name"] += f" · {curve.name}"
            data.append(line)

    # A line without values gives each run its entry in the legend.
    for run in sorted({line["meta"] for line in data}):
        empty = {"x": [None], "y": [None], "mode": "lines", "line": {"color": colors[run]}}
        data.append(empty | {"name": names[run], "meta": run, "legendgroup": str(run)})
    return {"data": data, "layout": layout}


def banded(over: str, panels: Sequence[tuple[str, str, Sequence[Banded]]]) -> dict[str, Any]:
    """A chart of means with bands. panels: title, unit, and (run, name, colour, points) of each curve;
    a point is x, mean, low and high.
    """
    axes: dict[str, dict[str, Any]] = {"xaxis": {}, "yaxis": {"rangemode": "normal"}}
    if all(point[0] < 6 for _, _, found in panels for curve in found for point in curve[3]):
        axes["xaxis"] = {"dtick": 1}  # plotly would write halves of an epoch
    layout: dict[str, Any] = {"over": over, "axes": axes, "hovermode": "closest", "annotations": []}
    data: list[dict[str, Any]] = []
    for i, (title, unit, found) in enumerate(panels, start=1):
        number = "" if i == 1 else str(i)
        layout["annotations"].append(_heading(title, {}, number))
        layout[f"yaxis{number}"] = {"ticksuffix": unit}
        for run, name, color, points in found:
            if not points:
                continue
            x, mean, low, high = (list(column) for column in zip(*points, strict=True))
            shared = {"meta": run, "xaxis": f"x{number}", "yaxis": f"y{number}", "legendgroup": str(run)}
            shared |= {"name": _shown_name(name)}
            band: dict[str, Any] = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
            band |= {"fill": "toself", "fillcolor": f"{color}33", "showlegend": False}
            line: dict[str, Any] = {"mode": "lines+markers", "line": {"color": color}, "showlegend": i == 1}
            # there, and back along the lower side
            data.append(shared | band | {"x": [*x, *x[::-1]], "y": [*high, *low[::-1]]})
            data.append(shared | line | {"x": x, "y": mean})
    return {"data": data, "layout": layout}


def _heading(title: str, styles: Mapping[int, str], number: str) -> dict[str, Any]:
    """The title of a panel, above its left corner; it explains the line styles if there are several."""
    text = f"<b>{title}</b>"
    if len(styles) > 1:
        for style in sorted(styles):
            text += f"   {SIGNS[style]} {styles[style]}"
    place = {"x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "showarrow": False}
    return {"text": text, "xref": f"x{number} domain", "yref": f"y{number} domain", **place}


def _line(curve: Curve, colors: Sequence[str], names: Sequence[str], number: str) -> dict[str, Any]:
    few = len(curve.epochs) <= MAX_MARKERS
    return {
        "x": curve.epochs.tolist(),
        "y": [float(f"{value:.6g}") for value in curve.values],
        "meta": curve.run,
        "xaxis": f"x{number}",
        "yaxis": f"y{number}",
        "line": {"color": colors[curve.run], "dash": DASHES[curve.style]},
        "mode": "lines+markers" if few else "lines",
        "showlegend": False,
        "name": names[curve.run],
        "legendgroup": str(curve.run),
    }


def _shown_name(name: str) -> str:
    """Shortened before it is escaped: plotly would cut through an escaped letter."""
    if len(name) > 45:
        name = f"{name[:20]}…{name[-24:]}"
    return html.escape(name)
