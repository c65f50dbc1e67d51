"""COCO's bounding-box figures, from detections that several processes made."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from util.class_map import ClassMap
from util.draw.curves import FIGURES

log = logging.getLogger(__name__)

IOU_TYPE = "bbox"


def coco_results(
    image_ids: Sequence[int], detections: Sequence[dict[str, Tensor]], classes: ClassMap
) -> list[dict[str, Any]]:
    """Detections (host tensors; boxes x0, y0, x1, y1 in pixels; labels) in COCO's results format
    (x, y, width, height; category ids of the data set).
    """
    results = []
    for image_id, detection in zip(image_ids, detections, strict=True):
        boxes = detection["boxes"].clone()
        boxes[:, 2:] -= boxes[:, :2]
        for box, label, score in zip(
            boxes.tolist(), detection["labels"].tolist(), detection["scores"].tolist(), strict=True
        ):
            results.append(
                {"image_id": image_id, "category_id": classes.id_of(label), "bbox": box, "score": score}
            )
    return results


def evaluate_boxes(ground_truth: COCO, results: list[dict[str, Any]], evaluator: str = "faster") -> COCOeval:
    """COCOeval after accumulate and summarize; `stats` holds the twelve FIGURES (-1 where nothing
    can be said).

    The outcome does not depend on which process found a detection: results are put in order of
    their image.

    Args:
        evaluator: "pycocotools", or "faster" for faster-coco-eval, which gives a COCOeval_faster.
            Its precision, recall, scores and figures have the same bits.
    """
    faster = _faster_coco_eval() if evaluator == "faster" else None
    with contextlib.redirect_stdout(io.StringIO()):
        truth, detections = _prepared(ground_truth, results)
        if faster and _fits_faster(truth, detections):
            evaluation = faster(truth, detections, IOU_TYPE, print_function=print)
            _accumulate_as_pycocotools(evaluation)
        else:
            evaluation = COCOeval(truth, detections, IOU_TYPE)
            evaluation.evaluate()
            evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def match_boxes(ground_truth: COCO, results: list[dict[str, Any]], iou: float) -> COCOeval:
    """COCOeval after evaluate alone, at one IoU threshold and all sizes: its evalImgs say which
    detection found which object.

    Objects have the ids 1.. in the order of the annotations, detections 1.. in the order of their
    images.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(*_prepared(ground_truth, results), IOU_TYPE)
        evaluation.params.iouThrs = np.array([iou])
        evaluation.params.areaRng, evaluation.params.areaRngLbl = evaluation.params.areaRng[:1], ["all"]
        evaluation.evaluate()
    return evaluation


def precision_tables(evaluation: COCOeval) -> dict[str, Any]:
    """What plots of precision and recall need, as plain tensors: precision [T, R, K, A, M], recall
    [T, K, A, M], scores.
    """
    tables = {
        name: torch.from_numpy(np.ascontiguousarray(evaluation.eval[name]))
        for name in ("precision", "recall", "scores")
    }
    return tables | {
        "category_ids": [int(i) for i in evaluation.params.catIds],
        "stats": evaluation.stats.tolist(),
    }


def figures_table(stats: Sequence[float]) -> str:
    """The twelve figures in two lines."""
    cells = [
        f"{name} {value * 100:.1f}" if value >= 0 else f"{name} -"
        for name, value in zip(FIGURES, stats, strict=True)
    ]
    return "  ".join(cells[:6]) + "\n" + "  ".join(cells[6:])


_USED = {
    "images": ("id",),
    "annotations": ("image_id", "category_id", "bbox", "area", "iscrowd"),
    "categories": ("id", "name"),
}


@functools.cache  # one warning
def _faster_coco_eval() -> Any:
    """COCOeval_faster, or None where it is not installed."""
    try:
        from faster_coco_eval import COCOeval_faster
    except ImportError as error:
        log.warning(
            "faster-coco-eval can't be imported (%s): pycocotools computes COCO's figures, the "
            "same but slower; pip install 'faster-coco-eval>=1.8'",
            error,
        )
        return None
    return COCOeval_faster


def _fits_faster(truth: COCO, detections: COCO) -> bool:
    """Whether faster-coco-eval can compute the same: it keeps ids as float64, and refuses a score
    of NaN.
    """
    ids = [entry["id"] for name in ("images", "categories") for entry in truth.dataset[name]]
    numbers = [(*entry["bbox"], entry["score"]) for entry in detections.dataset["annotations"]]
    return max(map(abs, ids), default=0) <= 2**53 and bool(np.isfinite(numbers).all())


def _accumulate_as_pycocotools(evaluation: Any) -> None:
    """`evaluate` and `accumulate` of a COCOeval_faster, with pycocotools' precision to the bit.

    pycocotools divides the true positives by the number of detections + 2^-52. In float64 that sum
    is the number itself, unless it is 1: for one right detection pycocotools has 1 - 2^-52, and
    faster-coco-eval has
    1. The precision at a recall is the highest at this recall or above. So pycocotools has 1 -
      2^-52 where
    the first detection is right and the second is not, and 1 where both are. The two cases differ
    at a recall that two of the n objects reach and one does not: the power of two in (1 / n, 2 /
    n]. These recalls are added to COCO's.
    """
    params = evaluation.params
    recalls, power = params.recThrs, np.frexp(_count_objects(evaluation) - 1)[1]
    params.recThrs = np.append(recalls, 2.0 ** (1 - np.arange(power.max(initial=0) + 1)))
    evaluation.evaluate()
    evaluation.accumulate()
    params.recThrs = recalls
    precision, added = np.split(evaluation.eval["precision"], [len(recalls)], axis=1)
    with_two = np.take_along_axis(added, power[None, None, :, :, None], axis=1)
    precision[(precision == 1) & (with_two < 1)] = 1 - 2**-52
    counts = [*precision.shape]
    scores = evaluation.eval["scores"][:, : len(recalls)]
    evaluation.eval |= {"params": params, "counts": counts, "precision": precision, "scores": scores}


def _count_objects(evaluation: Any) -> np.ndarray:
    """[K, A]: objects of every class and range of areas, without crowds."""
    params = evaluation.params
    objects = [entry for entry in evaluation.cocoGt.dataset["annotations"] if not entry["iscrowd"]]
    place = np.searchsorted(params.catIds, [entry["category_id"] for entry in objects])
    area = np.array([entry["area"] for entry in objects])
    in_range = [place[(area >= low) & (area <= high)] for low, high in params.areaRng]
    return np.stack([np.bincount(places, minlength=len(params.catIds)) for places in in_range], axis=1)


def _prepared(ground_truth: COCO, results: list[dict[str, Any]]) -> tuple[COCO, COCO]:
    """What COCOeval takes: objects, and the detections of classes that are known."""
    known = [
        dict(r) for r in results if r["category_id"] in ground_truth.cats
    ]  # loadRes adds entries to them
    known.sort(key=lambda r: r["image_id"])  # stable: the order within an image stays
    truth = _essence(ground_truth)
    return truth, _detections(truth, known)


def _essence(ground_truth: COCO) -> COCO:
    """What COCOeval uses of the annotations, numbered from 1: it takes a detection matched with an
    object of id 0 for unmatched.

    Its own, because COCOeval writes into the objects and copies all else of the file, however deep.
    """
    essence = COCO()
    essence.dataset = {
        name: [{key: entry[key] for key in keys} for entry in ground_truth.dataset[name]]
        for name, keys in _USED.items()
    }
    for number, annotation in enumerate(essence.dataset["annotations"], 1):
        annotation["id"] = number
    essence.createIndex()
    return essence


def _detections(ground_truth: COCO, results: list[dict[str, Any]]) -> COCO:
    if results:
        return ground_truth.loadRes(results)
    empty = COCO()  # loadRes can't take an empty list
    empty.dataset = {**ground_truth.dataset, "annotations": []}
    empty.createIndex()
    return empty
