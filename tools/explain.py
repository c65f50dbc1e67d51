"""Show what a detector looks at.

attention: the sampling points and weights of a detection or query (decoder), or of a pixel
(encoder), over the image. Written are pictures <image>_<what>_<part><layer>.

batchformer: how BatchFormerV2 relates the images of a batch in training: which attend to which at
chosen positions (positions_layer<i>), how much every position looks at other images
(others_layer<i>), and what the plain and the mixed stream detect (streams).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# a script sees only its own folder, not the project
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from util.config import add_detector_flags, add_score_threshold_flag, add_weights_flag, make_parser
from util.errors import UserError, run_as_command

ATTENTION_EXAMPLE = """\
  python tools/explain.py attention --resume exps/run/checkpoint.pth street.jpg --output_dir out
  python tools/explain.py attention --resume exps/run/checkpoint.pth street.jpg --output_dir out \\
      --pixel 320 180 --level 0 1
"""
BATCHFORMER_EXAMPLE = """\
  python tools/explain.py batchformer --resume exps/run/checkpoint.pth a.jpg b.jpg c.jpg --output_dir out \\
      --position 0.5 0.5
"""
EXAMPLE = """\
  python tools/explain.py attention --help
  python tools/explain.py attention --resume exps/run/checkpoint.pth street.jpg --output_dir out
  python tools/explain.py batchformer --resume exps/run/checkpoint.pth a.jpg b.jpg c.jpg --output_dir out
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Do what the flags say. Raises UserError."""
    args = _parser().parse_args(argv)
    # here, because --help needs no torch
    if args.command == "attention":
        from tools.explained.attention import explain_attention as explain
    else:
        from tools.explained.batchformer import explain_batchformer as explain
    try:
        written = explain(args)
    except OSError as error:
        raise UserError(
            f"{error.filename or args.output_dir} can't be written ({error.strerror or error})"
        ) from None
    print(f"{', '.join(path.name for path in written)} in {args.output_dir}")


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("tools/explain.py", __doc__, EXAMPLE)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{attention,batchformer}")

    # both have the same order: what is shown, files, and what a checkpoint does not say
    text = "sampling points and weights over an image"
    about = f"{text.capitalize()}."
    command = commands.add_parser("attention", help=text, description=about, example=ATTENTION_EXAMPLE)
    command.add_argument("image", type=Path, help="a picture")
    _add_common(command)
    _add_attention(command)
    add_detector_flags(command)

    # several images: a batch as in training
    text = "attention across a batch, and both streams"
    about = f"{text.capitalize()}."
    command = commands.add_parser("batchformer", help=text, description=about, example=BATCHFORMER_EXAMPLE)
    add = command.add_argument
    add("images", type=Path, nargs="+", help="the pictures of one batch, in its order")
    _add_common(command)
    text = (
        "a position in [0, 1] of the padded batch's width and height; repeatable; "
        "default: 0.25 0.25, 0.5 0.5 and 0.75 0.75"
    )
    add("--position", type=float, nargs=2, action="append", metavar=("X", "Y"), help=text)
    text = "levels whose tokens at the positions are shown; 0 is the finest"
    add("--level", type=int, nargs="+", default=[0], help=text)
    add_score_threshold_flag(command, "leave out detections that score less")
    add_detector_flags(command)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "the checkpoint, published or ours: a path or an https address"
    add("--resume", required=True, help=text)
    add("--output_dir", type=Path, required=True, help="folder to write")
    add("--format", default="png", choices=("png", "jpg"), help="of the pictures; jpg is smaller")
    add("--device", default="", help="cuda, cpu, cuda:1, mps; default: cuda where there is one, else cpu")
    add_weights_flag(parser)


def _add_attention(parser: argparse.ArgumentParser) -> None:
    # what is explained
    add = parser.add_mutually_exclusive_group().add_argument
    text = "detections by rank, 0 is the best; default: the best 3"
    add("--detection", type=int, nargs="+", help=text)
    add("--query", type=int, nargs="+", help="decoder queries by number, from 0")
    text = "the encoder's tokens at this pixel of the picture"
    add("--pixel", type=float, nargs=2, metavar=("X", "Y"), help=text)

    # and which parts of it
    add = parser.add_argument
    text = "with --pixel: the levels whose tokens are shown; 0 is the finest"
    add("--level", type=int, nargs="+", default=[0], help=text)
    text = "decoder layers (with --pixel encoder layers), from 0; default: the last"
    add("--layer", type=int, nargs="+", help=text)
    add("--head", type=int, nargs="+", help="draw the points of these heads alone, from 0; default: all")


if __name__ == "__main__":
    run_as_command(main)
