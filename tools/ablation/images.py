"""How far a difference of AP depends on the images: a bootstrap over them for one pair of runs.

It says what other validation images would change, and nothing of what another seed would change. An
image that is drawn w times counts w times. AP is computed from sums of weights, equal to COCOeval
over repeated images (if no two detections of different images have equal scores).

Shape letters: I images, D detections of a class, T IoU thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO

from datasets.coco_eval import match_boxes

RESAMPLES = 1000
_RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class _ClassMatches:
    """The detections of a class, best first. image [D]; right, wrong [T, D]; objects [I]."""

    image: NDArray[np.int64]
    right: NDArray[np.bool_]
    wrong: NDArray[np.bool_]
    objects: NDArray[np.int64]

    def average_precision(self, weights: NDArray[np.float64]) -> float | None:
        """AP over thresholds and recalls with a weight for each image [I]; None without objects."""
        count = weights @ self.objects
        if not count:
            return None
        each = weights[self.image]
        right, wrong = np.cumsum(self.right * each, 1), np.cumsum(self.wrong * each, 1)
        precision = right / np.maximum(right + wrong, np.spacing(1))
        # the best precision at this recall or above
        precision = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
        # at each of COCO's recalls the precision there, or 0 where it is not reached
        total = 0.0
        for reached, best in zip(right / count, precision, strict=True):
            places = np.searchsorted(reached, _RECALLS, side="left")
            total += best[places[places < len(best)]].sum()
        return total / (len(_RECALLS) * len(precision))


def difference_over_images(
    truth: COCO, first: list[dict[str, Any]], second: list[dict[str, Any]]
) -> dict[str, Any]:
    """AP of `second` minus AP of `first`, in points, and its 95 % interval over images.

    Args:
        truth: the annotations.
        first, second: detections in COCO's results format.
    """
    # matching does not depend on the weights, so it is done once
    runs = [_matches(truth, results) for results in (first, second)]
    num_images = len(truth.imgs)
    random = np.random.default_rng(0)

    def difference(weights: NDArray[np.float64]) -> float:
        before, after = (_average_precision(classes, weights) for classes in runs)
        return 100 * (after - before)

    # the images of a resample count as often as they were drawn
    drawn = [
        difference(
            np.bincount(random.integers(0, num_images, num_images), minlength=num_images).astype(float)
        )
        for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {
        "difference": round(difference(np.ones(num_images)), 3),
        "interval": [round(float(low), 3), round(float(high), 3)],
        "resamples": RESAMPLES,
        "images": num_images,
    }


def _average_precision(classes: Sequence[_ClassMatches], weights: NDArray[np.float64]) -> float:
    found = [one.average_precision(weights) for one in classes]
    known = [value for value in found if value is not None]
    return float(np.mean(known)) if known else 0.0


def _matches(truth: COCO, results: list[dict[str, Any]]) -> list[_ClassMatches]:
    """What COCOeval matched, over all sizes and at most 100 detections of an image."""
    evaluation = match_boxes(truth, results)
    num_images, num_thresholds = len(evaluation.params.imgIds), len(evaluation.params.iouThrs)

    # evalImgs has the images of the first class, then those of the next
    classes = []
    for start in range(0, len(evaluation.evalImgs), num_images):
        columns: list[tuple[NDArray[Any], ...]] = []
        objects = np.zeros(num_images, dtype=np.int64)
        for i, entry in enumerate(evaluation.evalImgs[start : start + num_images]):
            if entry is None:  # neither objects nor detections
                continue
            objects[i] = np.count_nonzero(~entry["gtIgnore"].astype(bool))
            matched, counts = entry["dtMatches"] > 0, ~entry["dtIgnore"].astype(bool)
            scores = np.asarray(entry["dtScores"])
            columns.append((scores, np.full(len(scores), i), matched & counts, ~matched & counts))
        if not columns:
            empty = np.zeros((num_thresholds, 0), dtype=bool)
            classes.append(_ClassMatches(np.zeros(0, dtype=np.int64), empty, empty, objects))
            continue
        scores, image, right, wrong = (np.concatenate(parts, -1) for parts in zip(*columns, strict=True))
        # stable, as COCOeval sorts: among equal scores the earlier image comes first
        order = np.argsort(-scores, kind="stable")
        classes.append(_ClassMatches(image[order], right[:, order], wrong[:, order], objects))
    return classes
