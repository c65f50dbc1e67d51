"""COCO's instances format as labelling tools export it: what is sound is kept, and the rest is
counted and left out.

`mend` comes first, then the images' files are found, and `check_export` does the rest. What
training would refuse (coco_format.py) or leave out (preflight.py) is a fault here, unless nothing
is lost by mending it.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datasets.coco_format import format_problems, is_area, is_id
from datasets.convert.common import Corners, Faults, as_stored
from datasets.preflight.boxes import box_problem, box_problems, describe_box, sizes_of, wrong_areas
from util.errors import UserError
from util.images.files import Header

Content = dict[str, Any]

_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,18}")
# what annotations refer to: list -> (the field that does, what an entry is known by)
_REFERRED = {"images": ("image_id", "file_name"), "categories": ("category_id", "name")}


# ---- what can be mended without loss, and ids


def mend(contents: Mapping[Path, Content], faults: Faults) -> None:
    """Make ids whole numbers, and those of annotations unique; `contents` are those of the files.

    What an annotation may lack may be null too, and an area that can't be right is as none. A size
    that is missing becomes 0.

    Ids of annotations that are double, missing or no whole numbers are numbered anew, for nothing
    refers to them. Ids of images and of categories may be text or floats: 7.0 and "7" are the
    number 7, and others get numbers that are free, a category the same one in all files. Entries
    that have one id and are different images or categories are left out with their objects.
    """
    for path, content in contents.items():
        _fill_in(content, faults)
        _make_whole([content], "images", faults)
        _number_annotations(_entries(content, "annotations"), faults)
        _leave_out_ambiguous(content, "images", path, faults)
    _make_whole(list(contents.values()), "categories", faults)
    for path, content in contents.items():
        _leave_out_ambiguous(content, "categories", path, faults)


def leave_out(content: Content, section: str, entries: Sequence[dict[str, Any]], faults: Faults) -> None:
    """Take entries of `images` or `categories` out, and count the objects that go with them."""
    if not entries:
        return
    out, key = set(map(id, entries)), _REFERRED[section][0]
    ids = {entry["id"] for entry in entries if is_id(entry.get("id"))}
    content[section] = [entry for entry in content[section] if id(entry) not in out]
    kept = [entry for entry in content["annotations"] if not _refers(entry, key, ids)]
    faults.notes[_GONE_ALONG] += len(content["annotations"]) - len(kept)
    content["annotations"] = kept


_GONE_ALONG = "objects of images or categories that were left out"


def _entries(content: Content, section: str) -> list[dict[str, Any]]:
    return [entry for entry in content[section] if isinstance(entry, dict)]


def _refers(entry: Any, key: str, ids: set[int]) -> bool:
    return isinstance(entry, dict) and is_id(entry.get(key)) and entry[key] in ids


def _fill_in(content: Content, faults: Faults) -> None:
    for image in _entries(content, "images"):
        if any(image.get(side) in (None, 0) for side in ("width", "height")):
            image["width"] = image["height"] = 0
    for annotation in _entries(content, "annotations"):
        if annotation.get("iscrowd", 0) is None:
            del annotation["iscrowd"]
            faults.notes["annotations whose iscrowd was null, taken for 0"] += 1
        if "area" in annotation and not is_area(annotation["area"]):
            del annotation["area"]
            faults.notes[_AREAS] += 1


_AREAS = "areas that could not be right, replaced by their boxes'"


def _make_whole(contents: Sequence[Content], section: str, faults: Faults) -> None:
    entries = [entry for content in contents for entry in _entries(content, section)]
    numbers = _numbering(entry.get("id") for entry in entries)
    changed = sum(_change(entry, "id", numbers) for entry in entries)
    faults.notes[f"ids of {section} that were no whole numbers, changed to such"] += changed
    for content in contents:
        for annotation in _entries(content, "annotations"):
            _change(annotation, _REFERRED[section][0], numbers)


def _numbering(ids: Iterable[Any]) -> dict[str, int]:
    """Numbers that are free, for ids that are none."""
    known = dict.fromkeys(map(_known_as, ids))
    free = _free_numbers(set(known))
    return {name: next(free) for name in known if isinstance(name, str)}


def _free_numbers(taken: set[Any]) -> Iterator[int]:
    return (number for number in itertools.count(1) if number not in taken)


def _change(entry: dict[str, Any], key: str, numbers: Mapping[str, int]) -> bool:
    """Make an id a whole number, if it is none and can be one. Returns whether it was changed."""
    known = None if is_id(entry.get(key)) else _known_as(entry.get(key))
    number = numbers.get(known) if isinstance(known, str) else known
    if number is None:
        return False
    entry[key] = number
    return True


def _known_as(value: Any) -> int | str | None:
    """The whole number that an id is; the text of an id that is none; None for what is no id."""
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is str and _WHOLE.fullmatch(value):
        value = int(value)
    if type(value) is int:
        return value if is_id(value) else str(value)
    if type(value) is float:
        return repr(value) if math.isfinite(value) else None
    return value if type(value) is str and value else None


def _number_annotations(annotations: Sequence[dict[str, Any]], faults: Faults) -> None:
    free = _free_numbers({entry["id"] for entry in annotations if is_id(entry.get("id"))})
    seen: set[int] = set()
    for entry in annotations:
        if not is_id(entry.get("id")) or entry["id"] in seen:
            entry["id"] = next(free)
            faults.notes[
                "ids of annotations that were double, missing or no whole numbers, numbered anew"
            ] += 1
        seen.add(entry["id"])


def _leave_out_ambiguous(content: Content, section: str, path: Path, faults: Faults) -> None:
    by_id: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for entry in _entries(content, section):
        if is_id(entry.get("id")):
            by_id[entry["id"]].append(entry)
    key = _REFERRED[section][1]
    groups = [
        same for same in by_id.values() if any(entry.get(key) != same[0].get(key) for entry in same[1:])
    ]
    for same in groups:
        for _ in same:
            different = f"{len(same)} different {section} have the id {same[0]['id']}"
            faults.add(f"{path}: {different}; number them anew, and what refers to them", "ambiguous_id")
    leave_out(content, section, [entry for same in groups for entry in same], faults)


# ---- everything else


def check_export(content: Content, files: Mapping[str, Path], path: Path, faults: Faults) -> None:
    """Leave out of `content` what training could not use, and read sizes of 0; `files`: where its
    images are, by their names.

    Raises:
        UserError: there is nothing that could be used at all.
    """
    _check_format(content, path, faults)
    _merge_images(content, files, faults)
    _read_sizes(content, files, faults)
    _check_boxes(content, path, faults)


def _check_format(content: Content, path: Path, faults: Faults) -> None:
    """One fault for an entry, however much of it is wrong."""
    objects = len(content["annotations"])
    told: dict[int, Any] = {}  # with the entries, or their numbers could come again
    for fault in format_problems(content, path, sizes_known=False):
        if not fault.section:
            raise UserError(fault.message)
        if not isinstance(fault.entry, dict) or id(fault.entry) not in told:
            told[id(fault.entry)] = fault.entry
            faults.add(fault.message, fault.kind)
            objects -= fault.section == "annotations"
    faults.notes[_GONE_ALONG] += objects - len(content["annotations"])


def _merge_images(content: Content, files: Mapping[str, Path], faults: Faults) -> None:
    """An image that is listed twice would be in both parts, or half of its objects would be taken
    for background.
    """
    first: dict[Path, int] = {}
    ids = {
        image["id"]: first.setdefault(files[image["file_name"]], image["id"]) for image in content["images"]
    }
    once = [image for image in content["images"] if ids[image["id"]] == image["id"]]
    faults.notes["images listed again under another id, merged"] += len(ids) - len(once)
    content["images"] = once
    for annotation in content["annotations"]:
        annotation["image_id"] = ids[annotation["image_id"]]


def _read_sizes(content: Content, files: Mapping[str, Path], faults: Faults) -> None:
    unknown = [image for image in content["images"] if not image["width"]]
    headers = {image["id"]: faults.header(files[image["file_name"]]) for image in unknown}
    leave_out(content, "images", [image for image in unknown if headers[image["id"]] is None], faults)
    turned = {}
    for image in unknown:
        if header := headers[image["id"]]:
            image["width"], image["height"] = header.size
            faults.notes["images without width and height, read from the file"] += 1
            if header.orientation > 1:
                turned[image["id"]] = header
    _turn_boxes(content["annotations"], turned)
    faults.notes["images with an EXIF orientation: boxes turned to the pixels as stored"] += len(turned)


def _turn_boxes(annotations: Iterable[dict[str, Any]], turned: Mapping[int, Header]) -> None:
    """Labelling tools show images as their EXIF orientation says, and nothing else is known of
    these.
    """
    for annotation in annotations:
        if header := turned.get(annotation["image_id"]):
            x, y, width, height = annotation["bbox"]
            x0, y0, x1, y1 = as_stored(Corners(x, y, x + width, y + height), header)
            annotation["bbox"] = [x0, y0, x1 - x0, y1 - y0]
            annotation.pop("segmentation", None)


def _check_boxes(content: Content, path: Path, faults: Faults) -> None:
    """Areas and boxes by the check's own rules, which let rounding pass."""
    annotations = content["annotations"]
    xywh = np.array([annotation["bbox"] for annotation in annotations], dtype=np.float64).reshape(-1, 4)
    areas = np.array([annotation["area"] for annotation in annotations], dtype=np.float64)
    for i in wrong_areas(xywh, areas).nonzero()[0].tolist():
        annotations[i]["area"] = float(xywh[i, 2] * xywh[i, 3])
        faults.notes[_AREAS] += 1
    images = {image["id"]: image for image in content["images"]}
    owners = [images[annotation["image_id"]] for annotation in annotations]
    out: set[int] = set()
    for kind, flagged in box_problems(xywh, sizes_of(owners)).items():
        wrong = flagged.nonzero()[0].tolist()
        out.update(i for i in wrong if not _is_mended(annotations[i], owners[i], kind, path, faults))
    content["annotations"] = [annotation for i, annotation in enumerate(annotations) if i not in out]


def _is_mended(
    annotation: dict[str, Any], image: dict[str, Any], kind: str, path: Path, faults: Faults
) -> bool:
    if kind == "box_reaches_out" and faults.on_bad == "clip":
        _cut(annotation, image)
        faults.notes["boxes cut at the border of their image"] += 1
        return True
    what = box_problem(kind, image)
    faults.add(describe_box(path, annotation["id"], annotation["bbox"], image, what), kind)
    return False


def _cut(annotation: dict[str, Any], image: dict[str, Any]) -> None:
    x, y, width, height = annotation["bbox"]
    x0, y0 = max(x, 0), max(y, 0)
    x1, y1 = min(x + width, image["width"]), min(y + height, image["height"])
    annotation["bbox"] = [round(value, 4) for value in (x0, y0, x1 - x0, y1 - y0)]
    annotation["area"] = min(annotation["area"], round(annotation["bbox"][2] * annotation["bbox"][3], 4))
