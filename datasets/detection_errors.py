"""What is wrong with detections: every false positive and missed object, by the kinds of TIDE.

Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV 2020, section
2.2. COCO's own matching at IoU 0.5 (pycocotools) decides which detection found which object. Crowds,
and detections matched with them, are neither right nor wrong.

Shape letters: D detections, G objects (annotations that are no crowds).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from datasets.coco_eval import match_boxes

FOUND_IOU = 0.5
BACKGROUND_IOU = 0.1
CORRECT, IGNORED = "correct", "ignored"
# of false positives, and of objects that nothing found
FALSE_POSITIVES = ("class", "localisation", "both", "duplicate", "background")
MISSED = "missed"
KINDS = (*FALSE_POSITIVES, MISSED)
RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Objects:
    """The objects.

    index [G]: in the file's annotations; image [G], category [G]: ids; box [G, 4]: x, y, width,
    height in pixels; found_by [G]: index of the detection that found it, or -1.
    """

    index: NDArray[np.int64]
    image: NDArray[np.int64]
    category: NDArray[np.int64]
    box: NDArray[np.float64]
    found_by: NDArray[np.int64]


@dataclass(frozen=True)
class SortedDetections:
    """The detections that COCO counts (100 an image and class), by category, image and falling score.

    image [D], category [D]: ids; score [D]; box [D, 4]: x, y, width, height in pixels; kind [D]: one
    of FALSE_POSITIVES, or CORRECT or IGNORED; object [D]: index of the object that was found, or that
    the kind is about, or -1; iou [D]: with that object.
    """

    image: NDArray[np.int64]
    category: NDArray[np.int64]
    score: NDArray[np.float64]
    box: NDArray[np.float64]
    kind: NDArray[np.str_]
    object: NDArray[np.int64]
    iou: NDArray[np.float64]


@dataclass(frozen=True)
class Errors:
    """Right and wrong detections of a data set."""

    objects: Objects
    detections: SortedDetections

    @property
    def never_touched(self) -> NDArray[np.bool_]:
        """[G]: objects that no detection found, not even with another class or another box."""
        touched = np.isin(self.detections.kind, ("class", "localisation"))
        near = np.isin(np.arange(len(self.objects.index)), self.detections.object[touched])
        return ~near & (self.objects.found_by < 0)

    def average_precision(self) -> float:
        """COCO's AP50 in [0, 1]; nan without an object."""
        return self._mean_ap(*self._without(""))

    def costs(self) -> dict[str, float]:
        """By kind: the gain in AP50 if the errors of this kind alone were corrected (paper: delta AP).

        A wrong class or box is corrected if the object was not found otherwise, for the detection
        with the highest score. All other errors, and missed objects, are removed.
        """
        now = self.average_precision()
        fixed = {kind: self._mean_ap(*self._without(kind)) for kind in FALSE_POSITIVES}
        fixed[MISSED] = self._mean_ap(*self._without(""), left_out=self.never_touched)
        return {kind: max(0.0, value - now) for kind, value in fixed.items()}

    def _without(self, kind: str) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
        """Category [D], correct [D] and kept [D] with the errors of a kind corrected; "" is none."""
        found = self.detections
        category, correct, kept = found.category.copy(), found.kind == CORRECT, found.kind != kind
        if kind not in ("class", "localisation"):
            return category, correct, kept

        # the first detection of each object, by falling score, is corrected
        wrong = np.flatnonzero(found.kind == kind)
        wrong = wrong[self.objects.found_by[found.object[wrong]] < 0]
        wrong = wrong[np.argsort(-found.score[wrong], kind="stable")]
        _, first = np.unique(found.object[wrong], return_index=True)
        mended = wrong[first]
        kept[mended] = correct[mended] = True
        category[mended] = self.objects.category[found.object[mended]]
        return category, correct, kept

    def _mean_ap(
        self,
        category: NDArray[np.int64],
        correct: NDArray[np.bool_],
        kept: NDArray[np.bool_],
        left_out: NDArray[np.bool_] | None = None,
    ) -> float:
        """The mean over the classes, with objects `left_out` [G]."""
        kept = kept & (self.detections.kind != IGNORED)
        counted = self.objects.category
        if left_out is not None:
            counted = counted[~left_out]
        values = []
        for number in np.unique(self.objects.category):
            mine = kept & (category == number)
            num_objects = int((counted == number).sum())
            values.append(average_precision(self.detections.score[mine], correct[mine], num_objects))
        return float(np.mean(values)) if values else float("nan")


def average_precision(scores: NDArray[np.float64], correct: NDArray[np.bool_], num_objects: int) -> float:
    """COCO's interpolated average precision of one class, at 101 recalls; 0 without an object."""
    if num_objects == 0:
        return 0.0
    # of equal scores the first of the file comes first, as in pycocotools
    order = np.argsort(-scores, kind="mergesort")
    # the precision at a recall is the highest at this recall or above
    right = np.cumsum(correct[order])
    recall = right / num_objects
    precision = right / np.arange(1, len(order) + 1)
    precision = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return float(precision[np.searchsorted(recall, RECALLS, side="left")].mean())


def find_errors(ground_truth: COCO, results: list[dict[str, Any]]) -> Errors:
    """Match detections (COCO's results format, original category ids) with objects; sort the errors."""
    # found objects, and detections that found one
    evaluation = match_boxes(ground_truth, results, FOUND_IOU)
    objects = _objects(evaluation)
    detections = _detections(evaluation, objects)
    right = detections.kind == CORRECT
    objects.found_by[detections.object[right]] = np.flatnonzero(right)

    # all other detections, image by image
    of_objects = _groups(objects.image)
    for image, rows in _groups(detections.image).items():
        columns = of_objects.get(image, np.empty(0, dtype=np.intp))
        _sort_errors(detections, objects, rows, columns)
    return Errors(objects, detections)


def _objects(evaluation: COCOeval) -> Objects:
    kept = [entry for entry in evaluation.cocoGt.dataset["annotations"] if not entry["iscrowd"]]
    return Objects(
        _integers(kept, "id") - 1,  # match_boxes numbers them from 1
        _integers(kept, "image_id"),
        _integers(kept, "category_id"),
        _boxes(kept),
        np.full(len(kept), -1, dtype=np.int64),
    )


def _detections(evaluation: COCOeval, objects: Objects) -> SortedDetections:
    """In the order in which COCOeval accumulates them. Errors have the kind "" still."""
    places = {number: place for place, number in enumerate((objects.index + 1).tolist())}
    entries, kinds, targets = [], [], []
    for image in filter(None, evaluation.evalImgs):
        matches, ignored = image["dtMatches"][0], image["dtIgnore"][0]
        for number, match, is_ignored in zip(image["dtIds"], matches, ignored, strict=True):
            kind, target = "", -1
            if is_ignored:
                kind = IGNORED
            elif match:
                kind, target = CORRECT, places[int(match)]
            entries.append(evaluation.cocoDt.anns[number])
            kinds.append(kind)
            targets.append(target)
    return SortedDetections(
        _integers(entries, "image_id"),
        _integers(entries, "category_id"),
        np.array([entry["score"] for entry in entries], dtype=np.float64),
        _boxes(entries),
        np.array(kinds, dtype="<U12"),
        np.array(targets, dtype=np.int64),
        np.zeros(len(entries)),
    )


def _groups(ids: NDArray[np.int64]) -> dict[int, NDArray[np.intp]]:
    """The places of every id."""
    if not len(ids):
        return {}
    order = np.argsort(ids, kind="stable")
    values, starts = np.unique(ids[order], return_index=True)
    return dict(zip(values.tolist(), np.split(order, starts[1:]), strict=True))


def _sort_errors(
    detections: SortedDetections, objects: Objects, rows: NDArray[np.intp], columns: NDArray[np.intp]
) -> None:
    """Fill kind, object and iou of an image's detections [R] by its objects [C].

    The kinds are tried in the order of the published program.
    """
    wrong = detections.kind[rows] == ""
    if not len(columns):
        detections.kind[rows[wrong]] = "background"
        return

    # the nearest object of the same class and of another
    iou = np.asarray(mask_utils.iou(detections.box[rows], objects.box[columns], [0] * len(columns)))
    iou = iou.reshape(len(rows), -1)
    same_class = detections.category[rows][:, None] == objects.category[columns]
    same, other = np.where(same_class, iou, 0.0), np.where(same_class, 0.0, iou)
    most_same, most_other = same.max(1), other.max(1)

    # what kind of error each would be, and about which object
    kinds = np.select(
        [
            (most_same >= BACKGROUND_IOU) & (most_same < FOUND_IOU),
            most_other >= FOUND_IOU,
            most_same >= FOUND_IOU,
            most_other <= BACKGROUND_IOU,
        ],
        ["localisation", "class", "duplicate", "background"],
        "both",
    )
    about = np.where(np.isin(kinds, ("class", "both")), other.argmax(1), same.argmax(1))
    about = np.where(kinds == "background", -1, columns[about])
    detections.kind[rows[wrong]] = kinds[wrong]
    detections.object[rows[wrong]] = about[wrong]

    # their IoU with that object; right detections have one already
    for place, row in enumerate(rows):
        if detections.object[row] >= 0:
            detections.iou[row] = iou[place, columns == detections.object[row]][0]


def _integers(entries: list[dict[str, Any]], key: str) -> NDArray[np.int64]:
    return np.array([entry[key] for entry in entries], dtype=np.int64)


def _boxes(entries: list[dict[str, Any]]) -> NDArray[np.float64]:
    return np.array([entry["bbox"] for entry in entries], dtype=np.float64).reshape(-1, 4)
