"""Reading a run's log.txt, and the panels in which its curves are drawn.

util/draw/plots.py draws them as a picture, tools/report.py on a page.
"""

import colorsys
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from util.errors import UserError

Row = dict[str, Any]

# COCO's figures, in the order of COCOeval.stats
FIGURES = (
    "AP",
    "AP50",
    "AP75",
    "AP small",
    "AP medium",
    "AP large",
    "AR 1",
    "AR 10",
    "AR 100",
    "AR small",
    "AR medium",
    "AR large",
)
# name of a curve -> key of the log and place in its list; "ema": of the averaged weights
# (--ema_decay)
COCO_CURVES = {
    f"{prefix}{name}": (key, place)
    for prefix, key in (("", "test_coco_eval_bbox"), ("ema ", "test_ema_coco_eval_bbox"))
    for place, name in enumerate(FIGURES)
}


@dataclass(frozen=True)
class Panel:
    """One chart over the epochs.

    curves: name in the legend -> key of the log or of COCO_CURVES; they are drawn solid, dashed and
    dotted. unit: of the values, written after them. logarithmic: the scale of the values; what is
    not positive is left out.
    """

    title: str
    curves: Mapping[str, str]
    unit: str = ""
    logarithmic: bool = False


PANELS = (
    Panel("Average precision", {"AP": "AP", "AP50": "AP50", "AP averaged": "ema AP"}, "%"),
    Panel("AP by size", {"small": "AP small", "medium": "AP medium", "large": "AP large"}, "%"),
    Panel("Total loss", {"training": "train_loss", "validation": "test_loss"}),
    Panel("Classification loss", {"training": "train_loss_ce", "validation": "test_loss_ce"}),
    Panel("Box L1 loss", {"training": "train_loss_bbox", "validation": "test_loss_bbox"}),
    Panel("Box GIoU loss", {"training": "train_loss_giou", "validation": "test_loss_giou"}),
    Panel("Classification error", {"training": "train_class_error", "validation": "test_class_error"}, "%"),
    Panel("Gradient norm", {"training": "train_grad_norm"}),
    Panel("Learning rate", {"training": "train_lr"}, logarithmic=True),
)


MAX_MARKERS = 25  # with more epochs, markers would hide the line


@dataclass(frozen=True)
class Line:
    """One curve of a run: place of the run, name and place in the panel; epochs [E] ascending,
    values [E].
    """

    run: int
    name: str
    place: int
    epochs: NDArray[np.float64]
    values: NDArray[np.float64]


def lines(panel: Panel, logs: Sequence[Sequence[Row]]) -> Iterator[Line]:
    """The curves of a panel, for the rows of every run; those without a value are left out."""
    for run, rows in enumerate(logs):
        for place, (name, key) in enumerate(panel.curves.items()):
            epochs, values = series(rows, key)
            if panel.logarithmic:
                epochs, values = epochs[values > 0], values[values > 0]
            if len(epochs):
                yield Line(run, name, place, epochs, values)


def series(rows: Sequence[Row], key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """One curve: epochs [E] ascending and values [E], where they are finite.

    `key` is a key of the log, or one of COCO_CURVES in percent; there COCO writes -1 for what is
    undefined, which is left out. Of an epoch that was run twice (resumed from an older checkpoint)
    the later row counts.
    """
    values = {}
    for row in rows:
        epoch, value = _number(row.get("epoch")), _value(row, key)
        if epoch is not None and value is not None:
            values[epoch] = value
    epochs = sorted(epoch for epoch, value in values.items() if math.isfinite(value))
    return np.array(epochs, dtype=np.float64), np.array([values[epoch] for epoch in epochs], dtype=np.float64)


def _value(row: Row, key: str) -> float | None:
    if key not in COCO_CURVES:
        return _number(row.get(key))
    entry, place = COCO_CURVES[key]
    figures = row.get(entry)
    if not isinstance(figures, list) or len(figures) <= place or (figure := _number(figures[place])) is None:
        return None
    return 100 * figure if figure >= 0 else math.nan


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def run_colors(count: int) -> list[str]:
    """A colour for each of `count` runs, as #rrggbb, for lines on white and on a dark ground."""
    if count <= len(_COLORS):
        return _COLORS[:count]
    colors = []
    for i in range(count):  # neighbours differ in hue, lightness and saturation
        shade = colorsys.hls_to_rgb(i / count, 0.42 + 0.08 * (i % 3), 0.85 if i % 2 else 0.6)
        colors.append("#" + "".join(f"{round(255 * part):02x}" for part in shade))
    return colors


_COLORS = ["#2f7fd0", "#dd6216", "#17906a", "#c25a9f", "#9a7a08", "#7d70e2", "#7d8691"]


def read_log(path: str | Path) -> list[Row]:
    """The rows of a log.txt, one JSON object a line, in the order of the file; blank lines do not
    count.

    A last line that is not whole is left out: the run is writing it, or was stopped while it did.

    Raises:
        OSError: the file cannot be read.
        UserError: another line is not a JSON object; the message names file and line.
    """
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    numbered = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    rows = []
    for number, line in numbered:
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == numbered[-1][0]:
                break
            raise UserError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not a JSON object")
        rows.append(row)
    return rows
