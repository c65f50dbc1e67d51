"""What the page shows, as plain data: the summary of runs, their flags, and the classes.

Values are numbers, or None where nothing is known; average precisions are shares in [0, 1].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO

from datasets.coco_results import is_finite
from tools.report_page.runs import Result, Run, Tables
from util.config import FLAGS
from util.draw.curves import series

# metrics of single classes: name -> IoU thresholds and size, as indices of COCO's tables
PRECISIONS = {
    "AP": (slice(None), 0),
    "AP50": (slice(0, 1), 0),
    "AP75": (slice(5, 6), 0),
    "AP small": (slice(None), 1),
    "AP medium": (slice(None), 2),
    "AP large": (slice(None), 3),
}
RECALL = "AR 100"


def results_of(runs: Sequence[Run]) -> list[tuple[int, Run, Result]]:
    return [(number, run, result) for number, run in enumerate(runs) for result in run.results]


def summary(run: Run) -> dict[str, Any]:
    """State, best result, size and machine of a run."""
    # A run that has only begun has neither rows nor a complete record.
    last = run.rows[-1] if run.rows else {}
    starts = run.starts
    return {
        "name": run.name,
        "folder": str(run.folder),
        "epochs": run.num_epochs,
        "of": run.flags.get("epochs"),
        "evaluated": run.evaluated,
        "basis": _basis(run),
        "best": _best(run, "AP"),
        "best_masks": _best(run, "mask AP"),
        "loss": _number(last.get("train_loss")),
        "parameters": _number(last.get("n_parameters")),
        "batch": None if run.evaluated else _total_batch(run),
        "changed": "" if run.evaluated else _changed_flags(run),
        "environment": run.recorded("environment"),
        "data": run.recorded("data"),
        "started": starts[0].get("at") if starts else None,
        "continued": max(len(starts) - 1, 0),
    }


def _best(run: Run, metric: str) -> dict[str, Any] | None:
    # most runs evaluate only every few epochs
    evaluated, ap = series(run.rows, metric)
    return {"AP": ap.max() / 100, "epoch": int(evaluated[ap.argmax()])} if len(ap) else None


def _basis(run: Run) -> str:
    """What an AP rests on: "6 epochs of 100 images, evaluated on 12". A toy run shows by that."""
    train = run.recorded("data", "train").get("num_images")
    val = run.recorded("data", "val").get("num_images")
    # a folder of main.py --eval has no epochs
    words = []
    if run.rows:
        words.append(f"{run.num_epochs} epochs" if run.num_epochs > 1 else "1 epoch")
        if isinstance(train, int):
            words[0] += f" of {train:,} images"
    if isinstance(val, int):
        words.append(f"evaluated on {val:,}")
    return ", ".join(words)


def _total_batch(run: Run) -> str | None:
    """Images of one update, over all processes: "16", or "6, then 8" if a later start changed it."""
    machines = run.starts or [run.recorded("environment")]
    batches = []
    for flags, machine in zip(_flags_of_starts(run), machines, strict=True):
        size, processes = flags.get("batch_size"), machine.get("processes")
        if isinstance(size, int) and isinstance(processes, int):
            batches.append(f"{size * processes * int(flags.get('accumulate_steps') or 1):,}")
    return _in_turn(batches) or None


def _changed_flags(run: Run) -> str:
    """Flags that later starts changed: "--lr 0.0005, then 0.0001; --seed 1, then 2"."""
    of_starts = _flags_of_starts(run)
    values = {name: [_flag(flags.get(name)) or "–" for flags in of_starts] for name in run.flags}
    changed = [name for name in values if len(set(values[name])) > 1 and name not in ("output_dir", "resume")]
    return "; ".join(f"--{name} {_in_turn(values[name])}" for name in changed)


def _flags_of_starts(run: Run) -> list[dict[str, Any]]:
    """The flags of each start. The record has the last ones, and what each start replaced."""
    flags = [run.flags]
    for start in run.starts[:0:-1]:
        changed = start.get("changed_flags")
        flags.append(flags[-1] | (changed if isinstance(changed, dict) else {}))
    return flags[::-1]


def _in_turn(values: Sequence[str]) -> str:
    return ", then ".join(value for value, _ in groupby(values))


def flag_table(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every flag, its meaning and its value in each run, in the order of --help.

    An evaluation is compared by the flags that it uses; its values of a training's flags are "".
    """
    # runs may be of different versions, with different flags: those of other versions come last
    given = {name for run in runs for name in run.flags}
    names = [name for name in FLAGS if name in given] + sorted(given - FLAGS.keys())
    table = []
    for name in names:
        help = FLAGS[name].help if name in FLAGS else ""
        role = FLAGS[name].of if name in FLAGS else ""
        values = ["" if run.evaluated and role == "training" else _flag(run.flags.get(name)) for run in runs]
        # of the flags of a process, only the precision changes an AP
        matters = role not in ("training", "run") or name == "amp"
        compared = {value for value, run in zip(values, runs, strict=True) if matters or not run.evaluated}
        table.append({"name": name, "help": help, "values": values, "differs": len(compared) > 1})
    return table


def _flag(value: Any) -> str | None:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return None if value is None else str(value)


def class_table(results: Sequence[Result], truth: COCO | None, names: Mapping[int, str]) -> dict[str, Any]:
    """Classes with their numbers of objects, and each result's metrics of every class."""
    tables = [result.tables for result in results]
    ids = sorted({i for one in tables if one for i in one.category_ids})

    # Without annotations the numbers of objects are not known.
    classes = [{"id": i, "name": names.get(i, f"class {i}"), "objects": None} for i in ids]
    if truth is not None:
        counts = Counter(a["category_id"] for a in truth.anns.values() if not a["iscrowd"])
        for one in classes:
            one["objects"] = counts[one["id"]]
    return {
        "classes": classes,
        "metrics": [*PRECISIONS, RECALL],
        "values": [class_metrics(one, ids) if one else None for one in tables],
    }


def class_metrics(tables: Tables, ids: Sequence[int]) -> dict[str, list[float | None]]:
    """COCO's metrics of single classes: the means of the defined values, in the order of `ids`."""
    metrics: dict[str, list[float | None]] = {name: [] for name in (*PRECISIONS, RECALL)}
    for category in ids:
        # no column for a class that this result's data set does not have
        columns = np.flatnonzero(np.equal(tables.category_ids, category))
        # the last index: the largest number of detections an image
        for name, (ious, size) in PRECISIONS.items():
            metrics[name].append(_defined_mean(tables.precision[ious, :, columns, size, -1]))
        metrics[RECALL].append(_defined_mean(tables.recall[:, columns, 0, -1]))
    return metrics


def _defined_mean(values: NDArray[np.float64]) -> float | None:
    values = values[values > -1]  # -1: no object of this class and size
    return _number(values.mean()) if values.size else None


def _number(value: Any) -> float | None:
    """A finite number with the digits that a page can show, else None."""
    return float(f"{float(value):.6g}") if is_finite(value) else None
