"""The section of the report page on all runs of an ablation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tools.ablation.statistics import LEAST_PAIRS
from tools.ablation.summary import METRICS, verdict
from tools.report_page.charts import banded
from util.draw.curves import run_colors


def section(summary: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Plain data for page.js.

    Args:
        summary: of tools.ablation.summary.summarise.
        names: the variants on the page, in the order of its runs.
    """
    chosen = [variant for variant in summary["variants"] if variant["name"] in names]
    means = []
    for variant in chosen:
        row: dict[str, Any] = {"name": variant["name"], "runs": len(variant["runs"])}
        row["flags"] = variant["flags"] or "none"
        for metric in METRICS:
            values = [run["curves"][metric][-1][1] for run in variant["runs"] if metric in run["curves"]]
            row[metric] = _mean_and_deviation(values)
        means.append(row)
    differences = []
    for comparison in summary["comparisons"]:
        metrics = comparison["metrics"]
        differences += [_difference_row(comparison, metric, one) for metric, one in metrics.items()]
        if images := comparison.get("images"):
            what = f"AP, seed {images['seed']} alone, other images"
            one = {"mean": images["difference"], "interval": images["interval"], "p": None, "claim": False}
            differences.append(_difference_row(comparison, what, one) | {"pairs": 1})
    return {
        "metrics": METRICS,
        "means": means,
        "differences": differences,
        "verdicts": [
            f"{one['variant']} against {one['baseline']}: {verdict(one)}" for one in summary["comparisons"]
        ],
        "missing": summary["missing"],
        "least": LEAST_PAIRS,
        "chart": _chart(chosen, summary["comparisons"], names),
    }


def _mean_and_deviation(values: Sequence[float]) -> list[float] | None:
    if not values:
        return None
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return [round(float(np.mean(values)), 2), round(deviation, 2)]


def _difference_row(comparison: Mapping[str, Any], metric: str, one: Mapping[str, Any]) -> dict[str, Any]:
    shown = {name: one.get(name) for name in ("mean", "interval", "bca", "p", "claim")}
    return {
        "name": comparison["variant"],
        "baseline": comparison["baseline"],
        "pairs": len(comparison["seeds"]),
        "metric": metric,
        **shown,
    }


def _chart(
    variants: Sequence[Mapping[str, Any]], comparisons: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> dict[str, Any] | None:
    """AP by epoch with a band of one deviation, and the difference by epoch with its interval."""
    colors = run_colors(len(names))
    curves, changes = [], []
    for variant in variants:
        by_epoch: dict[int, list[float]] = {}
        for run in variant["runs"]:
            for epoch, value in run["curves"].get("AP", []):
                by_epoch.setdefault(epoch, []).append(value)
        middle = [(epoch, *_mean_and_deviation(values)) for epoch, values in sorted(by_epoch.items())]  # type: ignore[misc]
        points = [(epoch, mean, mean - deviation, mean + deviation) for epoch, mean, deviation in middle]
        place = names.index(variant["name"])
        curves.append((place, variant["name"], colors[place], points))
    for comparison in comparisons:
        if comparison["variant"] not in names:
            continue
        points = [
            (one["epoch"], one["mean"], *(one["interval"] or (one["mean"], one["mean"])))
            for one in comparison["by_epoch"]
        ]
        place = names.index(comparison["variant"])
        changes.append((place, comparison["variant"], colors[place], points))
    panels = [("AP: mean and deviation of the runs", "%", curves)]
    if any(points for *_, points in changes):
        panels.append((f"Difference of AP to {comparisons[0]['baseline']}, 95 % interval", "", changes))
    return banded("epoch", panels)
