"""Make a smaller data set from a COCO-format one: some classes, or some images to overfit on.

With --split both, each split is taken from its own. With train or val, the images of that split
become both the training and the validation set, to see whether the model has learnt them. Ids of
images, objects and categories do not change.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# run as a script, Python searches only this folder
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets.coco_format import read_annotations, restrict
from datasets.convert.layout import WAYS, write_split
from datasets.respell import respell
from util.config import make_parser
from util.errors import UserError, run_as_command

EXAMPLE = "python tools/subset_coco.py --split both --classes person car dog --output_dir data/coco3"


def main() -> None:
    args = _parser().parse_args()
    source, folder = Path(args.coco_path), Path(args.output_dir)
    if folder.resolve() == source.resolve():
        raise UserError(f"--output_dir {folder} is the source itself; name another folder")

    # splits to write, by the split that they are taken from
    written = {args.split: ["train", "val"]}
    if args.split == "both":
        written = {"train": ["train"], "val": ["val"]}
    for split, names in written.items():
        content = read_annotations(source / "annotations" / f"instances_{split}2017.json").dataset
        images = source / f"{split}2017"
        respell(content["images"], images)
        subset = cut(content, args)
        files = {image["file_name"]: images / image["file_name"] for image in subset["images"]}
        for name in names:
            write_split(folder, name, subset, files, args.images)
        what = f"{len(files)} images with {len(subset['annotations'])} objects"
        print(f"{folder}: {what} of {len(subset['categories'])} classes as {' and '.join(names)}")


def cut(content: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """What the flags leave of annotations. Raises UserError if they can't be satisfied."""
    # classes first, because the other flags count only objects of these
    if args.classes:
        content = with_classes(content, args.classes)
    if args.num_images:
        return restrict(content, choose_images(content, args.num_images, args.max_objects))
    if args.drop_empty:
        return restrict(content, {annotation["image_id"] for annotation in content["annotations"]})
    return content


def with_classes(content: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """All images, with only the categories of these names. Raises UserError for an unknown name."""
    known = {category["name"]: category["id"] for category in content["categories"]}
    for name in names:
        if name not in known:
            raise UserError(f"--classes {name!r} is no category; there are {', '.join(list(known)[:100])}")
    ids = {known[name] for name in names}
    return content | {
        "annotations": [entry for entry in content["annotations"] if entry["category_id"] in ids],
        "categories": [category for category in content["categories"] if category["id"] in ids],
    }


def choose_images(content: dict[str, Any], count: int, max_objects: int) -> set[int]:
    """The first `count` ids of images that have between 1 and `max_objects` objects.

    Raises UserError if there are fewer.
    """
    # images without objects are not counted at all
    objects = Counter(annotation["image_id"] for annotation in content["annotations"])
    fitting = sorted(number for number, found in objects.items() if found <= max_objects)
    if len(fitting) < count:
        raise UserError(
            f"only {len(fitting)} images have 1 to {max_objects} objects; lower --num_images or "
            f"raise --max_objects"
        )
    return set(fitting[:count])


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("tools/subset_coco.py", __doc__, EXAMPLE)
    # which data, what of it, and where to
    add = parser.add_argument
    add("--coco_path", default="data/coco", help="folder in COCO's layout")
    add("--split", default="train", choices=("train", "val", "both"), help="split to take the images from")
    add("--classes", nargs="+", default=[], metavar="NAME", help="keep objects of these classes only")
    add("--drop_empty", action="store_true", help="leave out images in which no object is left")
    num_images = "so many images with objects, the first by id; 0: all images"
    add("--num_images", type=int, default=0, help=num_images)
    max_objects = "with --num_images: pass over images with more objects"
    add("--max_objects", type=int, default=12, help=max_objects)
    images = "copies of the images, hard links or symbolic links"
    add("--images", choices=WAYS, default="copy", help=images)
    add("--output_dir", required=True, help="folder to write")
    return parser


if __name__ == "__main__":
    run_as_command(main)
