"""The page's charts as plotly figures: curves over the epochs, and precision by recall.

A line carries the number of its run as `meta`; page.js sets the colours, which depend on the theme. Names of
runs are escaped, because plotly reads some HTML in text.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from tools.report_page import content
from tools.report_page.runs import Result, Run
from util.curves import COCO_CURVES, PANELS, Line, Panel, Row, lines

DASHES = ("solid", "dash", "dot")
MAX_POINTS = 1000  # of a line; a screen has no more
MAX_MARKERS = 30  # with more epochs, markers would hide the line
MAX_READ = 9  # lines whose values are shown together; more would not fit into a chart


def curves(runs: Sequence[Run]) -> dict[str, list[dict[str, Any]]]:
    """Charts of the panels that have a curve, and one chart of each figure in the logs."""
    single = single_panels([row for run in runs for row in run.rows])
    return {"panels": _charts(PANELS, runs), "any": _charts(single, runs)}


def single_panels(rows: Sequence[Row]) -> list[Panel]:
    """A panel for each number in the rows and each of COCO's figures."""
    keys = {key for row in rows for key, value in row.items() if isinstance(value, int | float)}
    # an unscaled loss has the shape of its scaled one
    keys = {key for key in keys if not key.endswith("_unscaled")} - {"epoch", "n_parameters"}
    units = dict.fromkeys(keys, "") | dict.fromkeys(COCO_CURVES, "%")
    return [Panel(key, {key: key}, unit) for key, unit in sorted(units.items())]


def _charts(panels: Sequence[Panel], runs: Sequence[Run]) -> list[dict[str, Any]]:
    logs, names = [run.rows for run in runs], [_shown_name(run.name) for run in runs]
    epochs = [float(row["epoch"]) for rows in logs for row in rows]
    charts = []
    for panel in panels:
        if found := [*lines(panel, logs)]:
            figure = curve_chart(panel, found, names, (min(epochs), max(epochs)))
            charts.append({"title": panel.title, "figure": figure.to_plotly_json()})
    return charts


def curve_chart(
    panel: Panel, found: Sequence[Line], names: Sequence[str], epochs: tuple[float, float]
) -> go.Figure:
    """The lines of a panel. All charts have the same axis, from the first to the last of the epochs."""
    figure = _chart("epoch", panel.unit, len(found))
    figure.update_xaxes(autorangeoptions_include=epochs)
    if epochs[1] - epochs[0] < 6:
        figure.update_xaxes(dtick=1)  # plotly would write halves of an epoch
    if panel.logarithmic:
        figure.update_yaxes(type="log", dtick="D2", tickformat=".0e", hoverformat=".3~e")
    elif min(line.values.min() for line in found) >= 0:
        figure.update_yaxes(rangemode="nonnegative")  # room below 0 would say that there could be something
    by_place = sorted(found, key=lambda line: line.place)
    _add_legend(figure, {line.name: DASHES[line.place] for line in by_place})
    for line in found:
        step = -(-len(line.epochs) // MAX_POINTS)
        figure.add_scatter(
            x=line.epochs[::step].tolist(), y=[float(f"{value:.6g}") for value in line.values[::step]],
            name=names[line.run] + (f" · {line.name}" if len(panel.curves) > 1 else ""), meta=line.run,
            mode="lines+markers" if len(line.epochs) <= MAX_MARKERS else "lines",
            line_dash=DASHES[line.place], legendgroup=line.name, showlegend=False,
        )  # fmt: skip
    return figure


def precision_recall(results: Sequence[tuple[int, Run, Result]], recalls: Sequence[float]) -> go.Figure:
    """A line for each result that has tables, with the result's place as `uid`.

    page.js puts in the precision of the class and the IoU that are chosen.
    """
    tabled = {place: result for place, result in enumerate(results) if result[2].tables}
    figure = _chart("recall", "%", len(tabled))
    figure.update_xaxes(range=[0, 100], ticksuffix="%", unifiedhovertitle_text="recall %{x}%")
    figure.update_yaxes(range=[0, 100.5], fixedrange=False)
    styles = {"": ("weights", "solid"), "ema": ("averaged weights", "dash")}
    _add_legend(figure, dict(styles[result.weights] for _, _, result in tabled.values()))
    for place, (number, run, result) in tabled.items():
        kind, dash = styles[result.weights]
        figure.add_scatter(
            x=[100 * recall for recall in recalls], mode="lines", line_dash=dash,
            name=_shown_name(content.result_name(run, result)), legendgroup=kind, showlegend=False,
            meta=number, uid=str(place),
        )  # fmt: skip
    return figure


def _chart(over: str, unit: str, num_lines: int) -> go.Figure:
    size = 11.5
    return go.Figure(layout={
        "template": {},  # plotly's own would be in each chart again
        "font": {"family": "system-ui, sans-serif", "size": size},
        "margin": {"l": 50, "r": 12, "t": 26, "b": 36},
        "plot_bgcolor": "rgba(0,0,0,0)",
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "hovermode": "x unified" if num_lines <= MAX_READ else "closest",
        "hoversort": "value descending",
        "hoverdistance": -1,
        "hoverlabel": {"namelength": -1},
        "xaxis": {
            "title": {"text": over, "font": {"size": size}}, "unifiedhovertitle": {"text": f"{over} %{{x}}"},
            "ticklabelstandoff": 4, "zeroline": False,
        },
        "yaxis": {
            "ticksuffix": unit, "ticklabelstandoff": 4, "hoverformat": ".4~g", "zeroline": False,
            "fixedrange": True,
        },
    })  # fmt: skip


def _shown_name(name: str) -> str:
    """A long name is shortened here: plotly would cut through what is escaped."""
    return html.escape(name if len(name) <= 45 else f"{name[:20]}…{name[-24:]}")


def _add_legend(figure: go.Figure, dashes: Mapping[str, str]) -> None:
    """Samples of the styles of lines, where there are several. A click on one hides its lines."""
    if len(dashes) > 1:
        for name, dash in dashes.items():
            figure.add_scatter(x=[None], y=[None], name=name, legendgroup=name, mode="lines", line_dash=dash)
