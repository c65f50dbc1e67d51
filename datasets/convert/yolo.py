"""YOLO's format: a text file for every image, a line for every object
(https://docs.ultralytics.com/datasets/detect).
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from datasets.coco_format import shown
from datasets.convert.common import (
    Corners,
    Faults,
    Labelled,
    LabelledImage,
    Object,
    as_stored,
    checked_name,
    files_by_key,
    key_of,
    names_in_part,
    parts_by_folder,
    progress,
)
from datasets.convert.yolo_files import DARKNET, LABELS_BY_SPELLING, YAML, Lookup, describe, names_in
from datasets.file_index import shown_size
from datasets.file_names import IMAGE_SUFFIXES, Key, files_below, folded_key
from util.errors import UserError
from util.images.files import Header
from util.text_files import read_lines

_CLASSES = ("classes.txt", "labels/classes.txt")
# class, x, y, width, height
_LINE_OF_LABELS = re.compile(r"\d+(\s+[-+.\deE]+){4,}$")


def is_yolo(source: Path) -> bool:
    if source.suffix.lower() in YAML:
        return True
    return source.is_dir() and (_yaml_in(source) is not None or _classes_in(source) is not None)


def is_darknet(source: Path) -> bool:
    if source.suffix.lower() == DARKNET:
        return True
    return source.is_dir() and any(_darknet_in(source, suffix) is not None for suffix in (DARKNET, ".names"))


def read_yolo(source: Path, faults: Faults) -> Labelled:
    """A data.yaml or an obj.data, a folder with such a file, or a folder with classes.txt or
    obj.names, images and labels.

    The labels of images/7.jpg are labels/7.txt, or 7.txt beside it: lines `class x y width height`,
    of the box's centre and size as shares of the image. A line with more columns is an outline, of
    which the box around it is taken. An image without a file of labels has no objects. Sides are
    those of the image as viewers show it, which is how Ultralytics' programs read it.

    Raises:
        UserError: there is nothing to convert; or as Faults says.
    """
    path = (_yaml_in(source) or _darknet_in(source, DARKNET)) if source.is_dir() else source
    if path is None:
        return _read_folder(source, faults)
    if not path.is_file():
        raise UserError(
            f"{source} does not exist; it must be a data.yaml, an obj.data, or a folder with one "
            f"or with classes.txt"
        )
    description = describe(path)
    lookup = Lookup(description, source.is_file(), faults)
    names = lookup.names()
    parts, used = {}, set()
    for part, images in lookup.images().items():
        pairs = [(_key(image, path), image) for image in images]
        labels = {image: lookup.label_file(image) for image in images}
        used |= set(labels.values())
        parts[part] = list(_read_images(pairs, labels, names, description.boxes_first, faults, part))
    _note_unused_labels(path.parent, used, faults)
    return Labelled(names, parts)


def _read_folder(root: Path, faults: Faults) -> Labelled:
    listed = _classes_in(root) or _darknet_in(root, ".names")
    if listed is None:
        raise UserError(
            f"{root} has no data.yaml, obj.data, classes.txt or obj.names: it is no data set in YOLO's format"
        )
    names = names_in(listed, faults)
    images = files_by_key(root, IMAGE_SUFFIXES, faults)
    labels = files_by_key(root, [".txt"], faults, wanted=images)
    _add_other_spellings(root, images, labels, faults)
    images = _each_file_once(images, labels)
    parts = {}
    for part, keys in parts_by_folder(images).items():
        pairs = [(key, images[key]) for key in keys]
        of_image = {images[key]: labels.get(key, images[key].with_suffix(".txt")) for key in keys}
        parts[part] = list(_read_images(pairs, of_image, names, False, faults, part))
    _note_unused_labels(root, set(labels.values()), faults)
    return Labelled(names, parts)


def _add_other_spellings(
    root: Path, images: dict[Key, Path], labels: dict[Key, Path], faults: Faults
) -> None:
    """Add labels whose names are spelled otherwise than their images'; leave out images whose
    labels can't be told apart.
    """
    spelled: dict[Key, list[Path]] = defaultdict(list)
    claimed = set(labels.values())
    for path in files_below(root, [".txt"]):
        if path not in claimed:
            spelled[folded_key(key_of(path.relative_to(root)))].append(path)
    unlabelled: dict[Key, list[Key]] = defaultdict(list)
    for key in images.keys() - labels.keys():
        unlabelled[folded_key(key)].append(key)
    for spelling in spelled.keys() & unlabelled.keys():
        keys, paths = unlabelled[spelling], spelled[spelling]
        if len(keys) == len(paths) == 1:
            labels[keys[0]] = paths[0]
            faults.notes[LABELS_BY_SPELLING] += 1
            continue
        for key in keys:
            faults.add(
                f"{images.pop(key)} has no labels of its own name, and {paths[0]} can't be told from others'"
            )


def _each_file_once(images: dict[Key, Path], labels: dict[Key, Path]) -> dict[Key, Path]:
    """Without what is seen a second time, through a link, and has no labels there."""
    first: dict[str, Key] = {}
    for key in sorted(images, key=lambda key: key not in labels):
        first.setdefault(os.path.realpath(images[key]), key)
    return {
        key: path for key, path in images.items() if key in labels or first[os.path.realpath(path)] == key
    }


def _note_unused_labels(root: Path, used: Iterable[Path], faults: Faults) -> None:
    used = {os.path.realpath(path) for path in used}
    rest = [path for path in files_below(root, [".txt"]) if os.path.realpath(path) not in used]
    faults.notes["files of labels that belong to no image of these parts, left out"] += sum(
        map(_has_labels, rest)
    )


def _has_labels(path: Path) -> bool:
    try:
        return any(_LINE_OF_LABELS.match(line.text) for line in read_lines(path))
    except UserError:
        return False


def _yaml_in(folder: Path) -> Path | None:
    """data.yaml, or the only YAML file of the folder."""
    return _usual_file(folder, YAML, ("data", "dataset"))


def _darknet_in(folder: Path, suffix: str) -> Path | None:
    """obj.data or obj.names, or the only file with that ending."""
    return _usual_file(folder, (suffix,), ("obj",))


def _usual_file(folder: Path, suffixes: tuple[str, ...], stems: tuple[str, ...]) -> Path | None:
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)
    usual = [path for path in found if path.stem in stems]
    return usual[0] if usual else found[0] if len(found) == 1 else None


def _classes_in(folder: Path) -> Path | None:
    return next((folder / name for name in _CLASSES if (folder / name).is_file()), None)


def _key(image: Path, yaml_file: Path) -> Key:
    try:
        return key_of(image.relative_to(os.path.normpath(yaml_file.parent)))
    except ValueError:
        return key_of(image.relative_to(image.parent))


def _read_images(
    pairs: list[tuple[Key, Path]],
    labels: dict[Path, Path],
    names: list[str],
    boxes_first: bool,
    faults: Faults,
    part: str,
) -> Iterator[LabelledImage]:
    if not pairs:
        return
    there = {image for image, label in labels.items() if label.is_file()}
    if not there:
        image, label = next(iter(labels.items()))
        raise UserError(f"no image of the {part} part has labels: those of {image} would be in {label}")
    for name, image in progress(names_in_part(pairs), part):
        header = faults.header(image) if checked_name(name, image, faults) else None
        if header is None:
            continue
        objects = list(_objects(labels[image], header, names, boxes_first, faults)) if image in there else []
        faults.notes["images without a file of labels, taken to have no objects"] += image not in there
        if header.orientation > 1:
            faults.notes["images with an EXIF orientation: boxes turned to the pixels as stored"] += 1
        yield LabelledImage(image, name, header.size, objects)


def _objects(
    path: Path, header: Header, names: list[str], boxes_first: bool, faults: Faults
) -> Iterator[Object]:
    try:
        lines = read_lines(path)
    except UserError as error:
        faults.add(str(error))
        return
    width, height = shown_size(header)
    for number, line in lines:
        columns = line.partition("#")[0].split()
        where = f"{path}: line {number}"
        try:
            which, *values = map(float, columns)
        except ValueError:
            faults.add(f"{where} has {shown(line)}, which are not numbers")
            continue
        if which not in range(len(names)):
            faults.add(f"{where} has class {columns[0][:40]}; classes are 0 to {len(names) - 1}")
            continue
        box = _box(values[:4] if boxes_first else values, faults)
        if box is None:
            faults.add(
                f"{where} has {len(columns)} columns; it must be class, x, y, width, height, or "
                f"class and an outline"
            )
            continue
        x0, y0, x1, y1 = box
        corners = Corners(x0 * width, y0 * height, x1 * width, y1 * height)
        placed = faults.placed(as_stored(corners, header), header.size, where)
        if placed:
            yield Object(names[int(which)], placed)


def _box(values: list[float], faults: Faults) -> Corners | None:
    """The box, as shares of the image, of centre and size or of an outline x, y, x, y, ...; None
    for anything else.
    """
    if len(values) == 4:
        x, y, width, height = values
        return Corners(x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    if len(values) < 6 or len(values) % 2:
        return None
    faults.notes["outlines, of which the boxes were taken"] += 1
    return Corners(min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2]))
