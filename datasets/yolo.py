"""YOLO's format: a text file for every image, a line for every object (https://docs.ultralytics.com/datasets/detect)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets.coco_format import shown
from datasets.files import IMAGE_SUFFIXES, Key, files_below, shown_size
from datasets.labelled import (
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
from util.errors import UserError
from util.images import Header, read_regular_file

_YAML = (".yaml", ".yml")
_CLASSES = ("classes.txt", "labels/classes.txt")


def is_yolo(source: Path) -> bool:
    if source.suffix in _YAML:
        return True
    return source.is_dir() and (_yaml_in(source) is not None or _classes_in(source) is not None)


def read_yolo(source: Path, faults: Faults) -> Labelled:
    """A data.yaml with train, val and names; a folder with such a file; or a folder with classes.txt, images and labels.

    The labels of images/7.jpg are labels/7.txt: lines `class x y width height`, of the box's centre and size as shares of the
    image. A line with more columns is an outline, of which the box around it is taken. An image without a file of labels has no
    objects. Sides are those of the image as viewers show it, which is how Ultralytics' programs read it.

    Raises:
        UserError: there is nothing to convert; or as Faults says.
    """
    if source.is_dir() and _yaml_in(source) is None:
        return _read_folder(source, faults)
    path = source if source.suffix in _YAML else _yaml_in(source)
    if path is None or not path.is_file():
        raise UserError(f"{source} does not exist; it must be a data.yaml, or a folder with one or with classes.txt")
    content = _read_yaml(path)
    names = _names(content.get("names"), path)
    if not content.get("train"):
        raise UserError(f"{path} has no 'train': it must name the folder or the list of the training images")
    boxes_first = "kpt_shape" in content  # then key points follow the box
    parts = {}
    for part in ("train", "val"):
        if content.get(part):
            files = [image for entry in _entries(content[part], path) for image in _images(entry, content, path, faults)]
            pairs = [(_key(image, path), image) for image in dict.fromkeys(files)]
            labels = {image: _label_file(image) for _, image in pairs}
            parts[part] = list(_read_images(pairs, labels, names, boxes_first, faults, part))
    return Labelled(names, parts)


def _read_folder(root: Path, faults: Faults) -> Labelled:
    listed = _classes_in(root)
    if listed is None:
        raise UserError(f"{root} has neither a data.yaml nor a classes.txt: it is no data set in YOLO's format")
    names = _names([line.strip() for line in _lines(listed) if line.strip()], listed)
    images = files_by_key(root, IMAGE_SUFFIXES, faults)
    labels = files_by_key(root, [".txt"], faults, wanted=images)
    parts = {}
    for part, keys in parts_by_folder(images).items():
        pairs = [(key, images[key]) for key in keys]
        of_image = {images[key]: labels.get(key, images[key].with_suffix(".txt")) for key in keys}
        parts[part] = list(_read_images(pairs, of_image, names, False, faults, part))
    return Labelled(names, parts)


def _yaml_in(folder: Path) -> Path | None:
    """data.yaml, or the only YAML file of the folder."""
    found = sorted(path for path in folder.iterdir() if path.suffix in _YAML)
    usual = [path for path in found if path.stem in ("data", "dataset")]
    return usual[0] if usual else found[0] if len(found) == 1 else None


def _classes_in(folder: Path) -> Path | None:
    return next((folder / name for name in _CLASSES if (folder / name).is_file()), None)


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml  # of all formats only this one needs it

    try:
        content = yaml.safe_load(read_regular_file(path))
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror})") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{path} is not YAML ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must have train, val and names, as Ultralytics' data.yaml has")
    return content


def _names(names: Any, path: Path) -> list[str]:
    """Class names by number: a list, or a mapping from 0, 1, ..."""
    if isinstance(names, dict):
        if sorted(map(str, names)) != sorted(map(str, range(len(names)))):
            raise UserError(f"{path}: the keys of 'names' must be 0, 1, ... without gaps")
        names = [name for _, name in sorted(names.items(), key=lambda item: int(item[0]))]
    if not isinstance(names, list) or not names or not all(isinstance(name, str | int | float) for name in names):
        raise UserError(f"{path}: 'names' must be a list of class names, or a mapping from numbers to names")
    names = [str(name) for name in names]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path} names two classes {shown(twice)}; names must differ")
    return names


def _entries(value: Any, path: Path) -> list[str]:
    entries = value if isinstance(value, list) else [value]
    if not all(isinstance(entry, str) for entry in entries):
        raise UserError(f"{path}: 'train' and 'val' must be a path or a list of paths, not {shown(value)}")
    return entries


def _images(entry: str, content: dict[str, Any], path: Path, faults: Faults) -> list[Path]:
    """The images of a folder, or of a file that lists them, in order."""
    place = _find(entry, content, path)
    if place.is_dir():
        return list(files_below(place, IMAGE_SUFFIXES))
    images = []
    for number, line in enumerate(_lines(place), 1):
        if line.strip():
            image = Path(os.path.normpath(place.parent / line.strip()))
            if image.is_file():
                images.append(image)
            else:
                faults.add(f"{place}: line {number} names {image}, which is missing")
    return images


def _find(entry: str, content: dict[str, Any], path: Path) -> Path:
    """Where a path of the YAML leads: from its `path`, or from the file itself if that is of another machine."""
    root = content.get("path")
    root = root if isinstance(root, str) else ""
    tried = [path.parent / root / entry, path.parent / entry, path.parent / entry.removeprefix("../")]
    for place in tried:
        if place.exists():
            return Path(os.path.normpath(place))
    raise UserError(f"{path} names {entry}, which is missing: tried {', '.join(dict.fromkeys(map(str, tried)))}")


def _key(image: Path, yaml_file: Path) -> Key:
    try:
        return key_of(image.relative_to(os.path.normpath(yaml_file.parent)))
    except ValueError:
        return key_of(image.relative_to(image.parent))


def _label_file(image: Path) -> Path:
    """As Ultralytics has it: in `labels` in place of the last `images`; beside the image where there is no such folder."""
    parts = list(image.parent.parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts, image.stem + ".txt")


def _read_images(
    pairs: list[tuple[Key, Path]], labels: dict[Path, Path], names: list[str], boxes_first: bool, faults: Faults, part: str
) -> Iterator[LabelledImage]:
    if not pairs:
        raise UserError(f"the {part} part has no images")
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


def _objects(path: Path, header: Header, names: list[str], boxes_first: bool, faults: Faults) -> Iterator[Object]:
    try:
        lines = _lines(path)
    except UserError as error:
        faults.add(str(error))
        return
    width, height = shown_size(header)
    for number, line in enumerate(lines, 1):
        columns = line.split()
        if not columns:
            continue
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
            faults.add(f"{where} has {len(columns)} columns; it must be class, x, y, width, height, or class and an outline")
            continue
        x0, y0, x1, y1 = box
        corners = Corners(x0 * width, y0 * height, x1 * width, y1 * height)
        placed = faults.placed(as_stored(corners, header), header.size, where)
        if placed:
            yield Object(names[int(which)], placed)


def _box(values: list[float], faults: Faults) -> Corners | None:
    """The box, as shares of the image, of centre and size or of an outline x, y, x, y, ...; None for anything else."""
    if len(values) == 4:
        x, y, width, height = values
        return Corners(x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    if len(values) < 6 or len(values) % 2:
        return None
    faults.notes["outlines, of which the boxes were taken"] += 1
    return Corners(min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2]))


def _lines(path: Path) -> list[str]:
    try:
        return read_regular_file(path).decode("utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text") from None
