"""What the page shows, as plain data: the summary of runs, their flags, classes, and precision by
recall.

Values are numbers or null where nothing can be said; average precisions are shares in [0, 1].
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO

from tools.report_page.runs import Result, Run, Tables
from util.config import FLAGS
from util.draw.curves import series

# of a class: its name, and its places among IoU thresholds, sizes and numbers of detections; the
# last from recall
CLASS_FIGURES: tuple[tuple[str, slice, int, bool], ...] = (
    ("AP", slice(None), 0, False),
    ("AP50", slice(0, 1), 0, False),
    ("AP75", slice(5, 6), 0, False),
    ("AP small", slice(None), 1, False),
    ("AP medium", slice(None), 2, False),
    ("AP large", slice(None), 3, False),
    ("AR 100", slice(None), 0, True),
)


def result_name(run: Run, result: Result) -> str:
    return f"{run.name} (averaged)" if result.weights else run.name


def results_of(runs: Sequence[Run]) -> list[tuple[int, Run, Result]]:
    return [(number, run, result) for number, run in enumerate(runs) for result in run.results]


def summary(run: Run) -> dict[str, Any]:
    """State, best result, size and machine of a run."""
    epochs, flags = len({row["epoch"] for row in run.rows}), run.flags
    last = run.rows[-1] if run.rows else {}
    evaluated, ap = series(run.rows, "AP")
    environment, starts = run.record.get("environment") or {}, run.record.get("starts") or []
    return {
        "name": run.name,
        "folder": str(run.folder),
        "epochs": epochs,
        "of": flags.get("epochs"),
        "best": {"AP": ap.max() / 100, "epoch": int(evaluated[ap.argmax()])} if len(ap) else None,
        "loss": number(last.get("train_loss")),
        "parameters": number(last.get("n_parameters")),
        "batch": total_batch(flags, environment),
        "environment": environment,
        "data": run.record.get("data") or {},
        "started": starts[0].get("at") if starts else None,
        "continued": max(0, len(starts) - 1),
    }


def total_batch(flags: Mapping[str, Any], environment: Mapping[str, Any]) -> int | None:
    size, processes = flags.get("batch_size"), environment.get("processes")
    if not isinstance(size, int) or not isinstance(processes, int):
        return None
    return size * processes * int(flags.get("accumulate_steps") or 1)


def flag_table(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every flag, its meaning and its value in each run, in the order of --help."""
    meanings = {name: flag.help for name, flag in FLAGS.items()}
    names = [*meanings, *sorted({name for run in runs for name in run.flags} - set(meanings))]
    known = [name for name in names if any(name in run.flags for run in runs)]
    return [
        {"name": n, "help": meanings.get(n, ""), "values": [_flag(run.flags.get(n)) for run in runs]}
        for n in known
    ]


def _flag(value: Any) -> str | None:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return None if value is None else str(value)


def class_table(results: Sequence[Result], truth: COCO | None, names: Mapping[int, str]) -> dict[str, Any]:
    """Classes with their numbers of objects, and by figure each result's values in that order."""
    ids = sorted({i for result in results if result.tables for i in result.tables.category_ids})
    counts = Counter(a["category_id"] for a in truth.anns.values() if not a["iscrowd"]) if truth else None
    return {
        "classes": [
            {"id": i, "name": names.get(i, f"class {i}"), "objects": None if counts is None else counts[i]}
            for i in ids
        ],
        "figures": [name for name, *_ in CLASS_FIGURES],
        "values": [class_figures(result.tables, ids) if result.tables else None for result in results],
    }


def class_figures(tables: Tables, ids: Sequence[int]) -> dict[str, list[float | None]]:
    """COCO's figures of single classes: the mean over what the figure averages, leaving out what is
    undefined.
    """
    places = {category: place for place, category in enumerate(tables.category_ids)}
    figures = {}
    for name, ious, area, is_recall in CLASS_FIGURES:
        table = tables.recall[ious, :, area, -1] if is_recall else tables.precision[ious, :, :, area, -1]
        figures[name] = [_defined_mean(table[..., places[i]]) if i in places else None for i in ids]
    return figures


def _defined_mean(values: NDArray[np.float64]) -> float | None:
    values = values[values > -1]
    return number(values.mean()) if values.size else None


def number(value: Any) -> float | None:
    """A finite number with the digits that a page can show, else None."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(f"{float(value):.6g}")
