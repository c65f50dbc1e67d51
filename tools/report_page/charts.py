"""The page's charts as plotly figures: curves over the epochs, and precision by recall.

A line carries the number of its run as `meta`; page.js sets the colours, which depend on the theme. Names of
runs are escaped, because plotly reads some HTML in text.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from tools.report_page.content import results_of
from tools.report_page.runs import Run
from util.curves import COCO_CURVES, MAX_MARKERS, PANELS, Line, Panel, lines

DASHES = ("solid", "dash", "dot")
MAX_POINTS = 1000  # of a line; a screen has no more
MAX_READ = 9  # lines whose values are shown together; more would not fit into a chart


def curves(runs: Sequence[Run]) -> dict[str, list[dict[str, Any]]]:
    """Charts of the panels that have a curve, and one chart of each figure in the logs."""
    units = dict.fromkeys(COCO_CURVES, "%")
    for row in itertools.chain(*(run.rows for run in runs)):
        # an unscaled loss has the shape of its scaled one
        units |= {key: "" for key in row.keys() - {"epoch", "n_parameters"} if not key.endswith("_unscaled")}
    single = [Panel(key, {key: key}, unit) for key, unit in sorted(units.items())]
    return {"panels": _curve_charts(PANELS, runs), "any": _curve_charts(single, runs)}


def _curve_charts(panels: Sequence[Panel], runs: Sequence[Run]) -> list[dict[str, Any]]:
    logs = [run.rows for run in runs]
    epochs = [float(row["epoch"]) for rows in logs for row in rows]
    charts = []
    for panel in panels:
        found = [*lines(panel, logs)]
        if not found:
            continue
        figure = _chart("epoch", panel.unit, found, runs)
        figure.update_xaxes(autorangeoptions_include=(min(epochs), max(epochs)))  # the same of all charts
        if max(epochs) - min(epochs) < 6:
            figure.update_xaxes(dtick=1)  # plotly would write halves of an epoch
        if panel.logarithmic:
            figure.update_yaxes(type="log", dtick="D2", tickformat=".0e", hoverformat=".3~e")
        elif min(line.values.min() for line in found) >= 0:
            figure.update_yaxes(rangemode="nonnegative")  # no room below 0 for what is never negative
        charts.append({"title": panel.title, "figure": figure.to_plotly_json()})
    return charts


def precision_recall(runs: Sequence[Run], recalls: Sequence[float]) -> go.Figure:
    """A line for each result that has tables; page.js puts in the precision of the chosen class and IoU."""
    x, found = 100 * np.array(recalls), []
    for number, _, result in results_of(runs):
        if result.tables:
            name, place = ("averaged weights", 1) if result.weights else ("weights", 0)
            found.append(Line(number, name, place, x, 0 * x))
    figure = _chart("recall", "%", found, runs)
    figure.update_xaxes(range=[0, 100], ticksuffix="%", unifiedhovertitle_text="recall %{x}%")
    return figure.update_yaxes(range=[0, 100.5], fixedrange=False)


def _chart(over: str, unit: str, found: Sequence[Line], runs: Sequence[Run]) -> go.Figure:
    size = 11.5
    axis = {"ticklabelstandoff": 4, "zeroline": False}
    title = {"title": {"text": over, "font": {"size": size}}, "unifiedhovertitle": {"text": f"{over} %{{x}}"}}
    figure = go.Figure(layout={
        "template": {},  # plotly's own would be in each chart again
        "font": {"family": "system-ui, sans-serif", "size": size},
        "margin": {"l": 50, "r": 12, "t": 26, "b": 36},
        "plot_bgcolor": "rgba(0,0,0,0)",
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "hovermode": "x unified" if len(found) <= MAX_READ else "closest",
        "hoversort": "value descending",
        "hoverdistance": -1,
        "hoverlabel": {"namelength": -1},
        "xaxis": axis | title,
        "yaxis": axis | {"ticksuffix": unit, "hoverformat": ".4~g", "fixedrange": True},
    })  # fmt: skip
    styles = {line.name: DASHES[line.place] for line in sorted(found, key=lambda line: line.place)}
    if len(styles) > 1:  # samples for a legend of styles, not of runs; a click on one hides its lines
        for name, dash in styles.items():
            figure.add_scatter(x=[None], y=[None], name=name, legendgroup=name, mode="lines", line_dash=dash)
    for line in found:
        name = _shown_name(runs[line.run].name) + (f" · {line.name}" if len(styles) > 1 else "")
        step = -(-len(line.epochs) // MAX_POINTS)
        figure.add_scatter(
            x=line.epochs[::step].tolist(), y=[float(f"{value:.6g}") for value in line.values[::step]],
            mode="lines+markers" if len(line.epochs) <= MAX_MARKERS else "lines", line_dash=styles[line.name],
            name=name, legendgroup=line.name, showlegend=False, meta=line.run,
        )  # fmt: skip
    return figure


def _shown_name(name: str) -> str:
    """A long name is shortened here: plotly would cut through what is escaped."""
    return html.escape(name if len(name) <= 45 else f"{name[:20]}…{name[-24:]}")
