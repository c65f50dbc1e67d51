"""The gate of tools/export.py: an exported file must detect what its checkpoint detects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
LOWEST_AP = 0.01  # of the checkpoint, from which on its AP shows a difference
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
    try:
        dataset = build_dataset("val", detector.config.with_flags(flags), known)
    except UserError as error:
        raise UserError(f"--verify {folder}: {error}") from None
    ids = evenly_chosen(sorted(dataset.image_ids), count)
    if missing := [file for i in ids if not (file := dataset.file_of(i)).is_file()]:
        raise UserError(f"--verify {folder}: {len(missing)} images are missing, such as {missing[0]}")
    chosen = set(ids)
    if not any(one["image_id"] in chosen and not one["iscrowd"] for one in dataset.coco.anns.values()):
        raise UserError(
            f"--verify {folder}: the {len(ids)} images have no objects, so there is no AP to compare"
        )
    return Images(dataset, ids)


@dataclass(frozen=True)
class Mismatch:
    """What two lists of detections of an image differ by.

    score, pixels: the largest of all pairs. pairs: how many there are. unpaired: detections that lack a
    partner within SCORE and PIXELS, though they are not at the end of their list.
    """

    score: float = 0.0
    pixels: float = 0.0
    pairs: int = 0
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

    # a partner may score SCORE less, and then be too low for the other list
    unpaired = 0
    for found, other, partners in ((ours, theirs, near[0]), (theirs, ours, near[1])):
        alone = found.scores.numpy()[np.setdiff1d(np.arange(len(found)), partners)]
        unpaired += int((~(alone <= other.scores[-1].item() + SCORE)).sum())
    return Mismatch(float(score), float(distance), int(paired.sum()), unpaired)


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
    precision = exported.model.about["precision"]
    differences: dict[int, Mismatch] = {}
    results: tuple[list, list] = ([], [])
    detections = 0
    both = _detections(reference, exported, images)
    for image_id, ours, theirs in tqdm(both, total=len(images.ids), unit="image", disable=None):
        differences[image_id] = compare(ours, theirs)
        detections += max(len(ours), len(theirs))
        for found, rows in zip((ours, theirs), results, strict=True):
            rows += _coco(image_id, found, images.dataset)

    failures = _compare_figures(images, results, precision)
    every = differences.values()
    score, pixels = max(one.score for one in every), max(one.pixels for one in every)
    pairs = sum(one.pairs for one in every)
    print(
        f"{len(images.ids)} images; {pairs} of {detections} detections are pairs, which differ by "
        f"{score:.1e} in score and {pixels:.2g} pixels at most"
    )
    remarks = _worst_images(images, differences)
    if 2 * pairs < detections:
        remarks.append(f"only {pairs} of {detections} detections have a partner")
    if precision == "float32":
        failures += remarks
    else:  # AP alone decides
        for line in remarks:
            print(line)
    if failures:
        raise UserError(f"{path} does not detect what --resume detects: {'; '.join(failures)}")


def _compare_figures(images: Images, results: tuple[list, list], precision: str) -> list[str]:
    """Print the twelve figures of each kind of both, and say which AP differs."""
    truth, failures = COCO(), []
    truth.dataset = restrict(images.dataset.coco.dataset, set(images.ids))
    for kind in iou_types_of(results[0]):
        stats = [evaluate_results(truth, rows, iou_type=kind).stats for rows in results]
        _print_table(kind, stats)
        points, bound = 100 * abs(stats[0][0] - stats[1][0]), POINTS[precision]
        if points > bound:
            failures.append(f"AP of {kind} differs by {points:.2f} points (at most {bound})")
        if precision != "float32" and stats[0][0] < LOWEST_AP:
            failures.append(f"an AP of {kind} of {percent(stats[0][0])} is too low to show a difference")
    return failures


def _worst_images(images: Images, differences: Mapping[int, Mismatch]) -> list[str]:
    """A line with the images that differ most, if any does."""
    counts = {i: one.unpaired for i, one in differences.items() if one.unpaired}
    if not counts:
        return []
    worst = sorted(counts, key=lambda i: -counts[i])[:WORST]
    named = ", ".join(f"{images.dataset.file_of(i).name} ({counts[i]})" for i in worst)
    bounds = f"score +-{SCORE} within {PIXELS} pixels"
    return [f"{len(counts)} images have detections without a partner of {bounds}: {named}"]


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
