"""COCO's bounding-box figures, from detections that several processes made."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from util.class_map import ClassMap
from util.curves import FIGURES


def coco_results(
    image_ids: Sequence[int], detections: Sequence[dict[str, Tensor]], classes: ClassMap
) -> list[dict[str, Any]]:
    """Detections (host tensors; boxes x0, y0, x1, y1 in pixels; labels) in COCO's results format (x, y, width, height; category
    ids of the data set)."""
    results = []
    for image_id, detection in zip(image_ids, detections, strict=True):
        boxes = detection["boxes"].clone()
        boxes[:, 2:] -= boxes[:, :2]
        for box, label, score in zip(boxes.tolist(), detection["labels"].tolist(), detection["scores"].tolist(), strict=True):
            results.append({"image_id": image_id, "category_id": classes.id_of(label), "bbox": box, "score": score})
    return results


def evaluate_boxes(ground_truth: COCO, results: list[dict[str, Any]]) -> COCOeval:
    """COCOeval after accumulate and summarize; `stats` holds the twelve FIGURES (-1 where nothing can be said).

    The outcome does not depend on which process found a detection: results are put in order of their image.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = _prepared(ground_truth, results)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def match_boxes(ground_truth: COCO, results: list[dict[str, Any]], iou: float) -> COCOeval:
    """COCOeval after evaluate alone, at one IoU threshold and all sizes: its evalImgs say which detection found which object.

    Objects have the ids 1.. in the order of the annotations, detections 1.. in the order of their images.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = _prepared(ground_truth, results)
        evaluation.params.iouThrs = np.array([iou])
        evaluation.params.areaRng, evaluation.params.areaRngLbl = evaluation.params.areaRng[:1], ["all"]
        evaluation.evaluate()
    return evaluation


def precision_tables(evaluation: COCOeval) -> dict[str, Any]:
    """What plots of precision and recall need, as plain tensors: precision [T, R, K, A, M], recall [T, K, A, M], scores."""
    tables = {name: torch.from_numpy(np.ascontiguousarray(evaluation.eval[name])) for name in ("precision", "recall", "scores")}
    return tables | {"category_ids": [int(i) for i in evaluation.params.catIds], "stats": evaluation.stats.tolist()}


def figures_table(stats: Sequence[float]) -> str:
    """The twelve figures in two lines."""
    cells = [f"{name} {value * 100:.1f}" if value >= 0 else f"{name} -" for name, value in zip(FIGURES, stats, strict=True)]
    return "  ".join(cells[:6]) + "\n" + "  ".join(cells[6:])


_USED = {
    "images": ("id",),
    "annotations": ("image_id", "category_id", "bbox", "area", "iscrowd"),
    "categories": ("id", "name"),
}


def _prepared(ground_truth: COCO, results: list[dict[str, Any]]) -> COCOeval:
    known = [dict(r) for r in results if r["category_id"] in ground_truth.cats]  # loadRes adds entries to them
    known.sort(key=lambda r: r["image_id"])  # stable: the order within an image stays
    truth = _essence(ground_truth)
    return COCOeval(truth, _detections(truth, known), "bbox")


def _essence(ground_truth: COCO) -> COCO:
    """What COCOeval uses of the annotations, numbered from 1: it takes a detection matched with an object of id 0 for unmatched.

    Its own, because COCOeval writes into the objects and copies all else of the file, however deep.
    """
    essence = COCO()
    essence.dataset = {name: [{key: entry[key] for key in keys} for entry in ground_truth.dataset[name]]
                       for name, keys in _USED.items()}  # fmt: skip
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
