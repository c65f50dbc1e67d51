"""The files of an evaluation: detections in COCO's results format, tables of precision and recall."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from util.checkpoint import write_atomically
from util.errors import NotSavedError

log = logging.getLogger(__name__)


def save_evaluation(
    run: Path, tables: dict[str, Any], results: Sequence[Any], epoch: int, prefix: str, predictions: bool
) -> None:
    """Write the files of an epoch's evaluation. A failure is a warning: training continues.

    Args:
        run: the run's folder. eval/ in it takes <prefix>latest.json (detections) and
            <prefix>latest.pth (tables), and every 50 epochs <prefix><epoch>.pth.
        prefix: "ema_" for the averaged weights, else "".
        predictions: whether to write the detections to predictions[_ema].json too.
    """
    folder = run / "eval"
    try:
        folder.mkdir(exist_ok=True)
        # hundreds of thousands of detections take seconds: once for both files
        text = json.dumps(results)
        _write_text(folder / f"{prefix}latest.json", text)
        write_atomically(tables, folder / f"{prefix}latest.pth")
        # kept, so that the course of a training can be seen
        if epoch % 50 == 0:
            write_atomically(tables, folder / f"{prefix}{epoch:03}.pth")
        if predictions:
            name = "predictions_ema.json" if prefix else "predictions.json"
            _write_text(run / name, text)
            log.info("%d detections in %s", len(results), name)
    except (OSError, NotSavedError) as error:
        log.warning("%s; training continues", error)


def write_evaluation(
    folder: Path, tables: dict[str, Any], results: Sequence[Any], suffix: str, predictions: bool
) -> None:
    """Write the files of --eval: eval<suffix>.pth and, if asked for, predictions<suffix>.json.

    Raises NotSavedError.
    """
    # the detections first: they can't be computed from the tables
    if predictions:
        path = folder / f"predictions{suffix}.json"
        _write_text(path, json.dumps(results))
        log.info("%d detections in %s", len(results), path)
    write_atomically(tables, folder / f"eval{suffix}.pth")


def _write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise NotSavedError(f"{path} could not be written ({error.strerror})") from None
