"""COCO's instances format: read, and every field checked that training or evaluation uses."""

from __future__ import annotations

import contextlib
import io
import json
import re
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pycocotools.coco import COCO

from util.errors import UserError
from util.images import read_regular_file

# pixels; float32 holds the corners of such boxes well enough, and pycocotools the areas
_FARTHEST = 1e9
# pycocotools leaves objects above this out of the figures
_LARGEST_AREA = 1e10
# characters; messages show them
_LONGEST_NAME = 1000
# absolute, with a drive, upwards; then what no name has and no log line can show: control characters, lone surrogates
_UNSAFE_NAME = re.compile(
    r"^$ | ^[/\\] | ^[A-Za-z]: | (^|[/\\])\.\.([/\\]|$) | [\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", re.VERBOSE
)


def read_annotations(path: Path) -> COCO:
    """A COCO index of an instances file.

    An annotation without `iscrowd` is no crowd, and one without `area` has its box's: many programs leave them out, and
    pycocotools can't do without.

    Raises:
        UserError: the file is missing, not JSON, or has a field that can't be right; the message names it.
    """
    try:
        content = json.loads(read_regular_file(path), object_pairs_hook=_unique_keys)
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}); it must be a COCO instances file: check --coco_path, or "
                        "--train_annotations and --val_annotations") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply; it must be a COCO instances file") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); it must be a COCO instances file") from None
    check_instances(content, path)
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        coco.createIndex()
    return coco


def check_instances(content: Any, path: Path) -> None:
    """Fill in what annotations may lack. Raises UserError for what is not COCO's instances format; `path` is the file's."""
    if not isinstance(content, dict):
        raise UserError(f"{path} is not in COCO's instances format: it must be an object with {', '.join(_FIELDS)}")
    for name, fields in _FIELDS.items():
        entries = content.get(name)
        if not isinstance(entries, list):
            raise UserError(f"{path} is not in COCO's instances format: it has no list {name!r}")
        for field in fields:
            _check_field(entries, name, field, path)
        _check_unique(entries, name, path)
    known = {image["id"] for image in content["images"]}
    for annotation in content["annotations"]:
        if annotation["image_id"] not in known:
            raise UserError(
                f"{path}: annotation {annotation['id']} has image_id {annotation['image_id']}, which is no image's id; "
                "take it out or add the image"
            )


def shown(value: Any) -> str:
    """Any value in one short line."""
    return _repr.repr(value)


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 60


class _Field(NamedTuple):
    key: str
    fits: Callable[[Any], bool]
    wanted: str
    default: Callable[[dict[str, Any]], Any] | None = None  # for an entry that lacks it; None: it must be there


def _check_field(entries: list[Any], name: str, field: _Field, path: Path) -> None:
    key, fits, wanted, default = field
    for i, entry in enumerate(entries):
        try:
            value = entry[key]
        except (KeyError, TypeError, IndexError):
            if default is None or not isinstance(entry, dict):
                raise UserError(f"{path} is not in COCO's instances format: {name}[{i}] lacks {key!r}") from None
            value = entry[key] = default(entry)
        if not fits(value):
            what = f"{name}[{i}]" if key == "id" else f"{_SINGULAR[name]} {entry['id']}"
            raise UserError(f"{path}: {what} has {key} {shown(value)}; it must be {wanted}")


def _check_unique(entries: list[dict[str, Any]], name: str, path: Path) -> None:
    seen: set[int] = set()
    for entry in entries:
        if entry["id"] in seen:
            raise UserError(f"{path}: two {name} have the id {entry['id']}; ids must be unique, number them anew")
        seen.add(entry["id"])


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entry = dict(pairs)
    if len(entry) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"an object has the key {shown(next(key for key in keys if keys.count(key) > 1))} twice")
    return entry


def _is_id(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63  # a bool is an int to isinstance


def _is_side(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= _FARTHEST and value == int(value)


def _is_inside(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST_NAME and not _UNSAFE_NAME.search(value)


def _is_number(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high  # not a number is not in between


def _is_box(value: Any) -> bool:
    if type(value) is not list or len(value) != 4:
        return False
    x, y, width, height = value
    return (
        _is_number(x, -_FARTHEST, _FARTHEST) and _is_number(y, -_FARTHEST, _FARTHEST)
        and _is_number(width, 0, _FARTHEST) and _is_number(height, 0, _FARTHEST)
    )  # fmt: skip


def _is_area(value: Any) -> bool:
    return _is_number(value, 0, _LARGEST_AREA)


def _is_flag(value: Any) -> bool:
    return type(value) in (int, bool) and value in (0, 1)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _box_area(annotation: dict[str, Any]) -> float:
    return min(annotation["bbox"][2] * annotation["bbox"][3], _LARGEST_AREA)


_ID = _Field("id", _is_id, "a whole number, of 64 bits")
# every entry has an id that fits when its other fields are checked, and a box before its area is filled in
_FIELDS = {
    "images": (
        _ID,
        _Field("file_name", _is_inside, f"the path of a file below the image folder, of at most {_LONGEST_NAME} characters"),
        _Field("height", _is_side, "a whole number of pixels above 0"),
        _Field("width", _is_side, "a whole number of pixels above 0"),
    ),
    "annotations": (
        _ID,
        _Field("image_id", _is_id, "a whole number, an image's id"),
        _Field("category_id", _is_id, "a whole number, a category's id"),
        _Field("bbox", _is_box, "four finite numbers x, y, width, height in pixels, width and height not negative"),
        _Field("area", _is_area, "a finite number of pixels, not negative", _box_area),
        _Field("iscrowd", _is_flag, "0 or 1", lambda annotation: 0),
    ),
    "categories": (_ID, _Field("name", _is_text, "a text")),
}
_SINGULAR = {"images": "image", "annotations": "annotation", "categories": "category"}
