"""Rules for boxes: which ones training would cut, leave out or misunderstand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

# pixels by which a box may reach out of its image: rounding does that in COCO and VOC, and training
# clamps such boxes
BOX_TOLERANCE = 2.0
# an object's pixels lie within its box; polygons that overlap count some twice
_LARGEST_SHARE = 2.0

_PROBLEMS = {
    "degenerate_box": "no width or no height; take the object out",
    "box_outside": "no part within the image of {size}; mend the box or the size",
    "box_reaches_out": "more than {tolerance:g} pixels outside of the image of {size}; mend "
    "the box or the size",
}


def sizes_of(images: Iterable[Mapping[str, Any]]) -> np.ndarray:
    """[N, 2]: width and height."""
    return np.array([[image["width"], image["height"]] for image in images], dtype=np.float64).reshape(-1, 2)


def box_problems(
    xywh: np.ndarray, sizes: np.ndarray, tolerance: float = BOX_TOLERANCE
) -> dict[str, np.ndarray]:
    """By kind of problem, which boxes [N, 4] have it in images of sizes [N, 2] (width, height).

    Each box has one kind at most.
    """
    # only the worst problem of a box is reported
    low, high = xywh[:, :2], xywh[:, :2] + xywh[:, 2:]
    degenerate = (xywh[:, 2:] <= 0).any(1)
    outside = ~degenerate & ((high <= 0) | (low >= sizes)).any(1)
    far = np.maximum(-low, high - sizes).max(1, initial=-np.inf) > tolerance
    return {
        "degenerate_box": degenerate,
        "box_outside": outside,
        "box_reaches_out": far & ~degenerate & ~outside,
    }


def box_problem(kind: str, image: Mapping[str, Any], tolerance: float = BOX_TOLERANCE) -> str:
    """What a box in `image` has that is wrong by `box_problems`."""
    return _PROBLEMS[kind].format(size=f"{image['width']:g} x {image['height']:g}", tolerance=tolerance)


def wrong_areas(xywh: np.ndarray, area: np.ndarray) -> np.ndarray:
    """[N] bool: areas that no object in a box [N, 4] of that size can have."""
    # within a pixel, rounding explains everything
    box_area = xywh[:, 2] * xywh[:, 3]
    too_large = area > _LARGEST_SHARE * box_area + 1
    empty = (area == 0) & (box_area > 1)
    return (box_area > 0) & (too_large | empty)


def describe_box(path: Path, number: int, xywh: Iterable[float], image: Mapping[str, Any], what: str) -> str:
    """One line: an object of the annotation file `path` by its id, its image, its box, and `what` it
    has.
    """
    box = ", ".join(f"{value:g}" for value in xywh)
    return (
        f"{path}: annotation {number} of image {image['id']} ({image['file_name']}), box [{box}], has {what}"
    )
