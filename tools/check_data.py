"""Find every problem of a data set before a run does: annotations, image files, and images in both
splits.

All flags of main.py are understood, so the command of a run serves with this tool's name in place
of main.py; those of the data and --masks are used. Prints what the data set holds and what is wrong with it,
each with its file and id.

Exit code: 0 without problems (warnings do not count), 1 with problems, 2 for a mistake in the flags.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

# run as a script, Python searches only this folder
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets.preflight.annotations import (
    CheckedSplit,
    check_annotations,
    check_classes,
    check_objects,
    check_unused,
)
from datasets.preflight.boxes import BOX_TOLERANCE
from datasets.preflight.files import check_files, check_paths
from datasets.preflight.report import class_table, problem_lines, split_table, summary, write_report
from util.config import Config, make_parser, parse_with_config
from util.errors import UserError, run_as_command

EXIT_PROBLEMS = 1
EXAMPLE = "python tools/check_data.py --coco_path data/coco --report problems.json"


def main() -> None:
    # flags
    args, config = parse_with_config(_parser(), None)
    config = replace(config, settled=True)  # no checkpoint decides about the data
    for name in ("workers", "show", "box_tolerance"):
        value = getattr(args, name)
        if not value >= 0:  # NaN too
            raise UserError(f"--{name} {value} must not be negative")

    # check, then print and write what was found
    splits = check(config, args)
    summaries = {split.name: summary(split) for split in splits}
    problems = [problem for split in splits for problem in split.problems]
    print(split_table(summaries))
    print("(width and height in pixels: smallest..median..largest)\n")
    print(class_table(summaries))
    print("(boxes without crowds; small: less than 32 x 32 pixels of area, medium: less than 96 x 96)\n")
    print("\n".join(problem_lines(problems, args.show)))
    if args.report:
        write_report(Path(args.report), summaries, problems)
    if not all(problem.is_warning for problem in problems):
        sys.exit(EXIT_PROBLEMS)


def check(config: Config, args: argparse.Namespace) -> list[CheckedSplit]:
    """The training and the validation split of a Config, with all problems that were found."""
    data = config.data
    splits = []
    for name in ("train", "val"):
        annotations = data.annotations_file(name)
        print(f"reading {annotations}", flush=True)
        where = (name, data.images_folder(name), annotations)
        masks = config.segmentation.masks
        splits.append(check_annotations(*where, args.box_tolerance, masks=masks))
    check_classes(splits, data.num_classes)
    check_unused(splits)
    for split in splits:
        check_objects(split, config.transformer.num_queries)
    if args.no_images:
        check_paths(splits)
    else:
        workers = args.workers or os.cpu_count() or 1
        whole = not args.headers_only
        check_files(splits, whole=whole, megapixels=data.max_image_megapixels, workers=workers)
    return splits


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("tools/check_data.py", __doc__, EXAMPLE)
    own = parser.add_argument_group("this tool's own")
    add = own.add_argument
    images = own.add_mutually_exclusive_group().add_argument
    images("--no_images", action="store_true", help="check the annotations alone, and open no image")
    images("--headers_only", action="store_true", help="read the sizes of the images, and do not decode them")
    add("--workers", type=int, default=0, help="processes that read images; 0: one for each core")
    outside = "pixels by which a box may leave its image"
    add("--box_tolerance", type=float, default=BOX_TOLERANCE, help=outside)
    add("--show", type=int, default=20, help="lines to print of each kind of problem; 0: all")
    report = "JSON file to write: counts, and every problem with kind, file and ids"
    add("--report", default="", help=report)
    return parser


if __name__ == "__main__":
    run_as_command(main)
