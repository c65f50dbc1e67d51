"""Make one HTML page of one or several runs: curves, COCO's figures, classes, precision-recall
curves and the worst mistakes.

The page holds everything, needs no network, and opens from disk. Differences are to the run that is
named first. A run that is not done yet, or lacks files, works: the page says what is missing.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # a script sees only its own folder, not the project
from util.config import add_score_threshold_flag, make_parser
from util.errors import UserError, run_as_command

EXAMPLE = """\
  python tools/report.py exps/plain exps/batchformer --output report.html
"""


def get_parser() -> argparse.ArgumentParser:
    parser = make_parser("tools/report.py", __doc__, EXAMPLE)
    add = parser.add_argument
    add(
        "runs",
        type=Path,
        nargs="+",
        help="output folders of runs; the first is what the others are compared with",
    )
    add("--output", type=Path, default=Path("report.html"), help="page to write")
    add(
        "--annotations",
        type=Path,
        default=argparse.SUPPRESS,
        help="COCO JSON of the validation images (default: what the first run that knows it "
        "was evaluated on)",
    )
    add(
        "--images",
        type=Path,
        default=argparse.SUPPRESS,
        help="folder of the validation images (default: likewise)",
    )
    add(
        "--num_pictures",
        type=int,
        default=12,
        help="pictures of each kind of mistake and run, the worst first",
    )
    add_score_threshold_flag(parser, "count and show mistakes among detections of at least this score")
    return parser


def check(args: argparse.Namespace) -> None:
    if args.num_pictures < 0:
        raise UserError(f"--num_pictures {args.num_pictures} must not be negative")
    if args.output.is_dir():
        raise UserError(
            f"--output {args.output} is a folder; name a file in it, {args.output / 'report.html'} say"
        )


def main(argv: Sequence[str]) -> None:
    args = get_parser().parse_args(argv)
    check(args)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from tools.report_page.make import make_page  # torch, which takes seconds

    size = make_page(
        args.runs,
        args.output,
        annotations=getattr(args, "annotations", None),
        images=getattr(args, "images", None),
        num_pictures=args.num_pictures,
        threshold=args.score_threshold,
    )
    print(f"{args.output} ({size / 1e6:.1f} MB): open it in a browser")


if __name__ == "__main__":
    run_as_command(lambda: main(sys.argv[1:]))
