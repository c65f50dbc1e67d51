"""The section of the report page on all runs of an ablation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tools.ablation.statistics import LEAST_PAIRS
from tools.ablation.summary import METRICS, mean_and_deviation, spread, verdict
from tools.report_page.charts import banded
from util.draw.curves import run_colors


def section(summary: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Plain data for page.js.

    Args:
        summary: of tools.ablation.summary.summarise.
        names: the variants on the page, in the order of its runs.
    """
    # a variant without a run has no colour on the page
    chosen = [variant for variant in summary["variants"] if variant["name"] in names]
    means = []
    for variant in chosen:
        row = {"name": variant["name"], "runs": len(variant["runs"]), "flags": variant["flags"] or "none"}
        means.append(row | {metric: mean_and_deviation(variant, metric) for metric in METRICS})

    # one row for each metric, and one for other images
    differences = []
    for comparison in summary["comparisons"]:
        metrics = comparison["metrics"]
        differences += [_difference_row(comparison, metric, one) for metric, one in metrics.items()]
        if images := comparison.get("images"):
            what = f"AP, seed {images['seed']} alone, other images"
            one = {"mean": images["difference"], "interval": images["interval"], "p": None, "claim": False}
            differences.append(_difference_row(comparison, what, one) | {"pairs": 1})

    verdicts = []
    for one in summary["comparisons"]:
        verdicts.append(f"{one['variant']} against {one['baseline']}: {verdict(one)}")
    return {
        "metrics": [metric for metric in METRICS if any(row[metric] for row in means)],
        "means": means,
        "differences": differences,
        "verdicts": verdicts,
        "missing": summary["missing"],
        "least": LEAST_PAIRS,
        "chart": _chart(chosen, summary["comparisons"], names),
    }


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
    # a run of the page has the variant's number and colour
    colors = run_colors(len(names))

    # how the runs of a variant went
    curves = []
    for variant in variants:
        by_epoch: dict[int, list[float]] = {}
        for run in variant["runs"]:
            for epoch, value in run["curves"].get("AP", []):
                by_epoch.setdefault(epoch, []).append(value)
        points = []
        for epoch, values in sorted(by_epoch.items()):
            mean, deviation = spread(values)
            points.append((epoch, mean, mean - deviation, mean + deviation))
        place = names.index(variant["name"])
        curves.append((place, variant["name"], colors[place], points))

    # how they differed from the baseline's; without an interval the band has no width
    changes = []
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
