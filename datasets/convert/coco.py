"""COCO's instances format in other places than the published ones, as labelling tools export it, or
not yet parted.
"""

from __future__ import annotations

import functools
import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from datasets.coco_format import is_file_name, read_json
from datasets.convert.coco_export import check_export, leave_out, mend
from datasets.convert.common import PARTS, ROLES, VAL_FRACTION, Faults
from datasets.convert.layout import Part
from datasets.file_index import Found, Index, annotated_size
from datasets.file_names import IMAGE_SUFFIXES, files_below, portable
from util.errors import UserError
from util.images.files import read_regular_file

_LISTS = ("images", "annotations", "categories")
# words in the names of COCO's other annotation files, some of which have boxes too
_OTHER_KINDS = {"captions", "keypoints", "stuff", "panoptic", "info"}


def is_coco(source: Path) -> bool:
    """Whether it is an instances file, or a folder with one."""
    return bool(_instances(source))


def has_json(source: Path) -> bool:
    """Whether there is a file that may have been meant as an instances file."""
    return bool(_json_files(source))


def read_coco(source: Path, fraction: float | None, seed: int, faults: Faults) -> dict[str, Part]:
    """The "train" and "val" parts of an instances file, or of a folder with one or with one for
    each part.

    A file belongs to the part that its name or its folder names (train; val, valid or validation;
    test, where there is no val). A single file is parted at random: `fraction` of its images are
    for validation, the same ones for the same seed. Whole numbers that are ids stay as they are
    (see coco_export.mend). Annotation files that are not taken are noted.

    Raises:
        UserError: files can't be told apart, nothing is left to convert; or as Faults says, of all
        faults at once.
    """
    paths = _instances(source) or [_no_instances(source)]
    root = source if source.is_dir() else _folder_of(source)
    if source.is_dir():
        _note("annotation files without instances, left out", _by_kind(source)[1], faults)
    if len(paths) == 1:
        (whole,) = _read(paths, root, faults)
        contents = _split(whole.content, paths[0], fraction or VAL_FRACTION, seed)
        return {part: Part(content, whole.files) for part, content in contents.items()}
    named = {
        part: [path for path in paths if _part_of(path, root) == part]
        for part in ("train", "val", "test", "")
    }
    chosen = {"train": named["train"] or named[""], "val": named["val"] or named["test"]}
    for part, files in chosen.items():
        if len(files) != 1:
            listed = ", ".join(path.name for path in files or paths)
            raise UserError(
                f"{source} has {len(files)} instances files for {part} ({listed}); name one file "
                f"to convert instead"
            )
    if fraction is not None:
        raise UserError(
            f"--val_fraction {fraction}: {source} has a validation part already; leave the flag out"
        )
    unused = [path for path in paths if path not in (chosen["train"][0], chosen["val"][0])]
    _note("instances files of another part, left out", unused, faults)
    return dict(
        zip(chosen, _read([path for files in chosen.values() for path in files], root, faults), strict=True)
    )


def _folder_of(path: Path) -> Path:
    """The folder of an export of which an instances file is given alone: images may lie beside its
    folder, `annotations`.
    """
    beside = path.parent.name.lower() in ROLES and not files_below(path.parent, IMAGE_SUFFIXES)
    return path.parent.parent if beside else path.parent


def _read(paths: Sequence[Path], root: Path, faults: Faults) -> list[Part]:
    """What is sound in instances files, and where the images are."""
    contents = {path: read_json(path) for path in paths}
    parts = []
    with faults.all_at_once() as found:
        mend(contents, found)
        for path, content in contents.items():
            files = _find(content, path, root, found)
            check_export(content, files, path, found)
            parts.append(Part(content, files))
    for path, part in zip(paths, parts, strict=True):
        if not part.content["images"]:
            raise faults.nothing_left(f"{path} has no images")
    return parts


def _instances(source: Path) -> list[Path]:
    return [path for path in _json_files(source) if _looks_like_instances(path)]


def _json_files(source: Path) -> list[Path]:
    if source.is_dir():
        return _by_kind(source)[0]
    return [source] if source.suffix.lower() == ".json" else []


def _no_instances(source: Path) -> NoReturn:
    """Raises UserError with what is wrong with the first file."""
    for path in _json_files(source):
        content = read_json(path)
        lacks = [
            name
            for name in _LISTS
            if not isinstance(content, dict) or not isinstance(content.get(name), list)
        ]
        raise UserError(f"{path} is no COCO instances file: it lacks the lists {', '.join(lacks)}")
    raise UserError(f"{source} has no COCO instances file (.json)")


def _by_kind(folder: Path) -> tuple[list[Path], list[Path]]:
    """JSON files that may hold instances, and those of COCO's other kinds. The latter are not read:
    they can be gigabytes.
    """
    kinds: dict[bool, list[Path]] = {True: [], False: []}
    for path in files_below(folder, [".json"]):
        kinds[_OTHER_KINDS.isdisjoint(_words(path))].append(path)
    return (kinds[True], kinds[False]) if kinds[True] else (kinds[False], [])


def _note(what: str, paths: list[Path], faults: Faults) -> None:
    names = ", ".join(path.name for path in paths[:5]) + ", ..." * (len(paths) > 5)
    faults.notes[f"{what} ({names})"] += len(paths)


def _looks_like_instances(path: Path) -> bool:
    try:
        content = json.loads(read_regular_file(path))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and all(isinstance(content.get(name), list) for name in _LISTS)


def _part_of(path: Path, root: Path) -> str:
    """By the words in its name, or else by the nearest folder that is named after a part."""
    for name in [*_words(path), *(folder.name.lower() for folder in path.relative_to(root).parents)]:
        name = name.rstrip("0123456789")  # train2017
        if name in PARTS:
            return PARTS[name]
    return ""


def _words(path: Path) -> list[str]:
    return path.stem.lower().replace("-", "_").replace(".", "_").split("_")


def _split(content: dict[str, Any], path: Path, fraction: float, seed: int) -> dict[str, dict[str, Any]]:
    images = sorted(content["images"], key=lambda image: image["id"])
    count = max(1, round(len(images) * fraction))
    if count >= len(images):
        raise UserError(
            f"{path}: {len(images)} images can't be parted by --val_fraction {fraction}; both parts need one"
        )
    chosen = {images[i]["id"] for i in random.Random(seed).sample(range(len(images)), count)}
    parts = {}
    for part, wanted in (("train", False), ("val", True)):
        parts[part] = {
            **content,
            "images": [image for image in images if (image["id"] in chosen) == wanted],
            "annotations": [
                entry for entry in content["annotations"] if (entry["image_id"] in chosen) == wanted
            ],
        }
    return parts


def _find(content: dict[str, Any], path: Path, root: Path, faults: Faults) -> dict[str, Path]:
    """Where the images are: as named below the folder of the file or of the source, or else found
    by their names.

    In `content` names that can't be used below another folder are replaced, and images that are
    missing are left out.
    """
    entries = [
        image
        for image in content["images"]
        if isinstance(image, dict) and isinstance(image.get("file_name"), str)
    ]
    names = {image["file_name"]: annotated_size(image) for image in entries}
    for folder in (path.parent, root):
        if all(is_file_name(name) and os.path.isfile(folder / name) for name in names):
            return {name: folder / name for name in names}
    findings = Index.below(root).find(names, prefers=_preference(path, root))
    files = faults.located(findings, str(path))
    leave_out(
        content, "images", [image for image in entries if image["file_name"] in findings.missing], faults
    )
    written = {name: _written(name, found) for name, found in findings.found.items()}
    for image in entries:
        image["file_name"] = written.get(image["file_name"], image["file_name"])
    return {written[name]: file for name, file in files.items()}


def _written(name: str, found: Found) -> str:
    """The name below the folder to write. It has an ending, or prediction would not find the image
    in that folder.
    """
    if not found.how:
        return name
    plain = portable(name)
    return plain if plain.lower().endswith(IMAGE_SUFFIXES) else plain + found.path.suffix


def _preference(path: Path, root: Path) -> Callable[[Path], int]:
    """An annotation file of one part doesn't take images of another part."""
    part = _part_of(path, root)

    @functools.cache
    def of_folder(folder: Path) -> int:
        other = _part_of(folder, root) if folder != root else ""
        return 0 if "" in (part, other) else 1 if part == other else -1

    return lambda file: of_folder(file.parent)
