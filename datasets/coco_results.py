"""Detections in COCO's results format, as files of other programs and ours have them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from datasets.coco_format import read_json
from util.errors import UserError


def read_results(path: Path) -> list[dict[str, Any]]:
    """The detections of a file.

    Raises:
        UserError: the file is missing, not JSON, or not a list of detections; the message names the
        entry.
    """
    # files of millions of detections: the first wrong entry ends it
    results = read_json(path)
    problem = f"{path} is not in COCO's results format"
    if not isinstance(results, list):
        raise UserError(f"{problem}: it must be a list of detections")
    for i, result in enumerate(results):
        if not _is_result(result):
            raise UserError(f"{problem}: entry {i} needs image_id, category_id, bbox [x, y, w, h] and score")
    return results


def _is_result(entry: Any) -> bool:
    if not isinstance(entry, dict) or not is_finite(entry.get("score")):
        return False
    # a bool is an int, too
    if type(entry.get("image_id")) is not int or type(entry.get("category_id")) is not int:
        return False
    box = entry.get("bbox")
    return isinstance(box, list) and len(box) == 4 and all(map(is_finite, box))


def is_finite(value: Any) -> bool:
    """True for a finite number; a bool is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
