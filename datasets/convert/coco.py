"""COCO's instances format in other places than the published ones, as labelling tools export it, or
not split yet.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets.coco_format import is_file_name, read_json
from datasets.convert.coco_export import LISTS, Entry, check_export, entries_of, leave_out, mend
from datasets.convert.common import ROLES, CocoSplit, split_named
from datasets.convert.problems import Problems
from datasets.file_index import Found, Index, annotated_size
from datasets.file_names import IMAGE_SUFFIXES, files_below, portable
from util.errors import UserError
from util.images.files import read_regular_file

# words in the names of COCO's other annotation files, some of which have boxes too
_OTHER_KINDS = {"captions", "keypoints", "stuff", "panoptic", "info"}


def is_coco(source: Path) -> bool:
    """Whether it is an instances file, or a folder with one."""
    return any(map(_looks_like_instances, _json_files(source)[0]))


def has_json(source: Path) -> bool:
    """Whether there is a file that may have been meant as an instances file."""
    return bool(_json_files(source)[0])


def read_coco(source: Path, problems: Problems, crowds: str = "keep") -> dict[str, CocoSplit]:
    """What is sound in an instances file ("train"), or in a folder with one or with one for each
    split ("train" and "val").

    A file belongs to the split that its name or its folder names (train; val, valid or validation;
    test, if there is no val). Ids that are whole numbers stay as they are (see coco_export.mend).
    Annotation files that are not used are noted. crowds: see coco_export.check_export.

    Raises:
        UserError: files can't be told apart, or hold nothing that could be used.
    """
    # the folder that image names may be relative to
    root = source
    if not source.is_dir():
        root = source.parent
        if root.name.lower() in ROLES and not files_below(root, IMAGE_SUFFIXES):
            root = root.parent  # images may lie beside the folder `annotations`

    chosen = _choose(source, root, problems)
    contents = {path: read_json(path) for path in chosen.values()}
    mend(contents, problems)
    splits = {}
    for split, path in chosen.items():
        files = _find_images(contents[path], path, root, problems)
        check_export(contents[path], files, path, problems, crowds)
        splits[split] = CocoSplit(contents[path], files)
    return splits


# ---- annotation files


def _choose(source: Path, root: Path, problems: Problems) -> dict[str, Path]:
    """The instances file of each split; a single one is "train"."""
    likely, others = _json_files(source)
    if not likely:
        raise UserError(f"{source} has no COCO instances file (.json)")
    paths = [path for path in likely if _looks_like_instances(path)]
    if not paths:
        missing = ", ".join(_missing_lists(read_json(likely[0])))
        raise UserError(f"{likely[0]} is no COCO instances file: the lists {missing} are missing")
    _note("annotation files without instances, left out", others, problems)
    # without a second file there is nothing to tell apart
    if len(paths) == 1:
        return {"train": paths[0]}

    by_split: dict[str, list[Path]] = {}
    for path in paths:
        by_split.setdefault(_split_of(path, root), []).append(path)
    # files of no split are "train", and "test" is used if there is no "val"
    options = {
        "train": by_split.get("train") or by_split.get("", []),
        "val": by_split.get("val") or by_split.get("test", []),
    }
    for split, files in options.items():
        if len(files) != 1:
            listed = ", ".join(path.name for path in files or paths)
            raise UserError(
                f"{source} has {len(files)} instances files for {split} ({listed}); name one file "
                f"to convert instead"
            )
    chosen = {split: files[0] for split, files in options.items()}
    unused = [path for path in paths if path not in chosen.values()]
    _note("instances files of another split, left out", unused, problems)
    return chosen


def _looks_like_instances(path: Path) -> bool:
    try:
        return not _missing_lists(json.loads(read_regular_file(path)))
    except (OSError, ValueError, RecursionError):
        return False


def _missing_lists(content: Any) -> list[str]:
    if not isinstance(content, dict):
        return list(LISTS)
    return [name for name in LISTS if not isinstance(content.get(name), list)]


def _json_files(source: Path) -> tuple[list[Path], list[Path]]:
    """JSON files that may hold instances, and those of COCO's other kinds. The latter are not read:
    they can be gigabytes.
    """
    if not source.is_dir():
        return [path for path in [source] if path.suffix.lower() == ".json"], []
    likely, others = [], []
    for path in files_below(source, [".json"]):
        if _OTHER_KINDS.isdisjoint(_words(path)):
            likely.append(path)
        else:
            others.append(path)
    # a folder of only such files: they may be meant
    if not likely:
        return others, []
    return likely, others


def _note(what: str, paths: Sequence[Path], problems: Problems) -> None:
    names = ", ".join(path.name for path in paths[:5])
    if len(paths) > 5:
        names += ", ..."
    problems.notes[f"{what} ({names})"] += len(paths)


def _split_of(path: Path, root: Path) -> str:
    """By the words in its name, or else by the nearest folder that is named after a split."""
    folders = [folder.name for folder in path.relative_to(root).parents]
    return split_named([*_words(path), *folders])


def _words(path: Path) -> list[str]:
    return path.stem.lower().replace("-", "_").replace(".", "_").split("_")


# ---- images


def _find_images(content: Entry, path: Path, root: Path, problems: Problems) -> dict[str, Path]:
    """Where the images are: as named below the folder of the file or of the source, or else found
    by their names.

    In `content` names that can't be used below another folder are replaced, and images that are
    missing are left out.
    """
    # all names as they stand
    entries = [image for image in entries_of(content, "images") if isinstance(image.get("file_name"), str)]
    sizes = {image["file_name"]: annotated_size(image) for image in entries}
    for folder in (path.parent, root):
        if all(is_file_name(name) and os.path.isfile(folder / name) for name in sizes):
            return {name: folder / name for name in sizes}

    # an annotation file of one split doesn't use images of another split
    split = _split_of(path, root)

    @functools.cache  # a folder has thousands of files
    def prefers_folder(folder: Path) -> int:
        other = "" if folder == root else _split_of(folder, root)
        if not split or not other:
            return 0
        return 1 if other == split else -1

    def prefers(file: Path) -> int:
        return prefers_folder(file.parent)

    findings = Index.below(root).find(sizes, prefers=prefers)
    problems.notes.update(findings.notes())
    for name, reason in findings.missing.items():
        problems.add_missing(name, reason, str(path))
    missing = [image for image in entries if image["file_name"] in findings.missing]
    leave_out(content, "images", missing, problems)

    # names to write
    written = {name: _written(name, found) for name, found in findings.found.items()}
    for image in entries:
        image["file_name"] = written.get(image["file_name"], image["file_name"])
    return {written[name]: found.path for name, found in findings.found.items()}


def _written(name: str, found: Found) -> str:
    """The name below the folder to write. It needs an ending, or prediction would not find the
    image in that folder.
    """
    if not found.how:
        return name
    # without folders of another machine
    plain = portable(name)
    if plain.lower().endswith(IMAGE_SUFFIXES):
        return plain
    return plain + found.path.suffix
