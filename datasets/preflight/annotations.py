"""First stage of the check: everything that the annotations alone tell."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

from datasets.coco_format import Problem, format_problems, read_json, shown
from datasets.coco_masks import run_lengths
from datasets.panoptic.format import is_panoptic, parse_panoptic
from datasets.preflight.boxes import (
    BOX_TOLERANCE,
    box_problem,
    box_problems,
    describe_box,
    sizes_of,
    wrong_areas,
)
from datasets.preflight.masks import MASK_PROBLEMS, mask_problems
from util.class_map import ClassMap
from util.errors import UserError

# COCO counts so many detections an image, and the detector gives so many
COUNTED_DETECTIONS = 100

_CROWDS = "crowd regions (iscrowd 1), which neither train nor count"
_UNCROWD = "set iscrowd to 0 where they are single objects, or convert Pascal VOC's with --difficult keep"


@dataclass
class CheckedSplit:
    """A split of a data set, its sound entries, and all problems found so far.

    name: "train" or "val". folder: of its images. annotations: the file.

    Of N objects: image [N] (index among the images), category_id [N], xywh [N, 4] in pixels, area
    [N], crowd [N] bool.
    """

    name: str
    folder: Path
    annotations: Path
    images: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    objects: list[dict[str, Any]]
    problems: list[Problem] = field(default_factory=list)

    def __post_init__(self) -> None:
        place = {image["id"]: i for i, image in enumerate(self.images)}
        self.image = np.array([place[entry["image_id"]] for entry in self.objects], np.int64)
        self.category_id = np.array([entry["category_id"] for entry in self.objects], np.int64)
        self.xywh = np.array([entry["bbox"] for entry in self.objects], np.float64).reshape(-1, 4)
        self.area = np.array([entry["area"] for entry in self.objects], np.float64)
        self.crowd = np.array([entry["iscrowd"] for entry in self.objects], bool)

    def flagged_boxes(self, tolerance: float) -> dict[str, np.ndarray]:
        """By kind of problem, which objects [N] have it (datasets/preflight/boxes.py)."""
        return box_problems(self.xywh, sizes_of(self.images)[self.image], tolerance)

    def add(self, problem: Problem, file: Path | None = None) -> None:
        """`file`: where the problem is, if not in the annotations."""
        problem.split, problem.file = self.name, str(file or self.annotations)
        self.problems.append(problem)


def check_annotations(
    name: str,
    folder: Path,
    annotations: Path,
    box_tolerance: float = BOX_TOLERANCE,
    *,
    masks: bool = False,
) -> CheckedSplit:
    """Everything that the annotations alone tell. Never raises for a problem in them.

    masks: check them, too; every object needs one then.
    """
    # read; fields of the wrong form
    content: Any = {}
    try:
        content = read_json(annotations, without=() if masks else ("segmentation",))
        if is_panoptic(content):
            # their masks are the maps
            content, masks = parse_panoptic(content, annotations).as_instances().dataset, False
        problems = list(format_problems(content, annotations))
    except UserError as error:
        problems = [Problem("unreadable_annotations", str(error))]
    if not isinstance(content, dict):
        content = {}
    lists = [content.get(key, []) for key in ("images", "categories", "annotations")]
    split = CheckedSplit(name, folder, annotations, *lists)
    for problem in problems:
        split.add(problem)

    # the meaning of what is left
    if not split.images and not problems:
        split.add(Problem("no_images", f"{annotations} has no images"))
    _check_file_names(split)
    _check_categories(split)
    _check_boxes(split, box_tolerance)
    if masks:
        _check_masks(split)
    return split


def check_classes(splits: Sequence[CheckedSplit], num_classes: int | str) -> None:
    """Whether categories fit --num_classes, and those of later splits the first's, as in training."""
    # the first split decides what the labels are
    trained, *others = splits
    if not trained.categories:
        return  # which has been reported
    try:
        classes = ClassMap.of(trained.categories, num_classes, str(trained.annotations))
    except UserError as error:
        trained.add(Problem("wrong_num_classes", str(error)))
        return

    # one by one, to report all categories and not only the first
    for split in others:
        for category in split.categories:
            try:
                classes.check([category], str(split.annotations))
            except UserError as error:
                split.add(Problem("other_category", str(error), "categories", category))


def check_objects(split: CheckedSplit, num_queries: int) -> None:
    """Add a warning if objects can be neither learnt nor measured."""
    if split.images and split.categories:
        for kind, message in object_warnings(split, num_queries):
            split.add(Problem(kind, f"{split.annotations}: {message}"))


def object_warnings(split: CheckedSplit, num_queries: int) -> Iterator[tuple[str, str]]:
    """(kind, message) of objects that can be neither learnt nor measured."""
    # objects that are none
    purpose = "learn" if split.name == "train" else "measure"
    single = ~split.crowd
    crowds_only = np.setdiff1d(split.category_id, split.category_id[single])
    if not len(single):
        yield "no_objects", f"no object in {len(split.images)} images: there is nothing to {purpose}"
    elif not single.any():
        message = f"all {len(single)} objects are {_CROWDS}, so there is nothing to {purpose}; {_UNCROWD}"
        yield "only_crowds", message
    elif len(crowds_only):
        names = [category["name"] for category in split.categories if category["id"] in crowds_only]
        message = f"{_have(names)} but {_CROWDS}: {_listed(names)}; {_UNCROWD}"
        yield "class_of_crowds", message

    # more objects in an image than can be found
    limits = [("more_than_queries", num_queries, f"the {num_queries} of --num_queries can find; raise it")]
    if split.name == "val":
        counted = f"the {COUNTED_DETECTIONS} detections that count"
        meaning = f"{counted}: not even a perfect detector has an AP of 1"
        limits.append(("more_than_detections", COUNTED_DETECTIONS, meaning))
    counts = np.bincount(split.image[single], minlength=len(split.images))
    for kind, limit, meaning in limits:
        if counts.max() > limit:
            most = f"up to {counts.max()} (image {split.images[counts.argmax()]['id']})"
            yield kind, f"{(counts > limit).sum()} images have more objects, {most}, than {meaning}"


def check_unused(splits: Sequence[CheckedSplit]) -> None:
    """Add a warning for the categories without objects of each split."""
    for split in splits:
        # without any object at all, only that is reported
        used = set(split.category_id.tolist())
        unused = {one["id"]: one["name"] for one in split.categories if one["id"] not in used}
        if not used or not unused:
            continue
        names = [*unused.values()]
        meaning = "can never be learned" if split.name == "train" else "cannot be measured"
        message = f"{_have(names)} no object and {meaning}: {_listed(names)}"
        for other in splits:
            counted = other.category_id[~other.crowd & np.isin(other.category_id, [*unused])]
            if len(counted) and other.name == "val":
                measured = _listed([unused[number] for number in np.unique(counted).tolist()])
                message += f"; but validation has {len(counted)}: the AP will be 0 for {measured}"
        split.add(Problem("unused_category", f"{split.annotations}: {message}"))


def _have(names: Sequence[str]) -> str:
    return "1 category has" if len(names) == 1 else f"{len(names)} categories have"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(shown, names[:5])) + ", ..." * (len(names) > 5)


def _check_file_names(split: CheckedSplit) -> None:
    first: dict[str, Any] = {}
    for image in split.images:
        # a/./b.jpg is a/b.jpg
        name = os.path.normpath(image["file_name"])
        other = first.setdefault(name, image)
        if other is not image:
            same = f"images {other['id']} and {image['id']} have the same file {image['file_name']}"
            message = f"{split.annotations}: {same}; merge them"
            split.add(Problem("duplicate_file", message, "images", image), split.folder / name)


def _check_categories(split: CheckedSplit) -> None:
    # names are what the user sees, so they must be unique like ids
    first: dict[str, int] = {}
    for category in split.categories:
        name, number = category["name"], category["id"]
        other = first.setdefault(name, number)
        if other != number:
            same = f"categories {other} and {number} are both named {shown(name)}"
            message = f"{split.annotations}: {same}; rename or merge them"
            split.add(Problem("duplicate_category_name", message, "categories", category))


def _check_boxes(split: CheckedSplit, tolerance: float) -> None:
    if split.objects and (split.xywh <= 1).all():
        message = "no box exceeds 1; boxes must be in pixels, not shares of the image"
        split.add(Problem("boxes_in_shares", f"{split.annotations}: {message}"))
        return

    # boxes and areas that can't be right
    for kind, flagged in split.flagged_boxes(tolerance).items():
        for i in np.flatnonzero(flagged).tolist():
            _add_box(split, kind, i, box_problem(kind, split.images[split.image[i]], tolerance))
    for i in np.flatnonzero(wrong_areas(split.xywh, split.area)).tolist():
        what = f"an area of {split.area[i]:g}, which no object in that box can have; give its pixels"
        _add_box(split, "wrong_area", i, what)

    # objects with the same image, category, box and crowd flag
    rows = np.column_stack([split.image, split.category_id, split.crowd, split.xywh])
    _, first, number = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    first = first[number.reshape(-1)]
    for i in np.flatnonzero(first != np.arange(len(first))).tolist():
        other = split.objects[first[i]]["id"]
        _add_box(split, "duplicate_box", i, f"the box and the category of annotation {other} too")


def _check_masks(split: CheckedSplit) -> None:
    # by the rules of training; crowds must have one, too
    kept, own, pixels = [], [], []
    for i, entry in enumerate(split.objects):
        image = split.images[split.image[i]]
        try:
            counts = run_lengths(entry, image, split.annotations)
        except UserError as error:
            kind = "wrong_segmentation" if entry.get("segmentation") else "missing_mask"
            split.add(Problem(kind, str(error), "annotations", entry))
            continue
        runs = {"size": [int(image["height"]), int(image["width"])], "counts": counts}
        kept.append(i)
        own.append(mask_utils.toBbox(runs))
        pixels.append(mask_utils.area(runs))

    places = np.array(kept, np.int64)
    found = mask_problems(
        np.array(own).reshape(-1, 4),
        np.array(pixels, np.float64),
        split.xywh[places],
        split.area[places],
        sizes_of(split.images)[split.image[places]],
    )
    for kind, flagged in found.items():
        for n in np.flatnonzero(flagged).tolist():
            box = ", ".join(f"{value:g}" for value in own[n])
            what = MASK_PROBLEMS[kind].format(box=box, area=split.area[kept[n]], pixels=pixels[n])
            _add_box(split, kind, kept[n], what)


def _add_box(split: CheckedSplit, kind: str, i: int, what: str) -> None:
    """Add a problem of object i."""
    image, entry = split.images[split.image[i]], split.objects[i]
    message = describe_box(split.annotations, entry["id"], split.xywh[i], image, what)
    split.add(Problem(kind, message, "annotations", entry))
