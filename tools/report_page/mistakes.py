"""The worst mistakes of runs, with the pictures they were made in."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from datasets.detection_errors import CORRECT, FALSE_POSITIVES, FOUND_IOU, IGNORED, KINDS, MISSED, Errors
from util.images.files import as_rgb

PICTURE_SIDE = 420  # pixels of the longer side
PICTURE_BYTES = 5_500_000  # of all pictures together, as text of the page
SURROUNDINGS = 2.2  # a picture's side, of what it is about
SMALLEST_VIEW = (
    # of the image's longer side: an object of ten pixels says nothing without its surroundings
    0.25
)
MAX_PIXELS = 200_000_000
CONTEXT = 30  # other objects shown in a picture

Box = tuple[float, float, float, float]  # x, y, width, height


@dataclass
class Album:
    """Cuttings of images as data URIs, each once, until their bytes are used up."""

    folder: Path | None
    coco: COCO
    uris: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    full: bool = False
    _places: dict[tuple, int] = field(default_factory=dict)
    _bytes: int = 0

    def cutting(self, image_id: int, view: Box) -> int | None:
        """The place of a cutting among `uris`; None if there is no such image or no room."""
        key = image_id, view
        if key not in self._places:
            uri = self._make(image_id, view)
            if uri is None:
                return None
            self._bytes += len(uri)
            self._places[key] = len(self.uris)
            self.uris.append(uri)
        return self._places[key]

    def _make(self, image_id: int, view: Box) -> str | None:
        self.full = self.full or self._bytes > PICTURE_BYTES
        if self.folder is None or self.full:
            return None
        name = self.coco.imgs[image_id].get("file_name", "")
        try:
            with Image.open(self.folder / name) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise OSError("too large")
                left, top, width, height = view
                cut = as_rgb(image).crop((round(left), round(top), round(left + width), round(top + height)))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # SyntaxError: a broken PNG
            if name not in self.unreadable:
                self.unreadable.append(name)
            return None
        cut.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        cut.save(buffer, "JPEG", quality=82, optimize=True)
        return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def error_table(errors: Errors, threshold: float) -> dict[str, Any]:
    """Of a result: its numbers of errors by kind at a threshold of the score, and what each kind
    costs.
    """
    sure = errors.detections.score >= threshold
    kinds = errors.detections.kind[sure]
    counts = {kind: int((kinds == kind).sum()) for kind in FALSE_POSITIVES}
    return {
        "counts": counts | {MISSED: int(missed(errors, threshold).sum())},
        "costs": {kind: round(cost, 5) for kind, cost in errors.costs().items()},
    }


def missed(errors: Errors, threshold: float) -> np.ndarray:
    """[G]: objects that no detection of at least the threshold found."""
    return ~(found_score(errors) >= threshold)


def found_score(errors: Errors) -> np.ndarray:
    """[G]: the score of the detection that found each object; nan where none did."""
    by = errors.objects.found_by
    scores = np.append(errors.detections.score, np.nan)
    return scores[by]  # -1 is the last


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
    ranked = {
        (number, kind): _ranked(errors, kind, threshold)[:count]
        for kind in KINDS
        for number, errors in enumerate(all_errors)
        if errors is not None
    }
    entries = []
    for place in range(
        count
    ):  # the very worst of every kind first, in case the room for pictures does not last
        for (number, kind), chosen in ranked.items():
            if place < len(chosen):
                entries.append(_entry(all_errors, number, kind, int(chosen[place]), coco, album, threshold))
    order = {kind: i for i, kind in enumerate(KINDS)}
    return sorted(entries, key=lambda entry: (order[entry["kind"]], -entry["badness"]))


def _entry(
    all_errors: Sequence[Errors | None],
    number: int,
    kind: str,
    chosen: int,
    coco: COCO,
    album: Album,
    threshold: float,
) -> dict[str, Any]:
    """One error: `chosen` is the index of the object that was missed, or of the false positive."""
    errors = all_errors[number]
    assert errors is not None
    found, objects = errors.detections, errors.objects
    target = chosen if kind == MISSED else int(found.object[chosen])
    image_id = int(objects.image[chosen] if kind == MISSED else found.image[chosen])
    boxes = ([objects.box[target]] if target >= 0 else []) + ([] if kind == MISSED else [found.box[chosen]])
    image = coco.imgs[image_id]
    size = float(image.get("width") or 0), float(image.get("height") or 0)
    view = view_of(np.stack(boxes), size)
    entry: dict[str, Any] = {
        "result": number,
        "kind": kind,
        "file": image.get("file_name", str(image_id)),
        "image": image_id,
        "view": [round(v, 1) for v in view],
        "picture": album.cutting(image_id, view),
        "object": _shown(objects.box[target], int(objects.category[target])) if target >= 0 else None,
        "context": _context(objects, image_id, target, view),
    }
    if kind == MISSED:
        score = found_score(errors)[chosen]
        found_with = None if np.isnan(score) else round(float(score), 3)
        entry |= {"badness": float(objects.box[chosen, 2:].prod()), "found_with": found_with}
    else:
        detection = _shown(found.box[chosen], int(found.category[chosen])) | {
            "score": round(float(found.score[chosen]), 3)
        }
        entry |= {
            "badness": float(found.score[chosen]),
            "detection": detection,
            "iou": round(float(found.iou[chosen]), 3),
        }
    entry["others"] = [
        {"result": other, "text": _elsewhere(theirs, entry, target, threshold)}
        for other, theirs in enumerate(all_errors)
        if theirs is not None and other != number
    ]
    return entry


def _ranked(errors: Errors, kind: str, threshold: float) -> np.ndarray:
    """Indices of the errors of a kind, the worst first."""
    if kind == MISSED:
        chosen = np.flatnonzero(missed(errors, threshold))
        return chosen[np.argsort(-errors.objects.box[chosen, 2:].prod(1), kind="stable")]
    chosen = np.flatnonzero((errors.detections.kind == kind) & (errors.detections.score >= threshold))
    return chosen[np.argsort(-errors.detections.score[chosen], kind="stable")]


def _shown(box: np.ndarray, category: int) -> dict[str, Any]:
    return {"box": [round(float(v), 1) for v in box], "class": category}


def _context(objects: Any, image_id: int, target: int, view: Box) -> list[dict[str, Any]]:
    """The other objects in the view."""
    near = []
    for i in np.flatnonzero(objects.image == image_id):
        x, y, width, height = objects.box[i]
        inside = (
            x < view[0] + view[2] and y < view[1] + view[3] and x + width > view[0] and y + height > view[1]
        )
        if i != target and inside:
            near.append(_shown(objects.box[i], int(objects.category[i])))
    return near[:CONTEXT]


def _elsewhere(errors: Errors, entry: Mapping[str, Any], target: int, threshold: float) -> str:
    """What another result made of the same object, or in the same place."""
    if entry["kind"] == MISSED:
        score = found_score(errors)[target]
        return f"found it ({score:.2f})" if score >= threshold else "missed it too"
    found, mine = errors.detections, entry["detection"]
    near = np.flatnonzero(
        (found.image == entry["image"]) & (found.category == mine["class"]) & (found.score >= threshold)
    )
    near = near[~np.isin(found.kind[near], (CORRECT, IGNORED))]
    if len(near):
        iou = np.asarray(mask_utils.iou(found.box[near], np.array([mine["box"]], dtype=np.float64), [0]))[
            :, 0
        ]
        if (iou >= FOUND_IOU).any():
            return f"made it too ({found.score[near[iou >= FOUND_IOU]].max():.2f})"
    return "did not make it"


def view_of(boxes: np.ndarray, size: tuple[float, float]) -> Box:
    """The part of an image to show for boxes [n, 4]: with all of them and what is around, 4:3 where
    the image allows.
    """
    low = np.clip(boxes[:, :2].min(0), 0, None)
    high = np.minimum((boxes[:, :2] + boxes[:, 2:]).max(0), np.where(np.array(size) > 0, size, np.inf))
    limits = np.array(size) if min(size) > 0 else SURROUNDINGS * np.maximum(high - low, 1)
    wanted = np.maximum(SURROUNDINGS * (high - low), SMALLEST_VIEW * limits.max())
    wanted = np.array([max(wanted[0], wanted[1] * 4 / 3), max(wanted[1], wanted[0] * 3 / 4)])
    wanted = np.minimum(wanted, limits)
    corner = np.clip((low + high) / 2 - wanted / 2, 0, limits - wanted)
    left, top = np.floor(corner)
    width, height = np.maximum(np.minimum(np.ceil(wanted), limits), 1)
    return float(left), float(top), float(width), float(height)
