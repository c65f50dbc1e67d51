"""Names of images in COCO's format, brought to those of the files in a folder."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets.file_index import END, Index, annotated_size
from datasets.file_names import folded_key, is_within, parts_of


def respell(images: Iterable[dict[str, Any]], folder: Path) -> Counter[str]:
    """Change each `file_name` that is not a file in `folder` to that of the file that is meant.

    The folder is known here: a name may be spelled otherwise or begin above the folder, but a file
    in another folder below it is another image's. Names of missing files stay.

    Returns how many names were changed, by how the file was found.
    """
    # nothing to do if all files are there
    names = {image["file_name"]: image for image in images}
    absent = set()
    if folder.is_dir():
        absent = absent_names(folder, names)
    if not absent:
        return Counter()

    there = (folder / name for name in names if name not in absent)
    findings = Index.below(folder).find({name: annotated_size(names[name]) for name in absent}, taken=there)
    # only names that end like the file's whole path below the folder
    notes: Counter[str] = Counter()
    for name, found in findings.found.items():
        relative = found.path.relative_to(folder)
        if folded_key(relative.parts) == folded_key(parts_of(name))[-len(relative.parts) :]:
            names[name]["file_name"] = relative.as_posix()
            notes[found.how or END] += 1
    return notes


def absent_names(folder: Path, names: Iterable[str]) -> set[str]:
    """Names of no file below `folder`. Folders are listed, because asking for each file takes 100
    times as long.
    """
    listings: dict[str, set[str]] = {}
    absent = set()
    for name in names:
        # each folder is listed once
        place, bare = os.path.split(name)
        if place not in listings:
            listings[place] = _file_names(folder / place) if is_within(folder / place, folder) else set()
        # where upper and lower case are one, a name that is not listed may still exist
        path = folder / name
        if bare not in listings[place] and not (is_within(path, folder) and os.path.exists(path)):
            absent.add(name)
    return absent


def _file_names(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError:  # it is no folder, or can't be listed
        return set()
