"""Outlines and masks of objects, as COCO's `segmentation`. A faulty one is never a problem of the conversion:
boxes train without masks. It is counted, and the check (datasets/preflight) says what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

from datasets.coco_masks import is_outline, run_lengths
from datasets.convert.problems import Problems, point_as_stored
from util.errors import UserError
from util.images.files import Header

_MENDED = "outlines mended: parts of fewer than three points left out, or the list around them added"


def outline_as_stored(points: Any, header: Header) -> list[list[float]]:
    """COCO's polygons of an outline x, y, x, y, ... in the image as viewers show it; empty: it is none."""
    if not is_outline(points):
        return []
    turned = (point_as_stored(u, v, header) for u, v in zip(points[::2], points[1::2], strict=True))
    return [[round(value, 4) for point in turned for value in point]]


def mask_as_stored(mask: np.ndarray, header: Header) -> np.ndarray:
    """A mask [H, W] of the image as viewers show it, in the image as stored (see `point_as_stored`)."""
    if header.orientation >= 5:
        mask = mask.T
    if header.orientation in (2, 3, 7, 8):
        mask = mask[:, ::-1]
    if header.orientation in (3, 4, 6, 7):
        mask = mask[::-1]
    return mask


def pixels_of(annotation: dict[str, Any], image: dict[str, Any]) -> int | None:
    """The number of pixels of an annotation's mask; None: it has none that training could use."""
    try:
        counts = run_lengths(annotation, image, Path())
    except UserError:
        return None
    return int(mask_utils.area({"size": [int(image["height"]), int(image["width"])], "counts": counts}))


def mend_outlines(annotations: Iterable[dict[str, Any]], problems: Problems) -> None:
    """Some tools write an outline without the list around it (VIA), or parts that are points and lines."""
    for annotation in annotations:
        parts = annotation.get("segmentation")
        if not isinstance(parts, list) or not parts:
            continue
        if not any(isinstance(part, list) for part in parts):
            parts = [parts]
        parts = [part for part in parts if isinstance(part, list) and len(part) >= 6]
        if parts and parts != annotation["segmentation"]:
            annotation["segmentation"] = parts
            problems.notes[_MENDED] += 1


def masks_line(contents: Iterable[dict[str, Any]]) -> str:
    """How many objects of some instances files have a mask; "": none has."""
    count = masks = 0
    for content in contents:
        images = {image["id"]: image for image in content["images"]}
        count += len(content["annotations"])
        with_any = (entry for entry in content["annotations"] if entry.get("segmentation"))
        masks += sum(pixels_of(entry, images[entry["image_id"]]) is not None for entry in with_any)
    if not masks:
        return ""
    line = f"masks: {masks} of {count} objects"
    if masks < count:
        line += "; --masks needs all, and tools/check_data.py --masks lists those without"
    return line
