"""The worst masks of runs: outlines of what was found over what is there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import contourpy
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from datasets.coco_masks import run_lengths
from datasets.detection_errors import CORRECT, Errors
from tools.report_page.mistakes import PICTURE_SIDE, Album, Box, entry_of

MASK = "mask"  # the kind of the entries


class MaskPairs:
    """The masks of a result's detections that found their object, each with the object's.

    `iou`: by the object's index, for those found with a score of at least the threshold.

    Raises UserError if a mask can't be used.
    """

    def __init__(self, errors: Errors, coco: COCO, path: Path, threshold: float) -> None:
        self._errors, self._coco, self._path = errors, coco, path
        found = errors.detections
        right = np.flatnonzero((found.kind == CORRECT) & (found.score >= threshold))
        self.detection = {int(found.object[i]): int(i) for i in right}
        self.iou = {target: self._iou(target) for target in self.detection}

    def worst(self, count: int) -> list[int]:
        """The objects with the lowest IoU, the lowest first."""
        return sorted(self.iou, key=lambda target: self.iou[target])[:count]

    def of(self, target: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """The run lengths of the detection that found an object, and of the object."""
        errors, index = self._errors, self.detection[target]
        image = self._coco.imgs[int(errors.objects.image[target])]
        truth = self._coco.dataset["annotations"][errors.objects.index[target]]
        segmentation = errors.detections.segmentation[index]
        found = {"segmentation": segmentation, "score": 0, "image_id": image["id"]}
        remedy = "so no worst masks are shown"
        size = [int(image["height"]), int(image["width"])]
        counts = [
            run_lengths(entry, image, path, remedy)
            for entry, path in ((found, Path("its detections")), (truth, self._path))
        ]
        return {"size": size, "counts": counts[0]}, {"size": size, "counts": counts[1]}

    def _iou(self, target: int) -> float:
        found, truth = self.of(target)
        return float(mask_utils.iou([found], [truth], [0])[0, 0])


def worst_masks(
    all_errors: Sequence[Errors | None],
    all_pairs: Sequence[MaskPairs | None],
    coco: COCO,
    album: Album,
    count: int,
) -> list[dict[str, Any]]:
    """The `count` worst masks of each result, as entries for the page: see mistakes.worst.

    Args:
        all_errors, all_pairs: of the results that share these annotations; None for the others.
    """
    entries = []
    for number, (errors, pairs) in enumerate(zip(all_errors, all_pairs, strict=True)):
        if errors is None or pairs is None:
            continue
        for target in pairs.worst(count):
            entry = entry_of(errors, MASK, pairs.detection[target], coco, album)
            entry |= {"result": number, "iou": round(pairs.iou[target], 3)}
            for which, mask in zip(("detection", "object"), pairs.of(target), strict=True):
                entry[which]["outline"] = outline(mask_utils.decode(mask), entry["view"])
            others = [(i, other) for i, other in enumerate(all_pairs) if other and other is not pairs]
            entry["others"] = [
                {
                    "result": i,
                    "text": f"mask IoU {other.iou[target]:.2f}" if target in other.iou else "did not find it",
                }
                for i, other in others
            ]
            entries.append(entry)
    return entries


def outline(mask: NDArray[Any], view: Box) -> str:
    """The border of the part of a mask [H, W] that a view shows: an SVG path in pixels of the image."""
    left, top, width, height = map(round, view)
    # no finer than the picture beside it
    step = math.ceil(max(width, height) / PICTURE_SIDE)
    part = mask[top : top + height : step, left : left + width : step]
    # the lines run between the centres of pixels; a pixel of nothing around closes them
    lines: Any = contourpy.contour_generator(z=np.pad(part, 1).astype(float)).lines(0.5)
    path = ""
    for line in lines:
        # points on a straight line say nothing
        steps = np.diff(line, axis=0)
        turns = np.r_[True, (steps[1:] != steps[:-1]).any(1), False]
        points = np.array([left, top]) + step * (line[turns] - 0.5)
        path += "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + "Z"
    return path
