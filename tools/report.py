"""Make one HTML page of one or several runs: curves, COCO's metrics, classes, precision-recall
curves and the worst mistakes.

The page contains everything, works offline, and opens from disk. Differences are to the run that is
named first. A run that is not finished, or whose files are incomplete, works: the page says what is
missing.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

# a script sees only its own folder, not the project
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from util.config import add_score_threshold_flag, make_parser
from util.errors import UserError, run_as_command

EXAMPLE = """\
  python tools/report.py exps/plain exps/batchformer --output report.html
"""


def parser() -> argparse.ArgumentParser:
    made = make_parser("tools/report.py", __doc__, EXAMPLE)
    add = made.add_argument
    runs = "output folders of runs; the others are compared with the first"
    add("runs", type=Path, nargs="+", help=runs)
    add("--output", type=Path, default=Path("report.html"), help="page to write")
    truth = "COCO JSON of the validation images (default: that of the first run which names it)"
    add("--annotations", type=Path, help=truth)
    add("--images", type=Path, help="folder of the validation images (default: likewise)")
    pictures = "pictures of each kind of mistake and run, the worst first"
    add("--num_pictures", type=int, default=12, help=pictures)
    add_score_threshold_flag(made, "count and show mistakes among detections of at least this score")
    return made


def main(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)

    # before anything is read, which may take minutes
    if args.num_pictures < 0:
        raise UserError(f"--num_pictures {args.num_pictures} must not be negative")
    if args.output.is_dir():
        example = args.output / "report.html"
        raise UserError(f"--output {args.output} is a folder; name a file in it, {example} say")
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    from tools.report_page.make import make_page  # imports torch, which takes seconds

    size = make_page(
        args.runs,
        args.output,
        annotations=args.annotations,
        images=args.images,
        num_pictures=args.num_pictures,
        threshold=args.score_threshold,
    )
    print(f"{args.output} ({size / 1e6:.1f} MB): open it in a browser")


if __name__ == "__main__":
    run_as_command(lambda: main(sys.argv[1:]))
