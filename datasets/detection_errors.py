"""What is wrong with detections: every false positive and every missed object, sorted into the
kinds of TIDE.

Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV 2020, section
2.2. Which detection found which object is said by COCO's own matching at IoU 0.5 (pycocotools);
crowds, and detections matched with them, are neither right nor wrong.

Shape letters: D detections, G objects (annotations that are no crowds).
"""

from __future__ import annotations

from collections.abc import Iterator
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
    """The objects. index [G] in the file's annotations; image [G], category [G]: ids; box [G, 4]:
    x, y, width, height in pixels; found_by [G]: index of the detection that found it, or -1.
    """

    index: NDArray[np.int64]
    image: NDArray[np.int64]
    category: NDArray[np.int64]
    box: NDArray[np.float64]
    found_by: NDArray[np.int64]


@dataclass(frozen=True)
class Detections:
    """The detections that COCO counts (100 an image and class), by category, image and falling
    score.

    image [D], category [D]: ids; score [D]; box [D, 4]: x, y, width, height in pixels; kind [D]: of
    FALSE_POSITIVES, or CORRECT or IGNORED; object [D]: index of the object that was found, or that
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
    detections: Detections

    @property
    def never_touched(self) -> NDArray[np.bool_]:
        """[G]: objects that no detection found, and that none would have with its class or its box
        put right.
        """
        touched = np.isin(self.detections.kind, ("class", "localisation"))
        near = np.zeros(len(self.objects.index), dtype=bool)
        near[self.detections.object[touched]] = True
        return ~near & (self.objects.found_by < 0)

    def average_precision(self) -> float:
        """COCO's AP50 in [0, 1]; nan without an object."""
        return self._mean_ap(*self._without(""))

    def costs(self) -> dict[str, float]:
        """By kind, how much AP50 would rise if the errors of this kind alone were put right (the
        paper's delta AP).

        A wrong class or box is put right where the object had not been found, by the surest such
        detection; everything else that is wrong is taken away. An object that was missed is taken
        away, too.
        """
        now = self.average_precision()
        fixed = {kind: self._mean_ap(*self._without(kind)) for kind in FALSE_POSITIVES}
        fixed[MISSED] = self._mean_ap(*self._without(""), left_out=self.never_touched)
        return {kind: max(0.0, value - now) for kind, value in fixed.items()}

    def _without(self, kind: str) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
        """Category [D], correct [D] and kept [D] with the errors of a kind put right; "" is none."""
        found = self.detections
        category, correct, kept = found.category.copy(), found.kind == CORRECT, found.kind != kind
        if kind in ("class", "localisation"):
            done = self.objects.found_by >= 0
            wrong = np.flatnonzero(found.kind == kind)
            for i in wrong[np.argsort(-found.score[wrong], kind="stable")]:
                target = found.object[i]
                if not done[target]:
                    done[target], kept[i], correct[i] = True, True, True
                    category[i] = self.objects.category[target]
        return category, correct, kept

    def _mean_ap(
        self,
        category: NDArray[np.int64],
        correct: NDArray[np.bool_],
        kept: NDArray[np.bool_],
        left_out: NDArray[np.bool_] | None = None,
    ) -> float:
        kept = kept & (self.detections.kind != IGNORED)
        counted = self.objects.category if left_out is None else self.objects.category[~left_out]
        values = []
        for one in np.unique(self.objects.category):
            mine = kept & (category == one)
            values.append(
                average_precision(self.detections.score[mine], correct[mine], int((counted == one).sum()))
            )
        return float(np.mean(values)) if values else float("nan")


def average_precision(scores: NDArray[np.float64], correct: NDArray[np.bool_], num_objects: int) -> float:
    """COCO's interpolated average precision of one class, at 101 recalls; 0 without an object."""
    if num_objects == 0:
        return 0.0
    order = np.argsort(
        -scores, kind="mergesort"
    )  # of equal scores the first of the file comes first, as in pycocotools
    right = np.cumsum(correct[order])
    recall = right / num_objects
    precision = right / np.arange(1, len(order) + 1)
    precision = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return float(precision[np.searchsorted(recall, RECALLS, side="left")].mean())


def find_errors(ground_truth: COCO, results: list[dict[str, Any]]) -> Errors:
    """Match detections (COCO's results format, original category ids) with the objects, and sort
    what is wrong.
    """
    evaluation = match_boxes(ground_truth, results, FOUND_IOU)
    objects, places = _objects(evaluation)
    detections = _detections(evaluation, places)
    right = detections.kind == CORRECT
    objects.found_by[detections.object[right]] = np.flatnonzero(right)
    for rows, columns in _same_image(detections, objects):
        _sort_mistakes(detections, objects, rows, columns)
    return Errors(objects, detections)


def _objects(evaluation: COCOeval) -> tuple[Objects, dict[int, int]]:
    """The objects, and the place of each by its id in the evaluation."""
    kept = [entry for entry in evaluation.cocoGt.dataset["annotations"] if not entry["iscrowd"]]
    ids = [entry["id"] for entry in kept]
    boxes = np.array([entry["bbox"] for entry in kept], dtype=np.float64).reshape(-1, 4)
    found_by = np.full(len(kept), -1, dtype=np.int64)
    numbers = (_integers(entry[name] for entry in kept) for name in ("image_id", "category_id"))
    return Objects(_integers(ids) - 1, *numbers, boxes, found_by), {
        number: place for place, number in enumerate(ids)
    }


def _detections(evaluation: COCOeval, places: dict[int, int]) -> Detections:
    """In the order in which COCOeval accumulates them; what is wrong has the kind "" still."""
    entries, kinds, targets = [], [], []
    for image in filter(None, evaluation.evalImgs):
        for number, match, ignored in zip(
            image["dtIds"], image["dtMatches"][0], image["dtIgnore"][0], strict=True
        ):
            entries.append(evaluation.cocoDt.anns[number])
            kinds.append(IGNORED if ignored else CORRECT if match else "")
            targets.append(places[int(match)] if match and not ignored else -1)
    boxes = np.array([entry["bbox"] for entry in entries], dtype=np.float64).reshape(-1, 4)
    scores = np.array([entry["score"] for entry in entries], dtype=np.float64)
    numbers = (_integers(entry[name] for entry in entries) for name in ("image_id", "category_id"))
    return Detections(
        *numbers, scores, boxes, np.array(kinds, dtype="<U12"), _integers(targets), np.zeros(len(entries))
    )


def _same_image(
    detections: Detections, objects: Objects
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """For every image with detections: their places, and those of its objects."""
    of_objects = _groups(objects.image)
    for image, rows in _groups(detections.image).items():
        yield rows, of_objects.get(image, np.empty(0, dtype=np.intp))


def _groups(ids: NDArray[np.int64]) -> dict[int, NDArray[np.intp]]:
    order = np.argsort(ids, kind="stable")
    values, starts = np.unique(ids[order], return_index=True)
    return dict(zip(values.tolist(), np.split(order, starts[1:]), strict=True)) if len(ids) else {}


def _sort_mistakes(
    detections: Detections, objects: Objects, rows: NDArray[np.intp], columns: NDArray[np.intp]
) -> None:
    """Fill kind, object and iou for an image, the kinds in the order in which the published program
    asks for them.
    """
    wrong = detections.kind[rows] == ""
    if not len(columns):
        detections.kind[rows[wrong]] = "background"
        return
    iou = np.asarray(mask_utils.iou(detections.box[rows], objects.box[columns], [0] * len(columns))).reshape(
        len(rows), -1
    )
    same_class = detections.category[rows][:, None] == objects.category[columns]
    same, other = np.where(same_class, iou, 0.0), np.where(same_class, 0.0, iou)
    most_same, most_other = same.max(1), other.max(1)
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
    for place, row in enumerate(rows):
        if detections.object[row] >= 0:
            detections.iou[row] = iou[place, columns == detections.object[row]][0]


def _integers(values: Any) -> NDArray[np.int64]:
    return np.array(list(values), dtype=np.int64)
