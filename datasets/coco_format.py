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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pycocotools.coco import COCO

from datasets.file_names import portable
from util.errors import UserError
from util.images.files import read_regular_file

# pixels; float32 holds the corners of such boxes well enough, and pycocotools the areas
_FARTHEST = 1e9
# pycocotools leaves larger objects out of the metrics
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


@dataclass
class Problem:
    """Something wrong with a data set, in one line.

    kind: its code in reports, in lower case. message: names the file, the entry, the field and the
    remedy. section: "images", "annotations" or "categories"; "" for a whole file. entry: what is
    wrong, as it is in that list. is_warning: it is legitimate, but rarely intended. split, file:
    where it is, set by the check of a whole data set (datasets/preflight).
    """

    kind: str
    message: str
    section: str = ""
    entry: Any = None
    is_warning: bool = False
    split: str = ""
    file: str = ""


# ---- reading


def read_annotations(path: Path) -> COCO:
    """A COCO index of an instances file.

    A missing `iscrowd` is filled in as 0 and a missing `area` as the box's: many programs omit them,
    and pycocotools needs them.

    Raises:
        UserError: the file is missing, not JSON, or has a field that can't be right; the message
        names it.
    """
    content = read_json(path)
    _check(content, path)
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        coco.createIndex()
    return coco


def read_images_and_categories(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The images and categories of an instances file, with or without annotations and sizes.

    COCO's image_info_test-dev2017.json has no annotations. Names of images may be those of files on
    another machine (datasets.file_index.portable).

    Raises:
        UserError: as `read_annotations`.
    """
    content = read_json(path, without=("annotations",))
    if isinstance(content, dict):
        content["annotations"] = []
    _check(content, path, sizes_known=False, names_are_here=False)
    return content["images"], content["categories"]


def read_json(path: Path, without: Collection[str] = ()) -> Any:
    """The content of an annotation file. `without`: keys to drop from its objects, to save memory.

    Raises:
        UserError: the file is missing or not JSON.
    """
    unique = functools.partial(_unique_keys, without=without)
    try:
        with _no_garbage_collection():
            return json.loads(read_regular_file(path), object_pairs_hook=unique)
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


def _unique_keys(pairs: list[tuple[str, Any]], without: Collection[str]) -> dict[str, Any]:
    entry = dict(pairs)
    if len(entry) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"an object has the key {shown(twice)} twice")
    for key in without:
        entry.pop(key, None)
    return entry


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """For code that makes millions of objects and no cycles, which the collector would visit again
    and again.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# ---- checking


def _check(content: Any, path: Path, **options: bool) -> None:
    for problem in format_problems(content, path, **options):
        raise UserError(problem.message)


def format_problems(
    content: Any, path: Path, *, sizes_known: bool = True, names_are_here: bool = True
) -> Iterator[Problem]:
    """Everything in an instances file that can't be right. Optional fields are filled in.

    After the last one, the lists of `content` hold only entries without a problem.

    Args:
        path: the file, for messages.
        sizes_known: False: width and height may be missing, and 0.
        names_are_here: False: names of images may be those of files on another machine.
    """
    not_coco = f"{path} is not in COCO's instances format: it"
    if not isinstance(content, dict):
        message = f"{not_coco} must be an object with {', '.join(_SINGULAR)}"
        yield Problem("not_instances_format", message, entry=content)
        return

    # each list: its fields, then its ids
    complete = True
    known: dict[str, set[int]] = {}
    for section, fields in _fields(sizes_known, names_are_here).items():
        entries = content.get(section)
        if not isinstance(entries, list):
            yield Problem("not_instances_format", f"{not_coco} has no list {section!r}")
            entries, complete = [], False
        broken: set[int] = set()
        for field in fields:
            yield from _field_problems(entries, section, field, broken, path)
        yield from _id_problems(entries, section, broken, path)
        known[section] = {entry["id"] for entry in entries if _has_id(entry)}
        content[section] = [entry for i, entry in enumerate(entries) if i not in broken]

    # what annotations refer to
    if complete and not known["categories"]:
        yield Problem("no_categories", f"{path} has no categories: there is nothing to detect; add them")
        complete = False
    if complete:
        yield from _reference_problems(content, known, path)
    else:
        content["annotations"] = []


class _Field(NamedTuple):
    """A field of the entries of a list.

    fits: whether a value may be right. wanted: what it must be. default: the value for an entry
    without it; None: it is required. kind: of the problem of a value that does not fit; None:
    wrong_<key>.
    """

    key: str
    fits: Callable[[Any], bool]
    wanted: str
    default: Callable[[dict[str, Any]], Any] | None = None
    kind: Callable[[Any], str] | None = None


def _field_problems(
    entries: list[Any], section: str, field: _Field, broken: set[int], path: Path
) -> Iterator[Problem]:
    """What is wrong with a field of all entries of a list. Adds their indices to `broken`."""
    key, fits, wanted, default, kind = field
    for i, entry in enumerate(entries):
        # the value, or its default
        try:
            value = entry[key]
        except (KeyError, TypeError, IndexError):
            if key != "id" and not isinstance(entry, dict):
                continue  # reported as an entry without an id
            if default is None:
                broken.add(i)
                message = f"{path} is not in COCO's instances format: {section}[{i}] lacks {key!r}"
                yield Problem("missing_field", message, section, entry)
                continue
            if i in broken:
                continue  # a default may need the field that is wrong
            value = entry[key] = default(entry)
        if fits(value):
            continue

        # entries are named by their ids, which were checked first
        name = f"{section}[{i}]"
        if key != "id" and _has_id(entry):
            name = f"{_SINGULAR[section]} {entry['id']}"
        broken.add(i)
        message = f"{path}: {name} has {key} {shown(value)}; it must be {wanted}"
        yield Problem(kind(value) if kind else f"wrong_{key}", message, section, entry)


def _id_problems(entries: list[Any], section: str, broken: set[int], path: Path) -> Iterator[Problem]:
    seen: set[int] = set()
    for i, entry in enumerate(entries):
        if not _has_id(entry):
            continue
        if entry["id"] in seen:
            broken.add(i)
            message = f"{path}: two {section} have the id {entry['id']}; ids must be unique, number them anew"
            yield Problem(f"duplicate_{_SINGULAR[section]}_id", message, section, entry)
        seen.add(entry["id"])


def _reference_problems(content: dict[str, Any], known: dict[str, set[int]], path: Path) -> Iterator[Problem]:
    """Annotations of unknown images and categories. `known`: the ids, also those of broken entries."""
    images = {entry["id"] for entry in content["images"]}
    categories = {entry["id"] for entry in content["categories"]}
    kept = []
    for annotation in content["annotations"]:
        image, category = annotation["image_id"], annotation["category_id"]
        if image in images and category in categories:
            kept.append(annotation)
            continue

        # one of a broken entry has been reported there
        number = annotation["id"]
        if image not in known["images"]:
            message = (
                f"{path}: annotation {number} has image_id {image}, which is no image's id; take it out "
                "or add the image"
            )
            yield Problem("unknown_image", message, "annotations", annotation)
        if category not in known["categories"]:
            message = (
                f"{path}: annotation {number} has category_id {category}, which its categories lack; "
                "add the category"
            )
            yield Problem("unknown_category", message, "annotations", annotation)
    content["annotations"] = kept


# ---- fields


def shown(value: Any) -> str:
    """Any value in one short line."""
    return _repr.repr(value)


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 60


def is_id(value: Any) -> bool:
    """Whether it may be an id: a whole number of 64 bits."""
    return type(value) is int and -(2**63) <= value < 2**63  # a bool is an int to isinstance


def is_file_name(value: Any) -> bool:
    """Whether an image may be called so: the path of a file below the image folder."""
    return _is_text(value) and len(value) <= _LONGEST_NAME and not _UNSAFE_NAME.search(value)


def is_area(value: Any) -> bool:
    """Whether it may be an area, in pixels."""
    return _is_number(value, 0, _LARGEST_AREA)


def _has_id(entry: Any) -> bool:
    return isinstance(entry, dict) and is_id(entry.get("id"))


def _is_number(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high  # False for NaN


def _is_side(value: Any) -> bool:
    return _is_number(value, 1, _FARTHEST) and value == int(value)


def _is_side_or_0(value: Any) -> bool:
    return _is_number(value, 0, 0) or _is_side(value)


def _is_portable(value: Any) -> bool:
    return _is_text(value) and is_file_name(portable(value))


def _is_flag(value: Any) -> bool:
    return type(value) in (int, bool) and value in (0, 1)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_box(value: Any) -> bool:
    if type(value) is not list or len(value) != 4:
        return False
    x, y, width, height = value
    # written out, because it runs for every annotation
    return (
        _is_number(x, -_FARTHEST, _FARTHEST)
        and _is_number(y, -_FARTHEST, _FARTHEST)
        and _is_number(width, 0, _FARTHEST)
        and _is_number(height, 0, _FARTHEST)
    )


def _box_kind(value: Any) -> str:
    """The problem of a value that is no box: "degenerate_box" if only its sides are negative."""
    try:
        if len(value) == 4 and _is_box([*value[:2], abs(value[2]), abs(value[3])]):
            return "degenerate_box"
    except (TypeError, ValueError):
        pass
    return "wrong_bbox"


def _box_area(annotation: dict[str, Any]) -> float:
    return min(annotation["bbox"][2] * annotation["bbox"][3], _LARGEST_AREA)


_SINGULAR = {"images": "image", "annotations": "annotation", "categories": "category"}


def _fields(sizes_known: bool, names_are_here: bool) -> dict[str, list[_Field]]:
    """The fields by list. An id is checked before the other fields, and a box before its area."""
    number = _Field("id", is_id, "a whole number, of 64 bits")
    name = _Field(
        "file_name",
        is_file_name if names_are_here else _is_portable,
        "the path of a file below the image folder, of at most "
        f"{_LONGEST_NAME} characters (tools/convert_dataset.py finds files of other names)",
    )
    side = _Field("height", _is_side, "a whole number of pixels above 0")
    if not sizes_known:
        side = side._replace(fits=_is_side_or_0, default=lambda image: 0)
    box = "four finite numbers x, y, width, height in pixels, width and height not negative"
    return {
        "images": [number, name, side, side._replace(key="width")],
        "annotations": [
            number,
            _Field("image_id", is_id, "a whole number, an image's id"),
            _Field("category_id", is_id, "a whole number, a category's id"),
            _Field("bbox", _is_box, box, kind=_box_kind),
            _Field("area", is_area, "a finite number of pixels, not negative", _box_area),
            _Field("iscrowd", _is_flag, "0 or 1", lambda annotation: 0),
        ],
        "categories": [number, _Field("name", _is_text, "a text")],
    }
