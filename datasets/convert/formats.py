"""The formats that can be converted. A new one is a module with a reader, and a name here."""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets.convert.coco import has_json, is_coco, read_coco
from datasets.convert.common import CocoSplit
from datasets.convert.layout import VAL_FRACTION, split_randomly
from datasets.convert.problems import Problems
from datasets.convert.voc import VocRules, is_voc, read_voc
from datasets.convert.voc_masks import is_voc_masks, read_voc_masks
from datasets.convert.yolo import is_darknet, is_yolo, read_yolo
from util.errors import UserError

# format -> whether a source is in it
FORMATS = {"voc": is_voc, "voc_masks": is_voc_masks, "yolo": is_yolo, "coco": is_coco}
# whether it is likely, if a source looks like no format; the reader says what is wrong with it
_MAY_BE = {"yolo": is_darknet, "coco": has_json}


def format_of(source: Path) -> str:
    """By what the source looks like. Raises UserError."""
    # weak signs count only where there is no clear one
    sure = [name for name, looks_like in FORMATS.items() if looks_like(source)]
    if len(sure) > 1:
        names = " or --format ".join(sure)
        raise UserError(f"{source} has files of several formats; add --format {names}")
    likely = sure or [name for name, may_be in _MAY_BE.items() if may_be(source)]
    if not likely:
        raise UserError(
            f"{source} has no XML files, no data.yaml, obj.data or classes.txt and no COCO instances "
            "file: it is in neither of Pascal VOC's, YOLO's and COCO's formats"
        )
    return likely[0]


def read_source(args: argparse.Namespace, problems: Problems) -> dict[str, CocoSplit]:
    """The splits "train" and "val" of the source; without a validation split one is drawn at
    random. Raises UserError.

    args: of tools/convert_dataset.py.
    """
    # read
    source = Path(args.source)
    if not source.exists():
        raise UserError(
            f"{source} does not exist; it must be a folder, a data.yaml, an obj.data or a COCO instances file"
        )
    name = args.format
    if name == "auto":
        name = format_of(source)
    if name in ("voc", "voc_masks"):
        rules = VocRules(args.difficult, args.first_pixel, args.train_set, args.val_set)
        splits = {"voc": read_voc, "voc_masks": read_voc_masks}[name](source, rules, problems)
    elif name == "yolo":
        splits = read_yolo(source, problems)
    else:
        splits = read_coco(source, problems, args.crowds)
    problems.stop_if_asked()

    # is there anything left?
    for split, (content, _) in splits.items():
        if not content["images"]:
            raise problems.nothing_left(f"{source} has no {split} images")
        if not content["categories"]:
            raise problems.nothing_left(f"{source} has no objects")

    # a validation split
    if "val" not in splits:
        return split_randomly(splits["train"], source, args.val_fraction or VAL_FRACTION, args.seed)
    if args.val_fraction is not None:
        raise UserError(
            f"--val_fraction {args.val_fraction}: {source} has a validation split already; leave the flag out"
        )
    return splits
