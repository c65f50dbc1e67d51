"""Faults of a data set: all of them at once, before a run meets them one by one.

`check_part`, `check_objects` and `check_files` are what tools/check_data.py is made of;
`quick_check` is what every training does. The rules for fields of annotations are those by which
training reads them (coco_format.py).
"""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import signal
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from datasets.coco_format import Fault, format_faults, read_json, shown
from datasets.file_index import absent_names, respell
from util.class_map import ClassMap
from util.config import TransformerConfig
from util.errors import UserError
from util.images.files import BadImageError, decode, read_header, read_image_file

log = logging.getLogger(__name__)

# pixels by which a box may reach out of its image: COCO's and VOC's do by rounding, and training
# clamps them
BOX_TOLERANCE = 2.0
# COCO's small, medium and large objects: areas in pixels below these, and the rest
SIZE_LIMITS = {"small": 32**2, "medium": 96**2, "large": float("inf")}
# an object's pixels lie within its box; polygons that overlap count some twice
_LARGEST_SHARE = 2.0
# detections an image that COCO counts and the detector gives
COUNTED_DETECTIONS = 100
# levels of 256 by which the pixels of a picture differ: below, nearly nothing is seen in it
_FLAT = 16
_FEW_FILES = 64  # are read faster than processes start


@dataclass(frozen=True)
class Finding:
    """Something wrong with a data set, in one line.

    is_fault: else it is a warning, of something that is legitimate but seldom meant. kind: its name
    in the report. file: the annotation file or the image file. The ids are those of the
    annotations, None where there is none.
    """

    kind: str
    message: str
    split: str
    file: str
    is_fault: bool = True
    image_id: Any = None
    annotation_id: Any = None
    category_id: Any = None


@dataclass(frozen=True)
class Boxes:
    """N objects: ids, image [N] (index among the images), category_id [N], xywh [N, 4] in pixels,
    area [N], crowd [N] bool.
    """

    ids: np.ndarray
    image: np.ndarray
    category_id: np.ndarray
    xywh: np.ndarray
    area: np.ndarray
    crowd: np.ndarray


@dataclass
class Part:
    """A part ("train" or "val") of a data set. `images`, `categories`: its sound entries; `boxes`:
    its sound objects.
    """

    split: str
    folder: Path
    annotations: Path
    images: list[dict[str, Any]] = field(default_factory=list)
    categories: list[dict[str, Any]] = field(default_factory=list)
    boxes: Boxes | None = None
    findings: list[Finding] = field(default_factory=list)

    def add(self, kind: str, message: str, file: Path | None = None, **more: Any) -> None:
        self.findings.append(Finding(kind, message, self.split, str(file or self.annotations), **more))


# ---- annotations


def check_part(split: str, folder: Path, annotations: Path, box_tolerance: float = BOX_TOLERANCE) -> Part:
    """Everything that the annotations alone tell; faults are findings and never raised."""
    part = Part(split, folder, annotations)
    try:
        content = read_json(annotations, without=("segmentation",))
    except UserError as error:
        part.add("unreadable_annotations", str(error))
        return part
    for fault in format_faults(content, annotations):
        part.add(fault.kind, fault.message, **_ids(fault))
    if not isinstance(content, dict):
        return part
    part.images, part.categories = content["images"], content["categories"]
    part.boxes = _boxes(part.images, content["annotations"])
    if not part.images and not part.findings:
        part.add("no_images", f"{annotations} has no images")
    _check_file_names(part)
    _check_names(part)
    _check_boxes(part, box_tolerance)
    return part


def check_classes(parts: Sequence[Part], num_classes: int | str) -> None:
    """Whether the categories fit --num_classes, and those of the later parts the first's, as
    training demands.
    """
    trained, *others = parts
    if not trained.categories:
        return  # which has been said
    try:
        classes = ClassMap.of(trained.categories, num_classes, str(trained.annotations))
    except UserError as error:
        trained.add("wrong_num_classes", str(error))
        return
    for part in others:
        for category in part.categories:
            try:
                classes.check([category], str(part.annotations))
            except UserError as error:
                part.add("other_category", str(error), category_id=category["id"])


def check_objects(part: Part, num_queries: int) -> None:
    """Whether there is something to learn or to measure, and no more of it in an image than
    --num_queries can find.
    """
    if part.boxes is None or not part.images or not part.categories:
        return  # which has been said
    for kind, message in _purposeless(part.split, part.images, part.categories, part.boxes, num_queries):
        part.add(kind, f"{part.annotations}: {message}", is_fault=False)


_PURPOSES = {"train": "learn", "val": "measure"}


def _purposeless(
    split: str,
    images: Sequence[dict[str, Any]],
    categories: Iterable[dict[str, Any]],
    boxes: Boxes,
    num_queries: int,
) -> Iterator[tuple[str, str]]:
    """(kind, message) of objects that can be neither learnt nor measured, or are none."""
    single, purpose = ~boxes.crowd, _PURPOSES[split]
    crowds_only = set(boxes.category_id.tolist()) - set(boxes.category_id[single].tolist())
    if not len(single):
        yield "no_objects", f"no object in {len(images)} images: there is nothing to {purpose}"
    elif not single.any():
        yield (
            "only_crowds",
            f"all {len(single)} objects are {_CROWDS}, so there is nothing to {purpose}; {_UNCROWD}",
        )
    elif crowds_only:
        names = _listed([category["name"] for category in categories if category["id"] in crowds_only])
        yield "class_of_crowds", f"{len(crowds_only)} categories have but {_CROWDS}: {names}; {_UNCROWD}"
    limits = {"more_than_queries": (num_queries, f"the {num_queries} of --num_queries can find; raise it")}
    if split == "val":
        counted = (
            f"the {COUNTED_DETECTIONS} detections that count: not even a perfect detector has an AP of 1"
        )
        limits["more_than_detections"] = (COUNTED_DETECTIONS, counted)
    counts = np.bincount(boxes.image[single], minlength=len(images))
    for kind, (limit, meaning) in limits.items():
        if counts.max() > limit:
            most = f"up to {counts.max()} (image {images[counts.argmax()]['id']})"
            yield kind, f"{(counts > limit).sum()} images have more objects, {most}, than {meaning}"


_CROWDS = "crowd regions (iscrowd 1), which neither train nor count"
_UNCROWD = "set iscrowd to 0 where they are single objects, or convert Pascal VOC's with --difficult keep"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(shown, names[:5])) + ", ..." * (len(names) > 5)


def _ids(fault: Fault) -> dict[str, Any]:
    """The ids of what has a fault, as far as it has any."""
    entry = fault.entry if isinstance(fault.entry, dict) else {}
    own = {"images": "image_id", "annotations": "annotation_id", "categories": "category_id"}.get(
        fault.section
    )
    ids = {own: entry.get("id")} if own else {}
    if fault.section == "annotations":
        ids |= {key: entry.get(key) for key in ("image_id", "category_id")}
    return {
        key: value if type(value) in (int, str) or value is None else shown(value)
        for key, value in ids.items()
    }


def _boxes(images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> Boxes:
    number = {image["id"]: i for i, image in enumerate(images)}
    return Boxes(
        np.array([a["id"] for a in annotations], dtype=np.int64),
        np.array([number[a["image_id"]] for a in annotations], dtype=np.int64),
        np.array([a["category_id"] for a in annotations], dtype=np.int64),
        np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4),
        np.array([a["area"] for a in annotations], dtype=np.float64),
        np.array([a["iscrowd"] for a in annotations], dtype=bool),
    )


def _check_file_names(part: Part) -> None:
    first: dict[str, Any] = {}
    for image in part.images:
        name = os.path.normpath(image["file_name"])
        if name in first:
            message = (
                f"{part.annotations}: images {first[name]} and {image['id']} have the same file "
                f"{image['file_name']}"
            )
            part.add("duplicate_file", f"{message}; merge them", part.folder / name, image_id=image["id"])
        first.setdefault(name, image["id"])


def _check_names(part: Part) -> None:
    first: dict[str, Any] = {}
    for category in part.categories:
        number, name = category["id"], category["name"]
        if name in first:
            message = (
                f"{part.annotations}: categories {first[name]} and {number} are both named {shown(name)}"
            )
            part.add("duplicate_category_name", f"{message}; rename or merge them", category_id=number)
        first.setdefault(name, number)
    used = set(part.boxes.category_id.tolist()) if part.boxes else set()
    unused = [category["name"] for category in part.categories if category["id"] not in used]
    if unused and part.boxes is not None and len(part.boxes.ids):
        message = f"{part.annotations}: {len(unused)} categories have no object: {_listed(unused)}"
        part.add("unused_category", message, is_fault=False)


def _check_boxes(part: Part, tolerance: float) -> None:
    boxes = part.boxes
    if boxes is None or not len(boxes.ids):
        return
    if (boxes.xywh <= 1).all():
        part.add(
            "boxes_in_shares",
            f"{part.annotations}: no box exceeds 1; boxes must be in pixels, not shares of the image",
        )
        return
    for kind, flagged in box_faults(boxes.xywh, sizes_of(part.images)[boxes.image], tolerance).items():
        for i in flagged.nonzero()[0].tolist():
            _add_box(part, kind, i, box_fault(kind, part.images[boxes.image[i]], tolerance))
    for i in wrong_areas(boxes.xywh, boxes.area).nonzero()[0].tolist():
        _add_box(
            part,
            "wrong_area",
            i,
            f"an area of {boxes.area[i]:g}, which no object in that box can have; give its pixels",
        )
    for i, other in _repeated(boxes):
        _add_box(
            part,
            "duplicate_box",
            i,
            f"the box and the category of annotation {boxes.ids[other]} too",
            is_fault=False,
        )


def sizes_of(images: Iterable[dict[str, Any]]) -> np.ndarray:
    """[N, 2]: width and height."""
    return np.array([[image["width"], image["height"]] for image in images], dtype=np.float64).reshape(-1, 2)


_BOX_FAULTS = {
    "degenerate_box": "no width or no height; take the object out",
    "box_outside": "no part within the image of {size}; mend the box or the size",
    "box_reaches_out": "more than {tolerance:g} pixels outside of the image of {size}; mend "
    "the box or the size",
}


def box_fault(kind: str, image: Mapping[str, Any], tolerance: float = BOX_TOLERANCE) -> str:
    """What a box in `image` has that is wrong by `box_faults`."""
    return _BOX_FAULTS[kind].format(size=f"{image['width']:g} x {image['height']:g}", tolerance=tolerance)


def box_faults(
    xywh: np.ndarray, sizes: np.ndarray, tolerance: float = BOX_TOLERANCE
) -> dict[str, np.ndarray]:
    """Which boxes [N, 4] are wrong in images of sizes [N, 2] (width, height), by kind; each has one
    kind at most.
    """
    low, high = xywh[:, :2], xywh[:, :2] + xywh[:, 2:]
    degenerate = (xywh[:, 2:] <= 0).any(1)
    outside = ~degenerate & ((high <= 0) | (low >= sizes)).any(1)
    far = np.maximum(-low, high - sizes).max(1, initial=-np.inf) > tolerance
    return {
        "degenerate_box": degenerate,
        "box_outside": outside,
        "box_reaches_out": far & ~degenerate & ~outside,
    }


def wrong_areas(xywh: np.ndarray, area: np.ndarray) -> np.ndarray:
    """[N] bool: areas that no object in a box [N, 4] of that size can have."""
    box_area = xywh[:, 2] * xywh[:, 3]
    return (box_area > 0) & ((area > _LARGEST_SHARE * box_area + 1) | (area == 0) & (box_area > 1))


def _repeated(boxes: Boxes) -> Iterator[tuple[int, int]]:
    """(later, first) of objects with the same image, category, box and kind."""
    rows = np.column_stack([boxes.image, boxes.category_id, boxes.crowd, boxes.xywh])
    _, first, number = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    first = first[number.reshape(-1)]
    for i in (first != np.arange(len(first))).nonzero()[0].tolist():
        yield i, int(first[i])


def _add_box(part: Part, kind: str, i: int, what: str, is_fault: bool = True) -> None:
    assert part.boxes is not None
    image, number = part.images[part.boxes.image[i]], int(part.boxes.ids[i])
    part.add(
        kind,
        describe_box(part.annotations, number, part.boxes.xywh[i], image, what),
        is_fault=is_fault,
        image_id=image["id"],
        annotation_id=number,
        category_id=int(part.boxes.category_id[i]),
    )


def describe_box(path: Path, number: int, xywh: Iterable[float], image: Mapping[str, Any], what: str) -> str:
    """One line: an object of the annotation file `path` by its number, its image, its box, and
    `what` it has.
    """
    box = ", ".join(f"{value:g}" for value in xywh)
    return (
        f"{path}: annotation {number} of image {image['id']} ({image['file_name']}), box [{box}], has {what}"
    )


# ---- image files


class _Task(NamedTuple):
    path: Path
    size: tuple[int, int]  # (width, height) that the annotations say
    megapixels: float
    whole: bool
    otherwise: str  # ends the remedy of a file that can't be used


class _Seen(NamedTuple):
    """What a file is.

    identity: the same for files with the same content (read as a whole) or of the same place
    (else). Of files read as a whole, levels: of 256, by which the pixels differ; bits: as
    `util.images.files.as_rgb` tells.
    """

    identity: tuple[Any, ...] | None = None
    kind: str = ""
    message: str = ""
    levels: int | None = None
    bits: int | None = None


def check_files(parts: Sequence[Part], *, whole: bool, megapixels: float, workers: int) -> None:
    """Open every image, in `workers` processes, and add what is wrong to the parts.

    whole: decode them as training does, look at their pixels and compare their contents; else only
    their headers, and their places on the disk.
    """
    owners: list[tuple[Part, dict[str, Any]]] = []
    for part in parts:
        if part.folder.is_dir():
            for how, count in respell(part.images, part.folder).items():
                part.add("other_name", f"{part.annotations}: {how}: {count}", is_fault=False)
            owners += [(part, image) for image in part.images]
        else:
            message = f"{part.folder} does not exist; it must be the folder of the {part.split} images"
            part.add("missing_folder", message, part.folder)
    tasks = [_task(part, image, megapixels, whole) for part, image in owners]
    first: dict[Any, tuple[Part, dict[str, Any]]] = {}
    depths: Counter[int | None] = Counter()
    for (part, image), task, seen in zip(owners, tasks, _look_at_all(tasks, workers), strict=True):
        if seen.kind:
            part.add(seen.kind, seen.message, task.path, image_id=image["id"])
        if seen.identity is not None:
            _check_repetition(part, image, task.path, *first.setdefault(seen.identity, (part, image)))
        if seen.levels is not None and seen.levels < _FLAT:
            message = (
                f"{task.path} is nearly of one level: as the detector sees it, its pixels differ by "
                f"{seen.levels} of 255"
            )
            part.add("flat_picture", message, task.path, is_fault=False, image_id=image["id"])
        depths[seen.bits] += 1
    _check_depths(parts[0], depths)


def _check_depths(part: Part, depths: Mapping[int | None, int]) -> None:
    known = sorted(bits for bits in depths if bits is not None)
    if len(known) > 1:
        found = ", ".join(f"{depths[bits]} of {bits} bits" for bits in known)
        message = (
            f"pictures are scaled by the depth that holds their largest number: {found}; convert "
            "those of one camera alike"
        )
        part.add("mixed_depths", message, part.folder, is_fault=False)


def check_paths(parts: Sequence[Part]) -> None:
    """What `check_files` finds of images in several parts, by their names alone."""
    first: dict[Path, tuple[Part, dict[str, Any]]] = {}
    for part in parts:
        folder = part.folder.resolve()
        for image in part.images:
            path = folder / os.path.normpath(image["file_name"])
            owner = first.setdefault(path, (part, image))
            if owner[0] is not part:
                _check_repetition(part, image, path, *owner)


def _task(part: Part, image: dict[str, Any], megapixels: float, whole: bool) -> _Task:
    otherwise = f"take image {image['id']} out of {part.annotations}"
    return _Task(
        part.folder / image["file_name"], (image["width"], image["height"]), megapixels, whole, otherwise
    )


def _check_repetition(
    part: Part, image: dict[str, Any], path: Path, owner: Part, other: dict[str, Any]
) -> None:
    if owner is not part:
        message = (
            f"{path} (image {image['id']}) is the same picture as "
            f"{owner.folder / other['file_name']} of {owner.split}; "
        )
        part.add("overlap", message + "take it out of one of the two", path, image_id=image["id"])
    elif other is not image and os.path.normpath(other["file_name"]) != os.path.normpath(image["file_name"]):
        message = (
            f"{path} (image {image['id']}) is the same picture as {other['file_name']} (image {other['id']})"
        )
        part.add("same_picture", message, path, is_fault=False, image_id=image["id"])


def _look_at_all(tasks: Sequence[_Task], workers: int) -> Iterable[_Seen]:
    """_look(task) for each, in their order, with a progress bar on a terminal."""

    def bar(results: Iterable[_Seen]) -> Iterable[_Seen]:
        return tqdm(results, total=len(tasks), desc="images", unit="image", disable=None)

    if workers == 1 or len(tasks) <= _FEW_FILES:
        yield from bar(map(_look, tasks))
        return
    # Not forked: the parent has threads, and memory that they would copy. Ctrl-C is left to the
    # parent, which ends its workers without a traceback from each.
    ignore = signal.signal, (signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), *ignore)
    try:
        yield from bar(pool.map(_look, tasks, chunksize=min(32, len(tasks) // workers)))
    except BrokenProcessPool:
        raise UserError(
            "a process that reads images died, of too little memory perhaps; try fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _look(task: _Task) -> _Seen:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of metadata that nobody uses
        return _look_at(task)


def _look_at(task: _Task) -> _Seen:
    if not task.path.exists():
        return _Seen(
            kind="missing_image", message=f"{task.path} is missing; add the file, or {task.otherwise}"
        )
    try:
        if task.whole:
            content = read_image_file(task.path, task.megapixels, task.otherwise)
            identity: tuple[Any, ...] = (hashlib.blake2b(content, digest_size=16).digest(),)
            picture = decode(content, task.path, task.megapixels, task.otherwise)
            seen = _Seen(
                identity,
                levels=max(high - low for low, high in picture.getextrema()),
                bits=picture.info.get("bits"),
            )
            size = picture.size
        else:
            status = task.path.stat()
            identity = (status.st_dev, status.st_ino)
            seen = _Seen(identity)
            size = read_header(task.path, task.megapixels, task.otherwise).size
    except BadImageError as error:
        return _Seen(kind="broken_image", message=str(error))
    return seen if size == task.size else seen._replace(kind="wrong_size", message=_wrong_size(task, size))


def _wrong_size(task: _Task, size: tuple[int, int]) -> str:
    said = f"{task.path} is {size[0]} x {size[1]}, and {task.size[0]:g} x {task.size[1]:g} in the annotations"
    if size[::-1] == task.size and read_header(task.path, task.megapixels, task.otherwise).orientation > 4:
        return (
            f"{said}: it was annotated as its EXIF orientation turns it, which training does not; "
            "store it turned"
        )
    return f"{said}; mend the size there, and the boxes if the image was scaled"


# ---- what training does


def quick_check(
    train: Any, val: Any, skip_missing: bool = False, num_queries: int = TransformerConfig.num_queries
) -> UserError | None:
    """What can be seen in seconds of two CocoDetection data sets, before a run: missing files,
    doubtful boxes and images, and whether there is something to learn and to measure.

    Gives the error to end with (for the caller to raise in all processes) if image files are
    missing; with `skip_missing` that is but a part of the one warning that tells the rest.
    """
    notes = []
    for split, dataset in (("train", train), ("val", val)):
        missing = _missing_files(dataset)
        if missing:
            said = f"missing image files of {dataset.annotations}: {len(missing)}, first {missing[0]}"
            if not skip_missing:
                return UserError(f"{said}; add them, take them out, or add --on_bad_image skip")
            notes.append(said)
        notes += _doubts(split, dataset.coco.dataset, num_queries)
    shared = len(_paths(train) & _paths(val))
    if shared:
        notes.append(f"images in both train and val: {shared}")
    if notes:
        log.warning("data: %s; python tools/check_data.py with these flags lists them", "; ".join(notes))
    return None


_COUNTED = {
    "degenerate_box": "boxes without width or height (training leaves them out)",
    "box_outside": "boxes outside of their image (training leaves them out)",
    "box_reaches_out": f"boxes that reach more than {BOX_TOLERANCE:g} pixels out of their "
    "image (training cuts them)",
}


def _missing_files(dataset: Any) -> list[Path]:
    names = [image["file_name"] for image in dataset.coco.imgs.values()]
    absent = absent_names(dataset.images, names)
    return [dataset.images / name for name in names if name in absent]


def _doubts(split: str, content: Mapping[str, Any], num_queries: int) -> Iterator[str]:
    images = content["images"]
    boxes = _boxes(images, content["annotations"])
    for kind, flagged in box_faults(boxes.xywh, sizes_of(images)[boxes.image]).items():
        if flagged.any():
            yield f"{_COUNTED[kind]} in {split}: {flagged.sum()}"
    for _, message in _purposeless(split, images, content["categories"], boxes, num_queries):
        yield f"{split}: {message}"


def _paths(dataset: Any) -> set[str]:
    folder = str(dataset.images.resolve())
    return {os.path.normpath(f"{folder}/{image['file_name']}") for image in dataset.coco.imgs.values()}


# ---- the table


class Summary(NamedTuple):
    """What a part has. classes: category id -> name, and boxes in all and by size (crowds aside),
    and images.
    """

    images: int
    empty_images: int
    boxes: int
    crowds: int
    width: tuple[int, int, int]
    height: tuple[int, int, int]
    classes: dict[int, dict[str, Any]]


def summary(part: Part) -> Summary:
    """Counts of a part; width and height are (smallest, median, largest) of its images."""
    boxes = part.boxes if part.boxes is not None else _boxes([], [])
    sides = [[image[key] for image in part.images] or [0] for key in ("width", "height")]
    width, height = ((int(min(values)), int(np.median(values)), int(max(values))) for values in sides)
    single = ~boxes.crowd
    classes = {
        category["id"]: _of_class(category["name"], boxes, single & (boxes.category_id == category["id"]))
        for category in sorted(part.categories, key=lambda category: category["id"])
    }
    empty = len(part.images) - len(np.unique(boxes.image))
    return Summary(len(part.images), empty, int(single.sum()), int(boxes.crowd.sum()), width, height, classes)


def _of_class(name: str, boxes: Boxes, chosen: np.ndarray) -> dict[str, Any]:
    size = np.searchsorted(list(SIZE_LIMITS.values()), boxes.area[chosen], side="right")
    counts = Counter(size.tolist())
    by_size = {label: counts[i] for i, label in enumerate(SIZE_LIMITS)}
    return {
        "name": name,
        "boxes": int(chosen.sum()),
        **by_size,
        "images": len(np.unique(boxes.image[chosen])),
    }
