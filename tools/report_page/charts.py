"""The page's charts as plotly figures: curves over the epochs, and precision by recall.

A chart has panels, and a panel has lines for each run. A line carries the number of its run as
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
from util.draw.curves import MAX_MARKERS, PANELS, Line, Panel, lines, run_colors

# of lines, and how headings show them
DASHES, SIGNS = ("solid", "dash", "dot"), ("—", "- -", "···")
GREY, GRID = "#7b828b", "rgba(128, 128, 128, 0.25)"  # on light and on dark ground
MAX_READ = 9  # lines whose values are shown together; more would not fit beside a panel
PR_IOUS = {"IoU 0.5": slice(0, 1), "IoU 0.75": slice(5, 6), "IoU 0.5 to 0.95 (mean)": slice(None)}
Drawn = tuple[Panel, list[Line]]


def curves(runs: Sequence[Run]) -> dict[str, Any] | None:
    """A chart of the panels that have a line; None if no run has finished an epoch."""
    logs = [run.rows for run in runs]
    panels = [(panel, found) for panel in PANELS if (found := [*lines(panel, logs)])]
    few = max((line.epochs.max() for _, found in panels for line in found), default=0) < 6
    axis = {"dtick": 1} if few else {}  # plotly would write halves of an epoch
    return _chart("epoch", axis, panels, runs).to_plotly_json() if panels else None


def precision_recall(runs: Sequence[Run], classes: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """A chart of the results that have tables, for all classes; None if there is none.

    `choices`: [name, the values of every line] of all classes and of each; [] if it has no objects.
    """
    results = [(i, result.weights, result.tables) for i, _, result in results_of(runs) if result.tables]
    if not results:
        return None
    # many runs and classes would take megabytes
    step = 1 if len(results) * len(classes) <= 800 else 4
    every: dict[str, Any] = {"name": "all classes", "id": [one["id"] for one in classes]}
    recalls = np.linspace(0, 100, 101)[::step]
    panels, precisions = [], []
    for title, ious in PR_IOUS.items():
        found = []
        for run, weights, tables in results:
            precision = 100 * tables.precision[ious, ::step, :, 0, -1].mean(axis=0)  # [R, K]
            precisions.append((precision, tables.category_ids))
            name, place = ("averaged", 1) if weights else ("weights", 0)
            found.append(Line(run, name, place, recalls, _mean(precision, tables.category_ids, every["id"])))
        panels.append((Panel(title, {}, "%"), found))
    figure = _chart("recall in %", {"range": [0, 100]}, panels, runs).update_yaxes(range=[0, 100.5])
    choices = []
    for one in [every, *sorted(classes, key=lambda one: one["name"])]:
        choices.append([one["name"], [_mean(*precision, one["id"]).tolist() for precision in precisions]])
    return {**figure.to_plotly_json(), "choices": choices}


def _mean(precision: NDArray[np.float64], ids: Sequence[int], wanted: int | list[int]) -> NDArray[np.float64]:
    """The mean [R] of precision [R, K] over the wanted ones of `ids` [K] that have objects; [] if
    none has.
    """
    chosen = (precision[0] >= 0) & np.isin(ids, wanted)
    return precision[:, chosen].mean(axis=1).round(1) if chosen.any() else np.array([])


def _chart(over: str, axis: dict[str, Any], panels: list[Drawn], runs: Sequence[Run]) -> Figure:
    common = {"gridcolor": GRID, "zeroline": False, "ticklabelstandoff": 4}
    x_axis = {"title": {"text": over, "standoff": 4}, "unifiedhovertitle": {"text": f"{over} %{{x}}"}}
    # no room below 0 for what is never negative
    y_axis = {"hoverformat": ".4~g", "rangemode": "nonnegative"}
    figure = Figure(
        layout={
            "template": {"layout": {"xaxis": common | x_axis | axis, "yaxis": common | y_axis}},
            "font": {"family": "system-ui, sans-serif", "size": 12, "color": GREY},
            "margin": {"l": 50, "r": 15, "t": 70, "b": 40},
            "paper_bgcolor": "rgba(0, 0, 0, 0)",
            "plot_bgcolor": "rgba(0, 0, 0, 0)",
            "legend": {"orientation": "h", "yref": "container", "y": 1, "yanchor": "top"},
            "hovermode": "x unified" if max(len(found) for _, found in panels) <= MAX_READ else "closest",
            "hoversort": "value descending",
            "hoverdistance": -1,
            "hoverlabel": {"namelength": -1, "bgcolor": "#2b3138", "font": {"color": "#ffffff"}},
            "modebar": {"bgcolor": "rgba(0, 0, 0, 0)", "color": GREY},
        }
    )
    colors, names = run_colors(len(runs)), [_shown_name(run.name) for run in runs]
    for i, (panel, found) in enumerate(panels, start=1):
        number = "" if i == 1 else i
        styles = {line.name: line.place for line in sorted(found, key=lambda line: line.place)}
        heading = f"<b>{panel.title}</b>"
        if len(styles) > 1:
            heading += "".join(f"   {SIGNS[place]} {name}" for name, place in styles.items())
        figure.add_annotation(
            text=heading,
            showarrow=False,
            xref=f"x{number} domain",
            x=0,
            xanchor="left",
            yref=f"y{number} domain",
            y=1,
            yanchor="bottom",
        )
        scale = {"type": "log", "dtick": "D2", "tickformat": ".0e"} if panel.logarithmic else {}
        figure.update_layout({f"yaxis{number}": {"ticksuffix": panel.unit, **scale}})
        if number:
            figure.update_layout({f"xaxis{number}": {"matches": "x"}})
        for line in found:
            suffix = f" · {line.name}" if len(styles) > 1 else ""
            figure.add_scatter(
                x=line.epochs.tolist(),
                y=[float(f"{value:.6g}") for value in line.values],
                meta=line.run,
                xaxis=f"x{number}",
                yaxis=f"y{number}",
                line_color=colors[line.run],
                line_dash=DASHES[line.place],
                mode="lines+markers" if len(line.epochs) <= MAX_MARKERS else "lines",
                showlegend=False,
                name=names[line.run] + suffix,
                legendgroup=str(line.run),
            )
    # its entry in the legend
    for run in sorted({line.run for _, found in panels for line in found}):
        sample = {"x": [None], "y": [None], "mode": "lines", "line_color": colors[run]}
        figure.add_scatter(**sample, name=names[run], meta=run, legendgroup=str(run))
    return figure


def _shown_name(name: str) -> str:
    """A long name is shortened here: plotly would cut through what is escaped."""
    return html.escape(name if len(name) <= 45 else f"{name[:20]}…{name[-24:]}")
