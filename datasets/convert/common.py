"""Images with labelled boxes, on their way from other formats (voc.py, yolo.py) to COCO's.

Readers for these formats on PyPI give boxes alone: of the light and maintained ones, globox and
supervision, neither keeps VOC's `difficult` or says in which line of which file a fault is. So they
are read with what Python, Pillow and PyYAML have.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from tqdm import tqdm

from datasets.coco_format import is_file_name, shown
from datasets.file_index import IMAGE_FOLDERS, Findings
from datasets.file_names import Key, files_below
from util.config import DataConfig
from util.errors import UserError
from util.images.files import BadImageError, Header, read_header

# folders that tell images from labels, and parts from each other; an image and its labels have the
# other names in common
ROLES = IMAGE_FOLDERS | {"annotations", "labels", "xmls"}
PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
# share of the images for validation where nobody says
VAL_FRACTION = 0.2
# pixels; further out is no rounding, but another image or another unit
_ROUNDING = 1.0
# pixels; shorter sides are none once they are written
_SHORTEST = 1e-3


class Corners(NamedTuple):
    """A box in pixels; (0, 0) is the outer corner of the first pixel."""

    x0: float
    y0: float
    x1: float
    y1: float


class Object(NamedTuple):
    """name: its class. corners: in the image as stored. crowd: not trained on, and no detection of
    it is wrong.
    """

    name: str
    corners: Corners
    crowd: bool = False


@dataclass
class LabelledImage:
    """An image file. name: below the folder of its part, with slashes. size: (width, height) as
    stored.
    """

    path: Path
    name: str
    size: tuple[int, int]
    objects: list[Object]


@dataclass
class Labelled:
    """A data set. names: of the classes, in the order of their ids. parts: images of "train", and
    of "val" if it has one.
    """

    names: list[str]
    parts: dict[str, list[LabelledImage]]


@dataclass
class Faults:
    """What is wrong with a source: ends the conversion, or is left out and counted. `notes` counts
    what was done otherwise.

    on_bad: stop; clip: cut boxes that reach out of their image, and skip the rest; skip. kinds: how
    many faults there are of each kind, which is named as in the check (preflight.py).
    """

    on_bad: str = "stop"
    messages: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)

    def add(self, message: str, kind: str = "other") -> None:
        """Raises UserError unless faults are skipped; `message` is one line that names file and
        line or object.
        """
        if self.on_bad == "stop":
            raise UserError(f"{message}; mend it, or leave such things out with --on_bad skip")
        self.messages.append(message)
        self.kinds[kind] += 1

    @contextlib.contextmanager
    def all_at_once(self) -> Iterator[Faults]:
        """Faults to add to in the block, which ends with all of them. Raises UserError then, unless
        faults are skipped.
        """
        found = Faults(
            "skip" if self.on_bad == "stop" else self.on_bad, self.messages, self.notes, self.kinds
        )
        yield found
        if self.on_bad == "stop" and found.messages:
            raise UserError(
                f"{found.messages[0]}; faults in all: {found.counted()}; mend them, or leave such "
                f"things out with "
                "--on_bad skip (clip: and cut boxes that reach out of their image)"
            )

    def counted(self) -> str:
        """The faults by kind, the most frequent first."""
        return ", ".join(f"{kind} {count}" for kind, count in self.kinds.most_common())

    def nothing_left(self, what: str) -> UserError:
        """The error of a source of which everything was left out; `what` begins the message."""
        first = f"; faults: {len(self.messages)}, the first one: {self.messages[0]}" if self.messages else ""
        return UserError(f"{what} that can be used{first}")

    def placed(self, corners: Corners, size: tuple[int, int], where: str) -> Corners | None:
        """The box cut to its image, or None if it is none; `where` begins the message."""
        x0, y0, x1, y1 = corners
        width, height = size
        said = f"{where}: box from ({x0:g}, {y0:g}) to ({x1:g}, {y1:g})"
        if not all(map(math.isfinite, corners)):
            return self.add(f"{said} is not finite", "wrong_bbox")
        if min(x1 - x0, y1 - y0) < _SHORTEST:
            return self.add(f"{said} has no width or no height", "degenerate_box")
        within = Corners(max(x0, 0), max(y0, 0), min(x1, width), min(y1, height))
        if min(within.x1 - within.x0, within.y1 - within.y0) < _SHORTEST:
            return self.add(f"{said} lies outside of the image of {width} x {height}", "box_outside")
        out = max(-x0, -y0, x1 - width, y1 - height)
        if out > _ROUNDING:
            if self.on_bad != "clip":
                reaches = (
                    f"reaches {out:g} pixels out of the image of {width} x {height} (--on_bad clip cuts it)"
                )
                return self.add(f"{said} {reaches}", "box_reaches_out")
            self.notes["boxes cut at the border of their image"] += 1
        return within

    def located(self, findings: Findings, where: str) -> dict[str, Path]:
        """The files that were found, by name; what was found by less than the exact name is noted,
        what is missing is added.
        """
        self.notes.update(findings.notes())
        for name, reason in findings.missing.items():
            self.add(f"{where} names the image {shown(name)}, and {reason}", "missing_image")
        return {name: found.path for name, found in findings.found.items()}

    def header(self, path: Path) -> Header | None:
        """Size and orientation of an image, or None if it can't be used."""
        try:
            return read_header(path, DataConfig.max_image_megapixels, "or take it out")
        except BadImageError as error:
            return self.add(f"{error.path} {error.reason}", "broken_image")


def as_stored(corners: Corners, header: Header) -> Corners:
    """A box of the image as viewers show it, turned by its EXIF orientation, in the image as
    stored, which training sees.
    """
    width, height = header.size
    (u0, v0), (u1, v1) = (
        _stored_point(header.orientation, *point, width, height) for point in (corners[:2], corners[2:])
    )
    return Corners(min(u0, u1), min(v0, v1), max(u0, u1), max(v0, v1))


def _stored_point(orientation: int, u: float, v: float, width: float, height: float) -> tuple[float, float]:
    """Exif 2.32, table of tag 274: where row 0 and column 0 of the stored image are seen."""
    if orientation >= 5:
        u, v = v, u
    # mirrored left to right: 2, 3, 7, 8; upside down: 3, 4, 6, 7
    return (width - u if orientation in (2, 3, 7, 8) else u), (
        height - v if orientation in (3, 4, 6, 7) else v
    )


# ---- folders


def key_of(path: PurePath) -> Key:
    """What an image and its labels have in common: images/train/7.jpg and labels/train/7.txt have
    ("train", "7").
    """
    return (*(name for name in path.parts[:-1] if name.lower() not in ROLES), path.stem)


def files_by_key(
    root: Path, suffixes: Container[str], faults: Faults, wanted: Container[Key] | None = None
) -> dict[Key, Path]:
    """The files below `root` with one of these endings, in order; of these keys only, if they are
    given.

    Two files of one key are left out, unless a link makes two of one.
    """
    found: dict[Key, list[Path]] = {}
    for path in files_below(root, suffixes):
        key = key_of(path.relative_to(root))
        if wanted is None or key in wanted:
            found.setdefault(key, []).append(path)
    for key, (first, *others) in list(found.items()):
        for other in others:
            if not first.samefile(other):
                found.pop(key, None)
                faults.add(
                    f"{other} and {first} can't be told apart: labels belong to images of the same name"
                )
    return {key: paths[0] for key, paths in found.items()}


def part_of(key: Key) -> str:
    """The part that a folder is named after; "": none is."""
    return next((PARTS[folder.lower()] for folder in key[:-1] if folder.lower() in PARTS), "")


def parts_by_folder(keys: Iterable[Key]) -> dict[str, list[Key]]:
    """Keys by the part that their folders name; all are "train" unless folders for both training
    and validation are there.
    """
    keys = list(keys)
    parts: dict[str, list[Key]] = {}
    for key in keys:
        parts.setdefault(part_of(key), []).append(key)
    if "train" in parts and ("val" in parts or "test" in parts) and "" not in parts:
        return {"train": parts["train"], "val": parts.get("val") or parts["test"]}
    return {"train": keys}


def names_in_part(files: Iterable[tuple[Key, Path]]) -> Iterator[tuple[str, Path]]:
    """(name, path): unique names below the folder of a part, without the part's own."""
    taken: set[str] = set()
    for key, path in files:
        folders = [name for name in key[:-1] if name.lower() not in PARTS]
        name = "/".join((*folders, path.name))
        number = 1
        while name.lower() in taken:
            number += 1
            name = "/".join((*folders, f"{path.stem}_{number}{path.suffix}"))
        taken.add(name.lower())
        yield name, path


def progress(files: Iterable[Any], part: str) -> Iterable[Any]:
    """With a bar on a terminal."""
    files = list(files)
    return tqdm(files, desc=part, unit="image", disable=None)


# ---- to COCO


def split_off(data: Labelled, fraction: float, seed: int) -> None:
    """Make a random part of the training images, the same for the same seed, the validation part.
    Raises UserError.
    """
    images = data.parts["train"]
    count = max(1, round(len(images) * fraction))
    if not 0 < count < len(images):
        raise UserError(
            f"{len(images)} images can't be parted by --val_fraction {fraction}; both parts need one at least"
        )
    chosen = set(random.Random(seed).sample(range(len(images)), count))
    data.parts = {
        "train": [image for i, image in enumerate(images) if i not in chosen],
        "val": [image for i, image in enumerate(images) if i in chosen],
    }


def to_coco(data: Labelled) -> dict[str, dict[str, Any]]:
    """COCO's instances format of every part; ids of categories, images and annotations count from
    1, through all parts.
    """
    ids = {name: number for number, name in enumerate(data.names, 1)}
    image_ids, object_ids = itertools.count(1), itertools.count(1)
    contents = {}
    for part, images in data.parts.items():
        content: dict[str, Any] = {"images": [], "annotations": []}
        for image in images:
            image_id = next(image_ids)
            width, height = image.size
            content["images"].append(
                {"id": image_id, "file_name": image.name, "width": width, "height": height}
            )
            for item in image.objects:
                content["annotations"].append(
                    {"id": next(object_ids), "image_id": image_id, **_annotation(item, ids)}
                )
        contents[part] = content | {
            "categories": [{"id": number, "name": name} for name, number in ids.items()]
        }
    return contents


def _annotation(item: Object, ids: dict[str, int]) -> dict[str, Any]:
    x0, y0, x1, y1 = item.corners
    box = [round(value, 4) for value in (x0, y0, x1 - x0, y1 - y0)]
    return {
        "category_id": ids[item.name],
        "bbox": box,
        "area": round(box[2] * box[3], 4),
        "iscrowd": int(item.crowd),
    }


def checked_name(name: str, path: Path, faults: Faults) -> bool:
    """Whether COCO's format can hold the name of a file; messages show it."""
    if not is_file_name(name):
        faults.add(f"{str(path)!r} has a name that annotations can't hold")
        return False
    return True
