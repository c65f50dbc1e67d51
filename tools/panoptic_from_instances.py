"""Make a panoptic data set of one with masks of instances, in COCO's layout.

The instances are things; everything else is one segment of a stuff class. Where instances overlap, the
smaller one is on top, because it would vanish below the larger one. Crowds are below all instances; those
of a class are one segment, because COCO's evaluation knows only one. The annotations of the instances are
written too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from tqdm import tqdm

# run as a script, Python searches only this folder
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets.coco_format import read_annotations
from datasets.coco_masks import mask_of
from datasets.convert.layout import WAYS, new_folder, write_split
from datasets.panoptic.format import Entry, Panoptic, describe, write_annotations, write_image
from datasets.respell import respell
from util.config import make_parser
from util.errors import UserError, run_as_command

EXAMPLE = "python tools/panoptic_from_instances.py --coco_path data/mine --output_dir data/mine_panoptic"


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    splits = [args.split]
    if args.split == "both":
        splits = ["train", "val"]
    sources = {split: Path(args.coco_path, "annotations", f"instances_{split}2017.json") for split in splits}
    truths = {split: read_annotations(path) for split, path in sources.items()}
    categories = panoptic_categories([truth.dataset for truth in truths.values()], args.stuff_name)

    folder = new_folder(args.output_dir)
    for split, truth in truths.items():
        # maps first: a mask that can't be used is found before all images are copied
        visible = write_maps(folder, split, truth, categories)
        images = Path(args.coco_path, f"{split}2017")
        respell(truth.dataset["images"], images)
        files = {image["file_name"]: images / image["file_name"] for image in truth.dataset["images"]}
        write_split(folder, split, truth.dataset, files, args.images)
        total = sum(not annotation["iscrowd"] for annotation in truth.dataset["annotations"])
        print(f"{folder}: {len(files)} images as {split}; {visible} of {total} instances are visible")


def panoptic_categories(contents: Sequence[dict[str, Any]], stuff_name: str) -> list[Entry]:
    """The categories of all splits as things, and one more for stuff with the next free id.

    Raises UserError if a category of this name exists.
    """
    # the splits may have different ones
    things = {category["id"]: category for content in contents for category in content["categories"]}
    if stuff_name in [category["name"] for category in things.values()]:
        raise UserError(f"--stuff_name {stuff_name!r} is a category of instances; choose another name")
    stuff = {"id": max(*things, 0) + 1, "name": stuff_name, "isthing": 0}
    return [*({**category, "isthing": 1} for category in things.values()), stuff]


def write_maps(folder: Path, split: str, truth: COCO, categories: Sequence[Entry]) -> int:
    """Write the maps and the JSON file of a split. Returns how many instances are visible."""
    maps = folder / "annotations" / f"panoptic_{split}2017"
    stuff_id, visible, annotations = categories[-1]["id"], 0, []
    try:
        maps.mkdir(parents=True)
        for image in tqdm(truth.dataset["images"], desc=split, unit="image", disable=None):
            panoptic = panoptic_of(image, truth, stuff_id)
            annotations.append(write_image(maps, image["id"], panoptic))
            for segment in panoptic.segments:
                visible += segment["category_id"] != stuff_id and not segment["iscrowd"]
        write_annotations(maps.with_suffix(".json"), truth.dataset["images"], categories, annotations)
    except OSError as error:
        raise UserError(f"{maps} can't be written ({error.strerror})") from None
    return visible


def panoptic_of(image: Entry, truth: COCO, stuff_id: int) -> Panoptic:
    """The instances of an image as segments, and the rest as one of the category `stuff_id`.

    Raises UserError for an instance without a usable mask.
    """
    annotations = truth.loadAnns(truth.getAnnIds(image["id"]))
    file, remedy = Path(image["file_name"]), "correct it in the annotations"
    masks = [mask_of(annotation, image, file, remedy) for annotation in annotations]
    # crowds, then the others, the largest first
    areas = [np.count_nonzero(mask) for mask in masks]
    order = sorted(range(len(masks)), key=lambda i: (not annotations[i]["iscrowd"], -areas[i]))
    ids = np.ones((image["height"], image["width"]), np.int32)
    categories = {1: stuff_id}
    crowds: dict[int, int] = {}  # by category
    for i in order:
        number, category = len(categories) + 1, annotations[i]["category_id"]
        if annotations[i]["iscrowd"]:
            number = crowds.setdefault(category, number)
        categories[number] = category
        ids[masks[i]] = number
    return describe(ids, categories, set(crowds.values()))


def parser() -> argparse.ArgumentParser:
    result = make_parser("tools/panoptic_from_instances.py", __doc__, EXAMPLE)
    add = result.add_argument
    add("--coco_path", default="data/coco", help="folder in COCO's layout, with masks")
    add("--split", default="both", choices=("train", "val", "both"), help="what to take of it")
    add("--stuff_name", default="background", help="name of the category of everything else")
    images = "copies of the images, hard links or symbolic links"
    add("--images", choices=WAYS, default="copy", help=images)
    add("--output_dir", required=True, help="folder to write; it must be empty or missing")
    return result


if __name__ == "__main__":
    run_as_command(main)
