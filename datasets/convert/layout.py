"""A data set in COCO's instances format, split and written in the published folder layout:
train2017, val2017 and annotations/instances_{train,val}2017.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets.convert.common import CocoSplit
from util.errors import UserError

# how an image gets into the folder
WAYS = ("link", "symlink", "copy")
# share of the images for validation if no flag says otherwise
VAL_FRACTION = 0.2


def split_randomly(whole: CocoSplit, source: Path, fraction: float, seed: int) -> dict[str, CocoSplit]:
    """Random images for "val", the others for "train"; the same ones for the same seed.

    Raises UserError if a split would be empty.
    """
    # by id, so that the order in the file does not matter
    content, files = whole
    ids = sorted(image["id"] for image in content["images"])
    count = max(1, round(len(ids) * fraction))
    if count >= len(ids):
        raise UserError(
            f"{source}: {len(ids)} images can't be split by --val_fraction {fraction}; both splits "
            f"need one at least"
        )
    chosen = set(random.Random(seed).sample(ids, count))

    # annotations go with their images
    train, val = {**content}, {**content}
    for section, key in (("images", "id"), ("annotations", "image_id")):
        train[section] = [entry for entry in content[section] if entry[key] not in chosen]
        val[section] = [entry for entry in content[section] if entry[key] in chosen]
    return {"train": CocoSplit(train, files), "val": CocoSplit(val, files)}


# ---- files


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


def write_split(
    folder: Path, split: str, content: Mapping[str, Any], files: Mapping[str, Path], way: str = "copy"
) -> None:
    """Write "train" or "val": `content` is COCO's instances format, `files` where each of its file
    names lies now.

    way: link (hard links, which take no space; copies where the disk is another one), symlink or
    copy.

    Raises:
        UserError: something can't be read or written.
    """
    # images first: without annotations the folder is visibly unfinished
    images = folder / f"{split}2017"
    for image in content["images"]:
        _place(files[image["file_name"]], images / image["file_name"], way)
    path = folder / "annotations" / f"instances_{split}2017.json"
    try:
        images.mkdir(parents=True, exist_ok=True)  # for a split without images
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror})") from None


def _place(source: Path, target: Path, way: str) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # writing through an earlier link would change its source
        if way == "symlink":
            target.symlink_to(source.resolve())
            return
        if way == "link":
            with contextlib.suppress(OSError):  # another disk, or one without links
                os.link(source.resolve(), target)
                return
        shutil.copyfile(source, target)
    except OSError as error:
        raise UserError(
            f"{source} can't be put into {target.parent} ({error.strerror}); is it there, and room for it?"
        ) from None
