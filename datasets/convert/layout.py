"""The published folder layout: train2017, val2017 and annotations/instances_{train,val}2017.json."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from util.errors import UserError

# how an image gets into the folder
WAYS = ("link", "symlink", "copy")


class Part(NamedTuple):
    """content: COCO's instances format. files: where each of its file names lies."""

    content: dict[str, Any]
    files: dict[str, Path]


def new_folder(name: str) -> Path:
    """An empty folder to write a data set to. Raises UserError if there is something in it already."""
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"--output_dir {folder} is not empty; remove what is there, or name another")
    except OSError as error:
        raise UserError(f"--output_dir {folder} can't be used ({error.strerror}); name another") from None
    return folder


def write_part(
    folder: Path, part: str, content: Mapping[str, Any], files: Mapping[str, Path], way: str = "copy"
) -> None:
    """Write the "train" or "val" part: `content` is COCO's instances format, `files` where each of
    its file names lies now.

    way: link (hard links, which take no room; copies where the disk is another one), symlink or
    copy.

    Raises:
        UserError: something can't be read or written.
    """
    images = folder / f"{part}2017"
    for image in content["images"]:
        _place(files[image["file_name"]], images / image["file_name"], way)
    path = folder / "annotations" / f"instances_{part}2017.json"
    try:
        images.mkdir(parents=True, exist_ok=True)  # for a part without images
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror})") from None


def _place(source: Path, target: Path, way: str) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # an earlier link must not be written through
        if way == "symlink":
            target.symlink_to(source.resolve())
        elif way == "copy" or not _linked(source, target):
            shutil.copyfile(source, target)
    except OSError as error:
        raise UserError(
            f"{source} can't be put into {target.parent} ({error.strerror}); is it there, and room for it?"
        ) from None


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another disk, or one without links
        return False
    return True
