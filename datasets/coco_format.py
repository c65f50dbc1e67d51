"""COCO's instances format: read, and every field checked that training or evaluation uses."""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import json
import re
import reprlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pycocotools.coco import COCO

from datasets.file_index import portable
from util.errors import UserError
from util.images.files import read_regular_file

# pixels; float32 holds the corners of such boxes well enough, and pycocotools the areas
_FARTHEST = 1e9
# pycocotools leaves objects above this out of the figures
_LARGEST_AREA = 1e10
# characters; messages show them
_LONGEST_NAME = 1000
# absolute, with a drive, upwards; then what no name has and no log line can show: control
# characters, lone surrogates
_UNSAFE_NAME = re.compile(
    r"^$ | ^[/\\] | ^[A-Za-z]: | (^|[/\\])\.\.([/\\]|$) | "
    r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]",
    re.VERBOSE,
)


def read_annotations(path: Path) -> COCO:
    """A COCO index of an instances file.

    An annotation without `iscrowd` is no crowd, and one without `area` has its box's: many programs
    leave them out, and pycocotools can't do without.

    Raises:
        UserError: the file is missing, not JSON, or has a field that can't be right; the message
        names it.
    """
    content = read_json(path)
    check_instances(content, path)
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        coco.createIndex()
    return coco


def read_images_and_categories(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Those of an instances file, whether or not it has annotations (COCO's
    image_info_test-dev2017.json has none) or sizes.

    Names of images may be those of files on another machine (datasets.file_index.portable).

    Raises:
        UserError: as `read_annotations`.
    """
    content = read_json(path, without=("annotations",))
    if isinstance(content, dict):
        content["annotations"] = []
    check_instances(content, path, sizes_known=False, names_are_here=False)
    return content["images"], content["categories"]


def read_json(path: Path, without: Collection[str] = ()) -> Any:
    """The content of an annotation file; of its objects not the keys `without`, which then never
    fill the memory.

    Raises:
        UserError: the file is missing or not JSON.
    """
    try:
        with _no_garbage_collection():
            return json.loads(
                read_regular_file(path), object_pairs_hook=functools.partial(_unique_keys, without=without)
            )
    except OSError as error:
        raise UserError(
            f"{path} can't be read ({error.strerror}); it must be a COCO instances file: check "
            f"--coco_path, or "
            "--train_annotations and --val_annotations"
        ) from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply; it must be a COCO instances file") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); it must be a COCO instances file") from None


class Fault(NamedTuple):
    """Something in an instances file that can't be right.

    kind: a name in lower case for those who count. section: images, annotations or categories; ""
    for the file. entry: what has it, as it stands in the file. message: one line that names file,
    entry and field.
    """

    kind: str
    section: str
    entry: Any
    message: str


def check_instances(
    content: Any, path: Path, *, sizes_known: bool = True, names_are_here: bool = True
) -> None:
    """Fill in what annotations may lack. Raises UserError for what is not COCO's instances format;
    `path` is the file's.
    """
    for fault in format_faults(content, path, sizes_known=sizes_known, names_are_here=names_are_here):
        raise UserError(fault.message)


def format_faults(
    content: Any, path: Path, *, sizes_known: bool = True, names_are_here: bool = True
) -> Iterator[Fault]:
    """Every fault of an instances file; what annotations may lack is filled in on the way.

    When all have been taken, what is left in the three lists is sound: entries with a fault are out
    of them. Without `sizes_known` images may have a width and height of 0, or none; without
    `names_are_here` names of files on another machine.
    """
    if not isinstance(content, dict):
        message = f"{path} is not in COCO's instances format: it must be an object with {', '.join(_FIELDS)}"
        yield Fault("not_instances_format", "", content, message)
        return
    incomplete = False
    known: dict[str, set[int]] = {}
    for name, fields in _FIELDS.items():
        entries = content.get(name)
        if not isinstance(entries, list):
            yield Fault(
                "not_instances_format",
                "",
                None,
                f"{path} is not in COCO's instances format: it has no list {name!r}",
            )
            entries, incomplete = [], True
        broken: set[int] = set()
        for field in fields:
            if field.fits is _is_side and not sizes_known:
                field = field._replace(fits=_is_side_or_0, default=lambda image: 0)
            if field.fits is is_file_name and not names_are_here:
                field = field._replace(fits=_is_portable)
            yield from _field_faults(entries, name, field, broken, path)
        yield from _id_faults(entries, name, broken, path)
        known[name] = {entry["id"] for entry in entries if _has_id(entry)}
        content[name] = _without(entries, broken)
    if not incomplete and not known["categories"]:
        yield Fault(
            "no_categories", "", None, f"{path} has no categories: there is nothing to detect; add them"
        )
        incomplete = True
    if incomplete:
        content["annotations"] = []  # nobody can say what they refer to
        return
    yield from _reference_faults(content, known, path)


def shown(value: Any) -> str:
    """Any value in one short line."""
    return _repr.repr(value)


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 60


class _Field(NamedTuple):
    key: str
    fits: Callable[[Any], bool]
    wanted: str
    default: Callable[[dict[str, Any]], Any] | None = (
        None  # for an entry that lacks it; None: it must be there
    )
    # of the fault of a value that does not fit; None: wrong_<key>
    kind: Callable[[Any], str] | None = None


def _field_faults(
    entries: list[Any], name: str, field: _Field, broken: set[int], path: Path
) -> Iterator[Fault]:
    """What is wrong with a field of all entries of a list. Indices of entries with a fault are
    added to `broken`.
    """
    key, fits, wanted, default, kind = field
    for i, entry in enumerate(entries):
        try:
            value = entry[key]
        except (KeyError, TypeError, IndexError):
            if i in broken and (default is not None or not isinstance(entry, dict)):
                continue  # it can't be filled in, or is no entry at all, which has been said
            if default is None or not isinstance(entry, dict):
                broken.add(i)
                message = f"{path} is not in COCO's instances format: {name}[{i}] lacks {key!r}"
                yield Fault("missing_field", name, entry, message)
                continue
            value = entry[key] = default(entry)
        if not fits(value):
            # the id is checked first
            what = f"{name}[{i}]" if key == "id" or not _has_id(entry) else f"{_SINGULAR[name]} {entry['id']}"
            broken.add(i)
            message = f"{path}: {what} has {key} {shown(value)}; it must be {wanted}"
            yield Fault(kind(value) if kind else f"wrong_{key}", name, entry, message)


def _id_faults(entries: list[dict[str, Any]], name: str, broken: set[int], path: Path) -> Iterator[Fault]:
    seen: set[int] = set()
    for i, entry in enumerate(entries):
        if i in broken and not _has_id(entry):
            continue
        if entry["id"] in seen:
            broken.add(i)
            message = f"{path}: two {name} have the id {entry['id']}; ids must be unique, number them anew"
            yield Fault(f"duplicate_{_SINGULAR[name]}_id", name, entry, message)
        seen.add(entry["id"])


def _reference_faults(content: dict[str, Any], known: dict[str, set[int]], path: Path) -> Iterator[Fault]:
    """Annotations of images and categories that are not there; `known` holds the ids of broken
    entries, too.
    """
    sound = {name: {entry["id"] for entry in content[name]} for name in ("images", "categories")}
    kept = []
    for annotation in content["annotations"]:
        number, image, category = annotation["id"], annotation["image_id"], annotation["category_id"]
        if image in sound["images"] and category in sound["categories"]:
            kept.append(annotation)
        if image not in known["images"]:
            message = (
                f"{path}: annotation {number} has image_id {image}, which is no "
                "image's id; take it out "
                "or add the image"
            )
            yield Fault("unknown_image", "annotations", annotation, message)
        if category not in known["categories"]:
            message = (
                f"{path}: annotation {number} has category_id {category}, which its "
                "categories lack; add "
                "the category"
            )
            yield Fault("unknown_category", "annotations", annotation, message)
    content["annotations"] = kept


def _without(entries: list[Any], broken: set[int]) -> list[Any]:
    return [entry for i, entry in enumerate(entries) if i not in broken] if broken else entries


def _unique_keys(pairs: list[tuple[str, Any]], without: Collection[str]) -> dict[str, Any]:
    entry = dict(pairs)
    if len(entry) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(
            f"an object has the key {shown(next(key for key in keys if keys.count(key) > 1))} twice"
        )
    for key in without:
        entry.pop(key, None)
    return entry


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """For code that makes millions of objects and no cycles: the collector would look through all
    of them again and again.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def is_id(value: Any) -> bool:
    """Whether it may be an id: a whole number of 64 bits."""
    return type(value) is int and -(2**63) <= value < 2**63  # a bool is an int to isinstance


def _has_id(entry: Any) -> bool:
    return isinstance(entry, dict) and is_id(entry.get("id"))


def _is_side(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= _FARTHEST and value == int(value)


def _is_side_or_0(value: Any) -> bool:
    return _is_side(value) or type(value) in (int, float) and value == 0


def _is_portable(value: Any) -> bool:
    return isinstance(value, str) and is_file_name(portable(value))


def is_file_name(value: Any) -> bool:
    """Whether an image may be called so: the path of a file below the image folder."""
    return isinstance(value, str) and len(value) <= _LONGEST_NAME and not _UNSAFE_NAME.search(value)


def _is_number(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high  # not a number is not in between


def _is_box(value: Any) -> bool:
    if type(value) is not list or len(value) != 4:
        return False
    x, y, width, height = value
    return (
        _is_number(x, -_FARTHEST, _FARTHEST)
        and _is_number(y, -_FARTHEST, _FARTHEST)
        and _is_number(width, 0, _FARTHEST)
        and _is_number(height, 0, _FARTHEST)
    )


def _box_fault(value: Any) -> str:
    """What a box that is none has wrong: its sides alone, or more."""
    try:
        sides_alone = len(value) == 4 and _is_box([*value[:2], abs(value[2]), abs(value[3])])
    except (TypeError, ValueError):
        sides_alone = False
    return "degenerate_box" if sides_alone else "wrong_bbox"


def is_area(value: Any) -> bool:
    """Whether it may be an area, in pixels."""
    return _is_number(value, 0, _LARGEST_AREA)


def _is_flag(value: Any) -> bool:
    return type(value) in (int, bool) and value in (0, 1)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _box_area(annotation: dict[str, Any]) -> float:
    return min(annotation["bbox"][2] * annotation["bbox"][3], _LARGEST_AREA)


_ID = _Field("id", is_id, "a whole number, of 64 bits")
# every entry has an id that fits when its other fields are checked, and a box before its area is
# filled in
_FIELDS = {
    "images": (
        _ID,
        _Field(
            "file_name",
            is_file_name,
            "the path of a file below the image folder, of at most "
            f"{_LONGEST_NAME} characters (tools/convert_dataset.py finds files of other names)",
        ),
        _Field("height", _is_side, "a whole number of pixels above 0"),
        _Field("width", _is_side, "a whole number of pixels above 0"),
    ),
    "annotations": (
        _ID,
        _Field("image_id", is_id, "a whole number, an image's id"),
        _Field("category_id", is_id, "a whole number, a category's id"),
        _Field(
            "bbox",
            _is_box,
            "four finite numbers x, y, width, height in pixels, width and height not negative",
            None,
            _box_fault,
        ),
        _Field("area", is_area, "a finite number of pixels, not negative", _box_area),
        _Field("iscrowd", _is_flag, "0 or 1", lambda annotation: 0),
    ),
    "categories": (_ID, _Field("name", _is_text, "a text")),
}
_SINGULAR = {"images": "image", "annotations": "annotation", "categories": "category"}
