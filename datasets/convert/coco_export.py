"""COCO's instances format as labelling tools export it: what is sound is kept, and the rest is
counted and left out.

`mend` comes first, then the images' files are found, and `check_export` does the rest. What
training would refuse (coco_format.py) or leave out (preflight) is a problem here, unless nothing
is lost by mending it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datasets.coco_format import format_problems, is_area, is_id
from datasets.convert.masks import mend_outlines, outline_as_stored
from datasets.convert.problems import BOXES_CUT, BOXES_TURNED, Corners, Problems, as_stored, coco_box
from datasets.preflight.boxes import box_problem, box_problems, describe_box, sizes_of, wrong_areas
from util.errors import UserError

Entry = dict[str, Any]  # of a list; or the whole content of a file

LISTS = ("images", "annotations", "categories")
_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,18}")
# list -> the annotations' field that refers to it, and the field that tells its entries apart
_REFERENCE = {"images": "image_id", "categories": "category_id"}
_NAME = {"images": "file_name", "categories": "name"}
# what the user reads of things that were mended
_OBJECTS_GONE = "objects of images or categories that were left out"
_AREAS = "areas that could not be right, replaced by their boxes'"
_NO_CROWD = "annotations whose iscrowd was null, taken for 0"
_ANNOTATION_IDS = "ids of annotations that were double, missing or no whole numbers, renumbered"


# ---- what can be mended without loss, and ids


def mend(contents: Mapping[Path, Entry], problems: Problems) -> None:
    """Make ids whole numbers, and those of annotations unique; `contents` are those of the files.

    Null stands for a value that may be missing, and an area that can't be right is deleted. A size
    that is missing becomes 0.

    Ids of annotations that are double, missing or no whole numbers are renumbered, because
    nothing refers to them. Ids of images and of categories may be text or floats: 7.0 and "7" are
    the number 7, and others get numbers that are free, a category the same one in all files.
    Different entries with one id are left out with their objects.
    """
    # ids of images and annotations are those of one file
    for path, content in contents.items():
        _fill_in(content, problems)
        _make_whole([content], "images", problems)
        _number_annotations(entries_of(content, "annotations"), problems)
        _leave_out_ambiguous(content, "images", path, problems)
    # a category has one id in all files
    _make_whole(list(contents.values()), "categories", problems)
    for path, content in contents.items():
        _leave_out_ambiguous(content, "categories", path, problems)


def entries_of(content: Entry, section: str) -> list[Entry]:
    """The entries of a list that are objects."""
    return [entry for entry in content[section] if isinstance(entry, dict)]


def leave_out(content: Entry, section: str, entries: Sequence[Entry], problems: Problems) -> None:
    """Take entries of `images` or `categories` out, and count the objects that go with them."""
    if not entries:
        return
    # by identity: entries may be equal
    out = {id(entry) for entry in entries}
    content[section] = [entry for entry in content[section] if id(entry) not in out]

    # their objects
    ids = {_id_in(entry) for entry in entries} - {None}
    key, annotations = _REFERENCE[section], content["annotations"]
    content["annotations"] = [item for item in annotations if _id_in(item, key) not in ids]
    problems.notes[_OBJECTS_GONE] += len(annotations) - len(content["annotations"])


def _id_in(entry: Any, key: str = "id") -> int | None:
    if not isinstance(entry, dict) or not is_id(entry.get(key)):
        return None
    return int(entry[key])


def _fill_in(content: Entry, problems: Problems) -> None:
    for image in entries_of(content, "images"):
        # null and 0 both mean unknown
        if image.get("width") in (None, 0) or image.get("height") in (None, 0):
            image["width"] = image["height"] = 0
    for annotation in entries_of(content, "annotations"):
        if annotation.get("iscrowd", 0) is None:
            del annotation["iscrowd"]
            problems.notes[_NO_CROWD] += 1
        if "area" in annotation and not is_area(annotation["area"]):
            del annotation["area"]
            problems.notes[_AREAS] += 1


def _make_whole(contents: Sequence[Entry], section: str, problems: Problems) -> None:
    """Make the ids of a list whole numbers, in the list and where annotations refer to it."""
    # ids that are text get numbers that are free
    entries = [entry for content in contents for entry in entries_of(content, section)]
    known = dict.fromkeys(_known_as(entry.get("id")) for entry in entries)
    free = _free_numbers(known)
    numbers = {name: next(free) for name in known if isinstance(name, str)}

    changed = sum(_change(entry, "id", numbers) for entry in entries)
    problems.notes[f"ids of {section} that were no whole numbers, changed to such"] += changed
    for content in contents:
        for annotation in entries_of(content, "annotations"):
            _change(annotation, _REFERENCE[section], numbers)


def _free_numbers(taken: Container[Any]) -> Iterator[int]:
    return (number for number in itertools.count(1) if number not in taken)


def _change(entry: Entry, key: str, numbers: Mapping[str, int]) -> bool:
    """Make an id a whole number, if it can be one. Returns whether it was changed."""
    value = entry.get(key)
    known = _known_as(value)
    number = numbers.get(known) if isinstance(known, str) else known
    if is_id(value) or number is None:
        return False
    entry[key] = number
    return True


def _known_as(value: Any) -> int | str | None:
    """The whole number that an id stands for; else its text; None for what is no id."""
    # 7.0 and "7" stand for 7
    is_whole = isinstance(value, float) and value.is_integer()
    if is_whole or isinstance(value, str) and _WHOLE.fullmatch(value):
        value = int(value)
    if is_id(value):
        return int(value)

    # what JSON can hold besides: true, null, NaN, lists
    if type(value) not in (int, float, str) or str(value) in ("", "nan", "inf", "-inf"):
        return None
    return str(value)


def _number_annotations(annotations: Sequence[Entry], problems: Problems) -> None:
    free = _free_numbers({_id_in(entry) for entry in annotations})
    seen: set[int | None] = {None}
    for entry in annotations:
        if _id_in(entry) in seen:
            entry["id"] = next(free)
            problems.notes[_ANNOTATION_IDS] += 1
        seen.add(entry["id"])


def _leave_out_ambiguous(content: Entry, section: str, path: Path, problems: Problems) -> None:
    """Different entries with one id: which one an object means is unknown."""
    # the same entry again is no doubt: coco_format.py drops it
    by_id: dict[int | None, list[Entry]] = {}
    for entry in entries_of(content, section):
        by_id.setdefault(_id_in(entry), []).append(entry)
    by_id.pop(None, None)
    ambiguous = []
    for number, same in by_id.items():
        names = [entry.get(_NAME[section]) for entry in same]
        if any(name != names[0] for name in names):
            ambiguous += same
            different = f"{len(same)} different {section} have the id {number}"
            message = f"{path}: {different}; renumber them, and what refers to them"
            for _ in same:  # each entry is lost
                problems.add(message, "ambiguous_id")
    leave_out(content, section, ambiguous, problems)


# ---- everything else


def check_export(
    content: Entry, files: Mapping[str, Path], path: Path, problems: Problems, crowds: str = "keep"
) -> None:
    """Leave out of `content` what training could not use, and read sizes of 0.

    Args:
        files: where its images are, by their names.
        crowds: "keep" objects with iscrowd 1 as they are, or make them ordinary "objects".

    Raises:
        UserError: there is nothing that could be used at all.
    """
    _check_format(content, path, problems)
    _count_crowds(content, crowds, problems)
    mend_outlines(content["annotations"], problems)
    _merge_images(content, files, problems)
    _read_sizes(content, files, problems)
    _check_boxes(content, path, problems)


def _check_format(content: Entry, path: Path, problems: Problems) -> None:
    """One problem for an entry, whatever is wrong with it."""
    count = len(content["annotations"])
    seen: dict[int, Any] = {}  # with the entries: memory that is freed could get the same identity again
    for fault in format_problems(content, path, sizes_known=False):
        if not fault.section:
            raise UserError(fault.message)
        if isinstance(fault.entry, dict):
            if id(fault.entry) in seen:
                continue
            seen[id(fault.entry)] = fault.entry
        problems.add(fault.message, fault.kind)
        count -= fault.section == "annotations"
    problems.notes[_OBJECTS_GONE] += count - len(content["annotations"])


def _count_crowds(content: Entry, crowds: str, problems: Problems) -> None:
    regions = [annotation for annotation in content["annotations"] if annotation["iscrowd"]]
    problems.notes[f"crowd regions, iscrowd 1 ({crowds})"] += len(regions)
    if crowds == "objects":
        for annotation in regions:
            annotation["iscrowd"] = 0


def _merge_images(content: Entry, files: Mapping[str, Path], problems: Problems) -> None:
    """An image that is listed twice could be in both splits, or half of its objects would be
    taken for background.
    """
    # file -> first id; id -> first id of its file
    first: dict[Path, int] = {}
    merged: dict[int, int] = {}
    for image in content["images"]:
        merged[image["id"]] = first.setdefault(files[image["file_name"]], image["id"])
    content["images"] = [image for image in content["images"] if merged[image["id"]] == image["id"]]
    for annotation in content["annotations"]:
        annotation["image_id"] = merged[annotation["image_id"]]
    problems.notes["images listed again under another id, merged"] += len(merged) - len(first)


def _read_sizes(content: Entry, files: Mapping[str, Path], problems: Problems) -> None:
    """Sizes of 0 from the files. Boxes are then taken for those of the image as shown: labelling
    tools show it as its EXIF orientation says, and without a size there is no other hint.
    """
    broken = []
    turned = {}
    for image in content["images"]:
        if image["width"]:
            continue
        header = problems.header(files[image["file_name"]])
        if header is None:
            broken.append(image)
            continue
        image["width"], image["height"] = header.size
        problems.notes["images without width and height, read from the file"] += 1
        if header.orientation > 1:
            turned[image["id"]] = header
    leave_out(content, "images", broken, problems)
    problems.notes[BOXES_TURNED] += len(turned)

    for annotation in content["annotations"]:
        if header := turned.get(annotation["image_id"]):
            x, y, width, height = annotation["bbox"]
            x0, y0, x1, y1 = as_stored(Corners(x, y, x + width, y + height), header)
            annotation["bbox"] = [x0, y0, x1 - x0, y1 - y0]
            # run lengths, which no tool writes without a size, are left out
            parts = annotation.pop("segmentation", None)
            if isinstance(parts, list):
                outlines = (outline_as_stored(part, header) for part in parts)
                annotation["segmentation"] = [*itertools.chain.from_iterable(outlines)]


def _check_boxes(content: Entry, path: Path, problems: Problems) -> None:
    """Areas and boxes by the rules of datasets/preflight, which accept rounding."""
    # areas
    images = {image["id"]: image for image in content["images"]}
    annotations = content["annotations"]
    owners = [images[annotation["image_id"]] for annotation in annotations]
    xywh = np.array([annotation["bbox"] for annotation in annotations], dtype=np.float64).reshape(-1, 4)
    area = np.array([annotation["area"] for annotation in annotations], dtype=np.float64)
    for i in wrong_areas(xywh, area).nonzero()[0]:
        annotations[i]["area"] = float(xywh[i, 2] * xywh[i, 3])
        problems.notes[_AREAS] += 1

    # boxes
    out = set()
    for kind, flagged in box_problems(xywh, sizes_of(owners)).items():
        for i in flagged.nonzero()[0].tolist():
            annotation, image = annotations[i], owners[i]
            if kind == "box_reaches_out" and problems.on_bad == "clip":
                _cut(annotation, image)
                problems.notes[BOXES_CUT] += 1
                continue
            what = box_problem(kind, image)
            problems.add(describe_box(path, annotation["id"], annotation["bbox"], image, what), kind)
            out.add(i)
    content["annotations"] = [annotation for i, annotation in enumerate(annotations) if i not in out]


def _cut(annotation: Entry, image: Entry) -> None:
    x, y, width, height = annotation["bbox"]
    right, bottom = min(x + width, image["width"]), min(y + height, image["height"])
    cut = coco_box(Corners(max(x, 0), max(y, 0), right, bottom))
    annotation["bbox"] = cut["bbox"]
    annotation["area"] = min(annotation["area"], cut["area"])
