"""The command: python -m datasets.synthetic --output_dir data/synthetic --train_images 2000"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields

from datasets.synthetic.write import Settings, generate
from util.config import make_parser
from util.errors import UserError, run_as_command


def parser() -> argparse.ArgumentParser:
    """The flags: where to write, and one for each field of Settings."""
    result = make_parser(
        "-m datasets.synthetic",
        "Writes a synthetic detection data set of textured shapes in COCO's layout.",
        "python -m datasets.synthetic --output_dir data/shapes --train_images 200 --num_classes 3",
    )
    add = result.add_argument
    add("--output_dir", default="data/synthetic", help="folder of the data set")
    # what decides the files
    for item in fields(Settings):
        if isinstance(item.default, bool):
            add(f"--{item.name}", action="store_true", help=item.metadata["help"])
        else:
            add(f"--{item.name}", type=int, default=item.default, help=item.metadata["help"])
    # and what does not
    workers = min(os.cpu_count() or 1, 16)
    add("--workers", type=int, default=workers, help="processes; no effect on the files")
    add("--force", action="store_true", help="replace a synthetic data set that is there already")
    return result


def main(argv: Sequence[str]) -> None:
    """Do what the flags say. Raises UserError."""
    options = vars(parser().parse_args(argv))
    folder = options["output_dir"]
    try:
        written = generate(**options)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None
    if written:
        print(f"wrote {folder}")
    else:
        print(f"{folder} is there already with these settings; nothing to do")


if __name__ == "__main__":
    run_as_command(lambda: main(sys.argv[1:]))
