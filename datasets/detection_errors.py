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


@dataclass(frozen=True)
class Objects:
    """The objects.

    index [G]: in the file's annotations; image [G], category [G]: ids; box [G, 4]: x, y, width,
    height in pixels; found_by [G]: index of the detection that found it, or -1.
    """

    index: np.ndarray
    image: np.ndarray
    category: np.ndarray
    box: np.ndarray
    # filled in by find_errors
    found_by: np.ndarray


@dataclass(frozen=True)
class SortedDetections:
    """The detections that COCO counts (100 an image and class), by category, image and falling score.

    image [D], category [D]: ids; score [D]; box [D, 4]: x, y, width, height in pixels; kind [D]: one
    of FALSE_POSITIVES, or CORRECT or IGNORED; object [D]: index of the object that was found, or that
    the kind is about, or -1; iou [D]: with that object. segmentation: D masks as the results have them;
    without meaning if they have none.
    """

    image: np.ndarray
    category: np.ndarray
    score: np.ndarray
    box: np.ndarray
    kind: np.ndarray
    object: np.ndarray
    iou: np.ndarray
    segmentation: list[Any]


@dataclass(frozen=True)
class Errors:
    """Right and wrong detections of a data set."""

    objects: Objects
    detections: SortedDetections

    @property
    def never_touched(self) -> np.ndarray:
        """[G] bool: objects that no detection found, not even with another class or another box."""
        touched = np.isin(self.detections.kind, ("class", "localisation"))
        near = np.isin(np.arange(len(self.objects.index)), self.detections.object[touched])
        return ~near & (self.objects.found_by < 0)

    def average_precision(self) -> float:
        """COCO's AP50 in [0, 1]; nan without an object."""
        return self._mean_ap("", self.objects.category)

    def costs(self) -> dict[str, float]:
        """By kind: the gain in AP50 if the errors of this kind alone were corrected (paper: delta AP).

        A wrong class or box is corrected if the object was not found otherwise, for the detection
        with the highest score. All other errors, and missed objects, are removed.
        """
        category, now = self.objects.category, self.average_precision()
        fixed = {kind: self._mean_ap(kind, category) for kind in FALSE_POSITIVES}
        fixed[MISSED] = self._mean_ap("", category[~self.never_touched])
        return {kind: max(0.0, value - now) for kind, value in fixed.items()}

    def _mean_ap(self, kind: str, objects: np.ndarray) -> float:
        """The mean over the classes with the errors of a kind corrected; objects [G]: their categories."""
        # errors that are corrected, and the others, which are removed
        found = self.detections
        category, correct = found.category.copy(), found.kind == CORRECT
        kept = ~np.isin(found.kind, (kind, IGNORED))
        if kind in ("class", "localisation"):
            mended = self._first_of_each_object(kind)
            kept[mended] = correct[mended] = True
            category[mended] = self.objects.category[found.object[mended]]

        # each class with the objects that count
        values = []
        for number in np.unique(self.objects.category):
            mine = kept & (category == number)
            values.append(average_precision(found.score[mine], correct[mine], (objects == number).sum()))
        return float(np.mean(values)) if values else float("nan")

    def _first_of_each_object(self, kind: str) -> np.ndarray:
        """The detections of a kind with the highest score, of each object that was not found."""
        # those about objects that nothing found, best first
        found = self.detections
        wrong = np.flatnonzero(found.kind == kind)
        wrong = wrong[self.objects.found_by[found.object[wrong]] < 0]
        wrong = wrong[np.argsort(-found.score[wrong], kind="stable")]
        # unique gives the first place of each object
        _, first = np.unique(found.object[wrong], return_index=True)
        return wrong[first]


def average_precision(scores: np.ndarray, correct: np.ndarray, num_objects: int) -> float:
    """COCO's interpolated average precision of one class, at 101 recalls; 0 without an object."""
    if num_objects == 0:
        return 0.0
    # of equal scores the first of the file comes first, as in pycocotools
    right = np.cumsum(correct[np.argsort(-scores, kind="stable")])
    # the precision at a recall is the highest at this recall or above
    precision = right / np.arange(1, len(right) + 1)
    precision = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return float(precision[np.searchsorted(right / num_objects, np.linspace(0, 1, 101))].mean())


def find_errors(ground_truth: COCO, results: list[dict[str, Any]]) -> Errors:
    """Match detections (COCO's results format, original category ids) with objects; sort the errors."""
    # found objects, and detections that found one
    evaluation = match_boxes(ground_truth, results, FOUND_IOU)
    objects = _objects(evaluation)
    detections = _detections(evaluation, objects)
    right = np.flatnonzero(detections.kind == CORRECT)
    objects.found_by[detections.object[right]] = right

    # all other detections, image by image
    of_objects = _groups(objects.image)
    nothing = np.empty(0, dtype=np.intp)
    for image, rows in _groups(detections.image).items():
        _sort_errors(detections, objects, rows, of_objects.get(image, nothing))
    return Errors(objects, detections)


def _objects(evaluation: COCOeval) -> Objects:
    kept = [entry for entry in evaluation.cocoGt.dataset["annotations"] if not entry["iscrowd"]]
    return Objects(
        index=_column(kept, "id") - 1,  # match_boxes numbers them from 1
        image=_column(kept, "image_id"),
        category=_column(kept, "category_id"),
        box=_column(kept, "bbox", np.float64).reshape(-1, 4),
        found_by=np.full(len(kept), -1, dtype=np.int64),
    )


def _detections(evaluation: COCOeval, objects: Objects) -> SortedDetections:
    """In the order in which COCOeval accumulates them. Errors have the kind "" still."""
    # COCOeval names objects by their ids
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
    # the kinds of errors are longer than "" and "correct"
    return SortedDetections(
        image=_column(entries, "image_id"),
        category=_column(entries, "category_id"),
        score=_column(entries, "score", np.float64),
        box=_column(entries, "bbox", np.float64).reshape(-1, 4),
        kind=np.array(kinds, dtype="<U12"),
        object=np.array(targets, dtype=np.int64),
        iou=np.zeros(len(entries)),
        # pycocotools gives detections without a mask their box
        segmentation=[entry["segmentation"] for entry in entries],
    )


def _groups(ids: np.ndarray) -> dict[int, np.ndarray]:
    """The places of every id."""
    if not len(ids):
        return {}
    # sorted by id, the places of one id are neighbours
    order = np.argsort(ids, kind="stable")
    values, starts = np.unique(ids[order], return_index=True)
    return dict(zip(values.tolist(), np.split(order, starts[1:]), strict=True))


def _sort_errors(
    detections: SortedDetections, objects: Objects, rows: np.ndarray, columns: np.ndarray
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
    # an IoU of 0 stands for objects of the other kind
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


def _column(entries: list[dict[str, Any]], key: str, dtype: type = np.int64) -> np.ndarray:
    return np.array([entry[key] for entry in entries], dtype)
