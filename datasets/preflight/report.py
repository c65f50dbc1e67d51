"""Third stage of the check: what the data set has, as tables, and its problems, as text and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datasets.coco_format import Problem, shown
from datasets.preflight.annotations import CheckedSplit
from util.errors import UserError

# COCO's small, medium and large objects: areas in pixels below these, and the rest
SIZE_LIMITS = {"small": 32**2, "medium": 96**2, "large": float("inf")}


class Summary(NamedTuple):
    """Counts of a split. width, height: smallest, median and largest of its images.

    classes: category id -> name, boxes in all and by size (without crowds), and images.
    """

    images: int
    empty_images: int
    boxes: int
    crowds: int
    width: tuple[int, int, int]
    height: tuple[int, int, int]
    classes: dict[int, dict[str, Any]]


def summary(split: CheckedSplit) -> Summary:
    """What a split has."""
    # each class; crowds count for none
    boxes, single = split.boxes, ~split.boxes.crowd
    classes = {}
    for category in sorted(split.categories, key=lambda category: category["id"]):
        chosen = single & (boxes.category_id == category["id"])
        size = np.searchsorted(list(SIZE_LIMITS.values()), boxes.area[chosen], side="right")
        by_size = np.bincount(size, minlength=len(SIZE_LIMITS)).tolist()
        classes[category["id"]] = {
            "name": category["name"],
            "boxes": int(chosen.sum()),
            **dict(zip(SIZE_LIMITS, by_size, strict=True)),
            "images": len(np.unique(boxes.image[chosen])),
        }

    return Summary(
        images=len(split.images),
        empty_images=len(split.images) - len(np.unique(boxes.image)),
        boxes=int(single.sum()),
        crowds=int(boxes.crowd.sum()),
        width=_range([image["width"] for image in split.images]),
        height=_range([image["height"] for image in split.images]),
        classes=classes,
    )


def _range(values: list[float]) -> tuple[int, int, int]:
    if not values:
        return 0, 0, 0
    return int(min(values)), int(np.median(values)), int(max(values))


# ---- text


def split_table(summaries: Mapping[str, Summary]) -> str:
    """Images, boxes and sizes of the splits."""
    rows: list[Sequence[Any]] = [("split", "images", "without object", "boxes", "crowds", "width", "height")]
    for name, s in summaries.items():
        sides = ["..".join(map(str, side)) for side in (s.width, s.height)]
        rows.append((name, s.images, s.empty_images, s.boxes, s.crowds, *sides))
    return _table(rows, texts=1)


def class_table(summaries: Mapping[str, Summary]) -> str:
    """Boxes and images of every class, for each split."""
    of_split = [s.classes for s in summaries.values()]
    columns = ("boxes", *SIZE_LIMITS, "images")
    header = ["id", "class"]
    for name in summaries:
        header += [f"{name} boxes", *columns[1:]]
    rows: list[Sequence[Any]] = [header]
    # a class may be in one split only
    for number in sorted(set().union(*of_split)):
        counts = [classes.get(number, {}) for classes in of_split]
        name = next(count["name"] for count in counts if count)
        cells = [count.get(column, "-") for count in counts for column in columns]
        rows.append([str(number), name[:30], *cells])
    return _table(rows, texts=2)


def _table(rows: Sequence[Sequence[Any]], texts: int) -> str:
    """The first row is the header; the first `texts` columns are flush left."""
    cells = [[f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        aligned = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        for i in range(texts):
            aligned[i] = row[i].ljust(widths[i])
        lines.append("  ".join(aligned))
    return "\n".join(lines)


def problem_lines(problems: Sequence[Problem], show: int) -> Iterator[str]:
    """Problems, then warnings, by kind. show: lines of each kind; 0: all."""
    for (is_warning, kind), group in groupby(in_order(problems), key=_place):
        found = list(group)
        yield f"{'warning' if is_warning else 'problem'}: {kind} ({len(found)})"
        for problem in found[: show or None]:
            yield f"  {problem.message}"
        if show and len(found) > show:
            yield f"  ... and {len(found) - show} more (--show 0 shows all)"
    warnings = sum(problem.is_warning for problem in problems)
    yield f"problems: {len(problems) - warnings}, warnings: {warnings}"


def in_order(problems: Sequence[Problem]) -> list[Problem]:
    """Warnings last; by kind."""
    return sorted(problems, key=_place)


def _place(problem: Problem) -> tuple[bool, str]:
    return problem.is_warning, problem.kind


# ---- JSON


def write_report(path: Path, summaries: Mapping[str, Summary], problems: Sequence[Problem]) -> None:
    """Counts, and every problem with kind, file and ids. Raises UserError if it can't be written."""
    warnings = sum(problem.is_warning for problem in problems)
    content = {
        # the names of these keys stay: programs read the file
        "faults": len(problems) - warnings,
        "warnings": warnings,
        "parts": {name: s._asdict() for name, s in summaries.items()},
        "findings": [_plain(problem) for problem in in_order(problems)],
    }
    try:
        path.write_text(json.dumps(content, indent=1))
    except OSError as error:
        raise UserError(f"--report {path} can't be written ({error.strerror}); choose another file") from None


def _plain(problem: Problem) -> dict[str, Any]:
    """A problem as the report has it, with the ids of its entry, as far as it has any."""
    entry = problem.entry if isinstance(problem.entry, dict) else {}
    # its own id, and those that an annotation refers to
    ids: dict[str, Any] = dict.fromkeys(("image_id", "annotation_id", "category_id"))
    if problem.section == "annotations":
        ids |= {"image_id": entry.get("image_id"), "category_id": entry.get("category_id")}
    own = {"images": "image_id", "annotations": "annotation_id", "categories": "category_id"}
    if problem.section:
        ids[own[problem.section]] = entry.get("id")
    # an id of a wrong type may be of any size
    for name, value in ids.items():
        if type(value) not in (int, str) and value is not None:
            ids[name] = shown(value)
    return {
        "kind": problem.kind,
        "message": problem.message,
        "split": problem.split,
        "file": problem.file,
        "is_fault": not problem.is_warning,
        **ids,
    }
