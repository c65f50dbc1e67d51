"""YOLO's format: a text file for every image, a line for every object
(https://docs.ultralytics.com/datasets/detect).
"""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections import defaultdict
from pathlib import Path

from datasets.coco_format import shown
from datasets.convert.common import (
    CocoSplit,
    Object,
    Pair,
    files_by_key,
    key_of,
    read_splits,
    splits_by_folder,
)
from datasets.convert.masks import outline_as_stored
from datasets.convert.problems import BOXES_TURNED, Corners, Problems, as_stored
from datasets.convert.yolo_files import DARKNET, LABELS_BY_SPELLING, YAML, Lookup, describe, names_in
from datasets.file_index import shown_size
from datasets.file_names import IMAGE_SUFFIXES, Key, files_below, folded_key, is_left_behind
from util.errors import UserError
from util.images.files import Header
from util.text_files import read_lines

_CLASSES = ("classes.txt", "labels/classes.txt")
_USUAL_STEMS = ("data", "dataset", "obj")
# class, x, y, width, height
_LINE_OF_LABELS = re.compile(r"\d+(\s+[-+.\deE]+){4,}$")


def is_yolo(source: Path) -> bool:
    """Whether it is a data.yaml, or a folder with a data.yaml or a classes.txt."""
    return _looks_yolo(_unpacked(source))


def _looks_yolo(source: Path) -> bool:
    if source.is_dir():
        return bool(_usual_file(source, *YAML) or _classes_in(source))
    return source.suffix.lower() in YAML


def is_darknet(source: Path) -> bool:
    """Whether it is an obj.data, or a folder with an obj.data or an obj.names."""
    return _looks_darknet(_unpacked(source))


def _looks_darknet(source: Path) -> bool:
    if source.is_dir():
        return bool(_usual_file(source, DARKNET) or _usual_file(source, ".names"))
    return source.suffix.lower() == DARKNET


def _unpacked(source: Path) -> Path:
    """The inner folder, if there is nothing else in the source: archives are often so."""
    if not source.is_dir():
        return source
    inside = [path for path in source.iterdir() if not is_left_behind(path.name)]
    # files of the file manager do not count
    if len(inside) != 1 or not inside[0].is_dir():
        return source
    if _looks_yolo(inside[0]) or _looks_darknet(inside[0]):
        return inside[0]
    return source


def read_yolo(source: Path, problems: Problems) -> dict[str, CocoSplit]:
    """A data.yaml or an obj.data, a folder with such a file, or a folder with classes.txt or
    obj.names, images and labels.

    The labels of images/7.jpg are labels/7.txt, or 7.txt beside it: lines `class x y width height`,
    of the box's centre and size as shares of the image. A line with more columns is an outline, which
    gives a box and a mask. An image without a file of labels has no objects. Sides are those of the
    image as viewers show it, as Ultralytics' programs read it.

    Raises:
        UserError: there is nothing to convert.
    """
    source = _unpacked(source)
    path = source
    if source.is_dir():
        path = _usual_file(source, *YAML) or _usual_file(source, DARKNET) or source

    # the class names, and the files of images and labels
    boxes_first = False
    if path.is_dir():
        root = path
        names, pairs_of = _pairs_of_folder(root, problems)
    else:
        root = path.parent
        description = describe(path)
        boxes_first = description.boxes_first
        lookup = Lookup(description, source.is_file(), problems)
        names = lookup.names()
        pairs_of = {}
        for split, images in lookup.images().items():
            pairs_of[split] = [Pair(_key(image, root), image, lookup.label_file(image)) for image in images]
    for split, pairs in pairs_of.items():
        if pairs and not any(pair.labels.is_file() for pair in pairs):
            raise UserError(
                f"no image of the {split} split has labels: those of {pairs[0].image} would be in "
                f"{pairs[0].labels}"
            )

    # labels that belong to no image
    used = {os.path.realpath(pair.labels) for pairs in pairs_of.values() for pair in pairs}
    for text_file in files_below(root, [".txt"]):
        if os.path.realpath(text_file) not in used and _has_labels(text_file):
            problems.notes["files of labels that belong to no image of these splits, left out"] += 1

    read_objects = functools.partial(_read_objects, names=names, boxes_first=boxes_first, problems=problems)
    return read_splits(pairs_of, read_objects, problems, names)


def _pairs_of_folder(root: Path, problems: Problems) -> tuple[list[str], dict[str, list[Pair]]]:
    """Class names and pairs of a folder with a file of class names and no description."""
    listed = _classes_in(root) or _usual_file(root, ".names")
    if listed is None:
        raise UserError(
            f"{root} has no data.yaml, obj.data, classes.txt or obj.names: it is no data set in YOLO's format"
        )
    names = names_in(listed, problems)
    images = files_by_key(root, IMAGE_SUFFIXES, problems)
    labels = files_by_key(root, [".txt"], problems, wanted=images)
    _add_other_spellings(root, images, labels, problems)

    # an image without labels may be one with labels again, through a link
    labelled = {os.path.realpath(images[key]) for key in labels}
    pairs = {}
    for key, image in images.items():
        if key in labels:
            pairs[key] = Pair(key, image, labels[key])
        elif os.path.realpath(image) not in labelled:
            labelled.add(os.path.realpath(image))
            pairs[key] = Pair(key, image, image.with_suffix(".txt"))
    splits = splits_by_folder(pairs)
    return names, {split: [pairs[key] for key in keys] for split, keys in splits.items()}


def _add_other_spellings(
    root: Path, images: dict[Key, Path], labels: dict[Key, Path], problems: Problems
) -> None:
    """Add labels whose names are spelled otherwise than their images'; leave out images whose
    labels can't be told apart.
    """
    # files of labels and images that are still without the other, by their spelling
    claimed = set(labels.values())
    spelled: dict[Key, list[Path]] = defaultdict(list)
    for path in files_below(root, [".txt"]):
        if path not in claimed:
            spelled[folded_key(key_of(path.relative_to(root)))].append(path)
    unlabelled: dict[Key, list[Key]] = defaultdict(list)
    for key in images.keys() - labels.keys():
        unlabelled[folded_key(key)].append(key)

    # one of each is a pair
    for spelling in spelled.keys() & unlabelled.keys():
        keys, paths = unlabelled[spelling], spelled[spelling]
        if len(keys) == len(paths) == 1:
            labels[keys[0]] = paths[0]
            problems.notes[LABELS_BY_SPELLING] += 1
            continue
        for key in keys:
            problems.add(
                f"{images.pop(key)} has no labels of its own name, and {paths[0]} can't be told from others'"
            )


def _has_labels(path: Path) -> bool:
    # README.txt and lists of images have none
    try:
        return any(_LINE_OF_LABELS.match(line.text) for line in read_lines(path))
    except UserError:
        return False


def _usual_file(folder: Path, *suffixes: str) -> Path | None:
    """data.yaml, obj.data or obj.names, or the only file of the folder with such an ending."""
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)
    usual = [path for path in found if path.stem in _USUAL_STEMS]
    # several files of other names can't be told apart
    if usual:
        return usual[0]
    return found[0] if len(found) == 1 else None


def _classes_in(folder: Path) -> Path | None:
    return next((folder / name for name in _CLASSES if (folder / name).is_file()), None)


def _key(image: Path, root: Path) -> Key:
    root = Path(os.path.normpath(root))
    if image.is_relative_to(root):
        return key_of(image.relative_to(root))
    return (image.stem,)


# ---- files of labels


def _read_objects(
    path: Path, header: Header, names: list[str], boxes_first: bool, problems: Problems
) -> list[Object]:
    """The objects in a file of labels."""
    # no file: no objects
    problems.notes[BOXES_TURNED] += header.orientation > 1
    if not path.is_file():
        problems.notes["images without a file of labels, taken to have no objects"] += 1
        return []
    try:
        lines = read_lines(path)
    except UserError as error:
        problems.add(str(error))
        return []

    # shares of the image as shown -> pixels of the image as stored
    objects = []
    width, height = shown_size(header)
    for number, line in lines:
        where = f"{path}: line {number}"
        try:
            label, (x0, y0, x1, y1), outline = _read_line(line, len(names), boxes_first)
        except ValueError as error:
            problems.add(f"{where} {error}")
            continue
        except LookupError as error:
            problems.add(f"{where} {error}", "unknown_category")
            continue
        corners = Corners(x0 * width, y0 * height, x1 * width, y1 * height)
        placed = problems.placed(as_stored(corners, header), header.size, where)
        if placed:
            points = [share * side for share, side in zip(outline, itertools.cycle((width, height)))]
            mask = outline_as_stored(points, header)
            objects.append(Object(names[label], placed, segmentation=mask))
    return objects


def _read_line(line: str, num_classes: int, boxes_first: bool) -> tuple[int, Corners, list[float]]:
    """Class, box and outline of a line, as shares of the image; the outline of a box is empty.

    Raises ValueError, or LookupError for an unknown class; its message continues a sentence that begins
    with the line's number.
    """
    columns = line.partition("#")[0].split()
    try:
        label, *values = map(float, columns)
    except ValueError:
        raise ValueError(f"has {shown(line)}, which are not numbers") from None
    if label not in range(num_classes):
        raise LookupError(f"has class {columns[0][:40]}; classes are 0 to {num_classes - 1}")

    # centre and size; or an outline x, y, x, y, ...
    if boxes_first:
        values = values[:4]
    if len(values) == 4:
        x, y, width, height = values
        return int(label), Corners(x - width / 2, y - height / 2, x + width / 2, y + height / 2), []
    if len(values) < 6 or len(values) % 2:
        raise ValueError(
            f"has {len(columns)} columns; it must be class, x, y, width, height, or class and an outline"
        )
    xs, ys = values[::2], values[1::2]
    return int(label), Corners(min(xs), min(ys), max(xs), max(ys)), values
