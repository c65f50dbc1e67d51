"""The page's charts as plotly figures: curves over the epochs, and precision by recall.

A chart has a panel for each thing it shows and a line for each run there. A line carries the number of its run as
`meta`; page.js arranges the panels in columns. Names of runs are escaped, because plotly reads some HTML in text.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from tools.report_page.content import results_of
from tools.report_page.runs import Run
from util.curves import MAX_MARKERS, PANELS, Line, Panel, lines, run_colors

DASHES, SIGNS = ("solid", "dash", "dot"), ("—", "- -", "···")  # of lines, and how headings show them
GREY, GRID = "#7b828b", "rgba(128, 128, 128, 0.25)"  # on light and on dark ground
MAX_READ = 9  # lines whose values are shown together; more would not fit beside a panel
PR_IOUS: dict[str, slice] = {"IoU 0.5": slice(0, 1), "IoU 0.75": slice(5, 6), "IoU 0.5 to 0.95 (mean)": slice(None)}


def curves(runs: Sequence[Run]) -> dict[str, Any] | None:
    """A chart of the panels that have a line; None if no run has finished an epoch."""
    logs = [run.rows for run in runs]
    panels = [(panel, found) for panel in PANELS if (found := [*lines(panel, logs)])]
    few = max((line.epochs.max() for _, found in panels for line in found), default=0) < 6
    axis = {"dtick": 1} if few else {}  # plotly would write halves of an epoch
    return _chart("epoch", axis, panels, runs).to_plotly_json() if panels else None


def precision_recall(runs: Sequence[Run], classes: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """A chart of the results that have tables, for all classes; None if there is none.

    `choices`: [name, the values of every line] of all classes and of each class; [] where a run has no objects.
    """
    results = [(number, result) for number, _, result in results_of(runs) if result.tables]
    if not results:
        return None
    step = 1 if len(results) * len(classes) <= 800 else 4  # many runs and classes would take megabytes
    recalls, panels, tables = np.linspace(0, 100, 101)[::step], [], []
    for title, ious in PR_IOUS.items():
        found = []
        for number, result in results:
            table = 100 * result.tables.precision[ious, ::step, :, 0, -1].mean(axis=0)  # [R, K]
            tables.append((table, result.tables.category_ids))
            name, place = ("averaged", 1) if result.weights else ("weights", 0)
            found.append(Line(number, name, place, recalls, _precision(*tables[-1])))
        panels.append((Panel(title, {}, "%"), found))
    figure = _chart("recall in %", {"range": [0, 100]}, panels, runs).update_yaxes(range=[0, 100.5])
    choices = [["all classes", [_precision(*table).tolist() for table in tables]]]
    for one in sorted(classes, key=lambda one: one["name"]):
        choices.append([one["name"], [_precision(*table, one["id"]).tolist() for table in tables]])
    return {**figure.to_plotly_json(), "choices": choices}


def _precision(table: np.ndarray, ids: Sequence[int], category: int | None = None) -> np.ndarray:
    """Precision [R] of a class, or the mean of all that have objects; [] if there is none."""
    chosen = (table[0] >= 0) & ((np.array(ids) == category) if category is not None else True)
    return table[:, chosen].mean(axis=1).round(1) if chosen.any() else np.array([])


def _chart(
    over: str, axis: Mapping[str, Any], panels: Sequence[tuple[Panel, Sequence[Line]]], runs: Sequence[Run]
) -> go.Figure:
    common = {"gridcolor": GRID, "zeroline": False, "ticklabelstandoff": 4}
    title = {"text": over, "standoff": 4, "font": {"size": 12}}
    x_axis = {"title": title, "unifiedhovertitle": {"text": f"{over} %{{x}}"}}
    y_axis = {"hoverformat": ".4~g", "rangemode": "nonnegative"}  # no room below 0 for what is never negative
    figure = go.Figure(layout={
        "template": {"layout": {"xaxis": common | x_axis | axis, "yaxis": common | y_axis}},
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": GREY},
        "margin": {"l": 50, "r": 15, "t": 70, "b": 40},
        "paper_bgcolor": "rgba(0, 0, 0, 0)", "plot_bgcolor": "rgba(0, 0, 0, 0)",
        "legend": {"orientation": "h", "yref": "container", "y": 1, "yanchor": "top"},
        "hovermode": "x unified" if max(len(found) for _, found in panels) <= MAX_READ else "closest",
        "hoversort": "value descending", "hoverdistance": -1,
        "hoverlabel": {"namelength": -1, "bgcolor": "#2b3138", "font": {"color": "#ffffff"}},
        "modebar": {"bgcolor": "rgba(0, 0, 0, 0)", "color": GREY},
    })  # fmt: skip
    colors, names = run_colors(len(runs)), [_shown_name(run.name) for run in runs]
    for i, (panel, found) in enumerate(panels, start=1):
        number = "" if i == 1 else i
        styles = {line.name: line.place for line in sorted(found, key=lambda line: line.place)}
        heading = f"<b>{panel.title}</b>"
        if len(styles) > 1:
            heading += "".join(f"   {SIGNS[place]} {name}" for name, place in styles.items())
        figure.add_annotation(
            text=heading, showarrow=False, xref=f"x{number} domain", x=0, xanchor="left",
            yref=f"y{number} domain", y=1, yanchor="bottom",
        )  # fmt: skip
        scale = {"type": "log", "dtick": "D2", "tickformat": ".0e"} if panel.logarithmic else {}
        figure.update_layout({
            f"xaxis{number}": {"matches": "x" if number else None},
            f"yaxis{number}": {"ticksuffix": panel.unit, **scale},
        })  # fmt: skip
        for line in found:
            figure.add_scatter(
                x=line.epochs.tolist(), y=[float(f"{value:.6g}") for value in line.values], meta=line.run,
                xaxis=f"x{number}", yaxis=f"y{number}", line={"color": colors[line.run], "dash": DASHES[line.place]},
                mode="lines+markers" if len(line.epochs) <= MAX_MARKERS else "lines", showlegend=False,
                legendgroup=str(line.run), name=names[line.run] + (f" · {line.name}" if len(styles) > 1 else ""),
            )  # fmt: skip
    for run in sorted({line.run for _, found in panels for line in found}):  # one entry of the legend for all its lines
        figure.add_scatter(
            x=[None], y=[None], name=names[run], meta=run, legendgroup=str(run), mode="lines", line_color=colors[run]
        )
    return figure


def _shown_name(name: str) -> str:
    """A long name is shortened here: plotly would cut through what is escaped."""
    return html.escape(name if len(name) <= 45 else f"{name[:20]}…{name[-24:]}")
