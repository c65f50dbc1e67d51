"""COCO's instances format, split and written in the published folder layout: train2017, val2017 and
annotations/instances_{train,val}2017.json.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from datasets.convert.common import Labelled, Object
from util.errors import UserError

# how an image gets into the folder
WAYS = ("link", "symlink", "copy")
# share of the images for validation if no flag says otherwise
VAL_FRACTION = 0.2


class CocoSplit(NamedTuple):
    """content: COCO's instances format. files: where each of its file names lies."""

    content: dict[str, Any]
    files: dict[str, Path]


def to_coco(data: Labelled) -> dict[str, CocoSplit]:
    """COCO's instances format of every split; ids of categories, images and annotations count from
    1, through all splits.
    """
    # ids count through both splits, so that no image has the id of another
    ids = {name: number for number, name in enumerate(data.names, 1)}
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    image_ids, object_ids = itertools.count(1), itertools.count(1)
    splits = {}
    for split, labelled in data.splits.items():
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for image in labelled:
            own = {"id": next(image_ids), "file_name": image.name}
            images.append(own | {"width": image.size[0], "height": image.size[1]})
            for item in image.objects:
                head = {"id": next(object_ids), "image_id": own["id"], "category_id": ids[item.name]}
                annotations.append(head | _annotation(item))
        content = {"images": images, "annotations": annotations, "categories": categories}
        splits[split] = CocoSplit(content, {image.name: image.path for image in labelled})
    return splits


def _annotation(item: Object) -> dict[str, Any]:
    x0, y0, x1, y1 = item.corners
    box = [round(value, 4) for value in (x0, y0, x1 - x0, y1 - y0)]
    return {"bbox": box, "area": round(box[2] * box[3], 4), "iscrowd": int(item.crowd)}


def split_randomly(whole: CocoSplit, source: Path, fraction: float, seed: int) -> dict[str, CocoSplit]:
    """Random images for "val", the others for "train"; the same ones for the same seed.

    Raises UserError if a split would be empty.
    """
    # by id, so that the order in the file does not matter
    images = sorted(whole.content["images"], key=lambda image: image["id"])
    count = max(1, round(len(images) * fraction))
    if count >= len(images):
        raise UserError(
            f"{source}: {len(images)} images can't be split by --val_fraction {fraction}; both splits "
            f"need one at least"
        )
    chosen = {images[i]["id"] for i in random.Random(seed).sample(range(len(images)), count)}
    # annotations go with their images
    splits = {}
    for split, is_val in (("train", False), ("val", True)):
        content = {
            **whole.content,
            "images": [image for image in images if (image["id"] in chosen) == is_val],
            "annotations": [
                item for item in whole.content["annotations"] if (item["image_id"] in chosen) == is_val
            ],
        }
        splits[split] = CocoSplit(content, whole.files)
    return splits


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
