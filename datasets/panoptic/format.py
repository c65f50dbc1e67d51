"""COCO's panoptic format (cocodataset.org/#format-data): read, checked and written.

The PNG of an image holds the ids of its segments as colours, R + 256 G + 256^2 B. The JSON file says for
each id what the segment is. Whether a category is a thing or stuff is its `isthing`, never its id.
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pycocotools.coco import COCO

from datasets.coco_format import (
    indexed,
    is_area,
    is_file_name,
    is_flag,
    is_id,
    is_text,
    parse_annotations,
    read_json,
    shown,
)
from util.config import DataConfig
from util.errors import UserError
from util.images.files import BadImageError, decode, read_image_file

Entry = dict[str, Any]

VOID = 0  # the id of pixels that belong to no segment
LARGEST_ID = 2**24 - 1  # three channels of 8 bits


class Panoptic(NamedTuple):
    """The segments of an image.

    ids: [H, W] int32, the id of every pixel's segment, or VOID. segments: a dictionary for each, with id,
    category_id, area (pixels), bbox (x, y, width, height) and iscrowd, as in COCO's `segments_info`.
    """

    ids: np.ndarray
    segments: list[Entry]


def describe(ids: np.ndarray, categories: Mapping[int, int], crowds: Collection[int] = ()) -> Panoptic:
    """A map [H, W] of ids with the area and the box of each segment, in the order of the ids.

    Args:
        categories: id -> category id, for every id of the map but VOID; it may have more.
        crowds: the ids of crowds.
    """
    # runs that end with their row
    height, width = ids.shape
    starts = np.union1d(run_starts(ids), width * np.arange(height))
    lengths = np.diff(starts, append=ids.size)
    present, segment = np.unique(ids.ravel()[starts], return_inverse=True)
    rows, columns = np.divmod(starts, width)

    # area and box of each segment
    areas = np.bincount(segment, lengths).astype(np.int64)
    first, last = np.tile([[height], [width]], len(present)), np.zeros((2, len(present)), np.int64)
    for side, low, high in ((0, rows, rows + 1), (1, columns, columns + lengths)):
        np.minimum.at(first[side], segment, low)
        np.maximum.at(last[side], segment, high)
    boxes = np.concatenate([first[::-1], (last - first)[::-1]]).T
    segments = [
        {
            "id": number,
            "category_id": categories[number],
            "area": area,
            "bbox": box,
            "iscrowd": int(number in crowds),
        }
        for number, area, box in zip(present.tolist(), areas.tolist(), boxes.tolist(), strict=True)
        if number != VOID
    ]
    return Panoptic(ids.astype(np.int32), segments)


def run_starts(*maps: np.ndarray) -> np.ndarray:
    """[r] int64: the pixels, counted row after row, where one of the maps [H, W] begins to differ.

    Segments have far fewer runs than pixels, so what follows takes little time.
    """
    changes = np.zeros(maps[0].size - 1, bool)
    for ids in maps:
        changes |= np.diff(ids.ravel()) != 0
    return np.append(0, changes.nonzero()[0] + 1)


# ---- writing


def write_map(path: Path, ids: np.ndarray) -> None:
    """Write a map [H, W] of ids from 0 to LARGEST_ID as PNG. Raises OSError."""
    # the first three bytes of little-endian numbers are R, G, B
    channels = ids.astype("<u4")[..., None].view(np.uint8)[..., :3]
    Image.fromarray(np.ascontiguousarray(channels)).save(path)


def write_image(folder: Path, image_id: int, panoptic: Panoptic) -> Entry:
    """Write the PNG of an image below `folder`; returns the image's annotation. Raises OSError."""
    file_name = f"{image_id:012d}.png"
    write_map(folder / file_name, panoptic.ids)
    return {"image_id": image_id, "file_name": file_name, "segments_info": panoptic.segments}


def write_annotations(
    path: Path, images: Sequence[Entry], categories: Sequence[Entry], annotations: Sequence[Entry]
) -> None:
    """Write the JSON file. Each category has an `isthing`. Raises OSError."""
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content, separators=(",", ":")))


# ---- reading


@dataclass(frozen=True)
class PanopticSet:
    """A panoptic data set: the content of its JSON file, and where its maps are.

    path: the JSON file. folder: the PNG files. images and annotations: by image id, one of each.
    """

    path: Path
    folder: Path
    categories: list[Entry]
    images: dict[int, Entry]
    annotations: dict[int, Entry]

    @property
    def things(self) -> set[int]:
        """The ids of the categories that are things; the others are stuff."""
        return {category["id"] for category in self.categories if category["isthing"]}

    def as_instances(self, *, only_things: bool = False) -> COCO:
        """The segments as COCO's annotations, without masks; `segment` is their id in the map."""
        categories = [one for one in self.categories if one["isthing"] or not only_things]
        known = {category["id"] for category in categories}
        annotations: list[Entry] = []
        for image_id, annotation in self.annotations.items():
            for segment in annotation["segments_info"]:
                if segment["category_id"] in known:
                    names = {"id": len(annotations) + 1, "image_id": image_id, "segment": segment["id"]}
                    annotations.append({**segment, **names})
        images = list(self.images.values())
        return indexed({"images": images, "annotations": annotations, "categories": categories})

    def read(self, image_id: int, megapixels: float = DataConfig.max_image_megapixels) -> Panoptic:
        """The segments of an image.

        Raises:
            UserError: the PNG is missing, is no RGB image or has another size than the image, or its
            ids are not those of the image's segments_info.
        """
        annotation, image = self.annotations[image_id], self.images[image_id]
        path = self.folder / annotation["file_name"]
        ids = read_map(path, megapixels)
        if ids.shape != (image["height"], image["width"]):
            height, width = ids.shape
            raise UserError(
                f"{path} is {width} x {height} pixels, but {self.path} says {image['width']} x "
                f"{image['height']} for image {image_id}; correct one of them"
            )
        self._check_ids(path, image_id, {*ids.ravel()[run_starts(ids)].tolist()} - {VOID})
        return Panoptic(ids, annotation["segments_info"])

    def _check_ids(self, path: Path, image_id: int, present: set[int]) -> None:
        listed = {segment["id"] for segment in self.annotations[image_id]["segments_info"]}
        for number in sorted(present - listed):
            raise UserError(
                f"{path} has pixels of segment {number}, which segments_info of image {image_id} in "
                f"{self.path} lacks; add it there, or make these pixels black (void)"
            )
        for number in sorted(listed - present):
            raise UserError(
                f"{self.path}: image {image_id} has segment {number}, of which {path} has no pixel; "
                f"take the segment out"
            )


def read_map(
    path: Path,
    megapixels: float = DataConfig.max_image_megapixels,
    otherwise: str = "or take its annotation out",
) -> np.ndarray:
    """The ids [H, W] int32 in a PNG file.

    Raises:
        BadImageError: the file can't be read, or is no RGB image of 8 bits. `otherwise` ends the remedy.
    """
    content = read_image_file(path, megapixels, otherwise)
    picture = decode(content, path, megapixels, otherwise)
    # other formats and channels would be converted, and give other ids without a word
    with Image.open(io.BytesIO(content)) as image:
        if (image.format, image.mode) != ("PNG", "RGB"):
            kind = f"{image.format} of mode {image.mode}"
            raise BadImageError(
                str(path), f"is a {kind}", "a panoptic map must be a PNG of mode RGB, 8 bits a channel"
            )
    red, green, blue = np.moveaxis(np.asarray(picture, dtype=np.int32), -1, 0)
    return red + 256 * green + 256**2 * blue


def read_panoptic(path: Path, folder: Path | None = None) -> PanopticSet:
    """The panoptic data set of a JSON file. Maps are read later, by `PanopticSet.read`.

    A missing `iscrowd` is filled in as 0.

    Args:
        folder: of the PNG files; by default the one with the JSON file's name, without .json.

    Raises:
        UserError: the file is missing, not JSON, or has a field that can't be right; the message names
        it.
    """
    return parse_panoptic(read_json(path, kind="panoptic", flags="--coco_panoptic_path"), path, folder)


def parse_panoptic(content: Any, path: Path, folder: Path | None = None) -> PanopticSet:
    """As `read_panoptic`, of the content of the file `path`."""
    if not isinstance(content, dict):
        raise UserError(f"{path} is not in COCO's panoptic format: it must be an object")
    for section in ("images", "categories", "annotations"):
        _check_section(content, section, path)
    known = {category["id"] for category in content["categories"]}
    for annotation in content["annotations"]:
        _check_segments(annotation, known, path)

    images = {image["id"]: image for image in content["images"]}
    annotations = {annotation["image_id"]: annotation for annotation in content["annotations"]}
    for number in sorted(images.keys() ^ annotations.keys()):
        lacks = "annotation" if number in images else "entry in images"
        raise UserError(f"{path}: image {number} has no {lacks}; add it, or take the image out")
    return PanopticSet(path, folder or path.with_suffix(""), content["categories"], images, annotations)


def is_panoptic(content: Any) -> bool:
    """Whether the content of a COCO file looks like one of panoptic annotations."""
    entries = content.get("annotations") if isinstance(content, dict) else None
    return isinstance(entries, list) and any(
        isinstance(entry, dict) and "segments_info" in entry for entry in entries
    )


def read_boxes(path: Path) -> COCO:
    """What boxes are compared with: the objects of an instances file, or the things of a panoptic one.

    Raises UserError as `read_annotations` and `read_panoptic` do.
    """
    content = read_json(path)
    if is_panoptic(content):
        return parse_panoptic(content, path).as_instances(only_things=True)
    return parse_annotations(content, path)


# ---- checks of the JSON file


def _is_side(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_box(value: Any) -> bool:
    return type(value) is list and len(value) == 4 and all(map(is_area, value))


def _is_segment_id(value: Any) -> bool:
    return type(value) is int and VOID < value <= LARGEST_ID


_ID = ("id", is_id, "a whole number, of 64 bits")
_NAME = ("file_name", is_file_name, "the path of a file below its folder")
_SIDE = "a whole number of pixels above 0"
# what must be in the entries of each list; the id comes first, because messages name an entry by it
_FIELDS = {
    "images": [_ID, _NAME, ("height", _is_side, _SIDE), ("width", _is_side, _SIDE)],
    "categories": [
        _ID,
        ("name", is_text, "a text"),
        ("isthing", is_flag, "1 for things, 0 for stuff"),
    ],
    "annotations": [
        ("image_id", is_id, "a whole number, an image's id"),
        _NAME,
        ("segments_info", lambda value: isinstance(value, list), "a list"),
    ],
    "segments_info": [
        ("id", _is_segment_id, f"a whole number from 1 to {LARGEST_ID}; 0 is void"),
        ("category_id", is_id, "a whole number, a category's id"),
        ("area", is_area, "a number of pixels"),
        ("bbox", _is_box, "four numbers x, y, width, height in pixels"),
        ("iscrowd", is_flag, "0 or 1"),
    ],
}


def _check_section(content: Entry, section: str, path: Path) -> None:
    if not isinstance(content.get(section), list):
        raise UserError(f"{path} is not in COCO's panoptic format: it has no list {section!r}")
    _check_entries(content[section], section, str(path))


def _check_segments(annotation: Entry, known: Collection[int], path: Path) -> None:
    place = f"{path}: image {annotation['image_id']}"
    segments = annotation["segments_info"]
    for segment in segments:
        if isinstance(segment, dict):
            segment.setdefault("iscrowd", 0)
    _check_entries(segments, "segments_info", place)
    for segment in segments:
        if segment["category_id"] not in known:
            raise UserError(
                f"{place}: segment {segment['id']} has category_id {segment['category_id']}, which is not "
                f"among the categories; add the category"
            )


def _check_entries(entries: Sequence[Any], section: str, place: str) -> None:
    """Raise UserError for the first entry with a wrong field, or with the id of an earlier one."""
    fields, seen = _FIELDS[section], set()
    for i, entry in enumerate(entries):
        for key, fits, wanted in fields:
            value = entry.get(key) if isinstance(entry, dict) else None
            if not fits(value):
                raise UserError(f"{place}: {section}[{i}] has {key} {shown(value)}; it must be {wanted}")
        key = fields[0][0]
        if entry[key] in seen:
            raise UserError(f"{place}: two {section} have the {key} {entry[key]}; it must be unique")
        seen.add(entry[key])
