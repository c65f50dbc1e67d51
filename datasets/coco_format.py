"""COCO's instances format: read, and every field checked that training or evaluation uses."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import re
import reprlib
from collections import Counter
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


# kinds of problems that are legitimate, but rarely intended
WARNINGS = {
    "other_name",
    "duplicate_box",
    "same_picture",
    "unused_category",
    "no_objects",
    "only_crowds",
    "class_of_crowds",
    "more_than_queries",
    "more_than_detections",
    "flat_picture",
    "mixed_depths",
    "mask_area",
}


@dataclass
class Problem:
    """Something wrong with a data set, in one line.

    kind: its code in reports, in lower case. message: names the file, the entry, the field and the
    remedy. section: "images", "annotations" or "categories"; "" for a whole file. entry: what is
    wrong, as it is in that list. split, file: where it is, set by the check of a whole data set
    (datasets/preflight).
    """

    kind: str
    message: str
    section: str = ""
    entry: Any = None
    split: str = ""
    file: str = ""

    @property
    def is_warning(self) -> bool:
        return self.kind in WARNINGS


# ---- reading


def read_annotations(path: Path) -> COCO:
    """A COCO index of an instances file.

    A missing `iscrowd` is filled in as 0 and a missing `area` as the box's: many programs omit them,
    and pycocotools needs them.

    Raises:
        UserError: the file is missing, not JSON, or has a field that can't be right; the message
        names it.
    """
    return parse_annotations(read_json(path), path)


def parse_annotations(content: Any, path: Path) -> COCO:
    """As `read_annotations`, of the content of the file `path`."""
    _check(content, path)
    return indexed(content)


def indexed(content: dict[str, Any]) -> COCO:
    """pycocotools' index of what an instances file has."""
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        coco.createIndex()
    return coco


def read_images_and_categories(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The images and categories of an instances file, with or without annotations and sizes.

    COCO's image_info_test-dev2017.json has no annotations. Names of images may be those of files on
    another machine (datasets.file_names.portable).

    Raises:
        UserError: as `read_annotations`.
    """
    # test sets have no annotations
    content = read_json(path, without=("annotations",))
    if isinstance(content, dict):
        content["annotations"] = []
    _check(content, path, sizes_known=False, names_are_here=False)
    return content["images"], content["categories"]


def read_json(
    path: Path,
    without: Collection[str] = (),
    *,
    kind: str = "instances",
    flags: str = "--coco_path, or --train_annotations and --val_annotations",
) -> Any:
    """The content of an annotation file. `without`: keys to drop from its objects, to save memory.

    `kind` and `flags` are for messages: which of COCO's formats it must have, and what names the file.

    Raises:
        UserError: the file is missing or not JSON.
    """
    wanted = f"it must be a COCO {kind} file"

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entry = dict(pairs)
        if len(entry) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"an object has the key {shown(twice)} twice")
        for key in without:
            entry.pop(key, None)
        return entry

    # millions of objects and no cycles: garbage collection would visit them again and again
    enabled = gc.isenabled()
    gc.disable()
    try:
        return json.loads(read_regular_file(path), object_pairs_hook=unique)
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}); {wanted}: check {flags}") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply; {wanted}") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); {wanted}") from None
    finally:
        if enabled:
            gc.enable()


# ---- checking


def restrict(content: dict[str, Any], image_ids: set[int]) -> dict[str, Any]:
    """The same annotations for some images only."""
    return content | {
        "images": [image for image in content["images"] if image["id"] in image_ids],
        "annotations": [entry for entry in content["annotations"] if entry["image_id"] in image_ids],
    }


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

    # each list; ids of broken entries are known too, because those entries have been reported
    complete = True
    known: dict[str, set[int]] = {}
    for section, fields in _fields(sizes_known, names_are_here).items():
        entries, content[section], known[section] = content.get(section), [], set()
        if isinstance(entries, list):
            yield from _list_problems(entries, section, fields, content[section], known[section], path)
        else:
            yield Problem("not_instances_format", f"{not_coco} has no list {section!r}")
            complete = False

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
    without it; None: it is required.
    """

    key: str
    fits: Callable[[Any], bool]
    wanted: str
    default: Callable[[dict[str, Any]], Any] | None = None


def _list_problems(
    entries: list[Any], section: str, fields: list[_Field], sound: list[Any], ids: set[int], path: Path
) -> Iterator[Problem]:
    """What is wrong with a list. Adds entries without a problem to `sound`, and all ids to `ids`."""
    for i, entry in enumerate(entries):
        problems = list(_entry_problems(entry, section, i, fields, path))
        if isinstance(entry, dict) and is_id(entry.get("id")):
            number = entry["id"]
            if number in ids:
                message = f"{path}: two {section} have the id {number}; ids must be unique, renumber them"
                problems.append(Problem(f"duplicate_{_SINGULAR[section]}_id", message, section, entry))
            ids.add(number)
        if not problems:
            sound.append(entry)
        yield from problems


def _entry_problems(entry: Any, section: str, i: int, fields: list[_Field], path: Path) -> Iterator[Problem]:
    """What is wrong with the fields of entry `i`. Optional ones are filled in."""
    # texts are made for a problem only: COCO has 860,000 annotations
    if not isinstance(entry, dict):
        yield Problem("missing_field", _missing(section, i, "id", path), section, entry)
        return
    for key, fits, wanted, default in fields:
        if key not in entry:
            if default is None:
                yield Problem("missing_field", _missing(section, i, key, path), section, entry)
            else:
                entry[key] = default(entry)
        elif not fits(entry[key]):
            kind = f"wrong_{key}"
            if key == "bbox" and _is_four_numbers(entry[key]):
                kind = "degenerate_box"
            # named by its id, or else by its place
            name = f"{section}[{i}]"
            if key != "id" and is_id(entry.get("id")):
                name = f"{_SINGULAR[section]} {entry['id']}"
            message = f"{path}: {name} has {key} {shown(entry[key])}; it must be {wanted}"
            yield Problem(kind, message, section, entry)


def _missing(section: str, i: int, key: str, path: Path) -> str:
    return f"{path} is not in COCO's instances format: {section}[{i}] lacks {key!r}"


def _reference_problems(content: dict[str, Any], known: dict[str, set[int]], path: Path) -> Iterator[Problem]:
    """Annotations of unknown images and categories. Those of broken entries are left out, too."""
    meanings = {
        "images": "which is no image's id; take it out or add the image",
        "categories": "which is not among its categories; add the category",
    }
    sound = {section: {entry["id"] for entry in content[section]} for section in meanings}
    kept = []
    for annotation in content["annotations"]:
        keep = True
        for section, meaning in meanings.items():
            name = _SINGULAR[section]
            number = annotation[f"{name}_id"]
            keep = keep and number in sound[section]
            if number not in known[section]:
                message = f"{path}: annotation {annotation['id']} has {name}_id {number}, {meaning}"
                yield Problem(f"unknown_{name}", message, "annotations", annotation)
        if keep:
            kept.append(annotation)
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
    return is_text(value) and len(value) <= _LONGEST_NAME and not _UNSAFE_NAME.search(value)


def is_area(value: Any) -> bool:
    """Whether it may be an area, in pixels."""
    return _is_number(value, 0, _LARGEST_AREA)


def _is_number(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high  # False for NaN


def _is_side(value: Any) -> bool:
    return _is_number(value, 1, _FARTHEST) and value == int(value)


def _is_side_or_0(value: Any) -> bool:
    return _is_number(value, 0, 0) or _is_side(value)


def _is_portable(value: Any) -> bool:
    return is_text(value) and is_file_name(portable(value))


def is_flag(value: Any) -> bool:
    """Whether it may be a flag: 0 or 1."""
    # some programs write true and false
    return type(value) in (int, bool) and value in (0, 1)


def is_text(value: Any) -> bool:
    """Whether it may be a name."""
    return isinstance(value, str)


def _is_four_numbers(value: Any) -> bool:
    if type(value) is not list or len(value) != 4:
        return False
    return all(_is_number(number, -_FARTHEST, _FARTHEST) for number in value)


def _is_box(value: Any) -> bool:
    return _is_four_numbers(value) and value[2] >= 0 and value[3] >= 0


def _box_area(annotation: dict[str, Any]) -> float:
    if not _is_box(annotation.get("bbox")):
        return 0.0  # the box is reported
    _, _, width, height = annotation["bbox"]
    return min(width * height, _LARGEST_AREA)


_SINGULAR = {"images": "image", "annotations": "annotation", "categories": "category"}


def _fields(sizes_known: bool, names_are_here: bool) -> dict[str, list[_Field]]:
    """The fields by list. The id comes first, because messages name an entry by it."""
    number = _Field("id", is_id, "a whole number, of 64 bits")
    is_name = is_file_name if names_are_here else _is_portable
    path = (
        f"the path of a file below the image folder, of at most {_LONGEST_NAME} characters "
        "(tools/convert_dataset.py finds files of other names)"
    )
    side = _Field("height", _is_side, "a whole number of pixels above 0")
    if not sizes_known:
        side = side._replace(fits=_is_side_or_0, default=lambda image: 0)
    box = "four finite numbers x, y, width, height in pixels, width and height not negative"
    return {
        "images": [number, _Field("file_name", is_name, path), side, side._replace(key="width")],
        "annotations": [
            number,
            _Field("image_id", is_id, "a whole number, an image's id"),
            _Field("category_id", is_id, "a whole number, a category's id"),
            _Field("bbox", _is_box, box),
            _Field("area", is_area, "a finite number of pixels, not negative", _box_area),
            _Field("iscrowd", is_flag, "0 or 1", lambda annotation: 0),
        ],
        "categories": [number, _Field("name", is_text, "a text")],
    }
