"""The page's charts as plotly figures: curves over the epochs, and precision by recall.

A chart has panels, and a panel has curves of each run. A curve carries the number of its run as
`meta`; page.js arranges the panels in columns. Names of runs are escaped, because plotly reads some
HTML in text.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from plotly.graph_objects import Figure

from tools.report_page.content import results_of
from tools.report_page.runs import Run
from util.draw.curves import MAX_MARKERS, PANELS, Curve, Panel, curves_of, run_colors

# of the curves, and how headings show them
DASHES, SIGNS = ("solid", "dash", "dot"), ("—", "- -", "···")
GREY, GRID = "#7b828b", "rgba(128, 128, 128, 0.25)"  # on a light and on a dark background
MAX_READ = 9  # curves whose values are shown together; more would not fit beside a panel
MAX_VALUES = 800  # results x classes; with more, every fourth recall is kept, or the page takes megabytes
PR_IOUS = {"IoU 0.5": slice(0, 1), "IoU 0.75": slice(5, 6), "IoU 0.5 to 0.95 (mean)": slice(None)}
Drawn = tuple[Panel, list[Curve]]


def curves(runs: Sequence[Run]) -> dict[str, Any] | None:
    """A chart of the panels that have a curve; None if no run has finished an epoch."""
    logs = [run.rows for run in runs]
    panels = [(panel, curves_of(panel, logs)) for panel in PANELS]
    panels = [(panel, found) for panel, found in panels if found]
    if not panels:
        return None
    axis = {}
    if max(curve.epochs.max() for _, found in panels for curve in found) < 6:
        axis = {"dtick": 1}  # plotly would write halves of an epoch
    return _chart("epoch", axis, panels, runs).to_plotly_json()


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
            name, style = ("averaged", 1) if result.weights else ("weights", 0)
            found.append(Curve(run, name, style, recalls, _mean(precision, ids, all_ids)))
        panels.append((Panel(title, {}, "%"), found))
    figure = _chart("recall in %", {"range": [0, 100]}, panels, runs).update_yaxes(range=[0, 100.5])

    # The page replaces the values of all curves when another class is chosen.
    choices = [("all classes", all_ids)]
    choices += [(one["name"], [one["id"]]) for one in sorted(classes, key=lambda one: one["name"])]
    values = [
        [name, [_mean(precision, ids, wanted).tolist() for precision, ids in precisions]]
        for name, wanted in choices
    ]
    return {**figure.to_plotly_json(), "choices": values}


def _mean(precision: NDArray[np.float64], ids: Sequence[int], wanted: Sequence[int]) -> NDArray[np.float64]:
    """The mean [R] of precision [R, K] over the wanted ones of `ids` [K] that have objects; [] if
    none has.
    """
    chosen = (precision[0] >= 0) & np.isin(ids, wanted)
    if not chosen.any():
        return np.array([])
    return precision[:, chosen].mean(axis=1).round(1)


def _chart(over: str, axis: dict[str, Any], panels: list[Drawn], runs: Sequence[Run]) -> Figure:
    common = {"gridcolor": GRID, "zeroline": False, "ticklabelstandoff": 4}
    x_axis = {"title": {"text": over, "standoff": 4}, "unifiedhovertitle": {"text": f"{over} %{{x}}"}}
    # no room below 0 for what is never negative
    y_axis = {"hoverformat": ".4~g", "rangemode": "nonnegative"}
    # With many curves a list of all values would cover the panels.
    hover = "closest"
    if max(len(found) for _, found in panels) <= MAX_READ:
        hover = "x unified"
    figure = Figure(
        layout={
            "template": {"layout": {"xaxis": common | x_axis | axis, "yaxis": common | y_axis}},
            "font": {"family": "system-ui, sans-serif", "size": 12, "color": GREY},
            "margin": {"l": 50, "r": 15, "t": 70, "b": 40},
            "paper_bgcolor": "rgba(0, 0, 0, 0)",
            "plot_bgcolor": "rgba(0, 0, 0, 0)",
            "legend": {"orientation": "h", "yref": "container", "y": 1, "yanchor": "top"},
            "hovermode": hover,
            "hoversort": "value descending",
            "hoverdistance": -1,
            "hoverlabel": {"namelength": -1, "bgcolor": "#2b3138", "font": {"color": "#ffffff"}},
            "modebar": {"bgcolor": "rgba(0, 0, 0, 0)", "color": GREY},
        }
    )
    colors, names = run_colors(len(runs)), [_shown_name(run.name) for run in runs]
    for i, (panel, found) in enumerate(panels, start=1):
        _add_panel(figure, "" if i == 1 else str(i), panel, found, colors, names)
    # A curve without values gives each run its entry in the legend.
    for run in sorted({curve.run for _, found in panels for curve in found}):
        sample = {"x": [None], "y": [None], "mode": "lines", "line_color": colors[run]}
        figure.add_scatter(**sample, name=names[run], meta=run, legendgroup=str(run))
    return figure


def _add_panel(
    figure: Figure, number: str, panel: Panel, found: list[Curve], colors: list[str], names: list[str]
) -> None:
    """number: of the panel's axes; plotly calls the first x and y, the next x2 and y2."""
    styles = {curve.style: curve.name for curve in found}
    heading = f"<b>{panel.title}</b>"
    if len(styles) > 1:
        for style in sorted(styles):
            heading += f"   {SIGNS[style]} {styles[style]}"
    left_above = {"x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "showarrow": False}
    axes = {"xref": f"x{number} domain", "yref": f"y{number} domain"}
    figure.add_annotation(text=heading, **left_above, **axes)

    axis: dict[str, Any] = {"ticksuffix": panel.unit}
    if panel.logarithmic:
        axis |= {"type": "log", "dtick": "D2", "tickformat": ".0e"}
    figure.update_layout({f"yaxis{number}": axis})
    if number:  # all panels are zoomed together
        figure.update_layout({f"xaxis{number}": {"matches": "x"}})

    for curve in found:
        suffix = f" · {curve.name}" if len(styles) > 1 else ""
        figure.add_scatter(
            x=curve.epochs.tolist(),
            y=[float(f"{value:.6g}") for value in curve.values],
            meta=curve.run,
            xaxis=f"x{number}",
            yaxis=f"y{number}",
            line_color=colors[curve.run],
            line_dash=DASHES[curve.style],
            mode="lines+markers" if len(curve.epochs) <= MAX_MARKERS else "lines",
            showlegend=False,
            name=names[curve.run] + suffix,
            legendgroup=str(curve.run),
        )


def _shown_name(name: str) -> str:
    """Shortened before it is escaped: plotly would cut through an escaped letter."""
    if len(name) > 45:
        name = f"{name[:20]}…{name[-24:]}"
    return html.escape(name)
