"""Third stage of the check: what the data set has, as tables, and its problems, as text and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from datasets.coco_format import Problem, shown
from datasets.preflight.annotations import CheckedSplit
from datasets.preflight.boxes import sizes_of
from util.errors import UserError

# COCO's small, medium and large objects: areas in pixels below these, and the rest
SIZE_LIMITS = {"small": 32**2, "medium": 96**2, "large": float("inf")}


def summary(split: CheckedSplit) -> dict[str, Any]:
    """Counts of a split.

    width, height: smallest, median and largest of its images. classes: category id -> name, boxes in
    all and by size (without crowds), and images.
    """
    # each class; crowds count for none
    single = ~split.crowd
    size = np.searchsorted(list(SIZE_LIMITS.values()), split.area, side="right")
    classes = {}
    for category in sorted(split.categories, key=lambda category: category["id"]):
        chosen = single & (split.category_id == category["id"])
        counts = {"name": category["name"], "boxes": int(chosen.sum())}
        for i, name in enumerate(SIZE_LIMITS):
            counts[name] = int((size[chosen] == i).sum())
        counts["images"] = len(np.unique(split.image[chosen]))
        classes[category["id"]] = counts

    # without images, sizes are 0
    sizes = sizes_of(split.images) if split.images else np.zeros((1, 2))
    width, height = np.quantile(sizes, (0, 0.5, 1), axis=0).astype(int).T.tolist()
    return {
        "images": len(split.images),
        "empty_images": len(split.images) - len(np.unique(split.image)),
        "boxes": int(single.sum()),
        "crowds": int(split.crowd.sum()),
        "width": width,
        "height": height,
        "classes": classes,
    }


# ---- text


def split_table(summaries: Mapping[str, dict[str, Any]]) -> str:
    """Images, boxes and sizes of the splits."""
    rows = [["split", "images", "without object", "boxes", "crowds", "width", "height"]]
    for name, counts in summaries.items():
        *numbers, width, height, _ = counts.values()
        rows.append([name, *numbers, "..".join(map(str, width)), "..".join(map(str, height))])
    return _table(rows, texts=1)


def class_table(summaries: Mapping[str, dict[str, Any]]) -> str:
    """Boxes and images of every class, for each split."""
    columns = ["boxes", *SIZE_LIMITS, "images"]
    header = ["id", "class"]
    names: dict[int, str] = {}
    for split, counts in summaries.items():
        header += [f"{split} boxes", *columns[1:]]
        names |= {number: entry["name"] for number, entry in counts["classes"].items()}
    # a class may be in one split only
    rows = [header]
    for number in sorted(names):
        row = [str(number), names[number][:30]]
        for counts in summaries.values():
            entry = counts["classes"].get(number, {})
            row += [entry.get(column, "-") for column in columns]
        rows.append(row)
    return _table(rows, texts=2)


def _table(rows: Sequence[Sequence[Any]], texts: int) -> str:
    """The first row is the header; the first `texts` columns are flush left."""
    columns = []
    for i, column in enumerate(zip(*rows, strict=True)):
        cells = [f"{cell:,}" if isinstance(cell, int) else cell for cell in column]
        align = str.ljust if i < texts else str.rjust
        width = max(map(len, cells))
        columns.append([align(cell, width) for cell in cells])
    return "\n".join(map("  ".join, zip(*columns, strict=True)))


def problem_lines(problems: Sequence[Problem], show: int) -> Iterator[str]:
    """Problems, then warnings, by kind. show: lines of each kind; 0: all."""
    for (is_warning, kind), group in groupby(sorted(problems, key=_place), key=_place):
        found = list(group)
        yield f"{'warning' if is_warning else 'problem'}: {kind} ({len(found)})"
        for problem in found[: show or None]:
            yield f"  {problem.message}"
        if show and len(found) > show:
            yield f"  ... and {len(found) - show} more (--show 0 shows all)"
    # the last line is the result
    warnings = sum(problem.is_warning for problem in problems)
    yield f"problems: {len(problems) - warnings}, warnings: {warnings}"


def _place(problem: Problem) -> tuple[bool, str]:
    """Sort key: warnings last; by kind."""
    return problem.is_warning, problem.kind


# ---- JSON


def write_report(path: Path, summaries: Mapping[str, dict[str, Any]], problems: Sequence[Problem]) -> None:
    """Counts, and every problem with kind, file and ids. Raises UserError if it can't be written."""
    warnings = sum(problem.is_warning for problem in problems)
    content = {
        # the names of these keys stay: programs read the file
        "faults": len(problems) - warnings,
        "warnings": warnings,
        "parts": summaries,
        "findings": [_plain(problem) for problem in sorted(problems, key=_place)],
    }
    try:
        path.write_text(json.dumps(content, indent=1))
    except OSError as error:
        raise UserError(f"--report {path} can't be written ({error.strerror}); choose another file") from None


def _plain(problem: Problem) -> dict[str, Any]:
    """A problem as the report has it, with the ids of its entry, as far as it has any."""
    plain = {
        "kind": problem.kind,
        "message": problem.message,
        "split": problem.split,
        "file": problem.file,
        "is_fault": not problem.is_warning,
    }
    # its own id, and those that an annotation refers to
    keys = dict.fromkeys(("image_id", "annotation_id", "category_id"), "")
    if problem.section == "annotations":
        keys = {key: key for key in keys}
    if problem.section:
        keys[_OWN_ID[problem.section]] = "id"
    for name, key in keys.items():
        value = problem.entry.get(key) if isinstance(problem.entry, dict) else None
        # an id of a wrong type may be of any size
        if type(value) not in (int, str) and value is not None:
            value = shown(value)
        plain[name] = value
    return plain


_OWN_ID = {"images": "image_id", "annotations": "annotation_id", "categories": "category_id"}
