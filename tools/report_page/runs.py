"""What a run's output folder has to tell, and what it lacks."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from util.checkpoint import read_checkpoint
from util.draw.curves import FIGURES, Row, read_log
from util.errors import UserError
from util.run.record import read_record

log = logging.getLogger(__name__)

# weights -> the tables and the detections of an evaluation, the newest place first: while training,
# or by main.py --eval
_FILES = {
    "": (("eval/latest.pth", "eval.pth"), ("eval/latest.json", "predictions.json")),
    "ema": (("eval/ema_latest.pth", "eval_ema.pth"), ("eval/ema_latest.json", "predictions_ema.json")),
}


@dataclass(frozen=True)
class Tables:
    """precision [T, R, K, A, M] and scores (the same) over IoU, recall, class, size and detections
    an image; recall [T, K, A, M]; -1 where nothing can be said.
    """

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    scores: NDArray[np.float64]
    category_ids: list[int]
    stats: list[float]


@dataclass
class Result:
    """A run's newest evaluation of one of its weights: "" or "ema" (averaged). tables and
    detections: None if not there.
    """

    weights: str
    tables: Tables | None
    detections: list[dict[str, Any]] | None
    stats: list[float] | None


@dataclass
class Run:
    """notes: what is missing, a sentence each with the remedy."""

    name: str
    folder: Path
    rows: list[Row]
    record: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def flags(self) -> dict[str, Any]:
        return self.record.get("flags", {})


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Raises UserError for a folder that is not a run's, or a file in one that is broken."""
    names = [folder.resolve().name for folder in folders]
    shown = [
        name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)
    ]
    if len(set(shown)) < len(shown):
        raise UserError(
            f"{next(name for name in shown if shown.count(name) > 1)} is given twice; name each run once"
        )
    return [_read_run(name, folder) for name, folder in zip(shown, folders, strict=True)]


def _read_run(name: str, folder: Path) -> Run:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give the --output_dir of a run")
    run = Run(name, folder, [], {})
    try:
        run.rows = [row for row in read_log(folder / "log.txt") if is_number(row.get("epoch"))]
    except FileNotFoundError:
        run.notes.append("has no log.txt yet, so it has no curves; they appear after its first epoch")
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None
    run.record = _sane(read_record(folder)) or _record_of_checkpoint(run)
    for weights in _FILES:
        if result := _result(run, weights):
            run.results.append(result)
    if not (run.rows or run.record or run.results):
        raise UserError(
            f"{folder} holds nothing of a run: no log.txt, run.json, checkpoint or eval/; give a "
            f"run's --output_dir"
        )
    if not run.results:
        run.notes.append(
            "has not been evaluated yet; its figures appear after its first evaluation (--eval_every)"
        )
    return run


def _sane(record: dict[str, Any]) -> dict[str, Any]:
    """The entries that are of their kind, whoever has edited the file."""
    kinds = {"flags": dict, "classes": dict, "data": dict, "environment": dict, "starts": list}
    sane = {name: value for name, value in record.items() if isinstance(value, kinds.get(name, object))}
    sane["starts"] = [start for start in sane.get("starts", []) if isinstance(start, dict)]
    sane["data"] = {name: value for name, value in sane.get("data", {}).items() if isinstance(value, dict)}
    return sane if record else {}


def _record_of_checkpoint(run: Run) -> dict[str, Any]:
    """Flags of a run without run.json, as far as a checkpoint has them."""
    files = [*sorted(run.folder.glob("resume_*.pth"))[-1:], *run.folder.glob("checkpoint.pth")]
    for file in files:
        try:
            checkpoint = read_checkpoint(file, "checkpoint")
        except UserError as error:
            log.warning("%s", error)
            continue
        args = checkpoint.get("args")
        flags = args if isinstance(args, dict) else vars(args) if hasattr(args, "__dict__") else {}
        run.notes.append(
            f"has no run.json; its flags are those in {file.name}, and what it ran on is not known"
        )
        return {"flags": flags, "classes": checkpoint.get("classes")}
    run.notes.append("has no run.json and no checkpoint, so its flags are not known")
    return {}


def _result(run: Run, weights: str) -> Result | None:
    tables, detections = _FILES[weights]
    result = Result(weights, _read(run, tables, _read_tables), _read(run, detections, _read_detections), None)
    result.stats = result.tables.stats if result.tables else last_figures(run.rows, weights)
    if result.tables is None and result.detections is None and result.stats is None:
        return None
    return result


def _read(run: Run, names: Sequence[str], reader: Callable[[Path], Any]) -> Any:
    """The newest of several files, or None; one that is broken costs a note."""
    files = [run.folder / name for name in names if (run.folder / name).is_file()]
    if not files:
        return None
    newest = max(files, key=lambda file: file.stat().st_mtime)
    try:
        return reader(newest)
    except UserError as error:
        run.notes.append(f"{error}; evaluate again with main.py --resume auto --eval")
        return None


def _read_tables(path: Path) -> Tables:
    content = read_checkpoint(path, "tables")
    try:
        arrays = [np.asarray(content[name], dtype=np.float64) for name in ("precision", "recall", "scores")]
        tables = Tables(
            *arrays, [int(i) for i in content["category_ids"]], [float(value) for value in content["stats"]]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} holds no tables of precision and recall ({error})") from None
    if (
        tables.precision.ndim != 5
        or tables.precision.shape[2] != len(tables.category_ids)
        or len(tables.stats) != 12
    ):
        raise UserError(f"{path} holds tables of another shape than COCO's")
    return tables


def _read_detections(path: Path) -> list[dict[str, Any]]:
    try:
        detections = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({getattr(error, 'strerror', None) or 'not JSON'})") from None
    if not isinstance(detections, list) or not all(map(_is_detection, detections)):
        raise UserError(
            f"{path} is not in COCO's results format: a list of image_id, category_id, bbox [x, y, "
            f"w, h] and score"
        )
    return detections


def _is_detection(entry: Any) -> bool:
    if not isinstance(entry, dict) or not is_number(entry.get("score")):
        return False
    ids, box = (entry.get("image_id"), entry.get("category_id")), entry.get("bbox")
    return (
        all(type(i) is int for i in ids)
        and isinstance(box, list)
        and len(box) == 4
        and all(map(is_number, box))
    )


def last_figures(rows: Sequence[Row], weights: str) -> list[float] | None:
    """The twelve figures of the last evaluation in the log."""
    key = f"test_{weights}_coco_eval_bbox" if weights else "test_coco_eval_bbox"
    for row in reversed(rows):
        values = row.get(key)
        if isinstance(values, list) and len(values) == len(FIGURES) and all(map(is_number, values)):
            return [float(value) for value in values]
    return None


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
