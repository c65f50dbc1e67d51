"""The gate of tools/export.py: an exported file must detect what its checkpoint detects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

from datasets import DetectionData, build_dataset
from datasets.coco_eval import coco_results, evaluate_results, iou_types_of
from datasets.coco_format import restrict
from models.detector import Detections, Detector
from models.export.detector import ExportedDetector, load_exported
from util.draw.curves import FIGURES, percent
from util.errors import UserError
from util.images import evenly_chosen
from util.images.files import read_picture

# a pair may differ by this
SCORE, PIXELS = 1e-3, 0.5
# points of AP, by the file's precision; below float32 only AP is compared
POINTS = {"float32": 0.05, "float16": 0.3, "bfloat16": 0.3}
WORST = 5  # images that are named


@dataclass(frozen=True)
class Images:
    """Images of a data set, by their ids."""

    dataset: DetectionData
    ids: Sequence[int]


def open_images(folder: str, detector: Detector, count: int) -> Images:
    """`count` validation images of a data set in COCO's layout. Raises UserError if it does not fit."""
    flags: dict[str, Any] = {"coco_path": folder}
    known = detector.classes if detector.classes.categories else None
    if not known:  # ids are labels
        flags["num_classes"] = detector.classes.num_classes
    dataset = build_dataset("val", detector.config.with_flags(flags), known)
    if not dataset.coco.anns:
        raise UserError(
            f"--verify {folder}: {dataset.annotations} has no objects, so there is no AP to compare"
        )
    return Images(dataset, evenly_chosen(sorted(dataset.image_ids), count))


@dataclass(frozen=True)
class Mismatch:
    """What two lists of detections of an image differ by.

    score, pixels: the largest of all pairs. unpaired: detections without a partner within SCORE and PIXELS.
    """

    score: float = 0.0
    pixels: float = 0.0
    unpaired: int = 0


def compare(ours: Detections, theirs: Detections) -> Mismatch:
    """Pair the detections of an image one to one, within a class, as near as possible.

    The last of both may lack a partner: which is the hundredth of equal scores is chance.
    """
    if not len(ours) or not len(theirs):
        return Mismatch(unpaired=len(ours) + len(theirs))
    scores = np.abs(ours.scores.numpy()[:, None] - theirs.scores.numpy())
    pixels = np.abs(ours.boxes.numpy()[:, None] - theirs.boxes.numpy()).max(-1)
    same = ours.labels.numpy()[:, None] == theirs.labels.numpy()
    costs = np.nan_to_num(np.maximum(scores / SCORE, pixels / PIXELS), nan=np.inf)
    # a number that is larger than any sum of those within the bounds
    rows, columns = linear_sum_assignment(np.where(same & (costs <= 1), costs, 1e6))
    paired = same[rows, columns] & (costs[rows, columns] <= 1)
    near = rows[paired], columns[paired]
    score, distance = (values[near].max(initial=0.0) for values in (scores, pixels))

    # what is at the end of its list is no difference
    last = min(ours.scores[-1].item(), theirs.scores[-1].item()) + 2 * SCORE
    alone = [
        found.scores.numpy()[np.setdiff1d(np.arange(len(found)), partners)]
        for found, partners in ((ours, near[0]), (theirs, near[1]))
    ]
    unpaired = sum(int((~(values <= last)).sum()) for values in alone)
    return Mismatch(float(score), float(distance), unpaired)


def verify(reference: Detector, path: Path, images: Images, runtime: str = "") -> None:
    """Print a table of both detectors on these images.

    Args:
        reference: the checkpoint in float32, on the CPU.
        path: the exported file.
        runtime: as for open_exported.

    Raises:
        UserError: they differ by more than the bounds.
    """
    exported = load_exported(str(path), runtime=runtime)
    exact = exported.model.about["precision"] == "float32"
    differences: dict[int, Mismatch] = {}
    results: tuple[list, list] = ([], [])
    pairs = _detections(reference, exported, images)
    for image_id, ours, theirs in tqdm(pairs, total=len(images.ids), unit="image", disable=None):
        differences[image_id] = compare(ours, theirs)
        for found, rows in zip((ours, theirs), results, strict=True):
            rows += _coco(image_id, found, images.dataset)

    # the twelve figures of each kind
    truth, failures = COCO(), []
    truth.dataset = restrict(images.dataset.coco.dataset, set(images.ids))
    for kind in iou_types_of(results[0]):
        stats = [evaluate_results(truth, rows, iou_type=kind).stats for rows in results]
        _print_table(kind, stats)
        points = 100 * abs(stats[0][0] - stats[1][0])
        bound = POINTS[exported.model.about["precision"]]
        if points > bound:
            failures.append(f"AP of {kind} differs by {points:.2f} points (at most {bound})")

    every = differences.values()
    score, pixels = max(one.score for one in every), max(one.pixels for one in every)
    print(f"{len(images.ids)} images; pairs differ by {score:.1e} in score and {pixels:.2g} pixels at most")
    # the worst images first
    bad = sorted((i for i in differences if differences[i].unpaired), key=lambda i: -differences[i].unpaired)
    if bad:
        named = ", ".join(
            f"{images.dataset.file_of(i).name} ({differences[i].unpaired})" for i in bad[:WORST]
        )
        line = (
            f"{len(bad)} images have detections without a partner of score +-{SCORE} within {PIXELS} pixels: "
        )
        if exact:
            failures.append(line + named)
        else:
            print(line + named)
    if failures:
        raise UserError(f"{path} does not detect what --resume detects: {'; '.join(failures)}")


def _print_table(kind: str, stats: Sequence[np.ndarray]) -> None:
    print(f"{kind:12}{'checkpoint':>12}{'file':>10}{'difference':>12}")
    for name, ours, theirs in zip(FIGURES, *stats, strict=True):
        if min(ours, theirs) < 0:  # no such objects
            print(f"{name:12}{percent(ours):>12}{percent(theirs):>10}")
            continue
        print(f"{name:12}{100 * ours:12.2f}{100 * theirs:10.2f}{100 * (theirs - ours):+12.2f}")


def _detections(
    reference: Detector, exported: ExportedDetector, images: Images
) -> Iterator[tuple[int, Detections, Detections]]:
    """Of each image its id, and what the two find, in the same batches."""
    dataset, size = images.dataset, reference.batch_size
    for start in range(0, len(images.ids), size):
        ids = images.ids[start : start + size]
        # as they are stored, as in evaluation
        pictures = [
            read_picture(dataset.file_of(i), reference.max_image_megapixels, "or remove it", upright=False)
            for i in ids
        ]
        batch = [reference.prepare(picture) for picture in pictures]
        yield from zip(ids, reference.detect(batch), exported.detect(batch), strict=True)


def _coco(image_id: int, found: Detections, dataset: DetectionData) -> list[dict]:
    outputs: dict[str, Any] = {"boxes": found.boxes, "scores": found.scores, "labels": found.labels}
    if found.embedded_masks is not None:
        outputs["masks"] = found.embedded_masks
    return coco_results([image_id], [outputs], dataset.classes)
