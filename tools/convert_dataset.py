"""Convert a data set in Pascal VOC's, YOLO's or COCO's format to the layout of folders that
--coco_path takes.

SOURCE is one of: a folder of Pascal VOC (JPEGImages, Annotations, ImageSets/Main) or any folder of
images with an XML file of the same name each; a data.yaml of Ultralytics or Darknet's obj.data, or
the folder with it; a folder with classes.txt, images and labels; a COCO instances file with its
images beside it or below, or a folder with one, or with one for each split. A source that does not
say which images are for validation is split at random. Images are linked; the source is not
changed. Outlines and masks are converted too, for --masks.

Give the folder of an export as it was unpacked, images included:

  tool            writes                                   what is used
  CVAT            COCO: annotations/instances_<split>.json splits by name; subfolders of images
                  Segmentation mask: SegmentationObject    masks, and boxes around them; labelmap.txt
                  VOC: ImageSets/Main/<subset>.txt         train, val, test; default is split
                  YOLO 1.1: obj.data, obj.names, lists     lists with or without data/ before the paths
                  Ultralytics YOLO: data.yaml, lists       the same
  Label Studio    COCO: result.json                        names with backslashes, addresses, upload prefixes
                  YOLO: classes.txt, notes.json            classes.txt
  Roboflow        COCO: <split>/_annotations.coco.json     train and valid, or test without valid
                  YOLO: data.yaml with ../train/images     the folders beside data.yaml
  labelme2coco    annotations.json, JPEGImages             names with backslashes, absolute names
  COCO            annotations of several kinds             the instances files

Only files of the given folder are used. A name that is not there as written is searched in another
spelling (letter case, Unicode form, backslashes, %20), then by the end of its path, and last by its
bare name, if there is only one such file and it has the annotated size. The command prints how many
files it found in each of these ways.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# a script sees only its own folder, not the project
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.convert.common import CocoSplit
from datasets.convert.formats import FORMATS, read_source
from datasets.convert.layout import VAL_FRACTION, WAYS, new_folder, write_split
from datasets.convert.masks import masks_line
from datasets.convert.problems import Problems
from util.config import make_parser
from util.errors import UserError, run_as_command

EXAMPLE = "python tools/convert_dataset.py VOCdevkit/VOC2012 --output_dir data/voc2012"
_MOST_LINES = 20


def main(argv: Sequence[str]) -> None:
    """Do what the flags say. Raises UserError."""
    # nothing is written before everything has been read
    args = parser().parse_args(argv)
    if args.val_fraction is not None and not 0 < args.val_fraction < 1:
        raise UserError(f"--val_fraction {args.val_fraction} must lie between 0 and 1")
    folder = new_folder(args.output_dir)
    problems = Problems(args.on_bad)
    splits = read_source(args, problems)
    for split, (content, files) in splits.items():
        write_split(folder, split, content, files, args.images)
    print_summary(folder, splits, problems)


def print_summary(folder: Path, splits: dict[str, CocoSplit], problems: Problems) -> None:
    """What was written, what was done to it and what was left out."""
    # details
    count = len(problems.messages)
    for message in problems.messages[:_MOST_LINES]:
        print(f"left out: {message}")
    if count > _MOST_LINES:
        print(f"left out: {count - _MOST_LINES} more")
    for note, times in (+problems.notes).items():
        print(f"{note}: {times}")
    for split, (content, _) in splits.items():
        print(f"{split}: {len(content['images'])} images with {len(content['annotations'])} objects")

    if line := masks_line(split.content for split in splits.values()):
        print(line)

    # the closing line
    left_out = "no problems"
    if count:
        left_out = f"left out by --on_bad {problems.on_bad}: {count} ({problems.counted()})"
    classes = len(splits["train"].content["categories"])
    check = f"python tools/check_data.py --coco_path {folder}"
    print(f"{folder}: {classes} classes; {left_out}; next: {check}")


def parser() -> argparse.ArgumentParser:
    result = make_parser("tools/convert_dataset.py", __doc__, EXAMPLE)
    add = result.add_argument
    add("source", help="folder, data.yaml, obj.data or instances file to convert")
    add("--output_dir", required=True, help="folder to write; it must be empty or not exist")
    add("--format", choices=("auto", *FORMATS), default="auto", help="format of the source")
    add(
        "--images",
        choices=WAYS,
        default="link",
        help="hard links (copies where the disk is another one), symbolic links, or copies of the images",
    )
    # a problem is never left out without being asked for
    add(
        "--on_bad",
        choices=("stop", "clip", "skip"),
        default="stop",
        help="at a broken file, a wrong entry, an unknown class or a box outside of its image: stop; "
        "leave it out and count it (skip); or cut boxes that reach out of their image and leave out "
        "the rest (clip)",
    )
    add(
        "--val_fraction",
        type=float,
        help="share of the images for validation where the source does not say which "
        f"(default: {VAL_FRACTION})",
    )
    # the same images for the same seed
    add("--seed", type=int, default=42, help="seed of that split")
    add = result.add_argument_group("COCO only").add_argument
    add(
        "--crowds",
        choices=("keep", "objects"),
        default="keep",
        help="objects with iscrowd 1, which neither train nor count: keep them so, or make them "
        "ordinary objects, as CVAT's brush masks are",
    )
    # what its files do not say
    add = result.add_argument_group("Pascal VOC only").add_argument
    add(
        "--difficult",
        choices=("crowd", "keep", "drop"),
        default="crowd",
        help="objects marked so: crowd regions, which count neither in training nor, found or not, "
        "in evaluation, as in VOC's own; ordinary objects; or none",
    )
    add(
        "--first_pixel",
        type=int,
        choices=(0, 1),
        default=1,
        help="number of the first column and row of an image",
    )
    add(
        "--train_set",
        default="",
        help="list in ImageSets/Main (of masks: ImageSets/Segmentation) for training "
        "(default: train, trainval or default)",
    )
    add(
        "--val_set",
        default="",
        help="list in ImageSets/Main for validation (default: val, or else test)",
    )
    return result


if __name__ == "__main__":
    run_as_command(lambda: main(sys.argv[1:]))
