"""The formats that can be converted. A new one is a module with a reader, and an entry in FORMATS."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from datasets.convert.coco import has_json, is_coco, read_coco
from datasets.convert.layout import VAL_FRACTION, CocoSplit, split_randomly, to_coco
from datasets.convert.problems import Problems
from datasets.convert.voc import VocRules, is_voc, read_voc
from datasets.convert.yolo import is_darknet, is_yolo, read_yolo
from util.errors import UserError


class Format(NamedTuple):
    """A format of data sets.

    looks_like: whether a source is in this format. may_be: whether it is likely, if it does not
    look like any format. read: gives the splits "train" and, if the source has one, "val"; problems
    are collected. add_flags: adds the format's own flags, which `read` finds in the arguments.
    """

    name: str
    looks_like: Callable[[Path], bool]
    may_be: Callable[[Path], bool]
    read: Callable[[Path, argparse.Namespace, Problems], dict[str, CocoSplit]]
    add_flags: Callable[[argparse.ArgumentParser], None]


def _add_voc_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Pascal VOC only").add_argument
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
        help="list in ImageSets/Main for training (default: train, trainval or default)",
    )
    add(
        "--val_set",
        default="",
        help="list in ImageSets/Main for validation (default: val, or else test)",
    )


def _read_voc(source: Path, args: argparse.Namespace, problems: Problems) -> dict[str, CocoSplit]:
    # the flags of _add_voc_flags
    rules = VocRules(args.difficult, args.first_pixel, args.train_set, args.val_set)
    return to_coco(read_voc(source, rules, problems))


FORMATS = (
    Format("voc", is_voc, lambda source: False, _read_voc, _add_voc_flags),
    Format(
        "yolo",
        is_yolo,
        is_darknet,
        lambda source, args, problems: to_coco(read_yolo(source, problems)),
        lambda parser: None,
    ),
    Format(
        "coco",
        is_coco,
        has_json,  # the reader says what is wrong with the file
        lambda source, args, problems: read_coco(source, problems),
        lambda parser: None,
    ),
)


def format_of(source: Path) -> Format:
    """By what the source looks like. Raises UserError."""
    # weak signs count only where there is no clear one
    sure = [form for form in FORMATS if form.looks_like(source)]
    likely = sure or [form for form in FORMATS if form.may_be(source)]
    if not likely:
        raise UserError(
            f"{source} has no XML files, no data.yaml, obj.data or classes.txt and no COCO instances "
            "file: it is in neither of Pascal VOC's, YOLO's and COCO's formats"
        )
    if len(sure) > 1:
        names = " or --format ".join(form.name for form in sure)
        raise UserError(f"{source} has files of several formats; add --format {names}")
    return likely[0]


def read_source(args: argparse.Namespace, problems: Problems) -> dict[str, CocoSplit]:
    """The splits "train" and "val" of the source; without a validation split one is drawn at
    random. Raises UserError.
    """
    # read
    source = Path(args.source)
    if not source.exists():
        raise UserError(
            f"{source} does not exist; it must be a folder, a data.yaml, an obj.data or a COCO instances file"
        )
    # --format auto names none
    named = [form for form in FORMATS if form.name == args.format]
    form = named[0] if named else format_of(source)
    splits = form.read(source, args, problems)
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
