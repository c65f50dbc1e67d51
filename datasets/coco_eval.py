"""COCO's metrics, from detections that several processes made.

The metrics are computed by IoU type: "bbox" for boxes, "segm" for masks. A further type is one more
entry of IOU_TYPES.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchvision.ops import box_convert

from datasets.coco_format import indexed
from datasets.coco_masks import coco_masks
from util.class_map import ClassMap
from util.draw.curves import FIGURES, percent

log = logging.getLogger(__name__)


def _xywh(boxes: Tensor) -> list[list[float]]:
    return box_convert(boxes, "xyxy", "xywh").tolist()


class IouType(NamedTuple):
    """What COCO compares under an IoU type.

    field: its name in COCO's annotations and results. output: its name in a detection of the
    detector. to_coco: an output of the detector for n detections to n values of `field`. key: the end of
    its name in log.txt.
    """

    field: str
    output: str
    to_coco: Callable[[Any], list[Any]]
    key: str


IOU_TYPES = {
    "bbox": IouType("bbox", "boxes", _xywh, "coco_eval_bbox"),
    "segm": IouType("segmentation", "masks", lambda masks: coco_masks(masks.chunks()), "coco_eval_masks"),
}


def iou_types_of(results: Sequence[dict[str, Any]]) -> list[str]:
    """The IoU types that detections can be compared by: by boxes, and by masks where they have some."""
    return [kind for kind, of in IOU_TYPES.items() if kind == "bbox" or (results and of.field in results[0])]


def coco_results(
    image_ids: Sequence[int], detections: Sequence[dict[str, Any]], classes: ClassMap
) -> list[dict[str, Any]]:
    """Detections in COCO's results format: category ids of the data set, boxes x, y, width, height, and
    masks as compressed run lengths. Of panoptic classes, things alone: they have boxes in COCO.

    Args:
        detections: of each image, on the host: labels [n], scores [n], and the outputs of IOU_TYPES
            that the detector has: boxes [n, 4] as x0, y0, x1, y1 in pixels; masks, an object whose
            `chunks` give them some at a time (datasets.coco_masks.coco_masks).
    """
    # columns of an image's detections, then one dictionary for each
    results = []
    for image_id, detection in zip(image_ids, detections, strict=True):
        if classes.stuff:
            stuff = torch.tensor(classes.stuff, device=detection["labels"].device)
            things = torch.isin(detection["labels"], stuff, invert=True).nonzero().flatten()
            detection = {name: values[things] for name, values in detection.items()}
        labels = detection["labels"].tolist()
        columns: dict[str, list[Any]] = {
            "image_id": [image_id] * len(labels),
            "category_id": [classes.id_of(label) for label in labels],
        }
        for kind in IOU_TYPES.values():
            if kind.output in detection:
                columns[kind.field] = kind.to_coco(detection[kind.output])
        columns["score"] = detection["scores"].tolist()
        results += [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return results


def evaluate_results(
    ground_truth: COCO, results: list[dict[str, Any]], evaluator: str = "faster", iou_type: str = "bbox"
) -> COCOeval:
    """COCOeval after accumulate and summarize; `stats` holds the twelve FIGURES (-1: undefined).

    They do not depend on which process found a detection, because results are sorted by image.

    Args:
        evaluator: "pycocotools", or "faster" for faster-coco-eval, which gives a COCOeval_faster.
            Its precision, recall, scores and metrics have the same bits.
        iou_type: of IOU_TYPES.
    """
    # both write to stdout
    with contextlib.redirect_stdout(io.StringIO()):
        truth, detections = _prepared(ground_truth, results, iou_type)
        faster = _faster_coco_eval() if evaluator == "faster" else None
        if faster and _fits_faster(truth, detections):
            evaluation = faster(truth, detections, iou_type, print_function=print)
            _accumulate_as_pycocotools(evaluation)
        else:
            evaluation = COCOeval(truth, detections, iou_type)
            evaluation.evaluate()
            evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def match_boxes(ground_truth: COCO, results: list[dict[str, Any]], iou: float | None = None) -> COCOeval:
    """COCOeval after `evaluate` at one IoU threshold, by default at COCO's ten, and all sizes.

    Its evalImgs tell which detection found which object. Objects have the ids 1.. in the order of
    the annotations, detections 1.. in the order of their images.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(*_prepared(ground_truth, results, "bbox"), "bbox")
        if iou is not None:
            evaluation.params.iouThrs = np.array([iou])
        evaluation.params.areaRng, evaluation.params.areaRngLbl = evaluation.params.areaRng[:1], ["all"]
        evaluation.evaluate()
    return evaluation


def precision_tables(evaluation: COCOeval) -> dict[str, Any]:
    """What plots of precision and recall need, as plain data.

    precision and scores [T, R, K, A, M], recall [T, K, A, M]: T IoU thresholds, R recalls, K
    categories, A ranges of areas, M limits of detections an image.
    """
    # contiguous copies, because a checkpoint would keep what a view belongs to
    tables: dict[str, Any] = {}
    for name in ("precision", "recall", "scores"):
        tables[name] = torch.from_numpy(np.ascontiguousarray(evaluation.eval[name]))
    tables["category_ids"] = [int(i) for i in evaluation.params.catIds]
    tables["stats"] = evaluation.stats.tolist()
    return tables


def metrics_table(stats: Sequence[float]) -> str:
    """The twelve metrics in two lines, in percent."""
    cells = [f"{name} {percent(value)}" for name, value in zip(FIGURES, stats, strict=True)]
    first, second = "  ".join(cells[:6]), "  ".join(cells[6:])
    if min(stats) < 0:
        second += "  (-: no such objects)"
    return f"{first}  (AP: IoU 0.50:0.95, in percent)\n{second}"


@functools.cache  # one warning
def _faster_coco_eval() -> Any:
    """COCOeval_faster, or None where it is not installed."""
    try:
        from faster_coco_eval import COCOeval_faster
    except ImportError as error:
        log.warning(
            "faster-coco-eval can't be imported (%s): pycocotools computes COCO's metrics, the "
            "same but slower; pip install 'faster-coco-eval>=1.8'",
            error,
        )
        return None
    return COCOeval_faster


def _fits_faster(truth: COCO, detections: COCO) -> bool:
    """Whether faster-coco-eval computes the same: it keeps ids as float64, and refuses NaN scores."""
    ids = [*truth.imgs, *truth.cats]
    numbers = [(*entry["bbox"], entry["score"]) for entry in detections.dataset["annotations"]]
    return max(map(abs, ids), default=0) <= 2**53 and bool(np.isfinite(numbers).all())


def _accumulate_as_pycocotools(evaluation: Any) -> None:
    """`evaluate` and `accumulate` of a COCOeval_faster, with pycocotools' precision to the bit.

    pycocotools divides the true positives by the number of detections + 2^-52. In float64 that sum
    is the number itself, unless it is 1. So for one right detection the precision is 1 - 2^-52 in
    pycocotools, and 1 in faster-coco-eval.

    The precision at a recall is the highest at this recall or above. So pycocotools has 1 - 2^-52
    where the first detection is right and the second is not, and 1 where both are. The two cases
    differ at a recall that two of the n objects reach and one does not: the power of two in
    (1 / n, 2 / n]. These recalls are added to COCO's.
    """
    # evaluate with the added recalls
    params = evaluation.params
    recalls, power = params.recThrs, np.frexp(_count_objects(evaluation) - 1)[1]
    params.recThrs = np.append(recalls, 2.0 ** (1 - np.arange(power.max(initial=0) + 1)))
    evaluation.evaluate()
    evaluation.accumulate()
    # summarize reads them
    params.recThrs = recalls

    # correct the precision where it shows that only the first detection is right
    precision, added = np.split(evaluation.eval["precision"], [len(recalls)], axis=1)
    with_two = np.take_along_axis(added, power[None, None, :, :, None], axis=1)
    precision[(precision == 1) & (with_two < 1)] = 1 - 2**-52

    # the tables without the added recalls
    counts = [*precision.shape]
    scores = evaluation.eval["scores"][:, : len(recalls)]
    evaluation.eval |= {"params": params, "counts": counts, "precision": precision, "scores": scores}


def _count_objects(evaluation: Any) -> np.ndarray:
    """[K, A]: number of objects by class and range of areas, without crowds."""
    params = evaluation.params
    objects = [entry for entry in evaluation.cocoGt.dataset["annotations"] if not entry["iscrowd"]]
    place = np.searchsorted(params.catIds, [entry["category_id"] for entry in objects])
    # one object may be in several ranges
    area = np.array([entry["area"] for entry in objects])
    counts = np.zeros((len(params.catIds), len(params.areaRng)), dtype=int)
    for i, (low, high) in enumerate(params.areaRng):
        np.add.at(counts[:, i], place[(area >= low) & (area <= high)], 1)
    return counts


def _prepared(ground_truth: COCO, results: list[dict[str, Any]], iou_type: str) -> tuple[COCO, COCO]:
    """What COCOeval takes: objects, and the detections of known classes.

    Objects are copied, because COCOeval changes them, and numbered from 1: COCOeval takes a detection
    matched with an object of id 0 for unmatched.
    """
    # masks are drawn at the images' size
    used = {
        "images": ("id", "height", "width") if iou_type == "segm" else ("id",),
        "annotations": ("image_id", "category_id", IOU_TYPES[iou_type].field, "area", "iscrowd"),
        "categories": ("id", "name"),
    }
    content = {}
    for name, keys in used.items():
        content[name] = [{key: entry[key] for key in keys} for entry in ground_truth.dataset[name]]
    for number, annotation in enumerate(content["annotations"], 1):
        annotation["id"] = number
    truth = indexed(content)

    # copied, because loadRes adds entries to them
    known = [dict(r) for r in results if r["category_id"] in truth.cats]
    if iou_type == "segm":
        for result in known:
            del result["bbox"]  # or the area of a detection would be that of its box
    known.sort(key=lambda r: r["image_id"])  # stable: the order within an image stays
    if known:
        return truth, truth.loadRes(known)
    return truth, indexed(content | {"annotations": []})  # loadRes can't take an empty list
