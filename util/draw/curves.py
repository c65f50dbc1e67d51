"""Reading a run's log.txt, and the panels in which its curves are drawn.

util/draw/plots.py draws them as a picture, tools/report.py on a page.
"""

import colorsys
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from util.errors import UserError

Row = dict[str, Any]

# COCO's metrics, in the order of COCOeval.stats
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

# the keys of log.txt that have them, without "test_" or "test_ema_", by what stands before their names
FIGURE_KEYS = {"": "coco_eval_bbox", "mask ": "coco_eval_masks"}


def percent(metric: float) -> str:
    """A metric of COCO in percent; -1 means that it is undefined."""
    return f"{100 * metric:.1f}" if metric >= 0 else "-"


@dataclass(frozen=True)
class Panel:
    """One chart over the epochs.

    curves: name in the legend -> key, as `series` takes it; they are drawn solid, dashed and
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
MASK_PANELS = (
    Panel("Mask AP", {"AP": "mask AP", "AP50": "mask AP50", "AP averaged": "ema mask AP"}, "%"),
    Panel("Mask AP by size", {s: f"mask AP {s}" for s in ("small", "medium", "large")}, "%"),
    Panel("Mask focal loss", {"training": "train_loss_mask", "validation": "test_loss_mask"}),
    Panel("Mask dice loss", {"training": "train_loss_dice", "validation": "test_loss_dice"}),
)

# of runs with panoptic data
PANOPTIC = Panel("Panoptic quality", {"all": "PQ_all", "things": "PQ_th", "stuff": "PQ_st"}, "%")

MAX_MARKERS = 25  # with more epochs, markers would hide the line


@dataclass(frozen=True)
class Curve:
    """One curve of a run in a panel.

    run: index of the run. name: in the legend. style: index among the panel's curves, which gives
    the line style. epochs [E] ascending, values [E].
    """

    run: int
    name: str
    style: int
    epochs: NDArray[np.float64]
    values: NDArray[np.float64]


def panels_of(logs: Sequence[Sequence[Row]]) -> list[tuple[Panel, list[Curve]]]:
    """The panels with their curves, for the rows of every run; those of masks only if they have one."""
    found = [(panel, curves_of(panel, logs)) for panel in (*PANELS, *MASK_PANELS, PANOPTIC)]
    return [(panel, curves) for panel, curves in found if curves or panel in PANELS]


def curves_of(panel: Panel, logs: Sequence[Sequence[Row]]) -> list[Curve]:
    """The curves of a panel for the rows of every run, without those that have no value."""
    found = []
    for run, rows in enumerate(logs):
        for style, (name, key) in enumerate(panel.curves.items()):
            epochs, values = series(rows, key)
            # a logarithmic scale has no place for 0
            if panel.logarithmic:
                epochs, values = epochs[values > 0], values[values > 0]
            if len(epochs):
                found.append(Curve(run, name, style, epochs, values))
    return found


def series(rows: Sequence[Row], key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """One curve: epochs [E] ascending and values [E], where they are finite.

    `key` is a key of the log, or one of FIGURES or of PANOPTIC in percent ("mask AP": of masks; "ema AP",
    "ema mask AP": of the averaged weights, --ema_decay); COCO's -1 for an undefined value is left out. Of
    an epoch that was run twice (resumed from an older checkpoint) the later row counts.
    """
    # a dictionary, so that a later row replaces an earlier one
    values = {}
    for row in rows:
        epoch, value = row.get("epoch"), _value(row, key)
        if isinstance(epoch, int | float) and isinstance(value, int | float):
            values[float(epoch)] = float(value)
    pairs = np.array(sorted(values.items()), dtype=np.float64).reshape(-1, 2)
    pairs = pairs[np.isfinite(pairs).all(axis=1)]
    return pairs[:, 0], pairs[:, 1]


def _value(row: Row, key: str) -> Any:
    if key in PANOPTIC.curves.values():
        quality = row.get(f"test_{key}")
        value = quality.get("pq") if isinstance(quality, dict) else None
        return _in_percent(value)
    # COCO's metrics are a list in the log
    of_kind = key.removeprefix("ema ")
    name = of_kind.removeprefix("mask ")
    if name not in FIGURES:
        return row.get(key)
    kind = FIGURE_KEYS[of_kind.removesuffix(name)]
    metrics = row.get(f"test_{kind}" if of_kind == key else f"test_ema_{kind}")
    place = FIGURES.index(name)
    if not isinstance(metrics, list) or len(metrics) <= place:
        return None
    return _in_percent(metrics[place])


def _in_percent(value: Any) -> float | None:
    if not isinstance(value, int | float):
        return None
    return 100 * value if value >= 0 else math.nan


def run_colors(count: int) -> list[str]:
    """A colour for each of `count` runs, as #rrggbb, for lines on a white and on a dark background."""
    # these have a contrast of 3 and more with both backgrounds
    if count <= len(_COLORS):
        return _COLORS[:count]
    colors = []
    for i in range(count):  # neighbours differ in hue, lightness and saturation
        saturation = 0.85 if i % 2 else 0.6
        shade = colorsys.hls_to_rgb(i / count, 0.42 + 0.08 * (i % 3), saturation)
        colors.append("#" + bytes(round(255 * channel) for channel in shade).hex())
    return colors


_COLORS = ["#2f7fd0", "#dd6216", "#17906a", "#c25a9f", "#9a7a08", "#7d70e2", "#7d8691"]


def read_log(path: str | Path) -> list[Row]:
    """The rows of a log.txt, one JSON object a line; blank lines are skipped.

    An incomplete last line is left out: the run is writing it, or was stopped while it did.

    Raises:
        OSError: the file cannot be read.
        UserError: another line is not a JSON object; the message names file and line.
    """
    # a line break at the end would count as one more line
    lines = Path(path).read_text(encoding="utf-8", errors="replace").rstrip().split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # half written
                break
            raise UserError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not a JSON object")
        rows.append(row)
    return rows
