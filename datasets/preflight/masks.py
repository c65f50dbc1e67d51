"""Rules for masks: which ones can't be their object's."""

from __future__ import annotations

import numpy as np

from datasets.preflight.boxes import wrong_areas

# Annotators' boxes and masks differ: on COCO's by up to 7 pixels, and a seventh of a side. A mask is not its
# object's if a side of its own box is further away than these pixels and this share of the box.
_FARTHEST, _FARTHEST_SHARE = 4.0, 0.25
# COCO's areas are those of polygons, and parts that overlap count twice
_LARGEST_FACTOR = 2.0

# what an object has; box: around its mask, pixels: of its mask
MASK_PROBLEMS = {
    "empty_mask": "a mask without any pixel in the image; draw it again, or take the object out",
    "mask_off_box": "a mask elsewhere, within [{box}]; mend the mask or the box",
    "mask_area": "an area of {area:g}, which decides small, medium or large, and {pixels} pixels of mask",
}


def mask_problems(
    own: np.ndarray, pixels: np.ndarray, xywh: np.ndarray, area: np.ndarray, sizes: np.ndarray
) -> dict[str, np.ndarray]:
    """By kind of problem, which masks have it.

    Each mask has one kind at most. What is wrong with a box or an area by itself (boxes.py) is no problem
    of the mask.

    Args:
        own: [N, 4] x, y, width, height of the boxes around the masks. pixels: [N] of the masks.
        xywh, area: [N, 4] and [N] of the annotations. sizes: [N, 2] of the images (width, height).
    """
    # the part of the box in the image, where the mask is
    low, high = np.clip(xywh[:, :2], 0, sizes), np.clip(xywh[:, :2] + xywh[:, 2:], 0, sizes)
    sides = high - low
    sound = (sides > 0).all(1)
    empty = sound & (pixels == 0)
    away = np.maximum(abs(own[:, :2] - low), abs(own[:, :2] + own[:, 2:] - high))
    far = sound & ~empty & (away > _FARTHEST + _FARTHEST_SHARE * sides).any(1)
    # an outline covers some pixels of its border or none
    differ = abs(pixels - area) > sides.sum(1)
    larger, smaller = np.maximum(pixels, area), np.minimum(pixels, area)
    wrong = wrong_areas(xywh, area)
    other = sound & ~empty & ~far & ~wrong & differ & (larger > _LARGEST_FACTOR * smaller)
    return {"empty_mask": empty, "mask_off_box": far, "mask_area": other}
