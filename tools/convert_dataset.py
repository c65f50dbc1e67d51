"""Convert a data set in Pascal VOC's, YOLO's or COCO's format to the layout of folders that
--coco_path takes.

SOURCE is one of: a folder of Pascal VOC (JPEGImages, Annotations, ImageSets/Main) or any folder of
images with an XML file of the same name each; a data.yaml of Ultralytics or Darknet's obj.data, or
the folder with it; a folder with classes.txt, images and labels; a COCO instances file with its
images beside it or below, or a folder with one, or with one for each part. A source that does not
say which images are for validation is split at random. Images are linked, and nothing of the source
is changed.

Give the folder of an export as it was unpacked, images included:

  tool            writes                                   taken
  CVAT            COCO: annotations/instances_<part>.json  parts by name; subfolders of images
                  VOC: ImageSets/Main/<subset>.txt         train, val, test; default is split
                  YOLO 1.1: obj.data, obj.names, lists     lists with or without data/ before the paths
                  Ultralytics YOLO: data.yaml, lists       the same
  Label Studio    COCO: result.json                        \\ in names, addresses, upload paths and
  prefixes
                  YOLO: classes.txt, notes.json            classes.txt
  Roboflow        COCO: <part>/_annotations.coco.json      train and valid, or test without valid
                  YOLO: data.yaml with ../train/images     the folders beside data.yaml
  labelme2coco    annotations.json, JPEGImages             \\ in names, absolute names
  COCO            annotations of several kinds             the instances files

Names lead to files of the folder given only. One that is not there as written is looked for in
another spelling (letter case, Unicode form, backslashes, %20), by the end of its path, and last by
its bare name, if it is the only one and of the annotated size. The number of files that were found
so is printed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # run as a script, this folder would be searched instead

from datasets.convert.coco import has_json, is_coco, read_coco
from datasets.convert.common import VAL_FRACTION, Faults, Labelled, split_off, to_coco
from datasets.convert.layout import WAYS, Part, new_folder, write_part
from datasets.convert.voc import VocRules, is_voc, read_voc
from datasets.convert.yolo import is_darknet, is_yolo, read_yolo
from datasets.file_names import is_left_behind
from util.config import make_parser
from util.errors import UserError, run_as_command

EXAMPLE = "python tools/convert_dataset.py VOCdevkit/VOC2012 --output_dir data/voc2012"
_MOST_LINES = 20


def main() -> None:
    args = _parser().parse_args()
    if args.val_fraction is not None and not 0 < args.val_fraction < 1:
        raise UserError(f"--val_fraction {args.val_fraction} must lie between 0 and 1")
    folder = new_folder(args.output_dir)
    faults = Faults(args.on_bad)
    parts = read(args, faults)
    for part, (content, files) in parts.items():
        write_part(folder, part, content, files, args.images)
    tell(folder, parts, faults)


def read(args: argparse.Namespace, faults: Faults) -> dict[str, Part]:
    """The parts of the source. Raises UserError."""
    source = Path(args.source)
    if not source.exists():
        raise UserError(
            f"{source} does not exist; it must be a folder, a data.yaml, an obj.data or a COCO instances file"
        )
    source = _unpacked(source)
    source_format = args.format if args.format != "auto" else format_of(source)
    if source_format == "coco":
        return read_coco(source, args.val_fraction, args.seed, faults)
    if source_format == "yolo":
        return parted(read_yolo(source, faults), args, faults)
    rules = VocRules(args.difficult, args.first_pixel, args.train_set, args.val_set)
    return parted(read_voc(source, rules, faults), args, faults)


def _unpacked(source: Path) -> Path:
    """Of a folder that holds but another one with a data.yaml or the like, as archives do, the
    inner one.
    """
    inside = [path for path in source.iterdir() if not is_left_behind(path.name)] if source.is_dir() else []
    alone = len(inside) == 1 and inside[0].is_dir()
    return inside[0] if alone and (is_yolo(inside[0]) or is_darknet(inside[0])) else source


def format_of(source: Path) -> str:
    """By what the source looks like. Raises UserError."""
    looks = [name for name, fits in (("voc", is_voc), ("yolo", is_yolo), ("coco", is_coco)) if fits(source)]
    if not looks and is_darknet(source):
        return "yolo"
    if not looks and has_json(source):
        return "coco"  # read_coco says what is wrong with the file
    if not looks:
        raise UserError(
            f"{source} has no XML files, no data.yaml, obj.data or classes.txt and no COCO "
            f"instances file: it is in neither of "
            "Pascal VOC's, YOLO's and COCO's formats"
        )
    if len(looks) > 1:
        raise UserError(f"{source} has files of several formats; add --format {' or --format '.join(looks)}")
    return looks[0]


def parted(data: Labelled, args: argparse.Namespace, faults: Faults) -> dict[str, Part]:
    """The parts of `data` in COCO's format; without a validation part one is drawn. Raises
    UserError.
    """
    empty = [part for part, images in data.parts.items() if not images]
    if empty or not data.names:
        raise faults.nothing_left(f"{args.source} has no {f'{empty[0]} images' if empty else 'objects'}")
    if "val" not in data.parts:
        split_off(data, args.val_fraction or VAL_FRACTION, args.seed)
    elif args.val_fraction is not None:
        raise UserError(
            f"--val_fraction {args.val_fraction}: {args.source} has a validation part already; "
            f"leave the flag out"
        )
    files = {part: {image.name: image.path for image in images} for part, images in data.parts.items()}
    return {part: Part(content, files[part]) for part, content in to_coco(data).items()}


def tell(folder: Path, parts: dict[str, Part], faults: Faults) -> None:
    """What was written, what was done to it and what was left out."""
    for message in faults.messages[:_MOST_LINES]:
        print(f"left out: {message}")
    if len(faults.messages) > _MOST_LINES:
        print(f"left out: {len(faults.messages) - _MOST_LINES} more")
    for note, count in faults.notes.items():
        if count:
            print(f"{note}: {count}")
    for part, (content, _) in parts.items():
        print(f"{part}: {len(content['images'])} images with {len(content['annotations'])} objects")
    left_out = (
        f"{len(faults.messages)} ({faults.counted()})"
        if faults.kinds.keys() - {"other"}
        else len(faults.messages)
    )
    print(
        f"{folder}: {len(parts['train'].content['categories'])} classes; left out by --on_bad: "
        f"{left_out}; next: python tools/check_data.py --coco_path {folder}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("tools/convert_dataset.py", __doc__, EXAMPLE)
    parser.add_argument("source", help="folder, data.yaml, obj.data or instances file to convert")
    parser.add_argument("--output_dir", required=True, help="folder to write; it must not hold anything yet")
    parser.add_argument(
        "--format", choices=("auto", "voc", "yolo", "coco"), default="auto", help="format of the source"
    )
    parser.add_argument(
        "--images",
        choices=WAYS,
        default="link",
        help="hard links (copies where the disk is another one), symbolic links, or copies of the images",
    )
    parser.add_argument(
        "--on_bad",
        choices=("stop", "clip", "skip"),
        default="stop",
        help="at a broken file, a wrong entry, an unknown class or a box outside of its "
        "image: stop; leave it out and count it "
        "(skip); or cut boxes that reach out of their image and leave out the rest (clip)",
    )
    parser.add_argument(
        "--val_fraction",
        type=float,
        help="share of the images for validation where the source does not say which "
        f"(default: {VAL_FRACTION})",
    )
    parser.add_argument("--seed", type=int, default=42, help="seed of that split")
    voc = parser.add_argument_group("Pascal VOC only")
    voc.add_argument(
        "--difficult",
        choices=("crowd", "keep", "drop"),
        default="crowd",
        help="objects marked so: crowd regions, which count neither in training nor, found "
        "or not, in evaluation, as in VOC's "
        "own; ordinary objects; or none",
    )
    voc.add_argument(
        "--first_pixel",
        type=int,
        choices=(0, 1),
        default=1,
        help="number of the first column and row of an image",
    )
    voc.add_argument(
        "--train_set",
        default="",
        help="list in ImageSets/Main for training (default: train, trainval or default)",
    )
    voc.add_argument(
        "--val_set", default="", help="list in ImageSets/Main for validation (default: val, or else test)"
    )
    return parser


if __name__ == "__main__":
    run_as_command(main)
