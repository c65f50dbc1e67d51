"""What an ablation found, as plain data and as a table. Metrics are in percent, differences in points."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tools.ablation.grid import Variant
from tools.ablation.runs import Cell
from tools.ablation.statistics import LEAST_PAIRS, paired_difference
from util.atomic import replace_text
from util.draw.curves import FIGURES, series
from util.run.record import read_record

METRICS = (*FIGURES[:6], "mask AP", "mask AP50")  # AP, AP50, AP75, small, medium, large
Cells = Mapping[tuple[str, int], Cell]  # by name of the variant, and seed


def summarise(
    command: Sequence[str],
    variants: Sequence[Variant],
    cells: Cells,
    seeds: Sequence[int],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """The results of all runs that are done, and the differences to the first variant."""
    runs = {variant.name: _runs_of(variant, cells, seeds, seconds) for variant in variants}
    # plain data, which becomes a table, a page and a file
    baseline, *others = variants
    return {
        "command": list(command),
        "seeds": list(seeds),
        "variants": [
            {"name": variant.name, "flags": " ".join(variant.words), "runs": runs[variant.name]}
            for variant in variants
        ],
        "comparisons": [_comparison(baseline.name, other.name, runs) for other in others],
        "missing": [cell.name for cell in cells.values() if not cell.is_done()],
    }


def _runs_of(
    variant: Variant, cells: Cells, seeds: Sequence[int], seconds: Mapping[str, float]
) -> list[dict[str, Any]]:
    found = []
    for seed in seeds:
        cell = cells[variant.name, seed]
        if not cell.is_done():
            continue

        # metrics by epoch, as [epoch, value]
        rows = cell.rows()
        curves = {}
        for metric in METRICS:
            epochs, values = series(rows, metric)
            # a data set without large objects has no AP of them
            if len(values):
                curves[metric] = [[int(e), round(v, 3)] for e, v in zip(epochs, values, strict=True)]

        # what it ran on: runs of several machines may be in one table
        machine = read_record(cell.folder).get("environment", {})
        known = {name: machine.get(name) for name in ("torch", "device", "device_name", "commit")}
        run = {"seed": seed, "curves": curves, "loss": rows[-1].get("train_loss"), **known}
        if cell.name in seconds:
            run["seconds"] = round(seconds[cell.name])
        found.append(run)
    return found


def _comparison(baseline: str, other: str, runs: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The differences of one variant to the baseline, over the seeds that both have."""
    # seeds that only one of them has are left out
    first = {run["seed"]: run["curves"] for run in runs[baseline]}
    second = {run["seed"]: run["curves"] for run in runs[other]}
    seeds = [seed for seed in first if seed in second]
    metrics = {}
    for metric in METRICS:
        pairs = [(first[seed].get(metric), second[seed].get(metric)) for seed in seeds]
        # of the last epoch
        last = [theirs[-1][1] - ours[-1][1] for ours, theirs in pairs if ours and theirs]
        if last:
            metrics[metric] = _plain(last)
    return {
        "variant": other,
        "baseline": baseline,
        "seeds": seeds,
        "metrics": metrics,
        "by_epoch": _by_epoch([(first[seed], second[seed]) for seed in seeds]),
    }


def _by_epoch(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> list[dict[str, Any]]:
    """The difference of AP at each epoch that all runs of both variants evaluated."""
    curves = [(dict(ours.get("AP", [])), dict(theirs.get("AP", []))) for ours, theirs in pairs]
    if not curves:
        return []
    # variants may have different numbers of epochs
    common = set.intersection(*(set(curve) for pair in curves for curve in pair))
    return [
        {"epoch": epoch, **_plain([theirs[epoch] - ours[epoch] for ours, theirs in curves])}
        for epoch in sorted(common)
    ]


def _plain(values: Sequence[float]) -> dict[str, Any]:
    found = paired_difference(values)
    # JSON has no tuples; a thousandth of a point is noise
    rounded = {
        name: None if pair is None else [round(end, 3) for end in pair]
        for name, pair in (("interval", found.interval), ("bca", found.bca))
    }
    return {
        "differences": [round(value, 3) for value in values],
        "mean": round(found.mean, 3),
        **rounded,
        "p": found.p,
        "claim": found.is_claim,
    }


def as_text(summary: Mapping[str, Any]) -> str:
    """The tables for a terminal."""
    # each variant by itself
    variants, comparisons = summary["variants"], summary["comparisons"]
    title = "mean and deviation"
    width = max(len(title), *(len(variant["name"]) for variant in variants))
    shown = [m for m in METRICS if any(m in run["curves"] for v in variants for run in v["runs"])]

    lines = [f"{title:{width}}  runs" + "".join(f"  {name:>13}" for name in shown)]
    for variant in variants:
        several = len(variant["runs"]) > 1
        cells = [f"{_shown(mean_and_deviation(variant, metric), several):>13}" for metric in shown]
        lines.append(f"{variant['name']:{width}}  {len(variant['runs']):4}  " + "  ".join(cells))
        times = [run["seconds"] for run in variant["runs"] if "seconds" in run]
        if times:
            lines[-1] += f"  {np.mean(times) / 60:.1f} min a run"

    # then the differences
    for comparison in comparisons:
        pairs = _pairs(comparison)
        lines.append(f"\n{comparison['variant']} against {comparison['baseline']}, {pairs} of runs")
        for metric, one in comparison["metrics"].items():
            lines.append(f"  {metric:10} {_difference(one)}")
        if images := comparison.get("images"):
            low, high = images["interval"]
            seed = f"seed {images['seed']} alone, other images"
            lines.append(f"  {'AP':10} {images['difference']:+6.2f}  [{low:+.2f}, {high:+.2f}]  ({seed})")
        lines.append(f"  {verdict(comparison)}")
    return "\n".join(lines)


def mean_and_deviation(variant: Mapping[str, Any], metric: str) -> list[float] | None:
    """Mean and standard deviation of the final values of a variant's runs; None without a value."""
    values = [run["curves"][metric][-1][1] for run in variant["runs"] if metric in run["curves"]]
    return spread(values) if values else None


def spread(values: Sequence[float]) -> list[float]:
    """Mean and standard deviation; of one value the deviation is given as 0."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return [round(float(np.mean(values)), 2), round(deviation, 2)]


def _shown(pair: Sequence[float] | None, several: bool) -> str:
    if pair is None:
        return "-"
    return f"{pair[0]:.1f} ± {pair[1]:.1f}" if several else f"{pair[0]:.1f}"


def _difference(one: Mapping[str, Any]) -> str:
    text = f"{one['mean']:+6.2f}"
    if one["interval"]:
        low, high = one["interval"]
        text += f"  [{low:+.2f}, {high:+.2f}]"
    if one["p"] is not None:
        text += f"  p = {one['p']:.3f}"
    return text


def verdict(comparison: Mapping[str, Any]) -> str:
    """What may be said about AP."""
    pairs = len(comparison["seeds"])
    if pairs < LEAST_PAIRS:
        least = 2 / 2**pairs if pairs else 1
        return (
            f"Nothing can be claimed: {_pairs(comparison)} can't give a p below {least:.3f}; "
            f"use {LEAST_PAIRS} seeds or more."
        )
    one = comparison["metrics"].get("AP")
    if one is None:
        return "Nothing can be claimed: no run has an AP."
    if not one["claim"]:
        low, high = one["interval"]
        return f"No difference of AP can be claimed. Effects from {low:+.2f} to {high:+.2f} fit the runs."
    word = "better" if one["mean"] > 0 else "worse"
    return f"{comparison['variant']} has a {word} AP (p = {one['p']:.3f})."


def _pairs(comparison: Mapping[str, Any]) -> str:
    pairs = len(comparison["seeds"])
    return "1 pair" if pairs == 1 else f"{pairs} pairs"


def write_json(summary: Mapping[str, Any], path: Path) -> None:
    replace_text(path, json.dumps(summary, indent=1) + "\n")
