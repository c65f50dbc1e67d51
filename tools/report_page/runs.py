"""Reads the output folders of runs, and notes what is missing there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from datasets.coco_results import is_finite, read_results
from util.checkpoint import read_checkpoint
from util.draw.curves import FIGURE_KEYS, FIGURES, Row, read_log
from util.errors import UserError
from util.run.record import read_record

log = logging.getLogger(__name__)
T = TypeVar("T")

# weights -> tables of an evaluation, and its detections: of training, and of main.py --eval
_FILES = {
    "": (("eval/latest.pth", "eval.pth"), ("eval/latest.json", "predictions.json")),
    "ema": (("eval/ema_latest.pth", "eval_ema.pth"), ("eval/ema_latest.json", "predictions_ema.json")),
}


@dataclass(frozen=True)
class Tables:
    """COCO's tables of an evaluation; -1 for undefined values.

    precision: [T, R, K, A, M] over IoU, recall, class, object size and detections an image.
    recall: [T, K, A, M]. category_ids: K ids. stats: the twelve metrics.
    """

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    category_ids: list[int]
    stats: list[float]

    @classmethod
    def from_plain(cls, content: dict[str, Any]) -> Tables:
        """From what datasets.coco_eval.precision_tables gives."""
        precision, recall = (np.asarray(content[name], float) for name in ("precision", "recall"))
        return cls(precision, recall, list(content["category_ids"]), list(content["stats"]))


@dataclass
class Result:
    """A run's newest evaluation of its weights ("") or of the averaged ones ("ema"), by boxes or by
    masks. None for what is missing.

    name: of the run, with "(averaged)", "(masks)" or both. detections: the same for boxes and masks.
    """

    name: str
    weights: str
    masks: bool
    tables: Tables | None
    detections: list[dict[str, Any]] | None
    stats: list[float] | None


@dataclass
class Run:
    """rows: of log.txt. record: of run.json, or what a checkpoint has of it. notes: sentences that say
    what is missing, and the remedy.
    """

    name: str
    folder: Path
    rows: list[Row] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def recorded(self, *names: str) -> dict[str, Any]:
        """An entry of the record; {} if it is missing or was edited to something else."""
        entry: Any = self.record
        for name in names:
            entry = entry.get(name)
            if not isinstance(entry, dict):
                return {}
        return entry

    @property
    def flags(self) -> dict[str, Any]:
        return self.recorded("flags")

    @property
    def starts(self) -> list[dict[str, Any]]:
        starts = self.record.get("starts")
        return [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []

    @property
    def evaluated(self) -> str:
        """Of main.py --eval: the checkpoint. Of a training: ""."""
        if self.rows or self.flags.get("eval") is not True:
            return ""
        last = self.starts[-1] if self.starts else {}
        return str(last.get("checkpoint") or self.flags.get("resume"))

    @property
    def num_epochs(self) -> int:
        return len({row["epoch"] for row in self.rows})


def read_runs(folders: Sequence[Path], names: Sequence[str] | None = None) -> list[Run]:
    """Raises UserError for a folder that is not a run's, or has a broken log."""
    names = names or [folder.resolve().name for folder in folders]
    runs: dict[str, Run] = {}
    for folder, name in zip(folders, names, strict=True):
        # a/run and b/run are shown by their paths
        if names.count(name) > 1:
            name = str(folder)
        if name in runs:
            raise UserError(f"{name} is given twice; name each run once")
        runs[name] = _read_run(name, folder)
    return list(runs.values())


def _read_run(name: str, folder: Path) -> Run:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give the --output_dir of a run")
    run = Run(name, folder)

    # Runs of older versions have no run.json.
    run.record = read_record(folder) or _record_of_checkpoint(run)

    # A run that has just started has no log yet, and an evaluation never has one.
    try:
        run.rows = [row for row in read_log(folder / "log.txt") if is_finite(row.get("epoch"))]
    except FileNotFoundError:
        if not run.evaluated:
            run.notes.append("has no log.txt yet, so it has no curves; they appear after its first epoch")
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None

    # main.py --eval writes tables and no log
    for weights, (table_files, detection_files) in _FILES.items():
        found = _newest(run, table_files, _read_tables) or {}
        detections = _newest(run, detection_files, read_results)
        for prefix, key in FIGURE_KEYS.items():
            tables, masks = found.get(prefix), prefix == "mask "
            stats = tables.stats if tables else _last_metrics(run.rows, weights, key)
            if stats or (detections is not None and not masks):
                words = ["averaged"] * bool(weights) + ["masks"] * masks
                shown = f"{name} ({', '.join(words)})" if words else name
                run.results.append(Result(shown, weights, masks, tables, detections, stats))

    # Any folder could be named by mistake.
    if not (run.rows or run.record or run.results):
        needed = "no log.txt, run.json, checkpoint or eval/"
        raise UserError(f"{folder} holds nothing of a run: {needed}; give a run's --output_dir")
    if not run.results:
        remedy = "its metrics appear after its first evaluation (--eval_every)"
        run.notes.append(f"has not been evaluated yet; {remedy}")
    return run


def _record_of_checkpoint(run: Run) -> dict[str, Any]:
    """Flags and classes of a run without run.json, from a checkpoint."""
    # a run that was not finished may have the first, and a published checkpoint is the second
    files = [*sorted(run.folder.glob("resume_*.pth"))[-1:], *run.folder.glob("checkpoint.pth")]
    for file in files:
        try:
            checkpoint = read_checkpoint(file, "checkpoint")
        except UserError as error:  # the next file may be whole
            log.warning("%s", error)
            continue
        flags = checkpoint.get("args", {})
        if not isinstance(flags, dict):  # published checkpoints hold a Namespace
            flags = getattr(flags, "__dict__", {})
        source = f"its flags are those in {file.name}, and what it ran on is not known"
        run.notes.append(f"has no run.json; {source}")
        return {"flags": flags, "classes": checkpoint.get("classes")}
    run.notes.append("has no run.json and no checkpoint, so its flags are not known")
    return {}


def _newest(run: Run, names: Sequence[str], reader: Callable[[Path], T]) -> T | None:
    """The content of the newest of several files. A broken file gives None and a note."""
    files = [run.folder / name for name in names if (run.folder / name).is_file()]
    if not files:
        return None
    newest = max(files, key=lambda file: file.stat().st_mtime)
    try:
        return reader(newest)
    except UserError as error:
        run.notes.append(f"{error}; evaluate again with main.py --resume auto --eval")
        return None


def _read_tables(path: Path) -> dict[str, Tables]:
    """The tables of boxes and, if there are some, of masks, by the keys of FIGURE_KEYS."""
    content = read_checkpoint(path, "tables")
    found = {"": content, "mask ": content["segm"]} if "segm" in content else {"": content}
    try:
        every = {prefix: Tables.from_plain(one) for prefix, one in found.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} holds no tables of precision and recall ({error})") from None
    # other shapes would fail later, where nothing names the file
    for tables in every.values():
        shape, classes = tables.precision.shape, len(tables.category_ids)
        if len(shape) != 5 or shape[2] != classes or not _are_metrics(tables.stats):
            raise UserError(f"{path} holds tables of another shape than COCO's")
    return every


def _are_metrics(values: Any) -> bool:
    return isinstance(values, list) and len(values) == len(FIGURES) and all(map(is_finite, values))


def _last_metrics(rows: Sequence[Row], weights: str, kind: str) -> list[float] | None:
    """The twelve metrics of the last evaluation in the log."""
    key = f"test_{weights}_{kind}" if weights else f"test_{kind}"
    for row in reversed(rows):
        if _are_metrics(row.get(key)):
            return row[key]
    return None
