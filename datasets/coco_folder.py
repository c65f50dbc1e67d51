"""COCO's instances format in other places than the published ones, as labelling tools export it, or not yet parted."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets.coco_format import read_annotations
from datasets.coco_layout import Part
from datasets.labelled import IMAGE_SUFFIXES, PARTS, VAL_FRACTION
from util.errors import UserError
from util.images import read_regular_file

_LISTS = ("images", "annotations", "categories")


def is_coco(source: Path) -> bool:
    """Whether it is an instances file, or a folder with one."""
    return bool(_instances(source))


def read_coco(source: Path, fraction: float | None, seed: int) -> dict[str, Part]:
    """The "train" and "val" parts of an instances file, or of a folder with one or with one for each part.

    A file belongs to the part that its name or its folder names (train; val, valid or validation; test, where there is no val). A
    single file is parted at random: `fraction` of its images are for validation, the same ones for the same seed. Ids of
    categories, images and annotations stay as they are.

    Raises:
        UserError: files or images can't be told apart or found, or are not as they should be.
    """
    paths = _instances(source)
    root = source if source.is_dir() else source.parent
    if len(paths) == 1:
        content = read_annotations(paths[0]).dataset
        contents = _split(content, paths[0], fraction or VAL_FRACTION, seed)
        return {part: Part(content, _find(content, paths[0], root)) for part, content in contents.items()}
    named = {part: [path for path in paths if _part_of(path, root) == part] for part in ("train", "val", "test")}
    chosen = {"train": named["train"], "val": named["val"] or named["test"]}
    for part, files in chosen.items():
        if len(files) != 1:
            listed = ", ".join(path.name for path in files or paths)
            raise UserError(f"{source} has {len(files)} instances files for {part} ({listed}); name one file to convert instead")
    if fraction is not None:
        raise UserError(f"--val_fraction {fraction}: {source} has a validation part already; leave the flag out")
    contents = {part: read_annotations(files[0]).dataset for part, files in chosen.items()}
    return {part: Part(content, _find(content, chosen[part][0], root)) for part, content in contents.items()}


def _instances(source: Path) -> list[Path]:
    files = [source] if source.suffix == ".json" else sorted(source.rglob("*.json")) if source.is_dir() else []
    return [path for path in files if _looks_like_instances(path)]


def _looks_like_instances(path: Path) -> bool:
    try:
        content = json.loads(read_regular_file(path))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and all(isinstance(content.get(name), list) for name in _LISTS)


def _part_of(path: Path, root: Path) -> str:
    """By the words in its name, or else by the nearest folder that is named after a part."""
    words = path.stem.lower().replace("-", "_").replace(".", "_").split("_")
    for name in [*words, *(folder.name.lower() for folder in path.relative_to(root).parents)]:
        name = name.rstrip("0123456789")  # train2017
        if name in PARTS:
            return PARTS[name]
    return ""


def _split(content: dict[str, Any], path: Path, fraction: float, seed: int) -> dict[str, dict[str, Any]]:
    images = sorted(content["images"], key=lambda image: image["id"])
    count = max(1, round(len(images) * fraction))
    if count >= len(images):
        raise UserError(f"{path}: {len(images)} images can't be parted by --val_fraction {fraction}; both parts need one")
    chosen = {images[i]["id"] for i in random.Random(seed).sample(range(len(images)), count)}
    parts = {}
    for part, wanted in (("train", False), ("val", True)):
        parts[part] = {
            **content,
            "images": [image for image in images if (image["id"] in chosen) == wanted],
            "annotations": [entry for entry in content["annotations"] if (entry["image_id"] in chosen) == wanted],
        }
    return parts


def _find(content: dict[str, Any], path: Path, root: Path) -> dict[str, Path]:
    """Where the images are: as named below the folder of the file or of the source, or in the one folder that has them all.

    Of several such folders it is the one that is named as the file's part is. Else images are found by their bare names.
    """
    names = [image["file_name"] for image in content["images"]]
    for folder in (path.parent, root):
        if _has_all(folder, names):
            return {name: folder / name for name in names}
    fitting = [folder for folder in sorted({file.parent for file in _images(root)}) if _has_all(folder, names)]
    if len(fitting) > 1:
        part = _part_of(path, root)
        fitting = [folder for folder in fitting if _part_of(folder, root) == part] if part else fitting
        if len(fitting) != 1:
            raise UserError(f"{path}: several folders below {root} have images of these names; put the file beside its own")
    if fitting:
        return {name: fitting[0] / name for name in names}
    return _by_bare_name(names, path, root)


def _by_bare_name(names: list[str], path: Path, root: Path) -> dict[str, Path]:
    by_name: dict[str, list[Path]] = {}
    for file in _images(root):
        by_name.setdefault(file.name, []).append(file)
    found = {name: by_name.get(Path(name).name, []) for name in names}
    for name, files in found.items():
        if len(files) != 1:
            several = f"there are {len(files)} of that name, {files[0]} and {files[1]} first" if files else "it is not there"
            raise UserError(f"{path} names the image {name}, and below {root} {several}; put it where the file says")
    return {name: files[0] for name, files in found.items()}


def _has_all(folder: Path, names: Iterable[str]) -> bool:
    return all((folder / name).is_file() for name in names)


def _images(root: Path) -> Iterable[Path]:
    return (file for file in sorted(root.rglob("*")) if file.suffix.lower() in IMAGE_SUFFIXES)
