"""The worst mistakes of runs, with the pictures they were made in."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from datasets.detection_errors import (
    CORRECT,
    FALSE_POSITIVES,
    FOUND_IOU,
    IGNORED,
    KINDS,
    MISSED,
    Errors,
    Objects,
)
from util.images.files import BadImageError, read_picture

PICTURE_SIDE = 420  # pixels of the longer side
PICTURE_BYTES = 5_500_000  # of all pictures together, as text of the page
SURROUNDINGS = 2.2  # sides of a picture, relative to the boxes that it shows
# Part of the image's longer side: an object of ten pixels says nothing without its surroundings.
SMALLEST_VIEW = 0.25
MEGAPIXELS = 200.0
CONTEXT = 30  # other objects shown in a picture

Box = tuple[float, float, float, float]  # x, y, width, height


@dataclass
class Album:
    """Parts of images as data URIs, each once. unreadable: names of files, in the order of their
    discovery. full: `uris` have reached their limit.
    """

    folder: Path | None
    coco: COCO
    uris: list[str] = field(default_factory=list)
    unreadable: dict[str, None] = field(default_factory=dict)
    full: bool = False
    _places: dict[tuple[int, Box], int] = field(default_factory=dict)

    def cutting(self, image_id: int, view: Box) -> int | None:
        """The index among `uris` of a part of an image; None if there is no such image or no room."""
        key = image_id, view
        if key in self._places:
            return self._places[key]
        # it stays full: smaller pictures must not overtake worse mistakes
        self.full = self.full or sum(map(len, self.uris)) > PICTURE_BYTES
        if self.folder is None or self.full:
            return None
        name = self.coco.imgs[image_id].get("file_name", "")
        try:
            uri = _data_uri(self.folder / name, view)
        except BadImageError:
            self.unreadable[name] = None
            return None
        self._places[key] = len(self.uris)
        self.uris.append(uri)
        return self._places[key]


def _data_uri(path: Path, view: Box) -> str:
    left, top, width, height = view
    picture = read_picture(path, MEGAPIXELS, "it is not shown", upright=False)
    cut = picture.crop((round(left), round(top), round(left + width), round(top + height)))
    # small enough for hundreds of pictures on a page
    cut.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    cut.save(buffer, "JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def error_table(errors: Errors, threshold: float) -> dict[str, Any]:
    """Of a result: numbers of errors by kind, among scores of at least `threshold`, and the AP50
    that each kind costs.
    """
    # The costs are over all detections, as AP50 is; the numbers depend on the threshold.
    kinds = Counter(errors.detections.kind[errors.detections.score >= threshold].tolist())
    counts = {kind: kinds[kind] for kind in FALSE_POSITIVES}
    counts[MISSED] = int(missed(errors, threshold).sum())
    costs = {kind: round(cost, 5) for kind, cost in errors.costs().items()}
    return {"counts": counts, "costs": costs}


def missed(errors: Errors, threshold: float) -> NDArray[np.bool_]:
    """[G]: objects that no detection of at least the threshold found."""
    return ~(found_score(errors) >= threshold)


def found_score(errors: Errors) -> NDArray[np.float64]:
    """[G]: the score of the detection that found each object; nan where none did."""
    scores = np.append(errors.detections.score, np.nan)
    return scores[errors.objects.found_by]  # -1, for none, is the last


def worst(
    all_errors: Sequence[Errors | None], coco: COCO, album: Album, threshold: float, count: int
) -> list[dict[str, Any]]:
    """The worst `count` errors of each kind and result: false positives by score, missed objects by
    area.

    Args:
        all_errors: of the results that share these annotations; None for the others.

    Returns:
        for the page: result, kind, image, view, boxes, and what the other results made of the same.
    """
    shared = {number: errors for number, errors in enumerate(all_errors) if errors is not None}
    chosen = []
    for order, kind in enumerate(KINDS):
        for number, errors in shared.items():
            for rank, index in enumerate(_ranked(errors, kind, threshold)[:count]):
                chosen.append((rank, order, number, kind, int(index)))

    # The worst of every kind get their pictures first: the room for pictures may not last.
    entries = []
    for _, order, number, kind, index in sorted(chosen):
        entry = entry_of(shared[number], kind, index, coco, album)
        entry["result"] = number
        target, others = entry.pop("target"), shared.keys() - {number}
        entry["others"] = [
            {"result": other, "text": _elsewhere(shared[other], entry, target, threshold)}
            for other in sorted(others)
        ]
        entries.append((order, -entry["badness"], entry))
    return [entry for *_, entry in sorted(entries, key=lambda one: one[:2])]


def entry_of(errors: Errors, kind: str, index: int, coco: COCO, album: Album) -> dict[str, Any]:
    """A detection, with the object that it is about, or a missed object; index: of the one or the other."""
    found, objects = errors.detections, errors.objects
    entry: dict[str, Any] = {"kind": kind, "object": None}
    boxes = []
    # A missed object has no detection, and a false positive may have no object.
    if kind == MISSED:
        target, image_id = index, int(objects.image[index])
        score = found_score(errors)[index]
        entry["found_with"] = None if np.isnan(score) else round(float(score), 3)
        entry["badness"] = float(objects.box[index, 2:].prod())
    else:
        target, image_id = int(found.object[index]), int(found.image[index])
        boxes.append(found.box[index])
        entry["detection"] = _shown(found.box[index], found.category[index])
        entry["detection"]["score"] = round(float(found.score[index]), 3)
        entry["iou"] = round(float(found.iou[index]), 3)
        entry["badness"] = float(found.score[index])
    if target >= 0:
        boxes.append(objects.box[target])
        entry["object"] = _shown(objects.box[target], objects.category[target])

    # The picture shows these boxes and their surroundings.
    image = coco.imgs[image_id]
    view = view_of(np.stack(boxes), (float(image.get("width") or 0), float(image.get("height") or 0)))
    return entry | {
        "target": target,
        "image": image_id,
        "file": image.get("file_name", str(image_id)),
        "view": [round(v, 1) for v in view],
        "picture": album.cutting(image_id, view),
        "context": _context(objects, image_id, target, view),
    }


def _ranked(errors: Errors, kind: str, threshold: float) -> NDArray[np.intp]:
    """Indices of the errors of a kind, the worst first."""
    if kind == MISSED:
        chosen = np.flatnonzero(missed(errors, threshold))
        return chosen[np.argsort(-errors.objects.box[chosen, 2:].prod(1), kind="stable")]
    chosen = np.flatnonzero((errors.detections.kind == kind) & (errors.detections.score >= threshold))
    return chosen[np.argsort(-errors.detections.score[chosen], kind="stable")]


def _shown(box: NDArray[np.float64], category: int) -> dict[str, Any]:
    return {"box": [round(float(v), 1) for v in box], "class": int(category)}


def _context(objects: Objects, image_id: int, target: int, view: Box) -> list[dict[str, Any]]:
    """The other objects in the view."""
    left, top, width, height = view
    x, y, w, h = objects.box.T
    # boxes that overlap the view
    inside = (x < left + width) & (y < top + height) & (x + w > left) & (y + h > top)
    near = np.flatnonzero(inside & (objects.image == image_id))
    near = near[near != target][:CONTEXT]
    return [_shown(objects.box[i], objects.category[i]) for i in near]


def _elsewhere(errors: Errors, entry: Mapping[str, Any], target: int, threshold: float) -> str:
    """What another result made of the same object, or in the same place."""
    if entry["kind"] == MISSED:
        score = found_score(errors)[target]
        return f"found it ({score:.2f})" if score >= threshold else "missed it too"
    found, mine = errors.detections, entry["detection"]
    same = (found.image == entry["image"]) & (found.category == mine["class"]) & (found.score >= threshold)
    near = np.flatnonzero(same)
    # a correct detection there is no mistake
    near = near[~np.isin(found.kind[near], (CORRECT, IGNORED))]
    if len(near):
        iou = np.asarray(mask_utils.iou(found.box[near], np.array([mine["box"]]), [0]))[:, 0]
        near = near[iou >= FOUND_IOU]
    if len(near):
        return f"made it too ({found.score[near].max():.2f})"
    return "did not make it"


def view_of(boxes: NDArray[np.float64], size: tuple[float, float]) -> Box:
    """The part of an image to show for boxes [n, 4]: they and their surroundings, in 4:3 if possible.

    size: of the image, (width, height); 0 if it is not known.
    """
    # The corners of a box around all boxes, cut at the image's border.
    low = np.clip(boxes[:, :2].min(0), 0, None)
    high = np.minimum((boxes[:, :2] + boxes[:, 2:]).max(0), np.where(np.array(size) > 0, size, np.inf))

    # Surroundings, at least so large, in 4:3, but not larger than the image.
    limits = np.array(size) if min(size) > 0 else SURROUNDINGS * np.maximum(high - low, 1)
    wanted = np.maximum(SURROUNDINGS * (high - low), SMALLEST_VIEW * limits.max())
    wanted = np.array([max(wanted[0], wanted[1] * 4 / 3), max(wanted[1], wanted[0] * 3 / 4)])
    wanted = np.minimum(wanted, limits)

    # In the middle, unless that would lead out of the image.
    corner = np.clip((low + high) / 2 - wanted / 2, 0, limits - wanted)
    left, top = np.floor(corner)
    width, height = np.maximum(np.minimum(np.ceil(wanted), limits), 1)
    return float(left), float(top), float(width), float(height)
