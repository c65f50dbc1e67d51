"""Find every fault of a data set before a run does: annotations, image files, and images in both
parts.

All flags of main.py are understood, so the command of a run serves with this tool's name in place
of main.py; those of the data are used. Prints what the data set holds and what is wrong with it,
each with its file and id.

Exit code: 0 without faults (warnings are none), 1 with faults, 2 for a mistake in the flags.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # run as a script, this folder would be searched instead

from datasets.preflight import (
    BOX_TOLERANCE,
    SIZE_LIMITS,
    Finding,
    Part,
    Summary,
    check_classes,
    check_files,
    check_objects,
    check_part,
    check_paths,
    summary,
)
from util.config import Config, make_parser, parse_with_config
from util.errors import UserError, run_as_command

EXIT_FAULTS = 1
EXAMPLE = "python tools/check_data.py --coco_path data/coco --report faults.json"


def main() -> None:
    args, config = parse_with_config(_parser(), None)
    config = replace(config, settled=True)  # no checkpoint has a say in the data
    for name in ("workers", "show", "box_tolerance"):
        if not getattr(args, name) >= 0:
            raise UserError(f"--{name} {getattr(args, name)} must not be negative")
    parts = check(config, args)
    summaries = {part.split: summary(part) for part in parts}
    findings = sorted((f for part in parts for f in part.findings), key=lambda f: (not f.is_fault, f.kind))
    print_tables(summaries)
    print_findings(findings, args.show)
    if args.report:
        write_report(Path(args.report), summaries, findings)
    if any(finding.is_fault for finding in findings):
        sys.exit(EXIT_FAULTS)


def check(config: Config, args: argparse.Namespace) -> list[Part]:
    """The training and the validation part of a Config, with all that was found."""
    data = config.data
    parts = []
    for split in ("train", "val"):
        print(f"reading {data.annotations_file(split)}", flush=True)
        parts.append(
            check_part(split, data.images_folder(split), data.annotations_file(split), args.box_tolerance)
        )
    check_classes(parts, data.num_classes)
    for part in parts:
        check_objects(part, config.transformer.num_queries)
    if args.no_images:
        check_paths(parts)
    else:
        workers = args.workers or os.cpu_count() or 1
        check_files(parts, whole=not args.headers_only, megapixels=data.max_image_megapixels, workers=workers)
    return parts


def print_tables(summaries: dict[str, Summary]) -> None:
    header = ("part", "images", "without object", "boxes", "crowds", "width", "height")
    rows = [
        [
            split,
            s.images,
            s.empty_images,
            s.boxes,
            s.crowds,
            "{}..{}..{}".format(*s.width),
            "{}..{}..{}".format(*s.height),
        ]
        for split, s in summaries.items()
    ]
    _print_table([header, *rows], texts=1)
    print("(width and height in pixels: smallest..median..largest)\n")

    of_split = [s.classes for s in summaries.values()]
    columns = ("boxes", *SIZE_LIMITS, "images")
    header = (
        "id",
        "class",
        *(f"{split} boxes" if name == "boxes" else name for split in summaries for name in columns),
    )
    rows = []
    for number in sorted({number for classes in of_split for number in classes}):
        name = next(classes[number]["name"] for classes in of_split if number in classes)
        rows.append(
            [
                str(number),
                name[:30],
                *(classes.get(number, {}).get(c, "-") for classes in of_split for c in columns),
            ]
        )
    _print_table([header, *rows], texts=2)
    print("(boxes aside from crowds; small: less than 32 x 32 pixels of area, medium: less than 96 x 96)\n")


def _print_table(rows: Sequence[Sequence[Any]], texts: int) -> None:
    """The first row is the header; the first `texts` columns are flush left."""
    cells = [[f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        aligned = (
            cell.ljust(w) if i < texts else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(aligned))


def print_findings(findings: Sequence[Finding], show: int) -> None:
    """Faults, then warnings, by kind; `show` of each kind, 0: all."""
    for (is_warning, kind), group in groupby(findings, key=lambda f: (not f.is_fault, f.kind)):
        found = list(group)
        print(f"{'warning' if is_warning else 'fault'}: {kind} ({len(found)})")
        for finding in found[: show or None]:
            print(f"  {finding.message}")
        if show and len(found) > show:
            print(f"  ... and {len(found) - show} more (--show 0 shows all)")
    faults = sum(finding.is_fault for finding in findings)
    print(f"faults: {faults}, warnings: {len(findings) - faults}")


def write_report(path: Path, summaries: dict[str, Summary], findings: Sequence[Finding]) -> None:
    faults = sum(finding.is_fault for finding in findings)
    content = {
        "faults": faults,
        "warnings": len(findings) - faults,
        "parts": {split: s._asdict() for split, s in summaries.items()},
        "findings": [asdict(finding) for finding in findings],
    }
    try:
        path.write_text(json.dumps(content, indent=1))
    except OSError as error:
        raise UserError(f"--report {path} can't be written ({error.strerror}); choose another file") from None


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("tools/check_data.py", __doc__, EXAMPLE)
    own = parser.add_argument_group("this tool's own")
    aside = own.add_mutually_exclusive_group()
    aside.add_argument(
        "--no_images", action="store_true", help="check the annotations alone, and open no image"
    )
    aside.add_argument(
        "--headers_only", action="store_true", help="read the sizes of the images, and do not decode them"
    )
    own.add_argument(
        "--workers", type=int, default=0, help="processes that read images; 0: one for each core"
    )
    own.add_argument(
        "--box_tolerance", type=float, default=BOX_TOLERANCE, help="pixels by which a box may leave its image"
    )
    own.add_argument("--show", type=int, default=20, help="lines to print of each kind of fault; 0: all")
    own.add_argument(
        "--report", default="", help="JSON file to write: counts, and every fault with kind, file and ids"
    )
    return parser


if __name__ == "__main__":
    run_as_command(main)
